"""A block of the common configuration as one call: the same bits as its ops one by one, without what lies between.

Buffers and layers are read from `nn.Module`'s dictionaries, which names them by attribute only after a lookup that
fails: 40 of those cost a block as much as its way through PyTorch's dispatcher.
"""

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
    plan, layers = block.plan, block._modules
    if plan.attention != "int8" or plan.attention_scales != "dynamic" or layers["fc2"].plan.delta != 0.0:
        return False
    for role, activations in ACTIVATIONS.items():
        if not _is_common(layers[role], activations):
            return False
    return True


def _is_common(layer, activations: tuple[str, ...]) -> bool:
    if not isinstance(layer, QuantLinear) or layer.observer is not None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    plan = layer.plan
    plain = plan.activation in activations and plan.tier == "int8" and plan.compensation == "none"
    return plain and layer._buffers["codes"].dim() == 4  # packed


def run_in_one_call(block, x: Tensor, leading_tokens: int | None = None) -> Tensor:
    """The block's result (B, S, D) for x (B, S, D), if `runs_in_one_call`; (B, L, D) of the first L tokens alone."""
    qkv, attn_out, fc1, fc2 = layers = [block._modules[role] for role in ROLES]
    own = block._buffers
    weights = [layer._buffers[part] for layer in layers for part in ("codes", "scale", "bias")]
    return ops.int8_encoder_block(
        x, block.num_heads, block.softmax_scale, own["norm1_weight"], own["norm1_bias"], block.eps1,
        own["norm2_weight"], own["norm2_bias"], block.eps2, *weights, own["layer_scale1"], own["layer_scale2"],
        block.activation, qkv.plan.delta, attn_out.plan.delta, fc1.plan.delta,
        attn_out.plan.activation == "per_token_group", fc2.plan.activation == "per_token_group", leading_tokens,
    )  # fmt: skip
