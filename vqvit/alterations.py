"""Parts that differ from what their class says: hooks, computed weights, adapters. They stay float, by name."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vqvit.trial import prepares_weight, users_hook

WRAPPED = ("base_layer", "original_module")
"""Where adapters (PEFT and its like) keep the module that they wrap."""


def altered(module: nn.Module) -> str | None:
    """Why a module may compute something else than its class, or None."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)
        return f"a parametrization computes its {names}: make it permanent with remove_parametrizations"
    for hook in module._forward_pre_hooks.values():
        if prepares_weight(hook):
            return f"{type(hook).__name__} of torch.nn.utils computes its weight at every call: remove it first"
    if users_hook(module):
        return "a forward hook sees or changes what it computes"
    if type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm):
        if module._modules:
            return f"it has a part of its own ({', '.join(module._modules)})"
        weight = vars(module)["_parameters"].get("weight")
        if weight is None and isinstance(getattr(module, "weight", None), Tensor):
            return "its weight is no parameter"
        if weight is not None and type(weight.data) is not torch.Tensor:
            return f"its weight is a {type(weight.data).__name__}"
    return None


def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules of adapters, and what they wrap, each with the reason why it stays float."""
    for name, module in model.named_modules():
        if any(wrapped in module._modules for wrapped in WRAPPED):
            reason = f"{name or type(module).__name__} wraps it in an adapter: merge that first"
            for part in module.modules():
                yield part, reason


def altered_part(block: nn.Module) -> str | None:
    """The first altered part inside a block, or the block itself, with the reason; None for none."""
    for part, reason in adapted(block):
        return f"{_name_in(block, part)}: {reason}"
    for name, module in block.named_modules():
        if (reason := altered(module)) is not None:
            return f"{name}: {reason}" if name else reason
    return None


def _name_in(block: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in block.named_modules() if module is part) or type(block).__name__
