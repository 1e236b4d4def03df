"""Compiles csrc/ into a shared library. Standard library only: setup.py loads this file by path, not through vqvit.

`setup.py` builds into the package, `vqvit.native` into a cache on first use; both call `build_cpu`.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CPU_LIBRARY = "libvqvit_cpu.so"

# No -march and no fast math: each file of kernels names its instructions, and results are fixed to the last bit:
# multiply and add fuse only where a kernel says fma. sqrt need not set errno.
CPU_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-Wall", "-Wextra",
)  # fmt: skip

# OpenMP's runtime is not linked: its symbols come from the libgomp that torch has loaded, so that both share one pool
# of threads. Wheels name their copy libgomp-<hash>.so.1, which a link-time dependency would miss.
LINK_FLAGS = ("-shared",)


class BuildError(RuntimeError):
    """The native library cannot be built; the message says why."""


def compiler() -> str:
    """Path of the C++ compiler: `$CXX` or g++."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"C++ compiler {name!r} not found (set CXX or install g++)")
    return path


def compiler_version(path: str) -> str:
    """First line of `--version`."""
    return _run([path, "--version"]).splitlines()[0]


def source_files(csrc: Path) -> list[Path]:
    """The translation units of the CPU library."""
    return sorted((csrc / "cpu").glob("*.cpp"))


def source_hash(csrc: Path) -> str:
    """Identifies sources and flags; compiled into the library, so that a stale binary shows."""
    digest = hashlib.sha256(" ".join(CPU_FLAGS + LINK_FLAGS).encode())
    for path in sorted([csrc / "vqvit.h", *(csrc / "cpu").iterdir()]):
        if path.suffix in (".h", ".cpp"):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build_cpu(csrc: Path, output: Path) -> None:
    """Compile the CPU library to `output`, which appears complete or not at all. Raises `BuildError`."""
    cxx, sources = compiler(), source_files(csrc)
    if not sources:
        raise BuildError(f"no C++ sources in {csrc / 'cpu'}")
    flags = [*CPU_FLAGS, f"-I{csrc}", f"-I{csrc / 'cpu'}", f'-DVQVIT_SOURCE_HASH="{source_hash(csrc)}"']
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as folder:
        objects = [Path(folder, source.stem + ".o") for source in sources]

        def compile_one(source: Path, target: Path) -> None:
            _run([cxx, *flags, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        library = Path(folder, output.name)
        _run([cxx, *LINK_FLAGS, *map(str, objects), "-o", str(library)])
        library.replace(output)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed with status {error.returncode}:\n{error.stderr}") from error
    return done.stdout
