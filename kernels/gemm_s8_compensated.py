"""Error-compensated INT8 GEMM (numerics §6), bit for bit that of `vqvit.reference`.

    y = act(α_a α_bᵀ ∘ (Aq Bqᵀ + [R_A Bqᵀ + Aq R_Bᵀ] / 254 + μ R_A R_Bᵀ / 254²) + bias) · layer_scale + residual

Shapes: a and its residual codes (M, K) int8, b and its residual codes (N, K) int8, out (M, N) float.
Layout and grid as in `kernels/gemm_s8.py`. Up to four products of the same tiles share one loop: each tile is loaded
once, and one int32 accumulator serves each power of 1 / 254.
Operations: 2 · M · N · K int8 for each product. Bytes: twice those of the plain GEMM with both residuals.
"""

import math

import torch
import triton
import triton.language as tl

from vqvit.kernels import numerics as nm
from vqvit.kernels.gemm_s8 import GemmConfig, load_k, multiples, tile_ids
from vqvit.kernels.gemm_s8_epilogue import finished, scaled, tile_ptrs
from vqvit.kernels.launch import EXACT, INTERPRETER, device_of, on, vector

# Three accumulators share the registers, and four tiles the shared memory, of one.
CONFIGS = {
    90: GemmConfig(64, 128, 128, 8, 2, ctas=1),
    86: GemmConfig(64, 64, 64, 4, 2, ctas=2),
    80: GemmConfig(64, 128, 64, 8, 2, ctas=1),
    INTERPRETER: GemmConfig(64, 64, 64, 4, 1, ctas=1),
}
RAGGED_CONFIG = GemmConfig(64, 64, 32, 4, 2, ctas=1)  # where 16-byte loads do not divide K


@triton.jit
def _int8_compensated_kernel(
    a_ptr,  # (M, K) int8
    a_residual_ptr,  # (M, K) int8 or None
    b_ptr,  # (N, K) int8
    b_residual_ptr,  # (N, K) int8 or None
    out_ptr,  # (M, N) float
    a_scale_ptr,  # (M,) fp32
    b_scale_ptr,  # (N,) fp32
    bias_ptr,  # (N,) float or None
    layer_scale_ptr,  # (N,) float or None
    residual_ptr,  # (M, N) float or None
    first_weight,  # 1 / 254
    second_weight,  # μ / 254²
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    RA_B: tl.constexpr,
    A_RB: tl.constexpr,
    RA_RB: tl.constexpr,
    EVEN_K: tl.constexpr,
    K_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # size, program ids, offsets
    K = multiples(K, K_UNIT)
    pid_m, pid_n = tile_ids(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_offsets = (offs_m % M)[:, None].to(tl.int64) * K + offs_k[None, :]
    b_offsets = (offs_n % N)[None, :].to(tl.int64) * K + offs_k[:, None]

    # main loop: one accumulator for each power of 1/254
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        a = load_k(a_ptr + k + a_offsets, offs_k[None, :], k, K, EVEN_K)
        b = load_k(b_ptr + k + b_offsets, offs_k[:, None], k, K, EVEN_K)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        if RA_B or RA_RB:
            a_residual = load_k(a_residual_ptr + k + a_offsets, offs_k[None, :], k, K, EVEN_K)
        if A_RB or RA_RB:
            b_residual = load_k(b_residual_ptr + k + b_offsets, offs_k[:, None], k, K, EVEN_K)
        if RA_B:
            first = tl.dot(a_residual, b, first, out_dtype=tl.int32)
        if A_RB:
            first = tl.dot(a, b_residual, first, out_dtype=tl.int32)
        if RA_RB:
            second = tl.dot(a_residual, b_residual, second, out_dtype=tl.int32)

    # epilogue, store
    y = acc.to(tl.float32)
    if RA_B or A_RB:
        y = nm.fma(first.to(tl.float32), first_weight, y)
    if RA_RB:
        y = nm.fma(second.to(tl.float32), second_weight, y)
    y = scaled(y, a_scale_ptr, b_scale_ptr, bias_ptr, offs_m, offs_n, M, N)
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    y = finished(y, layer_scale_ptr, residual_ptr, offs_n, inside, N, N, first_m, first_n, ACTIVATION, BLOCK_M, BLOCK_N)
    out_ptrs = tile_ptrs(out_ptr, first_m, first_n, N, BLOCK_M, BLOCK_N)
    tl.store(out_ptrs, nm.from_fp32(y, out_ptr.dtype.element_ty), mask=inside)


def int8_linear_compensated(
    a, a_scale, a_residual, b, b_scale, b_residual, bias, terms, mu=1.0, activation="none", layer_scale=None,
    residual=None, out_dtype=torch.float32,
):  # fmt: skip
    """`terms`: which of R_A Bqᵀ, Aq R_Bᵀ, R_A R_Bᵀ to add."""
    (m, k), n = a.shape, b_scale.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if m == 0 or n == 0:
        return out
    ra_b, a_rb, ra_rb = terms
    arch, unit = device_of(a).arch, math.gcd(16, k)
    c = RAGGED_CONFIG if unit < 16 and arch != INTERPRETER else CONFIGS[arch]
    with on(a):
        _int8_compensated_kernel[(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n),)](
            *(vector(t) for t in (a, a_residual, b, b_residual)), out, vector(a_scale), vector(b_scale), vector(bias),
            vector(layer_scale), vector(residual), 1 / nm.RESIDUAL_STEPS.value, mu / nm.RESIDUAL_STEPS.value**2,
            m, n, k, ACTIVATION=activation, RA_B=ra_b, A_RB=a_rb, RA_RB=ra_rb, EVEN_K=k % c.block_k == 0, K_UNIT=unit,
            BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, GROUP_M=c.group_m,
            num_warps=c.num_warps, num_stages=c.num_stages, maxnreg=c.max_registers, **EXACT,
        )  # fmt: skip
    return out
