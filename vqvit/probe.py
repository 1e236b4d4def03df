"""The probe of csrc/probe: which cases it runs where, its binaries, and a child process for each family of kernels.

    python -m vqvit.probe --build FOLDER [--twin]

puts `vqvit_probe` and the two libraries that it compares into FOLDER, built if need be.
"""

import argparse
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vqvit import _build, native
from vqvit.children import Child, Reporter, die_with_parent

PROGRAM, LIBRARY, ORACLE = "vqvit_probe", "cuda.so", "cpu.so"
"""Names in the folder that `build` fills."""

REAL = {
    "mm": ("197x768x768", "1576x2304x768", "1573x770x400", "2941x1530x768", "2941x1530x1024", "2944x1536x3072",
           "12608x3072x768", "12608x768x3072", "12607x770x400"),
    "linear": ("197x768x768", "1573x770x400", "2941x1530x1024", "12608x768x3072"),
    "linear-groups": ("197x768x3072", "1576x768x768", "1573x770x400", "2941x1530x1024", "12608x768x768",
                      "12608x768x3072"),
    "codes": ("197x3072x768", "1573x3070x400", "12608x3072x768"),
    "qkv": ("1x197x768x12", "8x197x768x12", "64x197x768x12"),
    "attention": ("1x12x197x64", "8x12x197x64", "64x12x197x64", "2x16x257x80", "1x8x577x128"),
    "rows": ("197x768", "1576x1024", "12608x768", "12608x3072"),
}  # fmt: skip
"""ViT-B at 1, 8 and 64 images, ragged sizes, and GEMMs of more tiles than multiprocessors: 2944 x 1536 has 276 of 128 x
128, two and three for each of an H100's 132 blocks.
"""

SMALL = {
    "mm": ("1100x1000x400", "70x130x768"),
    "linear": ("70x130x400",),
    "linear-groups": ("1100x1000x400", "70x130x768"),
    "codes": ("70x300x400",),
    "qkv": ("2x17x128x2",),
    "attention": ("1x2x70x64",),
    "rows": ("33x300",),
}
"""For sanitizers, which slow a kernel down a hundredfold; the largest still has two tiles a block on an H100."""

TWIN = SMALL | {
    "mm": ("70x130x768", "128x256x1024"),
    "linear-groups": ("70x130x768", "128x128x1024"),
}
TWIN_ENVIRONMENT = {"VQVIT_TWIN_ARCH": "90", "VQVIT_TWIN_MULTIPROCESSORS": "1"}
"""For the twin, which is slow: on one multiprocessor of Hopper two tiles are two tiles of one block."""

SANITIZERS = ("memcheck", "racecheck", "synccheck")

SECONDS, LIMIT, SILENCE = 8.0, 40.0, 20.0


def sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, or in $CUDA_HOME or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def child(
    family: str,
    sizes: Iterable[str],
    folder: Path,
    after: tuple[str, ...] = (),
    tool: str | None = None,
    environment: Mapping[str, str] | None = None,
    weight: int = 1,
) -> Child:
    """The probe of one family on what `build` put into `folder`, on its own or under a tool of compute-sanitizer."""
    command = (str(folder / PROGRAM), str(folder / LIBRARY), str(folder / ORACLE))
    command += tuple(f"{family}/{size}" for size in sizes)
    slower = 1.0
    if tool is not None:
        command = (sanitizer() or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command)
        slower = 2.5
    name = f"probe/{family}" if tool is None else f"sanitizer/{tool}-{family}"
    return Child(
        name, command, SECONDS * slower, LIMIT * slower, SILENCE * slower, after, weight, len(tuple(sizes)) - 1,
        environment or {},
    )  # fmt: skip


def build_child(folder: Path, twin: bool, weight: int = 1) -> Child:
    """Fills `folder`; nvcc takes about 40 seconds of a core for one part."""
    command = (sys.executable, "-m", "vqvit.probe", "--build", str(folder), *(["--twin"] if twin else []))
    return Child("build", command, 25.0, 150.0, weight=weight)


def program(twin: bool) -> Path:
    """The probe's binary: prebuilt from these sources, from the cache, or built. Raises `BuildError`."""
    library, csrc = _build.PROBE_TWIN if twin else _build.PROBE, native.csrc_directory()
    prebuilt = os.environ.get(native.PREBUILT)
    path = Path(prebuilt) / library.file if prebuilt else None
    if path and path.is_file() and (csrc is None or _hash_of(path) == _build.source_hash(csrc, library)):
        return path
    if csrc is None:
        raise _build.BuildError("no sources to build the probe from")
    return native.cached_library(csrc, library)


def _hash_of(path: Path) -> str | None:
    """Hash of the sources that a probe was built from; None if it does not run here."""
    try:
        done = subprocess.run([path, "--source-hash"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def build(folder: Path, twin: bool) -> dict[str, str]:
    """Put the probe and the libraries into `folder`. Returns what could not be built, and why, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    library = (lambda: native.library_file(native.CUDA_TWIN)) if twin else (lambda: native.library_file(native.CUDA))
    wanted = {LIBRARY: library, ORACLE: lambda: native.library_file(native.CPU), PROGRAM: lambda: program(twin)}
    problems = {}
    with ThreadPoolExecutor(len(wanted)) as pool:
        for name, found in {name: pool.submit(get) for name, get in wanted.items()}.items():
            try:
                shutil.copy2(found.result(), folder / name)
            except (_build.BuildError, native.NativeUnavailableError, OSError) as error:
                problems[name] = str(error)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--twin", action="store_true", help="the CUDA library's twin on the CPU")
    arguments = parser.parse_args()
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reporter = Reporter()
    reporter.doing("compiling the libraries and the probe")
    problems = build(arguments.build, arguments.twin)
    for name in (LIBRARY, ORACLE, PROGRAM):
        note = problems.get(name, "")
        reporter.row({"what": name, "wrong": int(bool(note)), "note": note.splitlines()[0][:300] if note else ""})
        print(problems.get(name, f"{name} is there"))
    reporter.end()
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
