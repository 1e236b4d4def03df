"""What happens to a GEMM's accumulators: dequantization, bias, activation, layer scale, residual, and the store.

Used by `kernels/gemm_s8.py`, whose docstring has the formulas; a tile is finished a few columns at a time.
"""

import triton
import triton.language as tl

from vqvit.kernels import numerics as nm


@triton.jit
def scaled(acc, a_scale_ptr, b_scale_ptr, bias_ptr, offs_m, offs_n, M, N):
    """fma(acc, α_a α_bᵀ, bias) of fp32 accumulators; without a_scale they are multiplied by it already.

    A missing bias is +0, so that a product of -0 becomes +0.
    """
    scale = tl.load(b_scale_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    if a_scale_ptr is not None:
        scale = tl.load(a_scale_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None] * scale
    if bias_ptr is not None:
        bias = nm.to_fp32(tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0))
        bias = bias[None, :]
    else:
        bias = 0.0
    return nm.fma(acc, scale, bias)


@triton.jit
def tile_ptrs(ptr, first_m, first_n, stride_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers to a tile: one 64-bit corner and 32-bit offsets."""
    corner = ptr + first_m.to(tl.int64) * stride_m + first_n
    return corner + (tl.arange(0, BLOCK_M)[:, None] * stride_m + tl.arange(0, BLOCK_N)[None, :])


@triton.jit
def finished(
    y, layer_scale_ptr, residual_ptr, offs_n, inside, N, stride_rm, first_m, first_n, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """act(y) · layer_scale + residual of the fp32 tile at (first_m, first_n)."""
    y = nm.activation(y, ACTIVATION)
    if layer_scale_ptr is not None:
        layer_scale = nm.to_fp32(tl.load(layer_scale_ptr + offs_n, mask=offs_n < N, other=0.0))[None, :]
    if residual_ptr is not None:
        residual_ptrs = tile_ptrs(residual_ptr, first_m, first_n, stride_rm, BLOCK_M, BLOCK_N)
        residual = nm.to_fp32(tl.load(residual_ptrs, mask=inside, other=0.0))
        if layer_scale_ptr is not None:
            y = nm.fma(y, layer_scale, residual)
        else:
            y = residual + y
    elif layer_scale_ptr is not None:
        y = y * layer_scale
    return y


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile's columns: a thread's registers stay its own."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _store_qkv(
    y, codes_ptr, scale_ptr, v_ptr, offs_m, inside, M, tokens, first_m, first_n,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The columns of one head: codes of q and k into (2, B, H, S, D), or fp32 v into (M, H D)."""
    part = first_n // (HEADS * HEAD_DIM)
    if part < 2:
        codes, scale = nm.quantize_rows(y, True, inside, HEAD_DIM, 0.0, False)
        image = (part * (M // tokens) + offs_m // tokens).to(tl.int64)
        rows = (image * HEADS + first_n // HEAD_DIM % HEADS) * tokens + offs_m % tokens
        tl.store(scale_ptr + rows[:, None], scale, mask=offs_m[:, None] < M)
        tl.store(codes_ptr + rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], codes, mask=inside)
    else:
        width = HEADS * HEAD_DIM
        tl.store(tile_ptrs(v_ptr, first_m, first_n - 2 * width, width, BLOCK_M, HEAD_DIM), y, mask=inside)


@triton.jit
def epilogue(
    acc, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, a_zero_ptr, a_sum_ptr,
    b_zero_ptr, b_sum_ptr, out_scale_ptr, row_scale_ptr, row_sum_ptr, v_ptr, M, N, K, tokens, stride_rm, first_m,
    first_n, ACTIVATION: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SUBTILE_N: tl.constexpr,
):  # fmt: skip
    """Finish and store the accumulators at (first_m, first_n), SUBTILE_N columns at a time to save registers."""
    if BLOCK_N > SUBTILE_N:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        epilogue(
            left, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, a_zero_ptr, a_sum_ptr,
            b_zero_ptr, b_sum_ptr, out_scale_ptr, row_scale_ptr, row_sum_ptr, v_ptr, M, N, K, tokens, stride_rm,
            first_m, first_n, ACTIVATION, HEADS, BLOCK_M, BLOCK_N // 2, SUBTILE_N,
        )  # fmt: skip
        epilogue(
            right, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, a_zero_ptr, a_sum_ptr,
            b_zero_ptr, b_sum_ptr, out_scale_ptr, row_scale_ptr, row_sum_ptr, v_ptr, M, N, K, tokens, stride_rm,
            first_m, first_n + BLOCK_N // 2, ACTIVATION, HEADS, BLOCK_M, BLOCK_N // 2, SUBTILE_N,
        )  # fmt: skip
    else:
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
        out_ptrs = tile_ptrs(out_ptr, first_m, first_n, N, BLOCK_M, BLOCK_N)
        if out_ptr.dtype.element_ty == tl.int32:
            tl.store(out_ptrs, acc, mask=inside)
        else:
            # zero points
            if a_zero_ptr is not None:
                a_zero = tl.load(a_zero_ptr + offs_m, mask=offs_m < M, other=0)[:, None]
                acc -= a_zero * tl.load(b_sum_ptr + offs_n, mask=offs_n < N, other=0)[None, :]
            if b_zero_ptr is not None:
                b_zero = tl.load(b_zero_ptr + offs_n, mask=offs_n < N, other=0)[None, :]
                acc -= tl.load(a_sum_ptr + offs_m, mask=offs_m < M, other=0)[:, None] * b_zero
                if a_zero_ptr is not None:
                    acc += K * a_zero * b_zero

            # scales, bias, activation, layer scale, residual
            y = scaled(acc.to(tl.float32), a_scale_ptr, b_scale_ptr, bias_ptr, offs_m, offs_n, M, N)
            y = finished(
                y, layer_scale_ptr, residual_ptr, offs_n, inside, N, stride_rm, first_m, first_n,
                ACTIVATION, BLOCK_M, BLOCK_N,
            )  # fmt: skip

            # store
            if HEADS > 0:
                _store_qkv(
                    y, out_ptr, row_scale_ptr, v_ptr, offs_m, inside, M, tokens, first_m, first_n,
                    HEADS, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            elif out_ptr.dtype.element_ty == tl.int8 and out_scale_ptr is None:
                y = tl.where(offs_n[None, :] < N, y, 0.0)
                codes, scale = nm.quantize_rows(y, True, inside, BLOCK_N, 0.0, False)
                groups = tl.cdiv(N, BLOCK_N)
                tl.store(row_scale_ptr + offs_m[:, None] * groups + first_n // BLOCK_N, scale, mask=offs_m[:, None] < M)
                tl.store(out_ptrs, codes, mask=inside)
            elif out_ptr.dtype.element_ty == tl.int8:
                if tl.max(nm.magnitude_bits(y)) >= nm.INF_BITS:  # rare, so that the usual tile pays one reduction
                    _, finite = nm.row_absmax(y)
                    rows = offs_m[:, None]
                    tl.store(row_scale_ptr + rows, float("nan"), mask=(rows < M) & (finite == 0))
                    y = tl.where(y == y, y, 0.0)
                codes = nm.to_codes_static(y, tl.load(out_scale_ptr))
                tl.store(out_ptrs, codes, mask=inside)
                if row_sum_ptr is not None:
                    sums = tl.sum(tl.where(inside, codes.to(tl.int32), 0), axis=1)
                    tl.atomic_add(row_sum_ptr + offs_m, sums, mask=offs_m < M, sem="relaxed")
            else:
                tl.store(out_ptrs, nm.from_fp32(y, out_ptr.dtype.element_ty), mask=inside)
