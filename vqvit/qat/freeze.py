"""From a trained model to the integer model with exactly its codes."""

import torch
from torch import nn

from vqvit import shortcut
from vqvit.nn import CompensatedLinear, EncoderBlock, QuantModule
from vqvit.nn.block import ROLES
from vqvit.qat.block import FakeEncoderBlock
from vqvit.qat.linear import FakePatchEmbed, FakeQuantLinear
from vqvit.qat.prepare import plan_of, prepared_modules, unprepare_
from vqvit.rewriter import Report, apply_plan, restore, swap


@torch.no_grad()
def freeze_(model: nn.Module) -> Report:
    """Replace the trained modules, in place, by integer ones that compute with exactly their codes; eval mode.

    The float modules from before `prepare_` stay beside them until `vqvit.rewriter.release_float`.

    Raises `PlanError` if the model is not prepared, `UncalibratedError` for static scales without calibration,
    `ValueError` for weights that hold NaN. After an error the model is as it was.
    """
    plan, prepared = plan_of(model), dict(prepared_modules(model))
    modes = {module: module.training for module in model.modules()}
    unprepare_(model)
    try:
        layers = apply_plan(model, plan)
        for name, fake in prepared.items():
            module = model.get_submodule(name)
            if isinstance(fake, FakeEncoderBlock):
                _fill_block(module, fake)
            else:
                _fill_layer(module, fake)
    except (ValueError, RuntimeError, KeyboardInterrupt):
        if any(isinstance(module, QuantModule) for module in model.modules()):
            restore(model)
        for name, fake in prepared.items():
            swap(model, name, fake)
        for module, mode in modes.items():
            module.training = mode
        raise
    line = shortcut.describe(plan.shortened) if plan.shortened else "not used: the plan has none"
    return Report(layers, plan, line)


def _fill_block(block: EncoderBlock, fake: FakeEncoderBlock) -> None:
    for role in ("norm1", "norm2"):
        for part in (f"{role}_weight", f"{role}_bias"):
            setattr(block, part, getattr(fake, part).detach().clone())
    for role in ("layer_scale1", "layer_scale2"):
        scale = getattr(fake, role)
        setattr(block, role, None if scale is None else scale.detach().clone())
    if fake.attention.is_static:
        scales = (scale.detach().clone() for scale in fake.attention.static_scales())
        block.q_scale, block.k_scale, block.v_scale = scales
    for role in ROLES:
        _fill_layer(getattr(block, role), getattr(fake, role))


def _fill_layer(layer: QuantModule, fake: FakeQuantLinear) -> None:
    plan, weight = fake.plan, fake.quantize_weight()
    for what, tensor in (("weights", fake.weight), ("bias", fake.bias)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{plan.name}: expected finite {what}; got NaN or Inf")
    if plan.tier == "fp16":
        layer.half_weight = weight.codes
        layer.bias = None if fake.bias is None else fake.bias.detach().to(fake.half_dtype)
        return
    layer.plan = plan
    layer.zero_point = weight.zero_point
    repack = layer.packed
    layer.unpack_()
    if isinstance(layer, CompensatedLinear) and layer.residual is not None:
        layer.residual = fake.weight_residual(weight)
    layer.codes, layer.scale = weight.codes, weight.scale.detach().clone()
    if layer.code_sum is not None:
        layer.code_sum = weight.codes.sum(-1, dtype=torch.int32)
    layer.bias = None if fake.bias is None else fake.bias.detach().clone()
    if isinstance(fake, FakePatchEmbed):
        layer.equalizer = None if fake.equalizer is None else fake.equalizer.clone()
    layer.input_scale = None if fake.log_input_alpha is None else fake.input_scale().detach().clone()
    if repack:
        layer.pack_()
