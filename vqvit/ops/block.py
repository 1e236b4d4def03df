"""A whole encoder block as one op: what a CPU spends between small ops is then spent once."""

import torch
from torch import Tensor

from vqvit import numerics as nm
from vqvit import validation as va
from vqvit.registry import op


@op(
    "int8_encoder_block(Tensor x, int num_heads, float sm_scale, Tensor norm1_weight, Tensor norm1_bias, float eps1,"
    " Tensor norm2_weight, Tensor norm2_bias, float eps2, Tensor qkv, Tensor qkv_scale, Tensor? qkv_bias,"
    " Tensor attn_out, Tensor attn_out_scale, Tensor? attn_out_bias, Tensor fc1, Tensor fc1_scale, Tensor? fc1_bias,"
    " Tensor fc2, Tensor fc2_scale, Tensor? fc2_bias, Tensor? layer_scale1=None, Tensor? layer_scale2=None,"
    " str activation='gelu', float qkv_delta=0.0, float attn_out_delta=0.0, float fc1_delta=0.0,"
    " bool attn_out_groups=False, bool fc2_groups=False, int? leading_tokens=None) -> Tensor"
)
def _(
    x, num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2,
    qkv, qkv_scale, qkv_bias, attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias,
    fc2, fc2_scale, fc2_bias, layer_scale1=None, layer_scale2=None, activation="gelu",
    qkv_delta=0.0, attn_out_delta=0.0, fc1_delta=0.0, attn_out_groups=False, fc2_groups=False, leading_tokens=None,
):  # fmt: skip
    name = "int8_encoder_block"
    va.check_tensor(name, "x", x, va.FLOATS, (None, None, None))
    _, tokens, width = x.shape
    va.check(1 <= width <= nm.NORM_K_MAX, name, f"between 1 and {nm.NORM_K_MAX} channels", width)
    va.check(1 <= tokens <= nm.MAX_KEYS, name, f"between 1 and {nm.MAX_KEYS} tokens (int32 sum of u16 codes)", tokens)
    for vector, tensor in (
        ("norm1_weight", norm1_weight),
        ("norm1_bias", norm1_bias),
        ("norm2_weight", norm2_weight),
        ("norm2_bias", norm2_bias),
    ):
        va.check_tensor(name, vector, tensor, va.FLOATS, (width,), x)
    for vector, tensor in (("layer_scale1", layer_scale1), ("layer_scale2", layer_scale2)):
        va.check_optional(name, vector, tensor, va.FLOATS, (width,), x)
    for vector, tensor in (("qkv_scale", qkv_scale), ("fc1_scale", fc1_scale)):
        va.check_tensor(name, vector, tensor, torch.float32, (None,), x)
    projected = qkv_scale.numel()
    divisible = num_heads > 0 and projected > 0 and projected % (3 * num_heads) == 0
    va.check(divisible, name, f"rows of qkv divisible by 3 · {num_heads} heads", projected)
    head_dim = projected // (3 * num_heads)
    va.check(head_dim <= 1024, name, "a head dimension of at most 1024 (exact fp32 logit accumulators)", head_dim)
    inner, hidden = num_heads * head_dim, fc1_scale.numel()
    for role, b, scale, bias, n, k in (
        ("qkv", qkv, qkv_scale, qkv_bias, projected, width),
        ("attn_out", attn_out, attn_out_scale, attn_out_bias, width, inner),
        ("fc1", fc1, fc1_scale, fc1_bias, hidden, width),
        ("fc2", fc2, fc2_scale, fc2_bias, width, hidden),
    ):
        va.check_weight(name, role, b, scale, bias, n, k, x)
    if attn_out_groups:
        va.check(attn_out_delta == 0.0, name, "attn_out_delta = 0 with attn_out_groups", attn_out_delta)
    va.check(activation in nm.ACTIVATIONS, name, f"activation in {nm.ACTIVATIONS}", repr(activation))
    leading = tokens if leading_tokens is None else leading_tokens
    va.check(1 <= leading <= tokens, name, f"leading_tokens between 1 and {tokens}", leading_tokens)
    return lambda: x.new_empty((x.shape[0], leading, width))


def int8_encoder_block(
    x: Tensor,
    num_heads: int,
    sm_scale: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    eps1: float,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    eps2: float,
    qkv: Tensor,
    qkv_scale: Tensor,
    qkv_bias: Tensor | None,
    attn_out: Tensor,
    attn_out_scale: Tensor,
    attn_out_bias: Tensor | None,
    fc1: Tensor,
    fc1_scale: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_scale: Tensor,
    fc2_bias: Tensor | None,
    layer_scale1: Tensor | None = None,
    layer_scale2: Tensor | None = None,
    activation: str = "gelu",
    qkv_delta: float = 0.0,
    attn_out_delta: float = 0.0,
    fc1_delta: float = 0.0,
    attn_out_groups: bool = False,
    fc2_groups: bool = False,
    leading_tokens: int | None = None,
) -> Tensor:
    """h = x + layer_scale1 ∘ attention(LN1(x)) attn_outᵀ; h + layer_scale2 ∘ act(LN2(h) fc1ᵀ) fc2ᵀ: the ops of a
    pre-LayerNorm block one after the other, bit for bit, every activation symmetric per token, or per group of
    128 columns of a token where that is asked for.

    Args:
        x: float (B, S, D). norm weights and biases, layer scales: float (D,).
        qkv: int8 (3 · H · Dh, D), the three projections one after the other; attn_out (D, H · Dh), fc1 (F, D),
            fc2 (D, F), each plain or from `pack_weight`, with its fp32 scale and its float bias or None by row.
        sm_scale: of attention's logits. activation: one of `numerics.ACTIVATIONS`.
        qkv_delta, attn_out_delta, fc1_delta: `delta` of the layer's input as in `quantize_per_token`.
        attn_out_groups, fc2_groups: the layer's input as by `quantize_per_group`; attn_out_delta is 0 then.
        leading_tokens: L of 1 to S: the first L tokens of the result alone, for less work; None: all.

    Returns: (B, S, D) or (B, L, D) in x's dtype, to which the first h is rounded too.
    """
    return torch.ops.vqvit.int8_encoder_block(
        x, num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2, qkv, qkv_scale,
        qkv_bias, attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_bias,
        layer_scale1, layer_scale2, activation, qkv_delta, attn_out_delta, fc1_delta, attn_out_groups, fc2_groups,
        leading_tokens,
    )  # fmt: skip
