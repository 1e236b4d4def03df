"""Runs the op tests on CPU kernels that are compiled with address and undefined-behaviour sanitizers.

    python tests/sanitize.py [pytest arguments]

A report of a sanitizer ends the run with a failure. Minutes long, so no part of `make test`.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from vqvit import _build, native

FLAGS = (
    "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
)  # fmt: skip
RUNTIMES = ("libasan.so", "libubsan.so")  # python itself is not instrumented: they are loaded before it
FILES = ("test_ops_parity.py", "test_cpu_isa.py", "test_fused_block.py")
ARGUMENTS = (
    "-q", "-p", "no:cacheprovider", *(str(Path(__file__).with_name(name)) for name in FILES),
    "-k", "not triton and not cuda",
)  # fmt: skip
"""Of pytest: the op tests of the CPU's kernels."""

READY = "VQVIT_SANITIZERS_LOADED"


def main() -> int:
    if os.environ.get(READY) != "1":
        return _with_runtimes()
    library = dataclasses.replace(_build.CPU, flags=(*_build.CPU.flags, *FLAGS))
    native.use_cpu(native.open_cpu(native.cached_library(native.csrc_directory(), library)))
    import pytest

    return pytest.main([*ARGUMENTS, *sys.argv[1:]])


def _with_runtimes() -> int:
    """This command again, with the sanitizers' libraries loaded first."""
    compiler = _build.compiler(_build.CPU)
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}  # torch frees nothing at exit
    environment = {**os.environ, **options, READY: "1", "LD_PRELOAD": " ".join(paths)}
    return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
