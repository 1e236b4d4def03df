"""One torch function per op: the definition of `torch.ops.vqvit.*`, on any device.

Signatures and results are those of the ops in `vqvit.ops`, which also validate the arguments; nothing here is tuned.
Shapes: M tokens, N output channels, K input channels; B batch, H heads, S tokens, D channels of a head.
"""

import functools
import sys

import torch
from torch import Tensor

from vqvit import layouts
from vqvit import numerics as nm
from vqvit.layouts import CHUNK, K_GROUP, PANEL, STRIP

COMPENSATION_TERMS = {
    "none": (False, False, False),
    "paper": (False, False, True),
    "activation": (True, False, False),
    "weight": (False, True, False),
    "full": (True, True, True),
}
"""Products added by each mode of `int8_linear_compensated`: (R_A Bqᵀ, Aq R_Bᵀ, R_A R_Bᵀ)."""


def quantize_per_token(x, delta=0.0, equalizer=None, symmetric=True, row_sum=False):
    """α_t = (max|x_t| + δ sd(x_t)) / 127, q = rne(x / α); asymmetric: α (q - z) ≈ x. x is multiplied by
    `equalizer` first.
    """
    x = _equalized(x, equalizer)
    if symmetric:
        scale = nm.row_scale(x, delta)
        codes, zero_point = nm.to_codes(x, scale.unsqueeze(-1)), _absent(x)
    else:
        scale, zero_point = nm.row_scale_asymmetric(x)
        codes = nm.to_codes_asymmetric(x, scale.unsqueeze(-1), zero_point.unsqueeze(-1))
    return codes, scale, zero_point, _row_sum(codes, row_sum)


def quantize_per_group(x, equalizer=None):
    """`quantize_per_token` of each group of 128 columns: scales (..., ⌈K / 128⌉)."""
    x = _equalized(x, equalizer)
    scale = nm.row_scale(nm.groups(x))
    columns = scale.repeat_interleave(nm.GROUP, -1)[..., : x.shape[-1]]
    return nm.to_codes(x, columns).contiguous(), scale


def quantize_static(x, scale, equalizer=None, row_sum=False):
    """q = rne(x / α) for one calibrated α; the returned row scales are α, or NaN where the row holds NaN or Inf."""
    x = _equalized(x, equalizer)
    codes = nm.to_codes(x, scale)
    return codes, _poisoned_scale(x, scale), _row_sum(codes, row_sum)


def layer_norm(x, weight, bias, eps, paper=False):
    """LayerNorm over the last dimension, rounded to x's dtype."""
    return nm.layer_norm(x, weight, bias, eps, paper).to(x.dtype)


def layernorm_quantize(x, weight, bias, eps, delta=0.0, scale=None, row_sum=False, paper=False):
    """LayerNorm, then per-token quantization, or static quantization if `scale` is given."""
    normalized = nm.layer_norm(x, weight, bias, eps, paper)
    if scale is not None:
        return quantize_static(normalized, scale, None, row_sum)
    codes, row_scale, _, sums = quantize_per_token(normalized, delta, None, True, row_sum)
    return codes, row_scale, sums


def add_layernorm_quantize(
    x, residual, weight, bias, eps, layer_scale=None, delta=0.0, scale=None, row_sum=False, paper=False
):
    """stream = residual + layer_scale ∘ x, stored in residual's dtype; then `layernorm_quantize(stream)`."""
    stream = _add_residual(x.float(), layer_scale, residual).to(residual.dtype)
    return *layernorm_quantize(stream, weight, bias, eps, delta, scale, row_sum, paper), stream


def patchify_quantize(pixels, patch_height, patch_width, equalizer=None):
    """Patches of (B, C, Ht, Wd) as rows (B · Ht/ph · Wd/pw, C · ph · pw), in Conv2d's weight order, quantized per
    token.
    """
    batch, channels, height, width = pixels.shape
    grid = pixels.reshape(batch, channels, height // patch_height, patch_height, width // patch_width, patch_width)
    rows = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch_height * patch_width)
    codes, scale, _, _ = quantize_per_token(rows, 0.0, equalizer)
    return codes, scale


def int8_mm(a, b):
    """acc[m, n] = Σ_k a[m, k] · b[n, k] in int32, exact: integers below 2^53 in fp64.

    Not torch._int_mm: on the CPU it returns uninitialised memory for K = 1 (torch 2.13).
    """
    return (a.double() @ _unpacked(b, a.shape[-1]).double().t()).to(torch.int32)


def int8_linear(
    a, a_scale, b, b_scale, bias=None, activation="none", layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_dtype=torch.float32,
):  # fmt: skip
    """act(α_a α_bᵀ ∘ Σ_k (a - z_a)(b - z_b) + bias) · layer_scale + residual, cast to `out_dtype`.

    With a_scale (M, ⌈K / 128⌉), α_a multiplies the product of each group of columns.
    """
    if a_scale.dim() == 2:
        y = _dequantized(_grouped_product(a, a_scale, b)[:, : b_scale.shape[0]], b_scale[None, :], bias)
        return epilogue(y, activation, layer_scale, residual, out_dtype)
    acc = int8_mm(a, b)[:, : b_scale.shape[0]]
    if a_zero is not None:
        acc = acc - a_zero[:, None] * b_sum[None, :]
    if b_zero is not None:
        acc = acc - a_sum[:, None] * b_zero[None, :]
    if a_zero is not None and b_zero is not None:
        acc = acc + a.shape[-1] * a_zero[:, None] * b_zero[None, :]
    y = _dequantized(acc.float(), a_scale[:, None] * b_scale[None, :], bias)
    return epilogue(y, activation, layer_scale, residual, out_dtype)


def int8_linear_quantize(
    a, a_scale, b, b_scale, bias=None, activation="none",
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_scale=None, symmetric=True, row_sum=False,
    per_group=False,
):  # fmt: skip
    """`int8_linear` to fp32, then quantized: per token, per group, or static if `out_scale` is given."""
    y = int8_linear(a, a_scale, b, b_scale, bias, activation, None, None, a_zero, a_sum, b_zero, b_sum, torch.float32)
    if per_group:
        return *quantize_per_group(y), _absent(y), _absent(y)
    if out_scale is None:
        return quantize_per_token(y, 0.0, None, symmetric, row_sum)
    codes, scale, sums = quantize_static(y, out_scale, None, row_sum)
    return codes, scale, _absent(y), sums


def quantize_residual(x, codes, scale):
    """R = rne(254 (x - α q) / α) in int8: what the symmetric codes left over, in units of α / 254."""
    remainder = x.float() - scale.unsqueeze(-1) * codes.float()
    return nm.to_codes(nm.RESIDUAL_STEPS * remainder, scale.unsqueeze(-1))


def int8_linear_compensated(
    a, a_scale, a_residual, b, b_scale, b_residual, bias=None, mode="full", mu=1.0, activation="none",
    layer_scale=None, residual=None, out_dtype=torch.float32,
):  # fmt: skip
    """α_a α_bᵀ ∘ (Aq Bqᵀ + [R_A Bqᵀ + Aq R_Bᵀ] / 254 + μ R_A R_Bᵀ / 254²) + bias, with the terms that `mode`
    selects; then `epilogue`.
    """
    ra_b, a_rb, ra_rb = COMPENSATION_TERMS[mode]
    b, b_residual = (t if t is None else _unpacked(t, a.shape[-1])[: len(b_scale)] for t in (b, b_residual))
    acc = int8_mm(a, b).float()
    if ra_b or a_rb:
        first_order = (int8_mm(a_residual, b) if ra_b else 0) + (int8_mm(a, b_residual) if a_rb else 0)
        acc = nm.fma(first_order.float(), 1 / nm.RESIDUAL_STEPS, acc)
    if ra_rb:
        acc = nm.fma(int8_mm(a_residual, b_residual).float(), mu / nm.RESIDUAL_STEPS**2, acc)
    y = _dequantized(acc, a_scale[:, None] * b_scale[None, :], bias)
    return epilogue(y, activation, layer_scale, residual, out_dtype)


def quantize_qkv(qkv, num_heads):
    """Packed float projections (B, S, 3 H D) to int8: q, k (B, H, S, D) per token and head; v (B, H, S, D) per channel.

    Scales: q, k (B, H, S); v (B, H, D), over the S tokens.
    """
    batch, tokens, width = qkv.shape
    q, k, v = qkv.float().reshape(batch, tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    q_scale, k_scale, v_scale = nm.row_scale(q), nm.row_scale(k), nm.row_scale(v.transpose(-1, -2))
    codes = (
        nm.to_codes(q, q_scale.unsqueeze(-1)),
        nm.to_codes(k, k_scale.unsqueeze(-1)),
        nm.to_codes(v, v_scale.unsqueeze(-2)),
    )
    return *(c.contiguous() for c in codes), q_scale, k_scale, v_scale


def int8_linear_qkv(a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero=None, a_sum=None, b_zero=None, b_sum=None):
    """`int8_linear` to fp32, then `quantize_qkv`: the projection of B · S tokens as attention's operands."""
    y = int8_linear(a, a_scale, b, b_scale, bias, "none", None, None, a_zero, a_sum, b_zero, b_sum)
    return quantize_qkv(y.view(-1, tokens, y.shape[-1]), num_heads)


def int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype=torch.float32):
    """softmax(sm_scale · q kᵀ) v from int8 codes; returns (B, Sq, H D).

    e_ij = rne(65535 · 2^(l_ij - max_j l_ij)) = 256 hi_ij + lo_ij, l in units of log2, hi and lo u8;
    out = α_v · fma(Σ_j hi_ij v_j, 256, Σ_j lo_ij v_j) / (Σ_j e_ij).
    """
    batch, heads, queries, width = q.shape
    acc = (q.double() @ k.double().transpose(-1, -2)).float()
    row_factor = q_scale * nm.round_fp32(sm_scale * nm.LOG2_E)
    logits = (row_factor.unsqueeze(-1) * k_scale.unsqueeze(-2)) * acc
    e = nm.softmax_numerators(logits - logits.amax(-1, keepdim=True))
    total = e.double().sum(-1).float() + row_factor * 0.0 + (k_scale * 0.0).sum(-1, keepdim=True)
    high = torch.floor(e / nm.P_BASE)
    high_acc, low_acc = ((digit.double() @ v.double()).float() for digit in (high, e - nm.P_BASE * high))
    acc = nm.fma(high_acc, nm.P_BASE, low_acc)
    out = (acc * (1.0 / total).unsqueeze(-1)) * v_scale.unsqueeze(-2)
    return out.transpose(1, 2).reshape(batch, queries, heads * width).to(out_dtype)


def int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale):
    """`int8_attention` to fp32, then `quantize_per_group`: rows (B · Sq, H · D) for the output projection."""
    return quantize_per_group(int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale).flatten(0, 1))


def compose_encoder_block(
    ops,
    x, num_heads, sm_scale, norm1_weight, norm1_bias, eps1, norm2_weight, norm2_bias, eps2,
    qkv, qkv_scale, qkv_bias, attn_out, attn_out_scale, attn_out_bias, fc1, fc1_scale, fc1_bias,
    fc2, fc2_scale, fc2_bias, layer_scale1=None, layer_scale2=None, activation="gelu",
    qkv_delta=0.0, attn_out_delta=0.0, fc1_delta=0.0, attn_out_groups=False, fc2_groups=False, leading_tokens=None,
):  # fmt: skip
    """`int8_encoder_block` from the ops of a backend: x (B, S, D), weights plain or packed."""
    batch, tokens, width = x.shape
    stream, dtype = x.reshape(batch * tokens, width), x.dtype
    codes, scale, _ = ops.layernorm_quantize(stream, norm1_weight, norm1_bias, eps1, qkv_delta)
    q, k, v, q_scale, k_scale, v_scale = ops.int8_linear_qkv(codes, scale, qkv, qkv_scale, qkv_bias, tokens, num_heads)
    queries = tokens if leading_tokens is None else leading_tokens
    if queries < tokens:
        q, q_scale = q[:, :, :queries], q_scale[:, :, :queries]
        stream = x[:, :queries].reshape(batch * queries, width)
    heads = (q, k, v, q_scale, k_scale, v_scale)
    if attn_out_groups:
        codes, scale = ops.int8_attention_quantize(*heads, sm_scale)
    else:
        attended = ops.int8_attention(*heads, sm_scale, dtype).flatten(0, 1)
        codes, scale, _, _ = ops.quantize_per_token(attended, attn_out_delta)
    stream = ops.int8_linear(
        codes, scale, attn_out, attn_out_scale, attn_out_bias, "none", layer_scale1, stream, out_dtype=dtype
    )
    codes, scale, _ = ops.layernorm_quantize(stream, norm2_weight, norm2_bias, eps2, fc1_delta)
    codes, scale, _, _ = ops.int8_linear_quantize(
        codes, scale, fc1, fc1_scale, fc1_bias, activation, per_group=fc2_groups
    )
    stream = ops.int8_linear(codes, scale, fc2, fc2_scale, fc2_bias, "none", layer_scale2, stream, out_dtype=dtype)
    return stream.view(batch, queries, width)


int8_encoder_block = functools.partial(compose_encoder_block, sys.modules[__name__])
"""h = x + ls1 ∘ attention(LN1(x)) W_oᵀ; h + ls2 ∘ act(LN2(h) W_1ᵀ) W_2ᵀ: a block as its ops, one after the other."""


def pack_weight(b, layout="panels"):
    """(N, K) codes in a packed layout, zero padded.

    panels: [p, g, n, i] = b[64 p + n, 4 g + i], then the int32 column sums Σ_k b[n, k] as bytes: signed kernels on u8 x
    s8 instructions subtract 128 times them.

    strips: for each 16 output channels (⌈K/16⌉, 4, 16, 4) of b + 128 as u8, [c, g, n, i] = b[n, 16 c + 4 g + i] + 128;
    then for each chunk c the largest ‖·‖² of the eight codes that one int16 sums, [:, n, :2] and [:, n, 2:] over all n,
    fp32, Inf from 65535 on (a square is |b| min(|b|, 127)).
    """
    n, k = b.shape
    if layout == "strips":
        return _strips(b)
    panels, groups = -(-n // PANEL), -(-k // K_GROUP)
    padded = b.new_zeros(panels * PANEL, groups * K_GROUP)
    padded[:n, :k] = b
    body = padded.reshape(panels, PANEL, groups, K_GROUP).transpose(1, 2)
    sums = padded.sum(-1, dtype=torch.int32).view(torch.int8).reshape(panels, 1, PANEL, K_GROUP)
    return torch.cat([body, sums], dim=1)


def _strips(b: Tensor) -> Tensor:
    n, k = b.shape
    packed = b.new_zeros(layouts.shape_of("strips", n, k))
    (panels, strips, _), chunks = packed.shape, -(-k // CHUNK)
    padded = b.new_zeros(panels * PANEL, chunks * CHUNK)
    padded[:n, :k] = b
    codes = padded.view(panels, strips, STRIP, chunks, CHUNK // K_GROUP, K_GROUP).permute(0, 1, 3, 4, 2, 5)
    packed[..., : chunks * CHUNK * STRIP] = (codes ^ -128).flatten(2)
    magnitudes = codes.int().abs()
    squares = (magnitudes * magnitudes.clamp_max(127)).unflatten(-1, (2, 2)).sum((3, -1))
    norms = squares.flatten(3).amax(-1).float()
    norms[norms >= 0xFFFF] = torch.inf
    packed[..., chunks * CHUNK * STRIP :][..., : 4 * chunks] = norms.view(torch.int8)
    return packed


def unpack_weight(packed, n, k):
    """Inverse of `pack_weight`: the (n, k) codes."""
    if packed.dim() == 3:  # strips
        (panels, strips, _), chunks = packed.shape, -(-k // CHUNK)
        codes = (packed[..., : chunks * CHUNK * STRIP] ^ -128).view(panels, strips, chunks, -1, STRIP, K_GROUP)
        body = codes.permute(0, 1, 4, 2, 3, 5).reshape(panels * PANEL, chunks * CHUNK)
    else:
        panels, groups = packed.shape[0], packed.shape[1] - 1
        body = packed[:, :groups].transpose(1, 2).reshape(panels * PANEL, groups * K_GROUP)
    return body[:n, :k].clone(memory_format=torch.contiguous_format)


def _unpacked(b: Tensor, k: int) -> Tensor:
    return b if b.dim() == 2 else unpack_weight(b, b.shape[0] * PANEL, k)


def _equalized(x: Tensor, equalizer: Tensor | None) -> Tensor:
    return x.float() if equalizer is None else x.float() * equalizer


def _poisoned_scale(x: Tensor, scale: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x).all(-1), scale, torch.nan)


def _row_sum(codes: Tensor, wanted: bool) -> Tensor:
    return codes.sum(-1, dtype=torch.int32) if wanted else _absent(codes)


def _absent(like: Tensor) -> Tensor:
    """An empty int32 tensor: an output that was not asked for."""
    return torch.empty(0, dtype=torch.int32, device=like.device)


def _add_residual(y: Tensor, layer_scale: Tensor | None, residual: Tensor) -> Tensor:
    return residual.float() + y if layer_scale is None else nm.fma(y, layer_scale.float(), residual.float())


def _grouped_product(a: Tensor, a_scale: Tensor, b: Tensor) -> Tensor:
    """Σ_g α_a[m, g] · acc_g[m, n], added in the order of the groups, one fma each."""
    b = _unpacked(b, a.shape[-1])
    y = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for g, (a_group, b_group) in enumerate(zip(a.split(nm.GROUP, -1), b.split(nm.GROUP, -1), strict=True)):
        y = nm.fma(int8_mm(a_group, b_group).float(), a_scale[:, g : g + 1], y)
    return y


def _dequantized(acc: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """fma(acc, scale, bias); a missing bias is +0, so that a product of -0 becomes +0."""
    return nm.fma(acc, scale, 0.0 if bias is None else bias.float())


def epilogue(y, activation, layer_scale, residual, out_dtype):
    """act(y) · layer_scale + residual of fp32 y (M, N), cast to `out_dtype`."""
    y = nm.activation(y, activation)
    if residual is not None:
        y = _add_residual(y, layer_scale, residual)
    elif layer_scale is not None:
        y = y * layer_scale.float()
    return y.to(out_dtype)
