"""Turn a float model into an integer one, and back: plan, build, swap.

`make_plan` reads the model and decides; `apply_plan` builds every replacement first and swaps them in only when all of
them exist, so that an error leaves the model as it was; `restore` puts the float structure back.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqvit import families, trial
from vqvit.alterations import adapted, altered, altered_part
from vqvit.families import BlockParts, NotABlock
from vqvit.nn import CompensatedPatchEmbed, EncoderBlock, HalfPatchEmbed, QuantLinear, QuantModule, QuantPatchEmbed
from vqvit.nn.block import ROLES as BLOCK_ROLES
from vqvit.nn.block import make_linear
from vqvit.nn.leading import request_leading_tokens
from vqvit.plan import BlockPlan, LayerPlan, Plan, PlanError, QuantConfig
from vqvit.probing import looks_like_block, verify_block
from vqvit.trial import Call, NoTrial, Trial

FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer or block.

    Attributes: name; role, one of `vqvit.plan.ROLES` or "block"; status, one of `vqvit.plan.TIERS` or "skipped"; reason
    why it was skipped; shape of the weight.
    """

    name: str
    role: str
    status: str
    reason: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `quantize_` did: every layer it looked at, the plan that reproduces it, what became of the CLS shortcut
    (`vqvit.shortcut`): where it is used, or why not, and of the comparison with float (`vqvit.verification`): its error
    and its seconds, or why there was none.
    """

    layers: tuple[LayerReport, ...]
    plan: Plan
    cls_only: str
    verified: str = "not run"

    def to_dict(self) -> dict:
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        plan = dataclasses.asdict(self.plan)
        return {"layers": layers, "plan": plan, "cls_only": self.cls_only, "verified": self.verified}

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{r.name:{width}}  {r.role:11}  {r.status:9}  {'x'.join(map(str, r.shape)):10}  {r.reason}".rstrip()
            for r in self.layers
        ]
        return "\n".join([*lines, f"CLS shortcut: {self.cls_only}", f"Comparison with float: {self.verified}"])


def make_plan(
    model: nn.Module, config: QuantConfig, tried: Trial | NoTrial | None = None
) -> tuple[Plan, tuple[LayerReport, ...]]:
    """Decide what to replace. Returns the plan and a report of what is skipped and why.

    Args: model; config; tried, a run of the model that watched `candidates`, or why there is none. Without it there is
    one here, where the model can be run.

    Raises `PlanError` if the model is already quantized, or if nothing in it can be.
    """
    refuse_quantized(model)
    calls = _calls(model) if tried is None else tried.calls if isinstance(tried, Trial) else {}
    blocks, layers, skipped = [], [], []
    taken: set[int] = set()
    shared = _shared_weights(model)
    adapters = {id(part): reason for part, reason in adapted(model)}
    for name, module in model.named_modules():
        if id(module) in taken or not looks_like_block(module):
            continue
        try:
            if (reason := altered_part(module)) is not None:
                raise NotABlock(reason)
            parts = families.probe(module)
            if shared & {id(p) for p in module.parameters()}:
                raise NotABlock("a weight is shared with another layer")
            returns_tuple = verify_block(module, parts, calls.get(name, []))
        except NotABlock as reason:
            skipped.append(LayerReport(name, "block", "skipped", f"kept its structure: {reason}"))
            continue
        roles = {role: config.tier_of(f"{name}.{role}", role) for role in BLOCK_ROLES}
        if "skip" in roles.values():
            kept = ", ".join(role for role, tier in roles.items() if tier == "skip")
            skipped.append(LayerReport(name, "block", "skipped", f"kept its structure: {kept} skipped on request"))
            continue
        blocks.append(BlockPlan(name, config.attention, returns_tuple, attention_scales=config.attention_scales))
        layers += [_layer_plan(f"{name}.{role}", role, roles[role], config) for role in BLOCK_ROLES]
        taken |= {id(m) for m in module.modules()}
    for name, module in model.named_modules():
        if id(module) in taken or not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        role, reason = _classify(name, module, shared)
        reason = adapters.get(id(module)) or altered(module) or reason
        tier = config.tier_of(name, role)
        if reason or tier == "skip":
            shape = tuple(module.weight.shape)
            skipped.append(LayerReport(name, role, "skipped", reason or "skipped on request", shape))
        else:
            layers.append(_layer_plan(name, role, tier, config))
    if not layers:
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in skipped) or "it has no Linear layer and no patch embedding"
        raise PlanError(f"{type(model).__name__}: expected a model with layers to quantize; got none ({reasons})")
    return Plan(tuple(blocks), tuple(layers), config.half_dtype), tuple(skipped)


def refuse_altered(model: nn.Module, plan: Plan) -> None:
    """Raise `PlanError` if the plan names a block or a layer that is not what its class says (`vqvit.alterations`)."""
    adapters = {id(part): reason for part, reason in adapted(model)}
    blocks, layers = match(model, plan)
    for planned in blocks:
        if (reason := altered_part(planned.module) or adapters.get(id(planned.module))) is not None:
            raise PlanError(f"plan: expected a plain block {planned.plan.name}; {reason}")
    for layer, module in layers:
        if (reason := adapters.get(id(module)) or altered(module)) is not None:
            raise PlanError(f"plan: expected a plain layer {layer.name}; {reason}")


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that may be blocks, by name."""
    return {name: module for name, module in model.named_modules() if looks_like_block(module)}


def _calls(model: nn.Module) -> dict[str, list[Call]]:
    try:
        return trial.try_out(model, None, candidates(model)).calls
    except NoTrial:
        return {}


class PlannedBlock(NamedTuple):
    """A block of a float model that a plan replaces: its plan, that of each of its roles, its parts, and itself."""

    plan: BlockPlan
    layers: dict[str, LayerPlan]
    parts: BlockParts
    module: nn.Module


def match(model: nn.Module, plan: Plan) -> tuple[list[PlannedBlock], list[tuple[LayerPlan, nn.Linear | nn.Conv2d]]]:
    """The blocks of a float model that a plan replaces, and the layers outside them. Raises `PlanError` if it does not
    fit.
    """
    modules = dict(model.named_modules())
    by_name = {layer.name: layer for layer in plan.layers}
    parts = {block.name: _planned_block(modules, block) for block in plan.blocks}
    _check_names(modules, plan)
    blocks = []
    for block in plan.blocks:
        layers = {role: by_name.pop(f"{block.name}.{role}", None) for role in BLOCK_ROLES}
        if missing := [f"{block.name}.{role}" for role, layer in layers.items() if layer is None]:
            raise PlanError(f"plan: expected every layer of block {block.name}; {', '.join(missing)} missing")
        blocks.append(PlannedBlock(block, layers, parts[block.name], modules[block.name]))
    return blocks, [(layer, modules[layer.name]) for layer in by_name.values()]


def apply_plan(model: nn.Module, plan: Plan) -> tuple[LayerReport, ...]:
    """Replace the plan's blocks and layers in place. Raises `PlanError` if the plan does not fit the model.

    Each replaced module stays beside its replacement with its weights, until `release_float`. Works on the meta device
    too, where it lays out the modules that a checkpoint then fills.
    """
    refuse_quantized(model)
    half = getattr(torch, plan.half_dtype)
    blocks, layers = match(model, plan)
    replacements: dict[str, QuantModule] = {
        block.name: replacement_class(EncoderBlock, type(module))(block, planned, parts, half)
        for block, planned, parts, module in blocks
    }
    replacements |= {layer.name: _replacement(layer, module, half) for layer, module in layers}
    for name, module in replacements.items():
        module.model_plan = plan
        swap(model, name, module)
    request_where_planned(model, plan)
    model.eval()
    pack_weights(model)
    return _layer_reports(model, plan)


def restore(model: nn.Module, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """Undo `quantize_` in place: the float modules come back.

    Args:
        model: a model that `quantize_` or `load` returned.
        weights: the original float state dict; with it the original model comes back bit for bit. Without it, so does a
            model quantized with `keep_float=True`; else the weights are those that the codes stand for.

    Raises `PlanError` if the model is not quantized, `ValueError` if `weights` lacks a parameter.
    """
    plan_of(model)
    request_where_planned(model, None)
    for name, module in list(quantized_modules(model)):
        original = module.original[0]
        if weights is None and not any(p.is_meta for p in original.parameters()):
            swap(model, name, original)
            continue
        if weights is None:
            state = _float_state(module)
        else:
            wanted = {key: f"{name}.{key}" for key in original.state_dict()}
            if missing := [full for full in wanted.values() if full not in weights]:
                raise ValueError(f"restore: expected weights for {', '.join(missing)}; got none")
            state = {key: weights[full].clone() for key, full in wanted.items()}
        device = next(module.buffers()).device
        state = {
            key: state[key].to(device=device, dtype=tensor.dtype).reshape(tensor.shape)
            for key, tensor in original.state_dict().items()
        }
        original.load_state_dict(state, assign=True)
        original.requires_grad_(True)
        original.eval()
        swap(model, name, original)
    return model


def revert(model: nn.Module, plan: Plan, names: list[str]) -> Plan:
    """Put the float modules of some replaced blocks and layers back, which must still hold their weights.

    Returns the plan of the rest, which the remaining modules carry from now on.
    """
    modules = dict(quantized_modules(model))
    for name in names:
        swap(model, name, modules.pop(name).original[0].eval())
    inside = tuple(f"{name}." for name in names)
    plan = dataclasses.replace(
        plan,
        blocks=tuple(block for block in plan.blocks if block.name not in names),
        layers=tuple(x for x in plan.layers if x.name not in names and not (inside and x.name.startswith(inside))),
    )
    for module in modules.values():
        module.model_plan = plan
    request_where_planned(model, plan)
    return plan


def request_where_planned(model: nn.Module, plan: Plan | None) -> None:
    """Let calls of the whole model ask for leading tokens alone exactly if `plan` has a block that can do so."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is request_leading_tokens:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    if plan is not None and plan.shortened is not None:
        model.register_forward_pre_hook(request_leading_tokens, with_kwargs=True)


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, QuantModule]]:
    """The outermost replaced modules with their names."""
    outermost: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantModule) and not any(name.startswith(f"{outer}.") for outer in outermost):
            outermost.append(name)
            yield name, module


def plan_of(model: nn.Module) -> Plan:
    """The plan that a quantized model carries. Raises `PlanError` if it is not quantized."""
    replaced = list(quantized_modules(model))
    if not replaced:
        raise PlanError(f"{type(model).__name__}: expected a quantized model; got one without quantized layers")
    return replaced[0][1].model_plan


def release_float(model: nn.Module) -> None:
    """Drop the float weights of replaced modules; their structure stays, for `restore`."""
    for _, module in quantized_modules(model):
        module.original[0].to("meta")


def pack_weights(model: nn.Module, layout: str | None = None) -> None:
    """Lay out all weights for the kernels that will run, or as `layout` says (`QuantLinear.pack_`); checkpoints do not
    see it.
    """
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.pack_(layout)


def refuse_quantized(model: nn.Module) -> None:
    """Raise `PlanError` if a part of the model is quantized."""
    if first := next(quantized_modules(model), None):
        raise PlanError(f"{type(model).__name__}: expected a float model; {first[0]!r} is quantized already")


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module owns: a replacement would untie them."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _classify(name: str, module: nn.Linear | nn.Conv2d, shared: set[int]) -> tuple[str, str]:
    """Role of a layer outside the blocks, and why it must stay float, or ""."""
    if isinstance(module, nn.Conv2d):
        patches = module.kernel_size == module.stride and module.groups == 1 and module.dilation == (1, 1)
        if type(module) is not nn.Conv2d or not patches or module.padding not in ((0, 0), "valid"):
            return "patch_embed", "a convolution whose stride is not its kernel is no patch embedding"
        role = "patch_embed"
    elif type(module) is not nn.Linear:
        return "linear", f"{type(module).__name__} is a special Linear that its owner reads directly"
    else:
        role = "head" if name.rsplit(".", 1)[-1] in families.HEAD_NAMES else "linear"
    return role, "its weight is shared with another layer" if id(module.weight) in shared else ""


def _layer_plan(name: str, role: str, tier: str, config: QuantConfig) -> LayerPlan:
    activation = "per_token" if role == "patch_embed" else config.activation_of(name, role)  # numerics §8
    return LayerPlan(
        name, role, tier, config.per_channel, activation=activation, equalize=config.equalize,
        bits=8 if tier == "fp16" else config.bits_of(name, role),
        compensation=config.compensation_of(name, role), observer=config.observer,
        factorized=config.factorize_patches and role == "patch_embed" and tier != "fp16",
    )  # fmt: skip


def _check_names(modules: dict[str, nn.Module], plan: Plan) -> None:
    """Raise `PlanError` for a layer that the model, with the plan's blocks replaced, does not have."""
    roles = {f"{block.name}.{role}": role for block in plan.blocks for role in BLOCK_ROLES}
    inside = tuple(f"{block.name}." for block in plan.blocks)
    linears = (name for name, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d))
    valid = (*roles, *(name for name in linears if not name.startswith(inside)))
    for layer in plan.layers:
        if layer.name not in valid:
            raise PlanError(f"plan: expected a layer of this model ({', '.join(valid)}); got {layer.name!r}")
        if layer.role != roles.get(layer.name, layer.role):
            raise PlanError(f"plan: expected role {roles[layer.name]} of {layer.name}; got {layer.role!r}")


def _planned_block(modules: dict[str, nn.Module], block: BlockPlan) -> BlockParts:
    if block.name not in modules:
        blocks = ", ".join(name for name, module in modules.items() if looks_like_block(module)) or "it has none"
        raise PlanError(f"plan: expected a block of this model ({blocks}); got {block.name!r}")
    try:
        return families.probe(modules[block.name])
    except NotABlock as reason:
        raise PlanError(f"plan: expected {block.name} to be a transformer block; it is not: {reason}") from reason


def _replacement(layer: LayerPlan, module: nn.Linear | nn.Conv2d, half: torch.dtype) -> QuantModule:
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    if isinstance(module, nn.Linear):
        return make_linear(layer, weight, bias, half)
    if layer.tier == "fp16":
        return HalfPatchEmbed(layer, weight, bias, half)
    kind = QuantPatchEmbed if layer.compensation == "none" else CompensatedPatchEmbed
    return kind(layer, weight, bias)


@functools.cache
def replacement_class(kind: type[nn.Module], replaced: type[nn.Module]) -> type[nn.Module]:
    """A block of `kind` that is also an instance of the replaced class: transformers finds hidden states by class."""

    class Replacement(kind, replaced):
        def __init__(self, *args):
            kind.__init__(self, *args)

        def __reduce_ex__(self, protocol):
            return _unpickled, (kind, replaced), self.__dict__

    Replacement.__name__ = Replacement.__qualname__ = f"{kind.__name__}[{replaced.__name__}]"
    return Replacement


def _unpickled(kind: type[nn.Module], replaced: type[nn.Module]) -> nn.Module:
    """An empty `replacement_class`, which pickle fills: the class itself is no attribute of a module."""
    made = replacement_class(kind, replaced)
    return made.__new__(made)


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at `name`; a replacement remembers the module it replaced. Forward hooks stay with the place."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    replaced = parent.get_submodule(child)
    if isinstance(module, QuantModule):
        module.original = (replaced,)  # in a tuple: not a submodule
    for hooks in FORWARD_HOOKS:
        setattr(module, hooks, getattr(replaced, hooks))
    parent._modules[child] = module


def _float_state(module: QuantModule) -> dict[str, Tensor]:
    if isinstance(module, EncoderBlock):
        return module.float_state(families.probe(module.original[0]).names)
    state = {"weight": module.float_weight()}
    return state if module.bias is None else {**state, "bias": module.bias}


def _layer_reports(model: nn.Module, plan: Plan) -> tuple[LayerReport, ...]:
    reports = []
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        shape = (module.out_features, module.in_features)
        reports.append(LayerReport(layer.name, layer.role, layer.tier, "", shape))
    return tuple(reports)
