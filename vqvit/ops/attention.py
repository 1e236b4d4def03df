"""Attention on int8 codes, and the products around it."""

import torch
from torch import Tensor

from vqvit import validation as va
from vqvit.numerics import group_count
from vqvit.registry import empty_fp32, empty_int8, empty_qkv, op


@op("quantize_qkv(Tensor qkv, int num_heads) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def _(qkv, num_heads):
    va.check_tensor("quantize_qkv", "qkv", qkv, va.FLOATS, (None, None, None))
    batch, tokens, width = qkv.shape
    divisible = num_heads > 0 and width > 0 and width % (3 * num_heads) == 0
    va.check(divisible, "quantize_qkv", f"a last dimension divisible by 3 · {num_heads} heads", width)
    va.check(tokens >= 1, "quantize_qkv", "at least one token", tuple(qkv.shape))
    return lambda: empty_qkv(qkv, batch, num_heads, tokens, width // (3 * num_heads))


def quantize_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Split and quantize attention inputs (numerics §7).

    Args: qkv float (B, S, 3 · H · D), the q, k and v projections side by side.

    Returns: q, k, v int8 (B, H, S, D); scales of q and k fp32 (B, H, S), per token and head; scale of v fp32 (B, H, D),
    per channel over the S tokens.
    """
    return torch.ops.vqvit.quantize_qkv(qkv, num_heads)


@op(
    "int8_linear_qkv(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, int tokens, int num_heads,"
    " Tensor? a_zero=None, Tensor? a_sum=None, Tensor? b_zero=None, Tensor? b_sum=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _(
    a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero=None, a_sum=None, b_zero=None, b_sum=None
):  # fmt: skip
    name = "int8_linear_qkv"
    m, n, _ = va.check_linear(name, a, a_scale, b, b_scale, bias, "none", a_zero, a_sum, b_zero, b_sum)
    va.check(tokens >= 1 and m % tokens == 0, name, f"rows of a in multiples of {tokens} tokens", m)
    divisible = num_heads > 0 and n > 0 and n % (3 * num_heads) == 0
    va.check(divisible, name, f"rows of b divisible by 3 · {num_heads} heads", n)
    return lambda: empty_qkv(a, m // tokens, num_heads, tokens, n // (3 * num_heads))


def int8_linear_qkv(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    tokens: int,
    num_heads: int,
    a_zero: Tensor | None = None,
    a_sum: Tensor | None = None,
    b_zero: Tensor | None = None,
    b_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`int8_linear` whose fp32 result is stored as attention's operands: `quantize_qkv` in the epilogue (numerics §7).

    Args: a int8 (B · S, K), `tokens` = S of each image; b int8 (3 · H · D, K), the q, k and v projections one after
    the other; the others as in `int8_linear`.

    Returns: as `quantize_qkv`.
    """
    return torch.ops.vqvit.int8_linear_qkv(
        a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero, a_sum, b_zero, b_sum
    )


@op(
    "int8_attention(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, float sm_scale,"
    " ScalarType out_dtype=float32) -> Tensor"
)
def _(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype=torch.float32):
    name = "int8_attention"
    batch, heads, queries, width = va.check_attention(name, q, k, v, q_scale, k_scale, v_scale)
    va.check_out_dtype(name, out_dtype)
    return lambda: q.new_empty((batch, queries, heads * width), dtype=out_dtype)


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    sm_scale: float,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """softmax(sm_scale · α_q α_kᵀ ∘ q kᵀ) v with both products in int8 and the softmax in fp32 (numerics §7).

    The softmax numerators are u16 codes rne(65535 · exp(l - max l)), two u8 digits, not normalised before the second
    product.

    Args: q int8 (B, H, Sq, D), k and v int8 (B, H, Sk, D); scales as `quantize_qkv` returns them.

    Returns: (B, Sq, H · D) in out_dtype.
    """
    return torch.ops.vqvit.int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype)


@op(
    "int8_attention_quantize(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale,"
    " float sm_scale) -> (Tensor, Tensor)"
)
def _(q, k, v, q_scale, k_scale, v_scale, sm_scale):
    shape = va.check_attention("int8_attention_quantize", q, k, v, q_scale, k_scale, v_scale)
    rows, width = shape[0] * shape[2], shape[1] * shape[3]
    va.check(width >= 1, "int8_attention_quantize", "at least one head", tuple(q.shape))
    return lambda: (empty_int8(q, rows, width), empty_fp32(q, rows, group_count(width)))


def int8_attention_quantize(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, v_scale: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """`int8_attention` whose fp32 result is stored as int8 for the output projection: the codes of
    `quantize_per_group`.

    Args: as `int8_attention`. Returns: codes int8 (B · Sq, H · D), scale fp32 (B · Sq, ⌈H · D / 128⌉).
    """
    return torch.ops.vqvit.int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale)
