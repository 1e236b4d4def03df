"""Prepare a float model for training on its codes, change tiers on the way, and freeze it into an integer model."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vqvit.plan import Plan, PlanError
from vqvit.qat.attention import FakeAttention
from vqvit.qat.block import FakeEncoderBlock
from vqvit.qat.calibrate import calibrate
from vqvit.qat.linear import FakePatchEmbed, FakeQuantLinear
from vqvit.qat.options import QatOptions
from vqvit.rewriter import match, quantized_modules, replacement_class, swap


def prepare_(
    model: nn.Module,
    plan: Plan,
    calibration: Iterable | None = None,
    options: QatOptions | None = None,
    progress: bool = False,
) -> None:
    """Replace the planned blocks and layers of a float32 model, in place, by trainable ones that compute on codes.

    Args:
        plan: as for `vqvit.quantize_`, with weights of 8 bits.
        calibration: batches as for `quantize_`. They start static scales, and choose the spread term β in [-2, 1] of
            weight scales by the error of the layer's output (numerics §2). Without them weight scales start from the
            plan's β, and static scales must come from a state dict before the model runs.
        options: what is learned.
        progress: show progress bars on stderr.

    Raises `PlanError` for a plan that does not fit the model or has no training form, `CalibrationError` for unusable
    data. After an error the model is as it was.
    """
    options = options or QatOptions()
    _require_float(model)
    half = getattr(torch, plan.half_dtype)
    blocks, layers = match(model, plan)
    replacements: dict[str, nn.Module] = {
        block.name: replacement_class(FakeEncoderBlock, type(module))(block, planned, parts, half, options)
        for block, planned, parts, module in blocks
    }
    for layer, module in layers:
        kind = FakeQuantLinear if isinstance(module, nn.Linear) else FakePatchEmbed
        replacements[layer.name] = kind(layer, module.weight, module.bias, half, options)
    for name, module in replacements.items():
        module.model_plan, module.original = plan, (model.get_submodule(name),)  # in a tuple: not a submodule
        module.train(module.original[0].training)
        swap(model, name, module)
    if calibration is None:
        return
    try:
        calibrate(model, calibration, progress)
    except (ValueError, RuntimeError, TypeError, KeyboardInterrupt):
        unprepare_(model)
        raise


def unprepare_(model: nn.Module) -> None:
    """Put the float modules back, as they were before `prepare_`."""
    for name, module in list(prepared_modules(model)):
        swap(model, name, module.original[0])


def prepared_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The replaced blocks, and layers outside them, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, FakeEncoderBlock | FakeQuantLinear) and hasattr(module, "original"):
            yield name, module


def fake_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The trainable quantized layers by the names of the plan, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}


def fake_attentions(model: nn.Module) -> dict[str, FakeAttention]:
    """The quantizers of q, k and v by the names of the plan's blocks."""
    return {name: module.attention for name, module in model.named_modules() if isinstance(module, FakeEncoderBlock)}


def plan_of(model: nn.Module) -> Plan:
    """The plan of a prepared model, with its current tiers and what was learned of beta, delta and mu.

    Raises `PlanError` for a model that is not prepared.
    """
    first = next(prepared_modules(model), None)
    if first is None:
        raise PlanError(f"{type(model).__name__}: expected a model prepared for training; got another")
    plan, layers = first[1].model_plan, fake_layers(model)
    return dataclasses.replace(plan, layers=tuple(layers[layer.name].plan for layer in plan.layers))


def retier_(model: nn.Module, layer_name: str, tier: str) -> None:
    """Give a layer of a prepared model another tier, with the weight that it has now.

    Only `int8` has compensation. Scales that the new tier does not use are dropped, those that it uses anew start from
    the plan; optimizers must be built again. Raises `PlanError` for a tier that does not fit the layer.
    """
    layers = fake_layers(model)
    if layer_name not in layers:
        raise PlanError(f"retier_: expected a layer among {', '.join(layers)}; got {layer_name!r}")
    layer = layers[layer_name]
    plan = layer.plan
    compensation = plan.compensation if tier == "int8" else "none"
    factorized = plan.factorized and tier != "fp16"
    layer.adopt_(dataclasses.replace(plan, tier=tier, compensation=compensation, factorized=factorized))


def load_snapshot_(model: nn.Module, plan: Plan, state: dict[str, Tensor]) -> None:
    """Take a prepared model back to a plan of its own, with the state dict that it had then.

    Raises `PlanError` for a plan of other layers, `RuntimeError` for a state dict of another plan. After an error the
    model is as it was.
    """
    layers, before = fake_layers(model), plan_of(model)
    if [p.name for p in plan.layers] != [p.name for p in before.layers]:
        raise PlanError(f"load_snapshot_: expected a plan of {len(layers)} layers of this model; got another model's")
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        _load(model, layers, plan, state)
    except RuntimeError:
        _load(model, layers, before, saved)
        raise


def _load(model: nn.Module, layers: dict[str, FakeQuantLinear], plan: Plan, state: dict[str, Tensor]) -> None:
    for planned in plan.layers:
        layers[planned.name].adopt_(planned)
    model.load_state_dict(state)


def _require_float(model: nn.Module) -> None:
    kind = type(model).__name__
    if first := next(quantized_modules(model), None) or next(prepared_modules(model), None):
        raise PlanError(f"{kind}: expected a float model; {first[0]!r} is quantized or prepared already")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise PlanError(f"{kind}: expected float32 parameters for training; {name} is {parameter.dtype}")
