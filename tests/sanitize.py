"""Runs the op tests on kernels that are compiled with address and undefined-behaviour sanitizers.

    python tests/sanitize.py cpu|twin [pytest arguments]

`cpu`: the CPU's kernels. `twin`: the CUDA kernels in the host's twin, addresses that are not aligned included, which a
GPU refuses and x86 forgives. A report of a sanitizer ends the run with a failure. Minutes long, so no part of
`make test`.
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
TWIN_FILES = (
    "test_ops_parity.py", "test_cuda_kernels.py", "test_cuda_kernels_rows.py", "test_cuda_kernels_attention.py",
    "test_cuda_schedules.py",
)  # fmt: skip


def arguments(files: tuple[str, ...], selected: str) -> tuple[str, ...]:
    """Of pytest, for the tests of these files whose names match. Reports of native code are not captured."""
    paths = (str(Path(__file__).with_name(name)) for name in files)
    return ("-q", "-p", "no:cacheprovider", "--capture=sys", *paths, "-k", selected)


ARGUMENTS = arguments(FILES, "not triton and not cuda")
"""Of pytest: the op tests of the CPU's kernels."""

READY = "VQVIT_SANITIZERS_LOADED"


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ("cpu", "twin"):
        print(f"usage: {Path(__file__).name} cpu|twin [pytest arguments]; got {sys.argv[1:]}", file=sys.stderr)
        return 2
    if os.environ.get(READY) != "1":
        return with_runtimes()
    chosen, *more = sys.argv[1:]
    import pytest

    if chosen == "cpu":
        use_sanitized()
        return pytest.main([*ARGUMENTS, *more])
    native.use_twin(native.open_twin(_sanitized(_build.CUDA_TWIN)))
    return pytest.main([*arguments(TWIN_FILES, "cuda and not triton"), *more])


def use_sanitized() -> None:
    """The CPU's kernels with sanitizers from now on, in a process that has the sanitizers' libraries."""
    native.use_cpu(native.open_cpu(_sanitized(_build.CPU)))


def _sanitized(library: _build.Library) -> Path:
    """The library compiled with sanitizers, in the cache."""
    flagged = dataclasses.replace(library, flags=(*library.flags, *FLAGS))
    return native.cached_library(native.csrc_directory(), flagged)


def with_runtimes() -> int:
    """This command again, with the sanitizers' libraries loaded first."""
    compiler = _build.compiler(_build.CPU)
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES
    ]
    options = {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # torch frees nothing at exit
    environment = {**os.environ, **options, READY: "1", "LD_PRELOAD": " ".join(paths)}
    return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
