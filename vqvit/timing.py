"""Latency of several candidates under the same conditions: interleaved, so that drift of the machine hits all alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

WARMUP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 200

COLD_BYTES = 64 * 2**20
"""More than the L2 cache of any GPU here: operand sets rotate until they exceed it, so that a call reads from DRAM."""

LAUNCHES = 20
"""Calls in one timed CUDA graph: enough that starting it does not show."""


@dataclass(frozen=True)
class Latency:
    """Median, 20th and 80th percentile of `runs` calls, milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    runs: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float = 10.0,
    device: torch.device | str = "cpu",
    progress: str | None = None,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
) -> dict[str, Latency]:
    """Time every candidate once a round, in an order that rotates, after `WARMUP_ROUNDS` unmeasured rounds.

    Args:
        candidates: name to a call without arguments; a call is timed until the device is idle.
        seconds: stop after the first round that ends later than this, but not before `min_rounds` rounds.
        device: the device that the candidates run on.
        progress: label of a progress bar on stderr; None shows none.
    """
    if not candidates:
        raise ValueError("interleaved: expected at least one candidate; got none")
    names = list(candidates)
    for name in names * WARMUP_ROUNDS:
        _timed(candidates[name], device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    with tqdm(desc=progress, unit="round", disable=progress is None) as bar:
        for round_index in range(max_rounds):
            first = round_index % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(_timed(candidates[name], device))
            bar.update()
            if round_index + 1 >= min_rounds and time.perf_counter() > end:
                break
    return {name: _latency(values) for name, values in samples.items()}


def operand_sets(footprint: int) -> int:
    """Sets of operands, of so many bytes each, that calls have to rotate through to find none of them in a cache."""
    return min(LAUNCHES, COLD_BYTES // max(1, footprint) + 1)


def back_to_back(calls: Sequence[Callable[[], object]], device: torch.device | str) -> Callable[[], float]:
    """A timer: runs `calls` one after the other and returns microseconds a call.

    On a GPU it replays one CUDA graph of `LAUNCHES` calls, taken from `calls` in turn, so that launches do not show;
    elsewhere it reads the clock around each of them once.
    """
    if torch.device(device).type != "cuda":

        def clocked() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls) * 1e6

        return clocked
    turns = list(itertools.islice(itertools.cycle(calls), LAUNCHES))
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turns:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replayed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(turns) * 1e3

    return replayed


def take_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """(median, p20, p80) of what each timer returns, one call of each a round after one unmeasured round."""
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


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has finished what was launched on it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _timed(call: Callable[[], object], device: torch.device | str) -> float:
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _latency(samples: list[float]) -> Latency:
    p20, median, p80 = np.percentile(samples, (20, 50, 80))
    return Latency(float(median), float(p20), float(p80), len(samples))
