"""Whether a block computes what `EncoderBlock` computes: asked of the block, with the calls that its model makes."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvit import families, trial
from vqvit.families import BlockParts, NotABlock
from vqvit.nn.block import unused_argument
from vqvit.trial import Call

PROBE_TOKENS = (5, 65)
"""Tokens of the calls that no model makes; some blocks attend locally where there are many."""

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative difference allowed between a block and its composed parts: rounding of the block's dtype, with room."""

STREAM_ROUNDINGS = 4
"""Roundings of a model's own residual stream by which two ways to compute a block may differ, in units of the dtype's
epsilon: what a block adds to a large stream is known no better. Random hidden states are small, and need none."""


def looks_like_block(module: nn.Module) -> bool:
    """Whether a report about this module would interest anyone: it has a norm, attention output and MLP of its own."""
    found = [families.find(module, families.ALIASES[role]) for role in ("norm1", "norm2")]
    return all(part is not None and isinstance(part[1], nn.Module) for part in found)


def verify_block(block: nn.Module, parts: BlockParts, calls: list[Call]) -> bool:
    """Whether the block returns tuples. Raises `NotABlock` unless its parts, composed, compute what it computes.

    Args: block; parts; calls, as the model makes them, or none where it cannot be run.

    The block is called with random hidden states: alone, and as in each of `calls`, whose results have to be those of
    the composed parts too.
    """
    weight = parts.fc1.weight
    if weight.is_meta:
        raise NotABlock("its weights are on the meta device")
    for call in calls:
        _check_arguments(call)
    shapes = [(2, tokens, parts.fc1.in_features) for tokens in PROBE_TOKENS]
    alone = [_verify_call(block, parts, Call((), {}, None), shape) for shape in (shapes[:1] if calls else shapes)]
    called = [_verify_call(block, parts, call, _hidden(call).shape) for call in calls]
    for call in calls:
        hidden = _hidden(call)
        _compare(_only(call.output), compose_quietly(block, parts, hidden), hidden, STREAM_ROUNDINGS)
    if len({*alone, *called}) != 1:
        raise NotABlock("it returns a tuple in some calls and a tensor in others")
    return alone[0]


def _check_arguments(call: Call) -> None:
    hidden = call.args[0] if call.args else call.kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise NotABlock("its model does not call it with hidden states (B, S, D) as its first argument")
    rest = {name: value for name, value in call.kwargs.items() if name != "hidden_states"}
    if (name := unused_argument(call.args[1:], rest)) is not None:
        raise NotABlock(f"its model passes {name}, with which an int8 block does not compute")


def _hidden(call: Call) -> Tensor:
    return call.args[0] if call.args else call.kwargs["hidden_states"]


def _verify_call(block: nn.Module, parts: BlockParts, call: Call, shape: tuple[int, ...]) -> bool:
    weight = parts.fc1.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(weight)
    kwargs = {name: value for name, value in call.kwargs.items() if name != "hidden_states"}
    try:
        with trial.undisturbed(block):
            y = block(x.clone(), *call.args[1:], **kwargs)
            expected = compose(parts, x)
    except trial.RUN_ERRORS as error:
        raise NotABlock(f"it cannot be called on hidden states alone ({type(error).__name__}: {error})") from error
    _compare(_only(y), expected, x)
    return isinstance(y, tuple)


def _only(output: object) -> Tensor:
    if isinstance(output, tuple) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor):
        count = f"{len(output)} results" if isinstance(output, tuple) else f"a {type(output).__name__}"
        raise NotABlock(f"it returns {count}, not its hidden states alone")
    return output


def _compare(output: Tensor, expected: Tensor, x: Tensor, roundings: int = 0) -> None:
    """Raise `NotABlock` if two results for the hidden states x differ; `roundings` of the stream are forgiven."""
    if output.shape != expected.shape:
        raise NotABlock(f"it turns hidden states {tuple(x.shape)} into {tuple(output.shape)}")
    difference, branch = (output - expected).float().norm().item(), (expected - x).float().norm().item()
    rounding = roundings * torch.finfo(x.dtype).eps * expected.float().norm().item()
    if not difference <= PROBE_TOLERANCE[x.dtype] * branch + rounding:
        relative = difference / max(branch, torch.finfo(torch.float32).tiny)
        raise NotABlock(f"not a pre-LayerNorm block: its output differs from its parts' by {relative:.1e}")


def compose_quietly(block: nn.Module, parts: BlockParts, x: Tensor) -> Tensor:
    """`compose`, without a trace in the block."""
    with trial.undisturbed(block):
        return compose(parts, x)


def compose(parts: BlockParts, x: Tensor) -> Tensor:
    """The float pre-LayerNorm block that `EncoderBlock` implements, from its parts."""

    def scaled(y: Tensor, layer_scale: Tensor | None) -> Tensor:
        return y if layer_scale is None else y * layer_scale

    normalized = parts.norm1(x)
    qkv = torch.cat([projection(normalized) for projection in parts.qkv], dim=-1)
    q, k, v = qkv.unflatten(-1, (3, parts.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, scale=parts.softmax_scale).transpose(1, 2).flatten(2)
    x = x + scaled(parts.attn_out(attended), parts.layer_scale1)
    hidden = families.ACTIVATION_FUNCTIONS[parts.activation](parts.fc1(parts.norm2(x)))
    return x + scaled(parts.fc2(hidden), parts.layer_scale2)
