"""Static activation scales from data: each layer's range as its observer chooses it (numerics §3)."""

from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from vqvit.batches import Batch, Batches
from vqvit.calibration.observers import CalibrationError, MaxObserver, Ranges, make_observer
from vqvit.calibration.state import CalibrationState, Fingerprint
from vqvit.nn import QuantLinear
from vqvit.plan import Plan

STATE_EVERY = 8
"""Batches between two writes of the calibration state."""


@torch.no_grad()
def calibrate_activations(
    model: nn.Module,
    plan: Plan,
    names: list[str],
    batches: Batches,
    progress: bool,
    state_file: str | Path | None,
    seed: int,
) -> None:
    """Give the layers `names` of a quantized model, which runs `plan`, their input scales and ranges.

    state_file keeps an interrupted calibration: written every `STATE_EVERY` batches, gone on from if it is there, and
    deleted when the ranges are known. seed: of the rows that the observer `output_error` samples.

    Raises `CalibrationError` for data that the model does not take, or that does not reach a layer.
    """
    if not names:
        return
    if state_file is not None and Path(state_file).exists() and not Path(state_file).is_file():
        raise CalibrationError(f"calibration state: expected a file, or a name for a new one; {state_file} is none")
    layers: dict[str, QuantLinear] = {name: model.get_submodule(name) for name in names}
    observers = {name: make_observer(name, layer.plan.observer, seed) for name, layer in layers.items()}
    fingerprint = Fingerprint.of(model, plan, batches, seed) if state_file else None
    done = _resume(state_file, fingerprint, observers, next(model.buffers()).device)
    try:
        for name, layer in layers.items():
            layer.observer = observers[name]
        rest = islice(batches, done, None)
        bar = tqdm(rest, "calibrating", len(batches), initial=done, unit="batch", disable=not progress)
        for index, batch in enumerate(bar, done):
            _observe(model, batch, index)
            if fingerprint is not None and (index + 1) % STATE_EVERY == 0:
                CalibrationState.of(fingerprint, index + 1, observers).save(state_file)
    finally:
        for layer in layers.values():
            layer.observer = None
    for name, layer in layers.items():
        if not observers[name].started:
            raise CalibrationError(f"calibration: expected {name} to run on the calibration data; it did not")
        chosen, scale = observers[name].range(layer.plan.observer, layer.plan.delta, layer.float_weight())
        layer.input_scale, layer.input_range = scale.clone(), chosen
    if state_file is not None:
        Path(state_file).unlink(missing_ok=True)


def _resume(
    path: str | Path | None, fingerprint: Fingerprint | None, observers: dict[str, MaxObserver], device: torch.device
) -> int:
    """Batches that the state at `path` has seen, which the observers then have too; 0 without one."""
    if path is None or not Path(path).exists():
        return 0
    state = CalibrationState.load(path, fingerprint)
    for name, observer in observers.items():
        observer.load(state.observers.get(name, {}), device)
    return state.done


def _observe(model: nn.Module, batch: Batch, index: int) -> None:
    placed = batch.to(next(model.buffers()).device)
    try:
        model(*placed.args, **placed.kwargs)
    except CalibrationError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        shape = tuple(batch.images.shape)
        raise CalibrationError(
            f"calibration: expected images that the model takes; batch {index}, {shape}: {error}"
        ) from error


def ranges_of(model: nn.Module) -> Ranges | None:
    """The calibrated ranges that a quantized model carries; None if it has no static scales."""
    layers = ((name, getattr(module, "input_range", None)) for name, module in model.named_modules())
    found = {name: layer for name, layer in layers if layer is not None}
    return Ranges(found) if found else None
