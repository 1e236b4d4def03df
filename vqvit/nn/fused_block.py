"""A block of the common configuration as one call: the same bits as its ops one by one, without what lies between."""

from torch import Tensor

from vqvit import ops
from vqvit.nn.linear import QuantLinear

ACTIVATIONS = {
    "qkv": ("per_token",),
    "attn_out": ("per_token", "per_token_group"),
    "fc1": ("per_token",),
    "fc2": ("per_token", "per_token_group"),
}
"""Of each layer: those that the one call knows. Behind a LayerNorm there is no store by group."""

ROLES = tuple(ACTIVATIONS)


def runs_in_one_call(block) -> bool:
    """Whether all linears of an `EncoderBlock` are int8, symmetric, per token (attn_out and fc2: or per group), without
    compensation and packed (for the CPU kernels) with no hook that watches them, and attention is int8 with dynamic
    scales.
    """
    dynamic = block.plan.attention == "int8" and block.plan.attention_scales == "dynamic"
    if not dynamic or block.fc2.plan.delta != 0.0:
        return False
    return all(_is_common(getattr(block, role), ACTIVATIONS[role]) for role in ROLES)


def _is_common(layer, activations: tuple[str, ...]) -> bool:
    if not isinstance(layer, QuantLinear) or layer.observer is not None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    plan = layer.plan
    plain = plan.activation in activations and plan.tier == "int8" and plan.compensation == "none"
    return plain and layer.packed


def run_in_one_call(block, x: Tensor, leading_tokens: int | None = None) -> Tensor:
    """The block's result (B, S, D) for x (B, S, D), if `runs_in_one_call`; (B, L, D) of the first L tokens alone."""
    groups = [getattr(block, role).plan.activation == "per_token_group" for role in ("attn_out", "fc2")]
    weights = [part for role in ROLES for part in _weight(getattr(block, role))]
    return ops.int8_encoder_block(
        x, block.num_heads, block.softmax_scale, block.norm1_weight, block.norm1_bias, block.eps1, block.norm2_weight,
        block.norm2_bias, block.eps2, *weights, block.layer_scale1, block.layer_scale2, block.activation,
        block.qkv.plan.delta, block.attn_out.plan.delta, block.fc1.plan.delta, *groups, leading_tokens,
    )  # fmt: skip


def _weight(layer: QuantLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    return layer.codes, layer.scale, layer.bias
