"""Which child processes a run of gpu.py starts, in order of value, and whether they fit its time."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqvit import device_checks, precompile, probe
from vqvit.children import Child, schedule, with_environment

CHILD = Path(__file__).with_name("gpu_child.py")

CALLS = {
    "correctness": ("build", "probe", "sanitizer", "bits", "logits", "ops", "guard", "timeline"),
    "timings": ("build", "models", "kernels", "tune"),
}
"""`guard` and `timeline` want the whole machine as timings do; they fill what the longer call leaves."""

BUDGETS = {"correctness": 480, "timings": 300}
"""Seconds that a call may take."""

SECTIONS = tuple(dict.fromkeys(name for names in CALLS.values() for name in names))

# Seconds on an H100 machine of 16 cores. No GPU has run this: compilations were timed on CPUs, the rest is a guess, and
# a child is killed well after what is expected of it.
START_SECONDS = 8.0  # imports, and the device's first call
COMPILE_SECONDS = 2.4  # of a Triton kernel on one core: 0.4 to 2.4 were seen
LAUNCHER_SECONDS = 0.3  # of the C stub of a kernel's signature, compiled with it
CUDA_CASE_SECONDS = 0.02
MACHINE_SECONDS = 15.0  # the first imports from a cold disk
MODEL_SECONDS = {256: 50.0, 64: 45.0, 1: 35.0, 8: 35.0}  # max-autotune takes most of it

OPS_SHARES = 10
TINY_LIMIT = 300.0  # of a rehearsal on a busy machine
H100 = precompile.Part(90, 90, 132)


@dataclass(frozen=True)
class Settings:
    """device: torch's name; backends: `cuda` first; cores: of the machine; work: folder of intermediate files; tiny: a
    rehearsal's sizes; environment: of every child; tools: of compute-sanitizer.
    """

    device: str
    backends: tuple[str, ...]
    cores: int
    work: Path
    environment: dict[str, str]
    tiny: bool = False
    quick: bool = False
    tools: tuple[str, ...] = ()
    part: precompile.Part = H100

    @property
    def built(self) -> Path:
        """Where the probe and its libraries are put."""
        return self.work / "built"


def section_of(name: str) -> str:
    """The section that a child belongs to."""
    return name.partition("/")[0]


def children(settings: Settings, sections: Sequence[str], keys: Sequence[int] = ()) -> list[Child]:
    """Of the sections, in order. keys: compilations that each share of the op cases makes."""
    found: list[Child] = []
    for section in sections:
        found += _PLANS[section](settings, keys) if section == "ops" else _PLANS[section](settings)
    names = {child.name for child in found}
    return [_bound(child, settings, names) for child in found]


def _bound(child: Child, settings: Settings, names: set[str]) -> Child:
    """With the run's environment, and waiting only for children that run."""
    after = tuple(name for name in child.after if name in names)
    limit = max(child.limit, TINY_LIMIT) if settings.tiny else child.limit
    silence = None if settings.tiny else child.silence
    return dataclasses.replace(
        with_environment(child, settings.environment), limit=limit, silence=silence, after=after,
        weight=min(child.weight, settings.cores),
    )  # fmt: skip


def part(settings: Settings, name: str, seconds: float, spec: dict, **options) -> Child:
    """A child of gpu_child.py, with time for two hangs. It is told to end itself shortly before it would be killed."""
    limit = options.pop("limit", 2.5 * seconds + 2 * (options.get("silence") or 0.0))
    whole = {
        "section": section_of(name), "backends": settings.backends, "device": settings.device,
        "work": str(settings.work), "quick": settings.quick or settings.tiny, "seconds": 0.9 * limit, **spec,
    }  # fmt: skip
    return Child(name, (sys.executable, str(CHILD), json.dumps(whole)), seconds, limit, **options)


def machine(settings: Settings) -> Child:
    """Asks for facts of the device, before anything else is planned."""
    child = part(settings, "machine", MACHINE_SECONDS, {}, limit=120.0, weight=settings.cores)
    return _bound(child, settings, set())


def _build(settings: Settings) -> list[Child]:
    return [probe.build_child(settings.built, settings.tiny, weight=settings.cores)]


def _probe(settings: Settings) -> list[Child]:
    cases = probe.TWIN if settings.tiny else probe.REAL
    weight = 1 if settings.tiny else max(1, settings.cores // 2)  # its CPU products take all cores, for moments
    environment = probe.TWIN_ENVIRONMENT if settings.tiny else {}
    return [
        probe.child(family, sizes, settings.built, ("build",), environment=environment, weight=weight)
        for family, sizes in cases.items()
    ]


def _sanitizer(settings: Settings) -> list[Child]:
    weight = max(1, settings.cores // 8)
    return [
        probe.child(family, sizes, settings.built, ("build",), tool, weight=weight)
        for tool in settings.tools
        for family, sizes in probe.SMALL.items()
    ]


def _checks(settings: Settings) -> list[Child]:
    size, weight = ("tiny", 1) if settings.tiny else ("vit-b16", max(1, settings.cores // 8))
    return device_checks.children(
        settings.backends, settings.device, size, settings.work, ("build",), weight, together=settings.tiny
    )


def _bits(settings: Settings) -> list[Child]:
    return [child for child in _checks(settings) if section_of(child.name) == "bits"]


def _logits(settings: Settings) -> list[Child]:
    found = [child for child in _checks(settings) if section_of(child.name) == "logits"]
    return found[:2] if settings.tiny else found


def ops_shares(settings: Settings, backend: str) -> int:
    """Processes for the op cases of a backend: most of Triton's time is compilation."""
    if settings.tiny:
        return 1
    return min(OPS_SHARES, settings.cores) if backend == "triton" else 2


def _ops(settings: Settings, keys: Sequence[int]) -> list[Child]:
    one_thread = {"OMP_NUM_THREADS": "1"}
    found = [part(settings, "expected", 10.0, {"backends": ["reference"]}, environment=one_thread)]
    for backend in settings.backends:
        count = ops_shares(settings, backend)
        for index in range(count):
            seconds = START_SECONDS + CUDA_CASE_SECONDS * 327 / count
            if backend == "triton" and not settings.tiny:
                share = keys[index] if index < len(keys) else 29
                seconds = START_SECONDS + (COMPILE_SECONDS + LAUNCHER_SECONDS) * share
            spec = {"backends": [backend], "share": [index, count]}
            name = f"ops/{backend}-{index + 1}" if count > 1 else f"ops/{backend}"
            after = ("expected", *(["build"] if backend == "cuda" else []))
            found.append(
                part(settings, name, seconds, spec, after=after, silence=40.0, restarts=4, environment=one_thread)
            )
    return found


def timed_backends(settings: Settings) -> tuple[str, ...]:
    """Whose times are taken: in a rehearsal, not the interpreter's."""
    return tuple(name for name in settings.backends if not (settings.tiny and name == "triton"))


def _models(settings: Settings) -> list[Child]:
    if settings.tiny:
        spec = {"arch": "tiny", "batch": 1, "backends": timed_backends(settings)}
        return [part(settings, "models/tiny-1", 40.0, spec, after=("build",), restarts=2)]
    spec = {"archs": ["vit-b16"], "batches": list(MODEL_SECONDS), "cores": settings.cores}
    spec["part"] = [settings.part.arch, settings.part.row, settings.part.sms]
    found = [part(settings, "warm", 25.0, spec, after=("build",), weight=settings.cores)]
    for batch, seconds in MODEL_SECONDS.items():
        found.append(
            part(settings, f"models/vit-b16-{batch}", seconds, {"arch": "vit-b16", "batch": batch},
                 after=("build", "warm"), restarts=2, silence=75.0, limit=2.5 * seconds, weight=settings.cores)
        )  # fmt: skip
    return found


def _by_backend(section: str, seconds: float):
    def plan(settings: Settings) -> list[Child]:
        return [
            part(settings, f"{section}/{backend}", seconds, {"backends": [backend], "quick": True},
                 after=("build", "warm"), weight=1 if settings.tiny else settings.cores)
            for backend in timed_backends(settings)[-1 if settings.tiny else 0 :]
        ]  # fmt: skip

    return plan


def _tune(settings: Settings) -> list[Child]:
    if "triton" not in settings.backends:
        return []
    spec = {"backends": ["triton"], "quick": True}
    return [
        part(settings, "tune/triton", 25.0, spec, after=("build",), restarts=3, silence=60.0, weight=settings.cores)
    ]


_PLANS = {
    "build": _build, "probe": _probe, "sanitizer": _sanitizer, "bits": _bits, "logits": _logits, "ops": _ops,
    "models": _models, "kernels": _by_backend("kernels", 20.0), "tune": _tune, "guard": _by_backend("guard", 25.0),
    "timeline": _by_backend("timeline", 15.0),
}  # fmt: skip


# ---- does it fit ----------------------------------------------------------------------------------------------------


def within(planned: Sequence[Child], cores: int, budget: float) -> dict[str, tuple[float, float]]:
    """Start and end of those that end in time: the longest beginning of the order that fits."""
    for count in range(len(planned), 0, -1):
        times = schedule(planned[:count], cores)
        if max(end for _, end in times.values()) <= budget:
            return times
    return {}


def text(planned: Sequence[Child], cores: int, budget: float, keys: Iterable[int]) -> str:
    """The plan as a table, and what it rests on."""
    fits, everything, keys = within(planned, cores, budget), schedule(planned, cores), list(keys)
    width = max(len(child.name) for child in planned)
    lines = [f"{'child':{width}}  start    end  seconds  limit  cores"]
    for child in planned:
        start, end = everything[child.name]
        late = "" if child.name in fits else "  if time is left"
        lines.append(
            f"{child.name:{width}}  {start:5.0f}  {end:5.0f}  {child.seconds:7.0f}  {child.limit:5.0f}"
            f"  {child.weight:5}{late}"
        )
    if keys:
        lines.append(
            f"{sum(keys)} Triton compilations for the op cases in {len(keys)} processes, at most {max(keys)} in one, at"
            f" {COMPILE_SECONDS} s and {LAUNCHER_SECONDS} s for a launcher"
        )
    last = max((end for _, end in fits.values()), default=0.0)
    lines.append(f"{len(fits)} of {len(planned)} children fit {budget:.0f} s on {cores} cores: {last:.0f} s")
    return "\n".join(lines)


def counted_keys(shares: int, device_part: precompile.Part = H100) -> list[int]:
    """Compilations of each share of the op cases, counted by their keys; none if Triton is missing or interprets."""
    import importlib.util

    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET"):
        return []
    import gpu_ops

    jobs = [precompile.Job.of(op, gpu_ops.arguments_of(op, case)) for op, case in gpu_ops.items()]
    return [precompile.count_keys(jobs[index::shares], device_part) for index in range(shares)]
