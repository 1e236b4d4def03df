"""Quantization to int8 codes, bit for bit that of `vqvit.reference`.

    per token    α_t = max(1e-8, (max|x_t| + δ sd(x_t)) / 127),  q = clamp(rne(x / α_t), -127, 127)
    asymmetric   α_t = (max - min) / 254,  z_t = -127 - rne(min / α_t),  q = clamp(rne(x / α_t) + z_t, -127, 127)
    static       q = clamp(rne(x / α)) for one calibrated α
    residual     R = clamp(rne(254 (x - α q) / α))

Shapes: x (M, K) float, any row stride, times equalizer (K,) if given -> codes (M, K) int8, scales (M,) fp32.
Grid: one program per ROWS rows of a tile (ROWS, BLOCK >= K) that stays in registers: every element is read once.
Rows beyond MAX_TILE elements are read twice (four times with δ) in blocks, by one program each.
Bytes: (input size + 1) · M · K; about 12 operations an element, so memory bounds it.
`patchify_quantize` gathers its rows from images.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vqvit import numerics as contract
from vqvit.kernels import numerics as nm
from vqvit.kernels.launch import EXACT, INTERPRETER, Device, absent, device_of, on, row_major, vector


@dataclass(frozen=True)
class RowConfig:
    """tile: least elements of a program (short rows share one); per_warp: elements of a warp."""

    tile: int
    per_warp: int


# Memory bounds these kernels on every architecture, so the number of rows decides and not the architecture.
MANY_ROWS = RowConfig(tile=1024, per_warp=1024)  # 32 registers a thread; rows up to 1024 reduce in one warp, no barrier
FEW_ROWS = RowConfig(tile=256, per_warp=256)  # small batches: more warps at work, a shorter chain in each
INTERPRETED = RowConfig(tile=2**16, per_warp=2**16)  # each tile is a numpy call
FEW_ROWS_PER_SM = 16  # one warp a row would leave most of a multiprocessor's 64 warps empty
MAX_WARPS = 16
MAX_TILE = 16384  # 16 warps of 32 registers a thread
LONG_BLOCK = 4096


def row_config(device: Device, m: int, k: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK, num_warps) for m rows of k elements."""
    few = FEW_ROWS if m < FEW_ROWS_PER_SM * device.sms else MANY_ROWS
    config = INTERPRETED if device.arch == INTERPRETER else few
    block = max(32, triton.next_power_of_2(k))
    rows = max(1, config.tile // block)
    return rows, block, min(max(1, rows * block // config.per_warp), MAX_WARPS)


@triton.jit
def load_rows(x_ptr, equalizer_ptr, rows, cols, stride_xm, M, K):
    """The tile x[rows, cols] · equalizer in fp32, 0 outside (M, K)."""
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    x = nm.to_fp32(tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xm + cols[None, :], mask=inside, other=0.0))
    if equalizer_ptr is not None:
        x = x * tl.load(equalizer_ptr + cols[None, :], mask=cols[None, :] < K, other=0.0)
    return x


@triton.jit
def store_rows(codes, codes_ptr, rows, cols, M, K):
    """codes[rows, cols] into a contiguous (M, K)."""
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    tl.store(codes_ptr + rows[:, None].to(tl.int64) * K + cols[None, :], codes, mask=inside)


@triton.jit
def store_per_row(ptr, value, rows, M):
    """A (ROWS, 1) tile into (M,)."""
    tl.store(ptr + rows[:, None], value, mask=rows[:, None] < M)


@triton.jit
def row_sum(codes):
    return tl.sum(codes.to(tl.int32), axis=1)[:, None]


@triton.jit
def _quantize_kernel(
    x_ptr,  # (M, K) float
    equalizer_ptr,  # (K,) fp32 or None
    static_scale_ptr,  # () fp32 or None
    codes_ptr,  # (M, K) int8
    scale_ptr,  # (M,) fp32
    zero_point_ptr,  # (M,) int32 or None: symmetric
    row_sum_ptr,  # (M,) int32 or None
    delta,  # fp32
    M,
    K,
    stride_xm,
    HAS_DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    x = load_rows(x_ptr, equalizer_ptr, rows, cols, stride_xm, M, K)

    if static_scale_ptr is not None:
        codes, scale = nm.quantize_rows_static(x, tl.load(static_scale_ptr))
    elif zero_point_ptr is not None:
        codes, scale, zero_point = nm.quantize_rows_asymmetric(x)
        codes = tl.where(cols[None, :] < K, codes, 0)  # a padded 0 has the code of the zero point
        store_per_row(zero_point_ptr, zero_point, rows, M)
    else:
        codes, scale = nm.quantize_rows(x, True, cols[None, :] < K, K, delta, HAS_DELTA)

    store_per_row(scale_ptr, scale, rows, M)
    store_rows(codes, codes_ptr, rows, cols, M, K)
    if row_sum_ptr is not None:
        store_per_row(row_sum_ptr, row_sum(codes), rows, M)


@triton.jit
def _quantize_long_kernel(
    x_ptr,  # (M, K) float
    equalizer_ptr,  # (K,) fp32 or None
    static_scale_ptr,  # () fp32 or None
    codes_ptr,  # (M, K) int8
    scale_ptr,  # (M,) fp32
    zero_point_ptr,  # (M,) int32 or None: symmetric
    row_sum_ptr,  # (M,) int32 or None
    delta,  # fp32
    M,
    K,
    stride_xm,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK)

    bits = tl.zeros((1, 1), tl.int32)
    low = tl.zeros((1, 1), tl.float32)
    high = tl.zeros((1, 1), tl.float32)
    for start in range(0, K, BLOCK):
        x = load_rows(x_ptr, equalizer_ptr, row, start + cols, stride_xm, M, K)
        bits = tl.maximum(bits, tl.max(nm.magnitude_bits(x), axis=1)[:, None])
        low = tl.minimum(low, tl.min(x, axis=1)[:, None])
        high = tl.maximum(high, tl.max(x, axis=1)[:, None])
    finite = bits < nm.INF_BITS
    span = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)

    if HAS_DELTA:
        exponent = nm.grid_exponent(span)
        total = tl.zeros((1, 1), tl.int64)
        for start in range(0, K, BLOCK):
            x = load_rows(x_ptr, equalizer_ptr, row, start + cols, stride_xm, M, K)
            total += nm.grid_sum(tl.where(finite, x, 0.0), exponent, 1)
        mean = nm.grid_mean(total, exponent, K, 1)
        total = tl.zeros((1, 1), tl.int64)
        for start in range(0, K, BLOCK):
            x = load_rows(x_ptr, equalizer_ptr, row, start + cols, stride_xm, M, K)
            inside = finite & ((start + cols)[None, :] < K)
            total += nm.grid_sum(tl.where(inside, x - mean, 0.0), exponent, 2)
        span = nm.fma(tl.sqrt_rn(nm.grid_mean(total, exponent, K, 2)), delta, span)

    if static_scale_ptr is not None:
        divisor = tl.load(static_scale_ptr) + tl.zeros((1, 1), tl.float32)
        scale = tl.where(finite, divisor, float("nan"))
    elif zero_point_ptr is not None:
        scale, zero_point = nm.asymmetric_range(tl.where(finite, low, 0.0), tl.where(finite, high, 0.0), finite)
        store_per_row(zero_point_ptr, zero_point, row, M)
    else:
        scale = tl.where(finite, nm.scale_of(span, nm.QMAX), float("nan"))
        divisor = scale
    store_per_row(scale_ptr, scale, row, M)

    total_codes = tl.zeros((1, 1), tl.int32)
    for start in range(0, K, BLOCK):
        x = load_rows(x_ptr, equalizer_ptr, row, start + cols, stride_xm, M, K)
        if zero_point_ptr is not None:
            codes = nm.to_codes_asymmetric(tl.where(finite, x, 0.0), scale, zero_point)
            codes = tl.where((start + cols)[None, :] < K, codes, 0)
        else:
            codes = nm.to_codes(x, divisor)
        store_rows(codes, codes_ptr, row, start + cols, M, K)
        total_codes += row_sum(codes)
    if row_sum_ptr is not None:
        store_per_row(row_sum_ptr, total_codes, row, M)


@triton.jit
def _quantize_residual_kernel(
    x_ptr,  # (M, K) float
    codes_ptr,  # (M, K) int8, contiguous
    scale_ptr,  # (M,) fp32
    residual_ptr,  # (M, K) int8
    M,
    K,
    stride_xm,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = load_rows(x_ptr, None, row, cols, stride_xm, M, K)
    scale = tl.load(scale_ptr + row)[:, None]
    codes = tl.load(codes_ptr + row[:, None].to(tl.int64) * K + cols[None, :], mask=cols[None, :] < K, other=0)
    remainder = x - scale * codes.to(tl.float32)
    store_rows(nm.to_codes(remainder * nm.RESIDUAL_STEPS, scale), residual_ptr, row, cols, M, K)


@triton.jit
def _patchify_quantize_kernel(
    pixels_ptr,  # (B, C, Ht, Wd) float
    equalizer_ptr,  # (C ph pw,) fp32 or None
    codes_ptr,  # (M, K) int8, M = B · GRID_H · GRID_W, K = C · ph · pw
    scale_ptr,  # (M,) fp32
    M,
    K,
    grid_h,
    grid_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    image, patch = rows // (grid_h * grid_w), rows % (grid_h * grid_w)
    channel, pixel = cols // (PATCH_H * PATCH_W), cols % (PATCH_H * PATCH_W)
    corner = (
        image.to(tl.int64) * stride_b + (patch // grid_w) * PATCH_H * stride_h + (patch % grid_w) * PATCH_W * stride_w
    )
    offset = channel * stride_c + (pixel // PATCH_W) * stride_h + (pixel % PATCH_W) * stride_w
    inside = (rows[:, None] < M) & (cols[None, :] < K)
    x = nm.to_fp32(tl.load(pixels_ptr + corner[:, None] + offset[None, :], mask=inside, other=0.0))
    if equalizer_ptr is not None:
        x = x * tl.load(equalizer_ptr + cols[None, :], mask=cols[None, :] < K, other=0.0)

    codes, scale = nm.quantize_rows(x, True, inside, K, 0.0, False)
    store_per_row(scale_ptr, scale, rows, M)
    store_rows(codes, codes_ptr, rows, cols, M, K)


def _quantize(x, delta, equalizer, static_scale, symmetric, row_sum):
    """Codes, scales, zero points (None if symmetric) and row sums (None if not wanted) of the last dimension's rows."""
    k = x.shape[-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    zero_point = None if symmetric else torch.empty_like(scale, dtype=torch.int32)
    sums = torch.empty_like(scale, dtype=torch.int32) if row_sum else None
    x = row_major(x.reshape(-1, k))
    m = x.shape[0]
    if m == 0:
        return codes, scale, zero_point, sums

    equalizer = vector(equalizer)
    tensors = (x, equalizer, static_scale, codes, scale, zero_point, sums)
    with on(x):
        if k > MAX_TILE:
            _quantize_long_kernel[(m,)](
                *tensors, delta, m, k, x.stride(0), HAS_DELTA=delta != 0.0, BLOCK=LONG_BLOCK, num_warps=8, **EXACT
            )
        else:
            rows, block, num_warps = row_config(device_of(x), m, k)
            _quantize_kernel[(triton.cdiv(m, rows),)](
                *tensors, delta, m, k, x.stride(0), HAS_DELTA=delta != 0.0, ROWS=rows, BLOCK=block,
                num_warps=num_warps, **EXACT,
            )  # fmt: skip
    return codes, scale, zero_point, sums


def quantize_per_token(x, delta=0.0, equalizer=None, symmetric=True, row_sum=False):
    codes, scale, zero_point, sums = _quantize(x, delta, equalizer, None, symmetric, row_sum)
    return codes, scale, absent(x) if symmetric else zero_point, sums if row_sum else absent(x)


def quantize_per_group(x, equalizer=None):
    k = x.shape[-1]
    if equalizer is not None:
        x = x.float() * equalizer
    # Padding copies, even by nothing.
    groups = contract.groups(x) if k % contract.GROUP else x.unflatten(-1, (-1, contract.GROUP))
    codes, scale, _, _ = quantize_per_token(groups)
    return codes.flatten(-2)[..., :k].contiguous(), scale


def quantize_static(x, scale, equalizer=None, row_sum=False):
    codes, scale, _, sums = _quantize(x, 0.0, equalizer, scale, True, row_sum)
    return codes, scale, sums if row_sum else absent(x)


def quantize_residual(x, codes, scale):
    k = x.shape[-1]
    residual = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    x, codes, scale = row_major(x.reshape(-1, k)), codes.contiguous(), scale.contiguous()
    if x.shape[0]:
        block = min(LONG_BLOCK, max(32, triton.next_power_of_2(k)))
        with on(x):
            _quantize_residual_kernel[(x.shape[0], triton.cdiv(k, block))](
                x,
                codes,
                scale,
                residual,
                x.shape[0],
                k,
                x.stride(0),
                BLOCK=block,
                num_warps=max(1, block // 512),
                **EXACT,
            )
    return residual


def patchify_quantize(pixels, patch_height, patch_width, equalizer=None):
    batch, channels, height, width = pixels.shape
    grid_h, grid_w = height // patch_height, width // patch_width
    m, k = batch * grid_h * grid_w, channels * patch_height * patch_width
    if k > MAX_TILE:  # no patch embedding comes near: one copy, then the kernel for long rows
        grid = pixels.reshape(batch, channels, grid_h, patch_height, grid_w, patch_width)
        return quantize_per_token(grid.permute(0, 2, 4, 1, 3, 5).reshape(m, k), 0.0, equalizer)[:2]
    codes = torch.empty((m, k), dtype=torch.int8, device=pixels.device)
    scale = torch.empty(m, dtype=torch.float32, device=pixels.device)
    if m == 0:
        return codes, scale
    rows, block, num_warps = row_config(device_of(pixels), m, k)
    equalizer = vector(equalizer)
    with on(pixels):
        _patchify_quantize_kernel[(triton.cdiv(m, rows),)](
            pixels, equalizer, codes, scale, m, k, grid_h, grid_w, *pixels.stride(),
            PATCH_H=patch_height, PATCH_W=patch_width, ROWS=rows, BLOCK=block, num_warps=num_warps, **EXACT,
        )  # fmt: skip
    return codes, scale
