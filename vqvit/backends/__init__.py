"""Which implementation of an op runs: `reference` (torch, any device), `cpu` (C++), `triton`, `cuda` (C++).

A backend is a module with one function per op, named and parameterised like `vqvit.reference`; `unavailable()`, which
returns None or the reason why it cannot run; and `device_types()`, whose tensors it takes. The choice per device is
automatic, logged once, and can be forced. The forced backend is process-wide state, like `torch.set_num_threads`.
"""

import importlib
import logging
from types import ModuleType

import torch

from vqvit import reference

logger = logging.getLogger("vqvit")

NAMES = ("reference", "cpu", "triton", "cuda")

PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
"""Backends tried for tensors of a device type, best first; other devices run the reference."""

_modules: dict[str, ModuleType] = {"reference": reference}
_forced: str | None = None
_automatic: dict[str, str] = {}


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run on this machine."""


class backend:  # noqa: N801  (used like a function: vqvit.backend("cpu"))
    """Force a backend for every op: `vqvit.backend("reference")`, or `with vqvit.backend("cpu"): ...` for a while.

    `None` returns to the automatic choice. Raises `ValueError` for an unknown name and `BackendUnavailableError`
    for one that cannot run here.
    """

    def __init__(self, name: str | None):
        global _forced
        if name is not None and name not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)} or None; got {name!r}")
        if name is not None and (reason := unavailable(name)):
            raise BackendUnavailableError(f"backend {name!r} was asked for but cannot run here: {reason}")
        self._previous, _forced = _forced, name

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._previous


def unavailable(name: str) -> str | None:
    """Why backend `name` cannot run on this machine, or None if it can."""
    if name == "reference":
        return None
    return _module(name).unavailable()


def device_types(name: str) -> tuple[str, ...]:
    """Device types whose tensors backend `name` takes; empty for any."""
    return () if name == "reference" else _module(name).device_types()


def selected(device: torch.device) -> str:
    """Name of the backend that ops on tensors of `device` run now.

    Raises `ValueError` if the forced backend does not take tensors of that device.
    """
    if _forced is not None:
        accepted = device_types(_forced)
        if accepted and device.type not in accepted:
            raise ValueError(f"backend {_forced!r}: expected tensors on {' or '.join(accepted)}; got {device.type}")
        return _forced
    if device.type not in _automatic:
        _automatic[device.type] = _choose(device.type)
    return _automatic[device.type]


def function(op: str, device: torch.device):
    """The selected backend's implementation of `op` for tensors of `device`."""
    return getattr(_module(selected(device)), op)


def _choose(device_type: str) -> str:
    reasons = []
    for name in PREFERENCE.get(device_type, ("reference",)):
        reason = unavailable(name)
        if reason is None:
            level = logging.WARNING if reasons else logging.INFO
            logger.log(level, "%s tensors run on backend %r%s", device_type, name, "".join(reasons))
            return name
        reasons.append(f"; {name!r} cannot run: {reason}")
    raise AssertionError("the reference backend is always available")


def _module(name: str) -> ModuleType:
    if name not in _modules:
        _modules[name] = importlib.import_module(f"vqvit.backends.{name}")
    return _modules[name]
