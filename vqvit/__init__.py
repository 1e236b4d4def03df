"""vqvit: integer inference for Vision Transformers.

Where PyTorch is not installed, or VQVIT_TORCH=0 is set, this is `vqvit.serving` alone, which does without it. The
command line imports PyTorch where a command needs it, so that its help is there at once.
"""

import importlib as _importlib
import importlib.util as _util
import os as _os
import signal as _signal
import sys as _sys
from pathlib import Path as _Path

__version__ = "0.1.0"

_checkout = _Path(__file__).resolve().parents[1]
if (_checkout / "kernels" / "quantize.py").is_file() and not (_Path(__path__[0]) / "kernels").is_dir():
    __path__.append(str(_checkout))  # a source checkout keeps vqvit.kernels beside the package, see setup.py

_has_torch = _os.environ.get("VQVIT_TORCH") != "0" and _util.find_spec("torch") is not None


def _runs_command() -> bool:
    """Whether this process is `vqvit ...` or `python -m vqvit ...`."""
    after_m = dict(zip(_sys.orig_argv, _sys.orig_argv[1:], strict=False)).get("-m", "")
    program = _Path(_sys.argv[0] if _sys.argv else "").name
    return program in ("vqvit", "vqvit.exe") or (program == "-m" and after_m in ("vqvit", "vqvit.cli"))


_LAZY = ("data", "progressive", "qat", "runtime", "sensitivity", "serving")
"""Public modules that are imported where they are first used."""

__all__ = ["serving"]
if _runs_command():
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # Ctrl-C while modules are imported ends without a traceback
elif _has_torch:
    from vqvit._public import *
    from vqvit._public import __all__


def _heed_interrupts() -> None:
    """Of the command line: PyTorch is imported, and from here on Ctrl-C is an exception, so that files stay whole."""
    if _signal.getsignal(_signal.SIGINT) is _signal.SIG_DFL:
        _importlib.import_module("torch")
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def __getattr__(name: str):
    if name in _LAZY:
        return _importlib.import_module(f"vqvit.{name}")
    if _has_torch and not name.startswith("_") and _util.find_spec(f"vqvit.{name}") is None:
        public = _importlib.import_module("vqvit._public")
        if name in public.__all__:
            return getattr(public, name)
    raise AttributeError(f"module 'vqvit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY})
