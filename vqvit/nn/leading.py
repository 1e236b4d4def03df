"""How a model asks its last block for its leading tokens alone: a keyword argument on its way through the model.

The model's own code passes keyword arguments on to its blocks, so that a request needs no state: threads, CUDA graphs,
`torch.compile` and `torch.export` see an argument, and calls that do not come through the whole model carry none.
"""

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

REQUEST = "only_leading_tokens"

HARMLESS = ("return_dict", "interpolate_pos_encoding")
"""Arguments whose value changes nothing about which tokens a result depends on."""

CAPTURE = "transformers.utils.output_capturing"
"""Hooks of this module stay on a model, and look at outputs only where hidden states are asked for."""


def request_leading_tokens(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a whole model: add `REQUEST`, unless this call could show the last block's other tokens.

    It could if it asks for hidden states or attentions, by argument or by configuration; if it has an argument that is
    neither a tensor nor None nor False, which may ask for them; or if a forward hook watches a part of the model.
    """
    if not all(map(_asks_for_nothing, args)):
        return None
    if not all(name in HARMLESS or _asks_for_nothing(value) for name, value in kwargs.items()):
        return None
    if _configured_to_show_more(model) or watched_part(model) is not None:
        return None
    return args, {**kwargs, REQUEST: True}


def watched_part(model: nn.Module) -> str | None:
    """The first module inside `model` whose inputs or outputs a forward hook sees, or None."""
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "every module"
    if not any(_is_watched(part) for part in _modules(model) if part is not model):
        return None
    return next(name for name, part in model.named_modules() if part is not model and _is_watched(part))


def _modules(model: nn.Module) -> list[nn.Module]:
    """`model.modules()`, shared ones as often as they occur, in a tenth of its time: every call reads them all."""
    found = [model]
    for part in found:  # which grows meanwhile
        if part._modules:
            found.extend(child for child in part._modules.values() if child is not None)
    return found


def _is_watched(part: nn.Module) -> bool:
    for hooks in (part._forward_hooks, part._forward_pre_hooks):
        if hooks and not all(_is_idle(hook) for hook in hooks.values()):
            return True
    return False


def _asks_for_nothing(value: object) -> bool:
    return value is None or value is False or isinstance(value, Tensor)


def _is_idle(hook: object) -> bool:
    return getattr(hook, "__module__", None) == CAPTURE


def _configured_to_show_more(model: nn.Module) -> bool:
    seen = None
    for part in _modules(model):
        config = vars(part).get("config")
        if config is None or config is seen:  # mostly one for all parts, whose attributes are slow to read
            continue
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return True
        seen = config
    return False
