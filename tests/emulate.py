"""The op tests on the kernels of instruction sets that this CPU lacks, emulated: `make emulate`.

`make test` runs the op cases so where they cannot run otherwise (test_emulated.py). AVX-512 VNNI and AVX-VNNI kernels
are compiled from their sources, with the intrinsics of emulated/avx512.h. What runs is what those CPUs run but for
the compiler's choice of instructions: the same bits are the same arithmetic. Needs AVX2.
"""

import dataclasses
import re
import shutil
import sys
import tempfile
from pathlib import Path

import sanitize

from vqvit import _build, native

EMULATED = Path(__file__).with_name("emulated")
KERNELS = ("kernels_avx_vnni.cpp", "kernels_avx512_vnni.cpp")
TARGET = r'#pragma GCC target\(".*"\)'
FEATURE = r'__builtin_cpu_supports\("(avx512\w+|avxvnni)"\)'


def emulated_sources(folder: Path) -> Path:
    """csrc/ below `folder`, whose kernels for newer instruction sets compile for AVX2 and run there."""
    csrc = shutil.copytree(native.csrc_directory(), folder / "csrc")
    for name in KERNELS:
        path = csrc / "cpu" / name
        text, targets = re.subn(TARGET, '#include "avx512.h"\n#pragma GCC target("avx2,fma,f16c")', path.read_text())
        text, features = re.subn(FEATURE, '__builtin_cpu_supports("avx2")', text)
        if targets != 1 or features == 0:
            raise ValueError(f"{name}: expected one target and the features it needs; got {targets} and {features}")
        path.write_text(text)
    return csrc


def main() -> int:
    import pytest

    # Vectors of 64 bytes go through memory, which GCC mentions; more than -O1 takes minutes to compile.
    flags = (*_build.CPU.flags, f"-I{EMULATED}", "-O1", "-Wno-psabi", "-Wno-ignored-attributes")
    with tempfile.TemporaryDirectory(prefix="vqvit-emulated-") as folder:
        library = Path(folder) / _build.CPU.file
        _build.build(emulated_sources(Path(folder)), dataclasses.replace(_build.CPU, flags=flags), library)
        native.use_cpu(native.open_cpu(library))
        return pytest.main([*sanitize.ARGUMENTS, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
