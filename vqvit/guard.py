"""Keep INT8 only where it is faster: what loses against float on this device goes back, and the report says so.

Each replaced block or layer, and then the whole model, is timed beside what it replaced, interleaved, on the inputs
that it gets from one batch. The baseline is the model in its own dtype.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vqvit import timing
from vqvit.batches import Batch
from vqvit.nn import EncoderBlock
from vqvit.plan import Plan
from vqvit.rewriter import LayerReport, quantized_modules, request_where_planned, revert

SECONDS = 0.5
"""Time spent on a comparison; the least number of rounds of `timing.interleaved` may take longer."""

Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], Mapping[str, float]]
"""Calls by name, device -> median milliseconds by name."""


@dataclass(frozen=True)
class Speed:
    """Median milliseconds of a float module, and of the one that replaced it."""

    float_ms: float
    int8_ms: float

    @property
    def speedup(self) -> float:
        return self.float_ms / self.int8_ms

    def __str__(self) -> str:
        return f"{self.speedup:.2f}x of float ({self.int8_ms:.3g} ms against {self.float_ms:.3g} ms)"


def medians(candidates: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The `Timer` that measures."""
    return {name: t.median_ms for name, t in timing.interleaved(candidates, SECONDS, device).items()}


def keep_faster(
    model: nn.Module, plan: Plan, sample: Batch, min_speedup: float, timer: Timer = medians
) -> tuple[Plan, tuple[LayerReport, ...]]:
    """Put float modules back where INT8 is less than `min_speedup` times as fast.

    Args:
        model: a quantized model that still holds its float modules.
        plan: its plan.
        sample: inputs of the size that will be served, on the model's device.
        min_speedup: float time over int8 time that a module, and the model, must reach.
        timer: measures; tests inject times.

    Returns: the plan of what stays, and a report of what went back: everything, if the whole model is too slow.
    """
    replaced = dict(quantized_modules(model))
    for module in replaced.values():
        module.original[0].eval()
    with torch.no_grad():
        speeds = _module_speeds(model, replaced, sample, timer)
        slow = {name: f"INT8 is {speeds[name]}" for name in replaced if speeds[name].speedup < min_speedup}
        plan = revert(model, plan, list(slow))
        left = [name for name in replaced if name not in slow]
        if left:
            whole = _compare(timer, float_skeleton(model), model, sample.args, sample.kwargs)
            if whole.speedup < min_speedup:
                plan = revert(model, plan, left)
                slow |= {name: f"the whole model in INT8 is {whole}" for name in left}
    wanted = f"; {min_speedup:g}x was asked for"
    roles = {name: "block" if isinstance(m, EncoderBlock) else m.plan.role for name, m in replaced.items()}
    return plan, tuple(LayerReport(name, roles[name], "skipped", reason + wanted) for name, reason in slow.items())


def float_skeleton(model: nn.Module) -> nn.Module:
    """The float model that a quantized one replaced: new containers around the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared |= {id(module): module.original[0] for _, module in quantized_modules(model)}
    skeleton = copy.deepcopy(model, shared)
    request_where_planned(skeleton, None)
    return skeleton


def _module_speeds(model: nn.Module, replaced: dict, sample: Batch, timer: Timer) -> dict[str, Speed]:
    inputs: dict[str, tuple] = {}

    def record(name: str):
        def hook(module, args, kwargs):
            inputs.setdefault(name, (args, kwargs))

        return hook

    handles = [m.register_forward_pre_hook(record(name), with_kwargs=True) for name, m in replaced.items()]
    try:
        model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in replaced if name not in inputs]:
        raise ValueError(
            f"min_speedup: expected every replaced module to run on the sample; {', '.join(missing)} did not"
        )
    return {name: _compare(timer, module.original[0], module, *inputs[name]) for name, module in replaced.items()}


def _compare(timer: Timer, floating: nn.Module, integer: nn.Module, args: tuple, kwargs: dict) -> Speed:
    device = next(integer.buffers()).device
    times = timer({"float": lambda: floating(*args, **kwargs), "int8": lambda: integer(*args, **kwargs)}, device)
    return Speed(times["float"], times["int8"])
