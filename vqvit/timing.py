"""Latency of several candidates under the same conditions: interleaved, so that drift of the machine hits all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

WARMUP_ROUNDS = 2
MIN_ROUNDS, MAX_ROUNDS = 5, 200


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
