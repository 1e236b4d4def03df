"""The layers of a plan in a float model: their weights, and how to run one of them alone in integers.

Hooks on the float modules put an integer layer's output in place of the float one's; the model itself is not changed.
"""

import dataclasses
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqvit import families
from vqvit.families import BlockParts
from vqvit.nn import HalfPatchEmbed, QuantLinear, QuantPatchEmbed
from vqvit.nn.block import ROLES as BLOCK_ROLES
from vqvit.nn.block import equalizer, make_linear, norm_reach
from vqvit.nn.module import QuantModule
from vqvit.plan import LayerPlan, Plan, PlanError

NORMS = {"qkv": "norm1", "fc1": "norm2"}
"""Roles behind a LayerNorm, which can hold an equaliser."""


@dataclass(frozen=True)
class Part:
    """Rows of a layer's weight that are scored as one matrix, and where the float model computes them.

    Attributes: name; module; rows of the whole weight; outputs of the module.
    """

    name: str
    module: nn.Linear | nn.Conv2d
    rows: slice
    outputs: slice


@dataclass(frozen=True)
class Target:
    """A plan's layer in the float model: its weight (N, K), bias (N,), equaliser c (K,) of its input, and its parts."""

    plan: LayerPlan
    weight: Tensor
    bias: Tensor | None
    equalizer: Tensor | None
    parts: tuple[Part, ...]

    def quantized(self, tier: str, half: torch.dtype) -> QuantModule:
        """The module that computes this layer, of an equalised input, in `tier`. Raises `PlanError` for a tier that the
        plan's other options rule out.
        """
        activation = "per_token" if self.plan.activation == "static" else self.plan.activation
        plan = dataclasses.replace(self.plan, tier=tier, activation=activation)
        weight = self.weight if self.folded(tier) is None else self.weight.float() * self.equalizer
        module = self.parts[0].module
        if isinstance(module, nn.Linear):
            return make_linear(plan, weight, self.bias, half)
        weight = weight.view(module.weight.shape)
        return (
            HalfPatchEmbed(plan, weight, self.bias, half)
            if tier == "fp16"
            else QuantPatchEmbed(plan, weight, self.bias)
        )

    def folded(self, tier: str) -> Tensor | None:
        """The equaliser that `tier` has: half precision needs none."""
        return None if tier == "fp16" else self.equalizer


def find_targets(model: nn.Module, plan: Plan) -> tuple[Target, ...]:
    """The plan's layers in a float model, in the plan's order. Raises `PlanError` for one that is not there."""
    modules = dict(model.named_modules())
    parts = {}
    for block in plan.blocks:
        if block.name not in modules:
            raise PlanError(f"plan: expected a block of this float model; got {block.name!r}")
        try:
            parts[block.name] = families.probe(modules[block.name])
        except families.NotABlock as reason:
            raise PlanError(f"plan: expected {block.name} to be a float transformer block; {reason}") from reason
    targets = []
    for layer in plan.layers:
        block, _, role = layer.name.rpartition(".")
        if block in parts and role in BLOCK_ROLES:
            targets.append(_block_target(layer, role, parts[block]))
        elif isinstance(module := modules.get(layer.name), nn.Linear | nn.Conv2d):
            targets.append(_target(layer, (module,), (layer.name,)))
        else:
            raise PlanError(f"plan: expected a layer of this float model; got {layer.name!r}")
    return tuple(targets)


def _block_target(layer: LayerPlan, role: str, parts: BlockParts) -> Target:
    modules = parts.qkv if role == "qkv" else (getattr(parts, role),)
    names = tuple(f"{layer.name}.{part}" for part in "qkv") if role == "qkv" else (layer.name,)
    target = _target(layer, modules, names)
    if role not in NORMS or not layer.equalize:
        return target
    norm = getattr(parts, NORMS[role])
    reach = norm_reach(norm.weight.detach(), norm.bias.detach())
    return dataclasses.replace(target, equalizer=equalizer(reach, target.weight))


def _target(layer: LayerPlan, modules: tuple[nn.Module, ...], names: tuple[str, ...]) -> Target:
    """A layer of one module, or of one for each name; a single module's rows are divided among the names."""
    weight = torch.cat([module.weight.detach().flatten(1) for module in modules])
    bias = None
    if any(module.bias is not None for module in modules):
        zeros = [module.weight.new_zeros(module.weight.shape[0]) for module in modules]
        bias = torch.cat([z if m.bias is None else m.bias.detach() for m, z in zip(modules, zeros, strict=True)])
    size = len(weight) // len(names)
    rows = [slice(i * size, (i + 1) * size) for i in range(len(names))]
    owners = modules if len(modules) == len(names) else modules * len(names)
    outputs = [slice(0, size)] * len(names) if len(modules) == len(names) else rows
    return Target(layer, weight, bias, None, tuple(map(Part, names, owners, rows, outputs)))


def in_tier(target: Target, tier: str, half: torch.dtype) -> QuantModule | None:
    """The layer in `tier`; None where its other options rule the tier out."""
    try:
        module = target.quantized(tier, half)
    except PlanError:
        return None
    if isinstance(module, QuantLinear):
        module.pack_()
    return module


@contextmanager
def replaced(target: Target, parts: tuple[Part, ...], quantized: QuantModule, equalizer: Tensor | None):
    """Within it, the float model's outputs of these parts are those of the quantized layer."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0] if equalizer is None else (args[0] / equalizer).to(args[0].dtype)
        y = quantized(x).to(output.dtype)
        if isinstance(module, nn.Conv2d):
            return y
        mixed = output.clone()
        for part in parts:
            if part.module is module:
                mixed[..., part.outputs] = y[..., part.rows]
        return mixed

    with ExitStack() as hooks:
        for module in dict.fromkeys(part.module for part in parts):
            hooks.callback(module.register_forward_hook(hook).remove)
        yield
