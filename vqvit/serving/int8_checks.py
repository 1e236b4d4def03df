"""The ops' own rules (`vqvit.validation`, `vqvit.ops`) for the steps of a program: what an op takes and gives.

A rule has the parameters of its function in `vqvit.serving.int8_ops`, without the number of threads, and returns the
shape and dtype of each result (`vqvit.serving.symbols`). Kernels trust what passed here.
"""

from vqvit import layouts
from vqvit.serving.int8_ops import ACTIVATIONS, GROUP, TERM_BITS
from vqvit.serving.program import expect
from vqvit.serving.symbols import (
    Array,
    Dimension,
    Panels,
    array,
    boolean,
    bounded,
    exact_quotient,
    finite,
    integer,
    product,
    times,
)

K_MOST = (133_144, 66_572, 33_286)
"""Longest inner dimension of int32 sums, by the number of zero points (`numerics.K_MAX_*`)."""
NORM_K_MOST = 1 << 16
MOST_KEYS = 1 << 15
MOST_HEAD = 1024
SIZE = 1 << 31
TORCH_FLOAT32 = 6
"""How schemas of torch write their default dtype."""

Results = tuple[Array, ...]


def tensor(name: str, value: object, dtype: str, shape: tuple) -> Array:
    """An array of this dtype and shape; a None in `shape` matches any size, a leading ... any dimensions."""
    if not isinstance(value, Array):
        expect(False, f"{name}: an array", value)
    received = value.shape
    if shape and shape[0] is ...:
        shape = shape[1:]
        received = received[len(received) - len(shape) :] if len(received) >= len(shape) else ()
    fits = len(received) == len(shape) and all(s is None or s == r for s, r in zip(shape, received, strict=True))
    if not fits or value.dtype != dtype:  # the text takes longer than the check
        expect(False, f"{name}: {dtype} ({', '.join(map(_size_text, shape))})", value)
    return value


def _size_text(size: object) -> str:
    return "*" if size is None else str(size)


def optional(name: str, value: object, dtype: str, shape: tuple) -> None:
    if value is not None:
        tensor(name, value, dtype, shape)


def groups_of(columns: int) -> int:
    return -(-columns // GROUP)


def rows(name: str, x: object) -> tuple[tuple[Dimension, ...], int]:
    """The shape of an fp32 x (..., K): the leading dimensions and K."""
    tensor(name, x, "float32", (..., None))
    return x.shape[:-1], integer(f"K of {name}", x.shape[-1], 1, SIZE)


def sums(lead: tuple, wanted: bool) -> Array:
    """Row sums or zero points: empty unless they are asked for, and nothing may read an empty array."""
    return array(lead, "int32") if wanted else Array((0,), "int32")


def scales(lead: tuple) -> Array:
    return array(lead, "float32")


def weight(name: str, value: object, n: int, k: int) -> None:
    """int8 (N, K), or in panels."""
    if isinstance(value, Panels):
        wanted = layouts.shape_of("panels", n, k)[:2]
        if (value.count, value.groups) != wanted:
            expect(False, f"{name}: int8 panels of ({n}, {k}), {wanted}", value)
    else:
        tensor(name, value, "int8", (n, k))


def gemm(a, a_scale, b, b_scale, bias, activation, zeros=(None,) * 4, most: int | None = None) -> tuple:
    """M, N and K of a product with its epilogue's vectors; zeros: a_zero, a_sum, b_zero, b_sum."""
    tensor("a", a, "int8", (None, None))
    m, k = a.shape
    a_zero, a_sum, b_zero, b_sum = zeros
    integer("K", k, 1, most or K_MOST[(a_zero is not None) + (b_zero is not None)])
    grouped = isinstance(a_scale, Array) and a_scale.ndim == 2
    expect(not grouped or (a_zero is None and b_zero is None), "no zero points with group scales", "some")
    tensor("a_scale", a_scale, "float32", (m, groups_of(k)) if grouped else (m,))
    tensor("b_scale", b_scale, "float32", (None,))
    n = integer("N", b_scale.shape[0], 1, SIZE)
    weight("b", b, n, k)
    optional("bias", bias, "float32", (n,))
    expect(isinstance(activation, str) and activation in ACTIVATIONS, f"activation in {ACTIVATIONS}", activation)
    expect(a_zero is None or b_sum is not None, "b_sum with a_zero", "none")
    expect(b_zero is None or a_sum is not None, "a_sum with b_zero", "none")
    for name, vector, size in (("a_zero", a_zero, m), ("a_sum", a_sum, m), ("b_zero", b_zero, n), ("b_sum", b_sum, n)):
        optional(name, vector, "int32", (size,))
    return m, n, k


def epilogue(layer_scale, residual, out_dtype, m: Dimension, n: int) -> None:
    optional("layer_scale", layer_scale, "float32", (n,))
    optional("residual", residual, "float32", (m, n))
    fp32_out(out_dtype)


def fp32_out(dtype: object) -> None:
    expect(dtype in (None, "float32") or (type(dtype) is int and dtype == TORCH_FLOAT32), "results in float32", dtype)


def quantize_per_token(x, delta, equalizer, symmetric, row_sum) -> Results:
    lead, k = rows("x", x)
    finite("delta", delta)
    expect(boolean("symmetric", symmetric) or delta == 0, "delta = 0 for asymmetric codes", delta)
    expect(delta == 0 or k <= NORM_K_MOST, f"rows of at most {NORM_K_MOST} elements with delta", k)
    optional("equalizer", equalizer, "float32", (k,))
    return array(x.shape, "int8"), scales(lead), sums(lead, not symmetric), sums(lead, boolean("row_sum", row_sum))


def quantize_per_group(x, equalizer) -> Results:
    lead, k = rows("x", x)
    optional("equalizer", equalizer, "float32", (k,))
    return array(x.shape, "int8"), scales((*lead, groups_of(k)))


def quantize_static(x, scale, equalizer, row_sum) -> Results:
    lead, k = rows("x", x)
    tensor("scale", scale, "float32", ())
    optional("equalizer", equalizer, "float32", (k,))
    return array(x.shape, "int8"), scales(lead), sums(lead, boolean("row_sum", row_sum))


def quantize_residual(x, codes, scale) -> Array:
    lead, _ = rows("x", x)
    tensor("codes", codes, "int8", x.shape)
    tensor("scale", scale, "float32", lead)
    return array(x.shape, "int8")


def norm(x, weight, bias, eps, paper) -> tuple:
    lead, k = rows("x", x)
    expect(k <= NORM_K_MOST, f"rows of at most {NORM_K_MOST} elements", k)
    tensor("weight", weight, "float32", (k,))
    tensor("bias", bias, "float32", (k,))
    finite("eps", eps, 0.0)
    boolean("paper", paper)
    return lead


def layer_norm(x, weight, bias, eps, paper) -> Array:
    norm(x, weight, bias, eps, paper)
    return array(x.shape, "float32")


def layernorm_quantize(x, weight, bias, eps, delta, scale, row_sum, paper) -> Results:
    lead = norm(x, weight, bias, eps, paper)
    finite("delta", delta)
    optional("scale", scale, "float32", ())
    return array(x.shape, "int8"), scales(lead), sums(lead, boolean("row_sum", row_sum))


def patchify_quantize(pixels, patch_height, patch_width, equalizer) -> Results:
    tensor("pixels", pixels, "float32", (None,) * 4)
    batch, *sizes = pixels.shape
    channels, height, width = (integer("pixels: channels, height and width", size, 1, SIZE) for size in sizes)
    integer("patch_height", patch_height, 1, height)
    integer("patch_width", patch_width, 1, width)
    whole = height % patch_height == 0 and width % patch_width == 0
    expect(whole, f"height and width in multiples of ({patch_height}, {patch_width})", pixels)
    k = channels * patch_height * patch_width
    optional("equalizer", equalizer, "float32", (k,))
    count = times(batch, (height // patch_height) * (width // patch_width))
    return array((count, k), "int8"), scales((count,))


def int8_linear(
    a, a_scale, b, b_scale, bias, activation, layer_scale, residual, a_zero, a_sum, b_zero, b_sum, _dtype
) -> Array:
    m, n, _ = gemm(a, a_scale, b, b_scale, bias, activation, (a_zero, a_sum, b_zero, b_sum))
    epilogue(layer_scale, residual, _dtype, m, n)
    return array((m, n), "float32")


def int8_linear_compensated(
    a, a_scale, a_residual, b, b_scale, b_residual, bias, mode, mu, activation, layer_scale, residual, _dtype
) -> Array:
    m, n, k = gemm(a, a_scale, b, b_scale, bias, activation, most=K_MOST[1])  # two products share an accumulator
    expect(a_scale.ndim == 1, "a scale for each row of a", a_scale)
    expect(isinstance(mode, str) and mode in TERM_BITS, f"mode in {tuple(TERM_BITS)}", mode)
    finite("mu", mu)
    for name, codes, terms in (("a_residual", a_residual, 1 | 4), ("b_residual", b_residual, 2 | 4)):
        expect(codes is not None or not TERM_BITS[mode] & terms, f"{name} for mode {mode}", None)
    optional("a_residual", a_residual, "int8", (m, k))
    if b_residual is not None:
        expect(type(b_residual) is type(b), "b_residual in the layout of b", b_residual)
        weight("b_residual", b_residual, n, k)
    epilogue(layer_scale, residual, _dtype, m, n)
    return array((m, n), "float32")


def int8_linear_quantize(
    a, a_scale, b, b_scale, bias, activation, a_zero, a_sum, b_zero, b_sum, out_scale, symmetric, row_sum, per_group
) -> Results:
    m, n, _ = gemm(a, a_scale, b, b_scale, bias, activation, (a_zero, a_sum, b_zero, b_sum))
    optional("out_scale", out_scale, "float32", ())
    boolean("symmetric", symmetric), boolean("row_sum", row_sum)
    expect(symmetric or out_scale is None, "symmetric codes with a static out_scale", symmetric)
    plain = out_scale is None and symmetric and not row_sum
    expect(plain or not boolean("per_group", per_group), "no out_scale, zero points or row sums per group", per_group)
    scale = scales((m, groups_of(n)) if per_group else (m,))
    return array((m, n), "int8"), scale, sums((m,), not symmetric), sums((m,), row_sum)


def int8_linear_qkv(a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero, a_sum, b_zero, b_sum) -> Results:
    m, n, _ = gemm(a, a_scale, b, b_scale, bias, "none", (a_zero, a_sum, b_zero, b_sum))
    integer("tokens", tokens, 1, SIZE)
    return qkv(exact_quotient(m, tokens), tokens, num_heads, n)


def quantize_qkv(qkv_rows, num_heads) -> Results:
    tensor("qkv", qkv_rows, "float32", (None, None, None))
    batch, tokens, width = qkv_rows.shape
    return qkv(batch, integer("tokens", tokens, 1, SIZE), num_heads, integer("width", width, 1, SIZE))


def qkv(batch: Dimension, tokens: int, num_heads: object, width: int) -> Results:
    head_dim = heads_of(num_heads, width)
    codes = array((batch, num_heads, tokens, head_dim), "int8")
    by_token = scales((batch, num_heads, tokens))
    return codes, codes, codes, by_token, by_token, scales((batch, num_heads, head_dim))


def heads_of(num_heads: object, width: int) -> int:
    """Channels of a head where width is 3 · heads · channels."""
    integer("num_heads", num_heads, 1, width)
    expect(width % (3 * num_heads) == 0, f"a width divisible by 3 · {num_heads} heads", width)
    return width // (3 * num_heads)


def int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, _dtype) -> Array:
    tensor("q", q, "int8", (None,) * 4)
    batch, heads, queries, width = q.shape
    integer("heads", heads, 1, SIZE), integer("queries", queries, 1, SIZE)
    integer("a head dimension", width, 1, MOST_HEAD)
    tensor("k", k, "int8", (batch, heads, None, width))
    keys = integer("keys", k.shape[2], 1, MOST_KEYS)
    tensor("v", v, "int8", (batch, heads, keys, width))
    tensor("q_scale", q_scale, "float32", (batch, heads, queries))
    tensor("k_scale", k_scale, "float32", (batch, heads, keys))
    tensor("v_scale", v_scale, "float32", (batch, heads, width))
    finite("sm_scale", sm_scale)
    fp32_out(_dtype)
    return array((batch, queries, heads * width), "float32")


def int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale) -> Results:
    batch, queries, width = int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, None).shape
    count = times(batch, queries)
    return array((count, width), "int8"), scales((count, groups_of(width)))


def encoder_block(
    x, num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2, qkv, qkv_scale, qkv_bias,
    attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_bias, layer_scale1,
    layer_scale2, activation, qkv_delta, attn_out_delta, fc1_delta, attn_out_groups, fc2_groups, leading_tokens=None,
) -> Array:  # fmt: skip
    tensor("x", x, "float32", (None, None, None))
    batch, tokens, width = x.shape
    integer("channels", width, 1, NORM_K_MOST), integer("tokens", tokens, 1, MOST_KEYS)
    for name, vector in (
        ("norm1_weight", norm1_weight), ("norm1_bias", norm1_bias), ("norm2_weight", norm2_weight),
        ("norm2_bias", norm2_bias),
    ):  # fmt: skip
        tensor(name, vector, "float32", (width,))
    optional("layer_scale1", layer_scale1, "float32", (width,))
    optional("layer_scale2", layer_scale2, "float32", (width,))
    tensor("qkv_scale", qkv_scale, "float32", (None,)), tensor("fc1_scale", fc1_scale, "float32", (None,))
    projected, hidden = (integer("rows of a weight", scale.shape[0], 1, SIZE) for scale in (qkv_scale, fc1_scale))
    head_dim = heads_of(num_heads, projected)
    expect(head_dim <= MOST_HEAD, f"a head dimension of at most {MOST_HEAD}", head_dim)
    for role, b, scale, bias, n, k in (
        ("qkv", qkv, qkv_scale, qkv_bias, projected, width),
        ("attn_out", attn_out, attn_out_scale, attn_out_bias, width, projected // 3),
        ("fc1", fc1, fc1_scale, fc1_bias, hidden, width),
        ("fc2", fc2, fc2_scale, fc2_bias, width, hidden),
    ):
        integer(f"K of {role}", k, 1, K_MOST[0])
        weight(role, b, n, k)
        tensor(f"{role}_scale", scale, "float32", (n,))
        optional(f"{role}_bias", bias, "float32", (n,))
        bounded(product((batch, tokens, n)), (batch, tokens, n))
    for name, value in (("qkv_delta", qkv_delta), ("attn_out_delta", attn_out_delta), ("fc1_delta", fc1_delta)):
        finite(name, value)
    expect(not attn_out_groups or attn_out_delta == 0, "attn_out_delta = 0 with attn_out_groups", attn_out_delta)
    boolean("attn_out_groups", attn_out_groups), boolean("fc2_groups", fc2_groups)
    finite("sm_scale", sm_scale), finite("eps1", eps1, 0.0), finite("eps2", eps2, 0.0)
    expect(isinstance(activation, str) and activation in ACTIVATIONS, f"activation in {ACTIVATIONS}", activation)
    leading = tokens if leading_tokens is None else integer("leading_tokens", leading_tokens, 1, tokens)
    return array((batch, leading, width), "float32")


RULES = {
    f"vqvit.{rule.__name__}.default": rule
    for rule in (
        quantize_per_token, quantize_per_group, quantize_static, quantize_residual, layer_norm, layernorm_quantize,
        patchify_quantize, int8_linear, int8_linear_quantize, int8_linear_qkv, int8_linear_compensated, int8_attention,
        int8_attention_quantize, quantize_qkv,
    )
}  # fmt: skip
RULES["vqvit.int8_encoder_block.default"] = encoder_block
