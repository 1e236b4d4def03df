"""Quantize a model, and give its static activation scales their ranges from data (numerics §3)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvit import guard, shortcut
from vqvit import numerics as nm
from vqvit.batches import Batch, read_batch
from vqvit.nn import QuantLinear
from vqvit.plan import Plan, QuantConfig
from vqvit.reconstruction import NotReached, reconstruct_
from vqvit.rewriter import Report, apply_plan, make_plan, release_float, restore

EMA_DECAY = 0.99
"""Memory of the running maximum and standard deviation: the paper's running statistics."""


class CalibrationError(ValueError):
    """Calibration data that cannot be used."""


class RangeObserver:
    """Running max|x| and sd(x) of a layer's input: an exponential moving average over batches, started by the first."""

    def __init__(self, name: str):
        self.name = name
        self.maximum: Tensor | None = None
        self.deviation: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a batch (M, K). Raises `CalibrationError` for NaN or Inf."""
        maximum, deviation = x.abs().amax().float(), x.float().std(correction=0)
        if not torch.isfinite(maximum):
            raise CalibrationError(f"calibration: expected finite inputs of {self.name}; got NaN or Inf")
        if self.maximum is None:
            self.maximum, self.deviation = maximum, deviation
        else:
            self.maximum = torch.lerp(maximum, self.maximum, EMA_DECAY)
            self.deviation = torch.lerp(deviation, self.deviation, EMA_DECAY)

    def scale(self, delta: float) -> Tensor:
        """max(1e-8, (max + delta · sd) / 127), fp32 scalar."""
        return ((self.maximum + delta * self.deviation) / nm.QMAX).clamp(min=nm.SCALE_MIN)


def quantize_(
    model: nn.Module,
    config: QuantConfig | Plan | None = None,
    calibration: Iterable | None = None,
    progress: bool = False,
    keep_float: bool = False,
    min_speedup: float | None = None,
    sample: object = None,
) -> Report:
    """Replace a model's layers by integer ones, in place, and put it in eval mode.

    Args:
        model: a float Vision Transformer (Hugging Face, timm or any `nn.Module`), on the device it will run on.
        config: what to do (`QuantConfig`), or exactly what to do (`Plan`); default W8A8, int8 attention.
        calibration: batches of model inputs: a tensor, a dict of model inputs, or (inputs, labels). Needed for
            `activation="static"` and `rounding="error_aware"`; with `rounding="auto"`, and with a `Plan`, weights are
            rounded by their output error where it is given (`vqvit.reconstruction`).
        progress: show a progress bar on stderr.
        keep_float: keep the float weights in memory, so that `restore` brings back exactly this model.
        min_speedup: put blocks and layers back that are not this many times as fast as in float on this device, and
            all of them if the whole model is not; the report says which, with the times. None keeps everything.
        sample: one batch of the size that will be served, for `min_speedup`.

    Returns: what was replaced, skipped and why, with the plan.

    Raises `PlanError` if the plan does not fit, `CalibrationError` for unusable data, `ValueError` for weights that
    hold NaN or exceed the accumulator bound. After an error the model is unchanged.
    """
    served = _read_sample(min_speedup, sample)
    config = config or QuantConfig()
    plan, skipped = (config, ()) if isinstance(config, Plan) else make_plan(model, config)
    static = [layer.name for layer in plan.layers if layer.activation == "static" and layer.tier != "fp16"]
    rounding = "auto" if isinstance(config, Plan) else config.rounding
    if rounding == "error_aware" and calibration is None:
        raise CalibrationError("calibration: expected batches for rounding='error_aware'; got calibration=None")
    batches = _read_calibration(calibration, static)
    example = served or next(iter(batches), None)
    if isinstance(config, Plan):
        cls_only = shortcut.check_shortcut(model, plan, example)
    else:
        plan, cls_only = shortcut.plan_shortcut(model, plan, config.cls_only, example)
    reports = apply_plan(model, plan)
    slower = ()
    try:
        _calibrate(model, static, batches, progress)
        if batches and rounding != "nearest":
            reconstruct_(model, batches, progress)
        if served is not None:
            shortened = plan.shortened
            plan, slower = guard.keep_faster(model, plan, served.to(next(model.buffers()).device), min_speedup)
            cls_only = cls_only if plan.shortened == shortened else shortcut.describe(plan.shortened)
    except (ValueError, RuntimeError, TypeError) as error:
        restore(model)
        if isinstance(error, NotReached):
            raise CalibrationError(str(error)) from error
        raise
    if not keep_float:
        release_float(model)
    kept = {layer.name for layer in plan.layers}
    return Report((*(r for r in reports if r.name in kept), *slower, *skipped), plan, cls_only)


def _read_sample(min_speedup: float | None, sample: object) -> Batch | None:
    if (min_speedup is None) != (sample is None):
        missing = "sample" if sample is None else "min_speedup"
        raise ValueError(f"quantize_: expected min_speedup and sample together; {missing} is missing")
    if min_speedup is None:
        return None
    if not min_speedup > 0:
        raise ValueError(f"min_speedup: expected a positive number; got {min_speedup}")
    return read_batch(sample)


def _read_calibration(calibration: Iterable | None, static: list[str]) -> list[Batch]:
    if calibration is None and static:
        raise CalibrationError(
            f"calibration: expected batches for the static activation scales of {len(static)} layers "
            f"({static[0]}, ...); got calibration=None"
        )
    if calibration is None:
        return []
    try:
        batches = [read_batch(batch) for batch in calibration]
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"calibration: {error}") from error
    if not batches:
        raise CalibrationError("calibration: expected at least one batch; got none")
    return batches


@torch.inference_mode()
def _calibrate(model: nn.Module, names: list[str], batches: list[Batch], progress: bool) -> None:
    if not names:
        return
    layers: dict[str, QuantLinear] = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.observer = RangeObserver(name)
    try:
        for batch in tqdm(batches, desc="calibrating", unit="batch", disable=not progress):
            batch = batch.to(next(model.buffers()).device)
            model(*batch.args, **batch.kwargs)
        for name, layer in layers.items():
            if layer.observer.maximum is None:
                raise CalibrationError(f"calibration: expected {name} to run on the calibration data; it did not")
            layer.input_scale = layer.observer.scale(layer.plan.delta).clone()
    finally:
        for layer in layers.values():
            layer.observer = None
