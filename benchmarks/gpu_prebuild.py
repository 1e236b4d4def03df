"""gpu.py --prebuild: what can be compiled without a GPU and carried to one: libraries, the probe, and a Triton cache.

The CUDA library is for compute capability 9.0 and is used only where its source hash matches. The Triton cache holds
what the op cases and the models of gpu.py launch on an H100. Its keys depend on Triton's own files, so a run with
another Triton ignores it; `--key-of PYTHON` files the kernels under the keys of another interpreter's Triton of the
same version, whose compiled extension differs from this one's only by the interpreter that it is for.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from gpu_plan import H100

from vqvit import _build, native, precompile
from vqvit.children import write_atomically

ARCHIVE, MANIFEST = "triton-cache.tar.gz", "prebuilt.json"
MOST_BYTES = 64 * 2**20
"""What may be carried to a machine, all together."""

KEY_CODE = "import triton; from triton.runtime.cache import triton_key; print(triton.__version__); print(triton_key())"


class PrebuildError(RuntimeError):
    """Nothing was prebuilt; the message says why."""


def key_of(python: str) -> tuple[str, str]:
    """Version and key of the Triton of an interpreter. Raises `PrebuildError`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", KEY_CODE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise PrebuildError(
            f"--key-of {python}: expected an interpreter with Triton; {detail.strip()[-300:]}"
        ) from error
    version, key = done.stdout.split("\n", 1)
    return version, key.strip()


@contextlib.contextmanager
def filed_under(key: str | None) -> Iterator[None]:
    """Triton's cache takes another install's key for its own."""
    from triton.runtime import cache

    if key is None:
        yield
        return
    before, cache.triton_key = cache.triton_key, lambda: key
    try:
        yield
    finally:
        cache.triton_key = before


def compile_share(index: int, count: int, key: str | None) -> list[str]:
    """Compile a share of everything into $TRITON_CACHE_DIR. Returns what failed."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]
    import torch

    torch.set_num_threads(1)
    problems = []
    with filed_under(key), precompile.compiling_for(H100):
        for job in all_jobs()[index::count]:
            try:
                job.run()
            except Exception as error:  # the compiler may fail in any way: the GPU's run meets it again
                problems.append(f"{job.op}: {type(error).__name__}: {str(error)[:200]}")
    return problems


def all_jobs() -> list[precompile.Job]:
    """What a GPU's run launches on the `triton` backend: op cases, and the ops of ViT-B at each batch. Real shapes of
    other ops share these kernels.
    """
    import gpu_ops
    from gpu_child import warm_jobs

    spec = {"archs": ["vit-b16"], "batches": [256, 64, 1, 8]}
    jobs = [*gpu_ops.compilations(), *warm_jobs(None, spec)]
    return list({repr(job): job for job in jobs}.values())


def pack(cache: Path) -> bytes:
    """Kernels and their descriptions, without intermediate forms."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=9) as archive:
        for path in sorted(p for p in cache.glob("*/*") if precompile.needed(p)):
            archive.add(path, path.relative_to(cache).as_posix())
    return buffer.getvalue()


def prebuild(folder: Path, work: Path, cores: int, python: str | None) -> int:
    """Fill `folder`; prints what is in it. Returns the exit status."""
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    start, cache = time.monotonic(), work / "prebuild-triton"
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    try:
        manifest, problems = _filled(folder, cache, cores, python)
    except (PrebuildError, _build.BuildError) as error:
        print(f"gpu.py: error: --prebuild: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps(manifest, indent=1))
    print("\n".join(problems))
    print(f"{size / 2**20:.1f} MiB in {folder.name}, {time.monotonic() - start:.0f} s, {len(problems)} failed")
    if size > MOST_BYTES:
        print(f"gpu.py: error: expected at most {MOST_BYTES} bytes to carry; got {size}", file=sys.stderr)
        return 2
    return int(bool(problems))


def _filled(folder: Path, cache: Path, cores: int, python: str | None) -> tuple[dict, list[str]]:
    own = precompile.identity()
    key = None
    if python is not None:
        version, key = key_of(python)
        if version != own["triton"]:
            raise PrebuildError(f"expected Triton {own['triton']} in {python}, as here; got {version}")
    csrc = native.csrc_directory()
    libraries = (_build.cuda_library(("90a",)), _build.PROBE, _build.CPU)
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        shutil.copy2(native.cached_library(csrc, library), folder / library.file)
    shutil.rmtree(cache, ignore_errors=True)
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(compile_share, index, cores, key) for index in range(cores)]
        problems = [problem for share in shares for problem in share.result()]
    write_atomically(folder / ARCHIVE, pack(cache))
    manifest = {
        "triton": own["triton"],
        "triton_key": own["triton_key"] if key is None else hashlib.sha256(key.encode()).hexdigest(),
        "compilations": len(precompile.entries(cache)),
        "part": [H100.arch, H100.row, H100.sms],
        "sources": {library.file: _build.source_hash(csrc, library) for library in libraries},
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest, problems


def install(folder: Path, cache: Path) -> str:
    """Unpack the Triton cache where the run will look. Returns what was done, in words; another Triton's is left
    alone.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        here = precompile.identity()
    except (OSError, ValueError, ImportError) as error:
        return f"no prebuilt Triton cache: {error}"
    for what in ("triton", "triton_key"):
        if here[what] != manifest[what]:
            return (
                f"the prebuilt Triton cache is for another Triton: expected {what} {here[what]}; got {manifest[what]}"
            )
    with tarfile.open(folder / ARCHIVE, "r:gz") as archive:
        archive.extractall(cache, filter="data")
    return f"{precompile.relocate(cache)} compilations from the prebuilt Triton cache of {manifest['triton']}"
