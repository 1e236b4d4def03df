"""Quantize a model in place: its plan, its integer modules, and with data its ranges and its rounding."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vqvit import guard, shortcut, trial, verification
from vqvit.batches import Batch, Batches, read_batch
from vqvit.calibration import (
    CalibrationError,
    calibrate_activations,
    calibrate_heads,
    factorize_,
    observed_heads,
    patch_factors,
)
from vqvit.plan import Plan, PlanError, QuantConfig
from vqvit.reconstruction import NotReached, reconstruct_
from vqvit.rewriter import (
    LayerReport,
    Report,
    apply_plan,
    candidates,
    make_plan,
    refuse_altered,
    refuse_quantized,
    release_float,
    restore,
)
from vqvit.trial import NoTrial, Trial

MIN_IMAGES = 8
"""Fewest images for static scales. Of n + 1 exchangeable images each is as likely to hold a layer's largest input, so
after n images a new one exceeds a layer's range with probability 1 / (n + 1): 11 % with eight."""


def quantize_(
    model: nn.Module,
    config: QuantConfig | Plan | None = None,
    calibration: Iterable | None = None,
    progress: bool = False,
    keep_float: bool = False,
    min_speedup: float | None = None,
    sample: object = None,
    calibration_state: str | Path | None = None,
    seed: int = 0,
    verify: bool = True,
) -> Report:
    """Replace a model's layers by integer ones, in place, and put it in eval mode.

    Args:
        model: a float Vision Transformer (Hugging Face, timm or any `nn.Module`), on the device it will run on.
        config: what to do (`QuantConfig`), or exactly what to do (`Plan`); default W8A8, int8 attention.
        calibration: batches of model inputs: a tensor, a dict of model inputs, or a list or tuple that begins with
            one, as a `DataLoader` yields them; read anew in each pass and not kept (`vqvit.batches.Batches`). Needed
            for `activation="static"`, `attention_scales="static"` and `factorize_patches=True`, and then of at least
            `MIN_IMAGES` images, and for `rounding="error_aware"`; with `rounding="auto"`, and with a `Plan`, weights
            are rounded by their output error where it is given (`vqvit.reconstruction`).
        progress: show a progress bar on stderr.
        keep_float: keep the float weights in memory, so that `restore` brings back exactly this model.
        min_speedup: put blocks and layers back that are not this many times as fast as in float on this device, and
            all of them if the whole model is not; the report says which, with the times. None keeps everything.
        sample: one batch of the size that will be served, for `min_speedup`.
        calibration_state: a file that keeps an interrupted calibration: gone on from if it is there, and deleted when
            the ranges are known.
        seed: of the rows that the observer `output_error` samples.
        verify: run the quantized model once beside the float one, on `sample`, the first images of `calibration`, or a
            random image as the model's configuration describes it, and put back the layers with which it fails or is
            far from float (`vqvit.verification`). The report says which and why, and how long it took.

    Returns: what was replaced, skipped and why, with the plan.

    Raises `PlanError` if the plan does not fit, `CalibrationError` for unusable data, `ValueError` for weights that
    hold NaN or exceed the accumulator bound. After an error the model is unchanged.
    """
    _refuse_double(model)
    served = _read_sample(min_speedup, sample)
    config = config or QuantConfig()
    refuse_quantized(model)
    batches = _read_batches(calibration)
    example = served or next(iter(batches), None)
    tried = _try_out(model, example, verify or not isinstance(config, Plan))
    plan, skipped = (config, ()) if isinstance(config, Plan) else make_plan(model, config, tried)
    static, heads = _static_names(plan)
    patches = [layer.name for layer in plan.layers if layer.factorized]
    rounding = "auto" if isinstance(config, Plan) else config.rounding
    if rounding == "error_aware" and calibration is None:
        raise CalibrationError("calibration: expected batches for rounding='error_aware'; got calibration=None")
    needed = {"static activation": static, "static attention": heads, "factorised patch": patches}
    _check_calibration(batches, needed)
    if isinstance(config, Plan):
        cls_only = shortcut.check_shortcut(model, plan, example)
        refuse_altered(model, plan)
    else:
        plan, cls_only = shortcut.plan_shortcut(model, plan, config.cls_only, example)
    with trial.kept_random_state(model):
        factors = patch_factors(model, patches, batches)
    modes = {module: module.training for module in model.modules()}
    shortened, undone, verified = plan.shortened, (), "off on request"
    reports = apply_plan(model, plan)
    try:
        with trial.kept_random_state(model):
            if verify and batches:  # what fails would fail in calibration
                plan, undone, _ = _verify(model, plan, tried, keep_float, failures_only=True)
            _fit(model, plan, factors, batches, rounding, progress, calibration_state, seed)
            if served is not None:
                plan, slower = guard.keep_faster(model, plan, served.to(next(model.buffers()).device), min_speedup)
                undone += slower
            if verify and plan.layers:
                plan, broken, verified = _verify(model, plan, tried, keep_float)
                undone += broken
            cls_only = cls_only if plan.shortened == shortened else shortcut.describe(plan.shortened)
    except (*trial.RUN_ERRORS, OSError, KeyboardInterrupt) as error:
        restore(model)
        for module, mode in modes.items():
            module.training = mode
        if isinstance(error, NotReached):
            raise CalibrationError(str(error)) from error
        raise
    if not keep_float:
        release_float(model)
    kept = {layer.name for layer in plan.layers}
    return Report((*(r for r in reports if r.name in kept), *undone, *skipped), plan, cls_only, verified)


def _static_names(plan: Plan) -> tuple[list[str], list[str]]:
    """Layers with a static activation scale, and blocks with static scales in attention."""
    layers = [layer.name for layer in plan.layers if layer.activation == "static" and layer.tier != "fp16"]
    return layers, [block.name for block in plan.blocks if block.attention_scales == "static"]


def _fit(
    model: nn.Module, plan: Plan, factors: dict[str, Tensor], batches: Batches, rounding: str, progress: bool,
    calibration_state: str | Path | None, seed: int,
) -> None:  # fmt: skip
    """Ranges, equalisers and codes of a quantized model, from data."""
    static, heads = _static_names(plan)
    names = {layer.name for layer in plan.layers}
    factorize_(model, {name: factor for name, factor in factors.items() if name in names})
    with observed_heads(model, heads):
        calibrate_activations(model, plan, static, batches, progress, calibration_state, seed)
    calibrate_heads(model, heads, batches, progress)
    if batches and rounding != "nearest":
        reconstruct_(model, batches, progress)


def _try_out(model: nn.Module, given: Batch | None, wanted: bool) -> Trial | NoTrial:
    """The float model's run on a sample, or why there is none."""
    if not wanted:
        return NoTrial("off on request")
    try:
        return trial.try_out(model, given, candidates(model))
    except NoTrial as reason:
        return reason


def _verify(
    model: nn.Module, plan: Plan, tried: Trial | NoTrial, keep_float: bool, failures_only: bool = False
) -> tuple[Plan, tuple[LayerReport, ...], str]:
    """The plan of what stays, what was undone, and a line for the report."""
    if isinstance(tried, NoTrial):
        return plan, (), f"not possible: {tried}"
    return verification.verify_(model, plan, tried, keep_float, failures_only)


def _refuse_double(model: nn.Module) -> None:
    """No kernel computes with fp64 beside its codes, and the first call would fail."""
    if name := next((name for name, p in model.named_parameters() if p.dtype == torch.float64), None):
        raise PlanError(
            f"{type(model).__name__}: expected a model in float32, bfloat16 or float16; got float64 ({name}): call "
            "model.float() first"
        )


def _read_sample(min_speedup: float | None, sample: object) -> Batch | None:
    if (min_speedup is None) != (sample is None):
        missing = "sample" if sample is None else "min_speedup"
        raise ValueError(f"quantize_: expected min_speedup and sample together; {missing} is missing")
    if min_speedup is None:
        return None
    if not min_speedup > 0:
        raise ValueError(f"min_speedup: expected a positive number; got {min_speedup}")
    return read_batch(sample)


def _read_batches(calibration: Iterable | None) -> Batches:
    if calibration is None:
        return Batches([])
    try:
        batches = Batches(calibration)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"calibration: {error}") from error
    if not batches:
        raise CalibrationError("calibration: expected at least one batch; got none")
    return batches


def _check_calibration(batches: Batches, needed: dict[str, list[str]]) -> None:
    for kind, names in needed.items():
        if not batches and names:
            raise CalibrationError(
                f"calibration: expected batches for the {kind} scales of {len(names)} layers "
                f"({names[0]}, ...); got calibration=None"
            )
    if any(needed.values()) and batches.images < MIN_IMAGES:
        expected = f"expected at least {MIN_IMAGES} images for static scales"
        raise CalibrationError(f"calibration: {expected}; got {batches.images}")
