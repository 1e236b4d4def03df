"""Small CUDA programs for the host's twin (csrc/cuda/twin.h), compiled from source text: what is right, and planted
mistakes."""

import ctypes
import os
import subprocess
from pathlib import Path

from vqvit import _build, native

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared")

PRELUDE = r"""
#include "hopper.h"
#include <string>
namespace vqvit {
static std::string reason;
int twin_status(const char* error) { reason = error == nullptr ? "" : error; return error != nullptr; }
}  // namespace vqvit
extern "C" const char* last() { return vqvit::reason.c_str(); }
"""


class Programs:
    """A library of programs; each function of it returns 0, or 1 after an error of the twin."""

    def __init__(self, source: str, folder: Path) -> None:
        csrc = native.csrc_directory()
        (folder / "programs.cpp").write_text(PRELUDE + source)
        files = [folder / "programs.cpp", *sorted((csrc / "cuda").glob("twin*.cpp"))]
        command = [_build.compiler(_build.CUDA_TWIN), *FLAGS, f"-I{csrc}", f"-I{csrc / 'cuda'}", *map(str, files)]
        subprocess.run([*command, "-o", str(folder / "programs.so")], check=True)
        self.library = ctypes.CDLL(str(folder / "programs.so"))
        self.library.last.restype = ctypes.c_char_p

    def error(self, name: str, *arguments: object, seed: int = 0, arch: int = 90) -> str:
        """What the twin says of a program, or "" if it found nothing wrong."""
        before = {key: os.environ.get(key) for key in ("VQVIT_TWIN_SEED", "VQVIT_TWIN_ARCH")}
        os.environ |= {"VQVIT_TWIN_SEED": str(seed), "VQVIT_TWIN_ARCH": str(arch)}
        try:
            failed = getattr(self.library, name)(*arguments)
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        return self.library.last().decode() if failed else ""


def ints(count: int) -> ctypes.Array:
    return (ctypes.c_int * count)()
