"""Compile Triton kernels before a GPU runs them, side by side, and without one, into Triton's cache.

Launchers run for real, on operands of the same shapes, strides, types and alignment on the meta device or the CPU; only
the launch itself is left out. What is compiled is therefore what a GPU of the given part would compile, under the same
key of Triton's cache. Other processes find it there.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A GPU to compile for: compute capability times ten, row of the kernels' config tables, multiprocessors."""

    arch: int
    row: int
    sms: int


@dataclass(frozen=True)
class Operand:
    """A tensor without its values: what a compilation depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        aligned = tensor.device.type == "meta" or tensor.data_ptr() % 16 == 0
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, aligned)

    def empty(self) -> Tensor:
        if self.aligned:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return torch.empty(extent + 1, dtype=self.dtype).as_strided(self.shape, self.stride, 1)  # an element off


@dataclass(frozen=True)
class Job:
    """A call of an op on the `triton` backend, with a config forced for the launches of a kind, if any."""

    op: str
    arguments: tuple
    options: dict
    kind: str | None = None
    config: object = None

    @classmethod
    def of(cls, op: str, arguments: tuple, options: dict | None = None, kind: str | None = None, config=None) -> "Job":
        described = tuple(Operand.of(a) if isinstance(a, Tensor) else a for a in arguments)
        named = {k: Operand.of(v) if isinstance(v, Tensor) else v for k, v in (options or {}).items()}
        return cls(op, described, named, kind, config)

    def run(self) -> None:
        from vqvit.backends import triton
        from vqvit.kernels import tuned

        arguments = [a.empty() if isinstance(a, Operand) else a for a in self.arguments]
        options = {k: v.empty() if isinstance(v, Operand) else v for k, v in self.options.items()}
        forced = tuned.forced(self.kind, self.config) if self.kind else contextlib.nullcontext()
        with torch.inference_mode(), forced:
            getattr(triton, self.op)(*arguments, **options)


class _NoDriver:
    """What Triton asks of a driver before a launch. The device number is the architecture, which keeps parts apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(part: Part) -> Iterator[list]:
    """Launches compile for `part` and launch nothing. Yields a list that grows with each: the kernel's function, the
    options of the launch, and what was compiled.

    Raises `RuntimeError` if the process interprets kernels (TRITON_INTERPRET=1).
    """
    import triton
    from triton.runtime.jit import JITFunction

    from vqvit.kernels import launch

    if triton.knobs.runtime.interpret:
        raise RuntimeError("compiling: expected a process without TRITON_INTERPRET=1, which interprets kernels instead")
    compiled, original = [], JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self, options, kernel.result() if hasattr(kernel, "result") else kernel))

    device, driver = launch.Device(part.row, part.sms), triton.runtime.driver
    before = getattr(driver, "_active", None)  # `driver.active` would look for a GPU
    driver.set_active(_NoDriver(part.arch))
    try:
        with mock.patch.object(JITFunction, "run", run), mock.patch.object(launch, "cuda_device", lambda index: device):
            yield compiled
    finally:
        driver.set_active(before)


def count_keys(jobs: Iterable[Job], part: Part) -> int:
    """Distinct compilations of the jobs, counted without compiling: their keys in Triton's cache."""
    return len(_keys(jobs, part))


def _keys(jobs: Iterable[Job], part: Part) -> set[str]:
    import triton
    from triton.runtime import jit

    keys: set[str] = set()

    def note(src, target=None, options=None, **_: object):
        keys.add(f"{src.hash()} {sorted((options or {}).items())}")
        return _Nothing()

    with compiling_for(part), mock.patch.object(triton.compiler, "compile", note), contextlib.ExitStack() as stack:
        for function in _kernels():
            stack.enter_context(mock.patch.object(function, "compile", note, create=True))
        if hasattr(jit, "compile"):
            stack.enter_context(mock.patch.object(jit, "compile", note))
        for job in jobs:
            job.run()
        for function in _kernels():
            function.device_caches.clear()  # or a later launch would find a stand-in
    return keys


class _Nothing:
    """Stands for a compiled kernel."""

    def __getattr__(self, name: str):
        raise AttributeError(name)


def _kernels() -> list:
    """Every jitted function of the kernels: some versions of Triton keep the compiler there."""
    from triton.runtime.jit import JITFunction

    from vqvit import kernels

    modules = (importlib.import_module(f"vqvit.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__))
    return [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]


# ---- side by side ---------------------------------------------------------------------------------------------------


def warm(jobs: Sequence[Job], part: Part, workers: int | None = None) -> list[str]:
    """Compile the jobs in worker processes into Triton's cache. Returns why jobs failed: they fail again when they run.

    A worker takes seconds to start, so few jobs are left to whoever runs them.
    """
    together: dict[str, list[Job]] = {}  # jobs that share kernels: one worker, which compiles each of them once
    for job in jobs:
        together.setdefault(repr((job.op, job.kind, job.config)), []).append(job)
    groups, problems = list(together.values()), []
    workers = min(workers or os.cpu_count() or 1, len(groups))
    if workers < 1:
        return []
    shares = [[job for group in groups[start::workers] for job in group] for start in range(workers)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        for found in [pool.submit(_compile_all, share, part) for share in shares]:
            try:
                problems += found.result()
            except BrokenProcessPool as error:
                problems.append(f"a worker died: {error}")
    return problems


def _start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    torch.set_num_threads(1)


def _compile_all(jobs: Sequence[Job], part: Part) -> list[str]:
    problems = []
    with compiling_for(part):
        for job in jobs:
            try:
                job.run()
            except Exception as error:  # a compiler may fail in any way: whoever runs the job meets it again
                problems.append(f"{job.op}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return problems


# ---- carrying a cache -----------------------------------------------------------------------------------------------


def identity() -> dict:
    """What keys of the cache depend on beside kernels and part: Triton's version, and its own hash of its files."""
    import triton
    from triton.runtime import cache

    key = getattr(cache, "triton_key", None)
    if key is None:
        from triton.compiler.compiler import triton_key as key
    return {"triton": triton.__version__, "triton_key": hashlib.sha256(key().encode()).hexdigest()}


def entries(cache: Path) -> set[str]:
    """Compilations in a cache: folders that hold a cubin."""
    return {cubin.parent.name for cubin in cache.glob("*/*.cubin")}


def relocate(cache: Path) -> int:
    """Make a cache that was made elsewhere usable where it lies: its groups name files by absolute paths.

    Returns how many compilations it holds.
    """
    for group in cache.glob("*/__grp__*.json"):
        document = json.loads(group.read_text())
        names = document["child_paths"]
        there = {name for name in names if (group.parent / name).is_file()}
        document["child_paths"] = {name: str(group.parent / name) for name in sorted(there)}
        group.write_text(json.dumps(document))
    return len(entries(cache))


def needed(path: Path) -> bool:
    """Whether a file of a cache is read again: intermediate forms of a kernel are not."""
    return path.suffix in (".json", ".cubin")
