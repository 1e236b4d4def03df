"""Timing of calls on a GPU as graph replays, interleaved; on the CPU, for rehearsals, by the clock."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

L2_BYTES = 64 * 2**20
"""Operand sets rotate until they exceed this, so that each launch reads from DRAM."""

LAUNCHES = 20
"""Calls in one timed graph."""


@dataclass(frozen=True)
class Run:
    """What the sections share: where, how much, until when."""

    device: torch.device
    quick: bool
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


def captured(run: Run, calls: list[Callable[[], object]]) -> Callable[[], float]:
    """A call that runs `calls` back to back, as one CUDA graph on a GPU, and returns microseconds a call."""
    if not run.cuda:

        def timed() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls) * 1e6

        return timed
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replayed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(calls) * 1e3

    return replayed


def interleaved(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """(median, p20, p80) of each timer's results, one call of each a round after one unmeasured round."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for round_index in range(rounds + 1):
        for name, timer in timers.items():
            value = timer()
            if round_index:
                samples[name].append(value)
    summary = {}
    for name, values in samples.items():
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
        summary[name] = (statistics.median(ordered), low, high)
    return summary


def copy_rate(run: Run) -> float:
    """Bytes a microsecond, read and written, of a device-to-device copy."""
    source = torch.empty(2**30 if run.cuda else 2**20, dtype=torch.int8, device=run.device)
    target = torch.empty_like(source)
    timer = captured(run, [lambda: target.copy_(source)] * 4)
    return 2 * source.numel() / interleaved({"copy": timer}, 5)["copy"][0]


def int8_rate(run: Run) -> float:
    """int8 operations a microsecond of torch._int_mm on a large square."""
    n = 8192 if run.cuda else 64
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=run.device) for _ in range(2))
    timer = captured(run, [lambda: torch._int_mm(a, b.t())] * 4)
    return 2 * n**3 / interleaved({"mm": timer}, 5)["mm"][0]
