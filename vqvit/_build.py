"""Compiles csrc/ into shared libraries. Standard library only: setup.py loads this file by path, not through vqvit.

`setup.py` builds into the package, `vqvit.native` into a cache on first use; both call `build`.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# No -march and no fast math: each file of kernels names its instructions, and results are fixed to the last bit:
# multiply and add fuse only where a kernel says fma. sqrt need not set errno.
CXX_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra",
)  # fmt: skip

# The same contract for nvcc, whose division and square root are correctly rounded by default.
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")

CUDA_ARCHS = ("75", "80", "90a")
"""Parts with machine code of their own: 8.6 to 8.9 run that of 8.0, newer parts compile its PTX when they load it."""


@dataclass(frozen=True)
class Library:
    """device: folder in csrc/, and vqvit_<device>_ starts its functions; units: patterns of its files there; compiler:
    "c++" or "nvcc"; link: what makes objects a library, or a program.
    """

    file: str
    device: str
    units: tuple[str, ...]
    compiler: str
    flags: tuple[str, ...]
    link: tuple[str, ...] = ("-shared",)


# OpenMP's runtime is not linked: its symbols come from the libgomp that torch has loaded, so that both share one pool
# of threads. Wheels name their copy libgomp-<hash>.so.1, which a link-time dependency would miss.
# pthread_atfork is in no shared library of glibc before 2.34.
CPU = Library("libvqvit_cpu.so", "cpu", ("*.cpp",), "c++", (*CXX_FLAGS, "-fopenmp"), ("-shared", "-lpthread"))


def cuda_library(archs: tuple[str, ...] = CUDA_ARCHS) -> Library:
    """The CUDA library with machine code for `archs`, and PTX of 8.0 if that is among them."""
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if "80" in archs:
        code.append("-gencode=arch=compute_80,code=compute_80")
    return Library("libvqvit_cuda.so", "cuda", ("*.cu",), "nvcc", (*NVCC_FLAGS, *code))


CUDA = cuda_library()

# csrc/cuda/twin.h: the CUDA kernels on the CPU, one fibre a thread, for tests.
CUDA_TWIN = Library("libvqvit_cuda_twin.so", "cuda", ("*.cu", "*.cpp"), "c++", CXX_FLAGS)


# csrc/probe: a program that runs kernels of the CUDA library, or of its twin, and needs no Python. nvcc links its
# runtime statically.
_PROGRAM = ("-ldl", "-lpthread")
PROBE = Library("vqvit_probe", "probe", ("*.cpp",), "nvcc", ("-std=c++17", "-O3", "-DVQVIT_PROBE_CUDA"), _PROGRAM)
PROBE_TWIN = Library("vqvit_probe_twin", "probe", ("*.cpp",), "c++", (*CXX_FLAGS, "-pthread"), _PROGRAM)


class BuildError(RuntimeError):
    """The native library cannot be built; the message says why."""


def compiler(library: Library) -> str:
    """Path of the library's compiler, without arguments: see `compiler_command`."""
    return compiler_command(library)[0]


def compiler_command(library: Library) -> list[str]:
    """How to call the library's compiler: `$CXX` or g++; `$NVCC`, nvcc, or the one in $CUDA_HOME or /usr/local/cuda.

    A variable may hold arguments too, as in CXX="ccache g++". Raises `BuildError` if the program is not there.
    """
    if library.compiler == "c++":
        names, missing = [os.environ.get("CXX") or "g++"], "C++ compiler {!r} not found (set CXX or install g++)"
    elif chosen := os.environ.get("NVCC"):
        names, missing = [chosen], "CUDA compiler {!r} not found (set NVCC or install the CUDA toolkit)"
    else:
        names = ["nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"]
        missing = "CUDA compiler {!r} not found (set NVCC or install the CUDA toolkit)"
    for name in names:
        if path := shutil.which(name):  # of a path with spaces too
            return [path]
        program, *arguments = _words(name)
        if path := shutil.which(program):
            return [path, *arguments]
    raise BuildError(missing.format(names[0]))


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command) or [command]
    except ValueError as error:
        raise BuildError(f"compiler {command!r} cannot be understood: {error}") from error


def compiler_version(library: Library) -> str:
    """What `--version` prints."""
    return _run([*compiler_command(library), "--version"])


def source_files(csrc: Path, library: Library) -> list[Path]:
    """The translation units of a library."""
    return sorted(path for pattern in library.units for path in (csrc / library.device).glob(pattern))


def source_hash(csrc: Path, library: Library) -> str:
    """Identifies sources and flags; compiled into the library, so that a stale binary shows."""
    digest = hashlib.sha256(" ".join((library.file, *library.flags)).encode())
    for path in sorted([*csrc.glob("*.h"), *(csrc / library.device).iterdir()]):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(csrc: Path, library: Library, output: Path) -> None:
    """Compile a library to `output`, which appears complete or not at all. Raises `BuildError`."""
    program, sources = compiler_command(library), source_files(csrc, library)
    if not sources:
        raise BuildError(f"no sources in {csrc / library.device}")
    flags = [*library.flags, f"-I{csrc}", f"-I{csrc / library.device}"]
    flags.append(f'-DVQVIT_SOURCE_HASH="{source_hash(csrc, library)}"')
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as folder:
        objects = [Path(folder, source.name + ".o") for source in sources]

        def compile_one(source: Path, target: Path) -> None:
            language = ["-x", "c++"] if library.compiler == "c++" else []
            _run([*program, *flags, *language, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        linked = Path(folder, output.name)
        _run([*program, *map(str, objects), *library.link, "-o", str(linked)])
        linked.replace(output)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise BuildError(f"cannot run {command[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed with status {error.returncode}:\n{error.stderr}") from error
    return done.stdout
