"""(Residual add +) LayerNorm (+ quantization) in one pass, bit for bit that of `vqvit.reference`.

    stream = residual + layer_scale ∘ x                                    (optional, rounded to residual's dtype)
    y = (stream - mean) / sqrt(var + ε) · γ + β                            (paper: / (sd + ε))
    α_t = max(1e-8, (max|y_t| + δ sd(y_t)) / 127) or static,  q = clamp(rne(y / α_t), -127, 127)

Shapes: x, residual, stream (M, K) float; γ, β, layer_scale (K,) float -> codes (M, K) int8, scales (M,) fp32; or y
(M, K) in x's dtype.
Grid: one program per ROWS rows of a tile (ROWS, BLOCK >= K) that stays in registers: every element is read once.
Bytes: (input size + 1) · M · K, with the residual (3 · input size + 1) · M · K; about 30 operations an element.
Mean and variance are exact int64 sums on a grid of 2^-21 of the row's largest magnitude (numerics §4), 3 of the 30.
Tiles as in `kernels/quantize.py`, without a loop: beyond 16384 columns registers spill, up to the op's limit of 65536.
"""

import torch
import triton
import triton.language as tl

from vqvit.kernels import numerics as nm
from vqvit.kernels.launch import EXACT, absent, device_of, on, row_major, vector
from vqvit.kernels.quantize import row_config, row_sum, store_per_row


@triton.jit
def _load_channels(ptr, cols, K):
    """(1, BLOCK) fp32 of a float vector (K,), 0 beyond."""
    return nm.to_fp32(tl.load(ptr + cols[None, :], mask=cols[None, :] < K, other=0.0))


@triton.jit
def _normalize(x, weight_ptr, bias_ptr, cols, eps, K, PAPER: tl.constexpr):
    """(y of the tile x, 0 beyond K, where weight and bias are; whether a row is finite: y means nothing elsewhere)."""
    valid = cols[None, :] < K
    absmax, finite = nm.row_absmax(x)
    deviation, variance = nm.row_deviation(x, valid, nm.grid_exponent(absmax), K)
    if PAPER:
        spread = tl.sqrt_rn(variance) + eps
    else:
        spread = tl.sqrt_rn(variance + eps)
    weight = _load_channels(weight_ptr, cols, K)
    bias = _load_channels(bias_ptr, cols, K)
    return nm.fma(deviation * tl.div_rn(1.0, spread), weight, bias), finite


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # (M, K) float
    weight_ptr,  # (K,) float
    bias_ptr,  # (K,) float
    y_ptr,  # (M, K) in x's dtype
    eps,  # fp32
    M,
    K,
    stride_xm,
    PAPER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    x = nm.to_fp32(tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xm + cols[None, :], mask=inside, other=0.0))
    y, finite = _normalize(x, weight_ptr, bias_ptr, cols, eps, K, PAPER)
    y = nm.from_fp32(tl.where(finite, y, float("nan")), y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None].to(tl.int64) * K + cols[None, :], y, mask=inside)


@triton.jit
def _layernorm_quantize_kernel(
    x_ptr,  # (M, K) float
    residual_ptr,  # (M, K) float or None
    stream_ptr,  # (M, K) in residual's dtype, or None
    layer_scale_ptr,  # (K,) float or None
    weight_ptr,  # (K,) float
    bias_ptr,  # (K,) float
    static_scale_ptr,  # () fp32 or None
    codes_ptr,  # (M, K) int8
    scale_ptr,  # (M,) fp32
    row_sum_ptr,  # (M,) int32 or None
    eps,  # fp32
    delta,  # fp32
    M,
    K,
    stride_xm,
    stride_rm,
    PAPER: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # program ids, offsets
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    valid = cols[None, :] < K
    inside = (rows[:, None] < M) & valid
    out_offsets = rows[:, None].to(tl.int64) * K + cols[None, :]

    # residual stream
    x = nm.to_fp32(tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xm + cols[None, :], mask=inside, other=0.0))
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows[:, None].to(tl.int64) * stride_rm + cols[None, :]
        residual = nm.to_fp32(tl.load(residual_ptrs, mask=inside, other=0.0))
        if layer_scale_ptr is not None:
            x = nm.fma(x, _load_channels(layer_scale_ptr, cols, K), residual)
        else:
            x = residual + x
        stream = nm.from_fp32(x, stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + out_offsets, stream, mask=inside)
        x = nm.to_fp32(stream)

    # LayerNorm, quantize, store
    y, finite = _normalize(x, weight_ptr, bias_ptr, cols, eps, K, PAPER)
    if static_scale_ptr is not None:
        codes, scale = nm.quantize_rows_static(tl.where(finite, y, float("nan")), tl.load(static_scale_ptr))
    else:
        codes, scale = nm.quantize_rows(y, finite, valid, K, delta, HAS_DELTA)
    store_per_row(scale_ptr, scale, rows, M)
    tl.store(codes_ptr + out_offsets, codes, mask=inside)
    if row_sum_ptr is not None:
        store_per_row(row_sum_ptr, row_sum(codes), rows, M)


def _launch(x, residual, weight, bias, eps, layer_scale, delta, static_scale, want_sum, paper):
    """Codes, scales, row sums (None if not wanted) and the stream (None without residual)."""
    k = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    sums = torch.empty_like(scale, dtype=torch.int32) if want_sum else None
    stream = None if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    x = row_major(x.reshape(-1, k))
    residual = None if residual is None else row_major(residual.reshape(-1, k))
    m = x.shape[0]
    if m == 0:
        return codes, scale, sums, stream

    rows, block, num_warps = row_config(device_of(x), m, k)
    with on(x):
        _layernorm_quantize_kernel[(triton.cdiv(m, rows),)](
            x, residual, stream, vector(layer_scale), vector(weight), vector(bias), static_scale, codes, scale, sums,
            eps, delta, m, k, x.stride(0), 0 if residual is None else residual.stride(0),
            PAPER=paper, HAS_DELTA=delta != 0.0, ROWS=rows, BLOCK=block, num_warps=num_warps, **EXACT,
        )  # fmt: skip
    return codes, scale, sums, stream


def layer_norm(x, weight, bias, eps, paper=False):
    y, k = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    x = row_major(x.reshape(-1, k))
    m = x.shape[0]
    if m == 0:
        return y

    rows, block, num_warps = row_config(device_of(x), m, k)
    with on(x):
        _layer_norm_kernel[(triton.cdiv(m, rows),)](
            x, vector(weight), vector(bias), y, eps, m, k, x.stride(0),
            PAPER=paper, ROWS=rows, BLOCK=block, num_warps=num_warps, **EXACT,
        )  # fmt: skip
    return y


def layernorm_quantize(x, weight, bias, eps, delta=0.0, scale=None, row_sum=False, paper=False):
    codes, scale, sums, _ = _launch(x, None, weight, bias, eps, None, delta, scale, row_sum, paper)
    return codes, scale, sums if row_sum else absent(x)


def add_layernorm_quantize(
    x, residual, weight, bias, eps, layer_scale=None, delta=0.0, scale=None, row_sum=False, paper=False
):
    codes, scale, sums, stream = _launch(x, residual, weight, bias, eps, layer_scale, delta, scale, row_sum, paper)
    return codes, scale, sums if row_sum else absent(x), stream
