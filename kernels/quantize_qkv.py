"""Attention's operands as int8 codes, bit for bit `vqvit.reference.quantize_qkv`.

q and k have a scale for each token of a head, v one for each channel of a head over its tokens: rows and columns.

Shapes: qkv (B, S, 3 H D) float -> q, k, v (B, H, S, D) int8, scales of q and k (B, H, S), of v (B, H, D).
Grid: one program for a head's block of tokens of q or k, or for a few channels of v, which it reads twice.
"""

import torch
import triton
import triton.language as tl

from vqvit.kernels import numerics as nm
from vqvit.kernels.launch import EXACT, on, row_major
from vqvit.kernels.quantize import load_rows, store_per_row, store_rows

QKV_TILE = 4096  # elements of a tile: 32 registers a thread with 4 warps
QKV_CHANNELS = 16  # channels of v in a program: whole 32-byte sectors of half precision


@triton.jit
def _load_channels(x_ptr, channels, tokens, stride_s, S, D):
    """The tile x[tokens, channels] of one head with channels as rows, in fp32."""
    ptrs = x_ptr + channels[:, None] + tokens[None, :].to(tl.int64) * stride_s
    return nm.to_fp32(tl.load(ptrs, mask=(channels[:, None] < D) & (tokens[None, :] < S), other=0.0))


@triton.jit
def _quantize_tokens(x_ptr, codes_ptr, scale_ptr, start, stride_s, S, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start ... start + BLOCK_S of one head's q or k."""
    rows = start + tl.arange(0, BLOCK_S)
    cols = tl.arange(0, BLOCK_D)
    x = load_rows(x_ptr, None, rows, cols, stride_s, S, D)
    codes, scale = nm.quantize_rows(x, True, cols[None, :] < D, D, 0.0, False)
    store_per_row(scale_ptr, scale, rows, S)
    store_rows(codes, codes_ptr, rows, cols, S, D)


@triton.jit
def _quantize_channels(
    x_ptr, codes_ptr, scale_ptr, start, stride_s, S, D, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """BLOCK_C channels of one head's v over all tokens: a pass for the ranges, a pass for the codes."""
    channels = start + tl.arange(0, BLOCK_C)
    bits = tl.zeros((BLOCK_C, 1), tl.int32)
    for first in range(0, S, BLOCK_S):
        x = _load_channels(x_ptr, channels, first + tl.arange(0, BLOCK_S), stride_s, S, D)
        bits = tl.maximum(bits, tl.max(nm.magnitude_bits(x), axis=1)[:, None])
    finite = bits < nm.INF_BITS
    absmax = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)
    scale = tl.where(finite, nm.scale_of(absmax, nm.QMAX), float("nan"))
    store_per_row(scale_ptr, scale, channels, D)
    for first in range(0, S, BLOCK_S):
        tokens = first + tl.arange(0, BLOCK_S)
        x = _load_channels(x_ptr, channels, tokens, stride_s, S, D)
        codes = nm.to_codes_in_range(tl.where(finite, x, 0.0), scale)
        inside = (channels[:, None] < D) & (tokens[None, :] < S)
        tl.store(codes_ptr + tokens[None, :] * D + channels[:, None], codes, mask=inside)


@triton.jit
def _quantize_qkv_kernel(
    qkv_ptr,  # (B, S, 3 H D) float
    q_ptr,  # (B, H, S, D) int8
    k_ptr,  # (B, H, S, D) int8
    v_ptr,  # (B, H, S, D) int8
    q_scale_ptr,  # (B, H, S) fp32
    k_scale_ptr,  # (B, H, S) fp32
    v_scale_ptr,  # (B, H, D) fp32
    H,
    S,
    D,
    stride_b,
    stride_s,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # program ids: (head of an image; token blocks of q, then of k, then channel blocks of v)
    head = tl.program_id(0)
    block = tl.program_id(1)
    token_blocks = tl.cdiv(S, BLOCK_S)
    qkv_ptr += (head // H).to(tl.int64) * stride_b + (head % H) * D
    offset = head.to(tl.int64) * S * D

    if block < token_blocks:
        _quantize_tokens(
            qkv_ptr, q_ptr + offset, q_scale_ptr + head * S, block * BLOCK_S, stride_s, S, D, BLOCK_S, BLOCK_D
        )
    elif block < 2 * token_blocks:
        start = (block - token_blocks) * BLOCK_S
        _quantize_tokens(
            qkv_ptr + H * D, k_ptr + offset, k_scale_ptr + head * S, start, stride_s, S, D, BLOCK_S, BLOCK_D
        )
    else:
        start = (block - 2 * token_blocks) * BLOCK_C
        _quantize_channels(
            qkv_ptr + 2 * H * D, v_ptr + offset, v_scale_ptr + head * D, start, stride_s, S, D, BLOCK_S, BLOCK_C
        )


@triton.jit
def _quantize_values_kernel(
    v_ptr,  # (B, S, H, D) fp32
    codes_ptr,  # (B, H, S, D) int8
    scale_ptr,  # (B, H, D) fp32
    H,
    S,
    D,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = tl.program_id(0)
    v_ptr += (head // H).to(tl.int64) * S * H * D + (head % H) * D
    codes_ptr += head.to(tl.int64) * S * D
    _quantize_channels(
        v_ptr, codes_ptr, scale_ptr + head * D, tl.program_id(1) * BLOCK_C, H * D, S, D, BLOCK_S, BLOCK_C
    )


def quantize_qkv(qkv, num_heads):
    batch, tokens, width = qkv.shape
    dim = width // (3 * num_heads)
    qkv = row_major(qkv)
    codes = [torch.empty((batch, num_heads, tokens, dim), dtype=torch.int8, device=qkv.device) for _ in range(3)]
    q_scale = torch.empty((batch, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    k_scale = torch.empty_like(q_scale)
    v_scale = torch.empty((batch, num_heads, dim), dtype=torch.float32, device=qkv.device)
    if batch:
        block_d = triton.next_power_of_2(dim)
        block_s = max(16, QKV_TILE // block_d)
        grid = (batch * num_heads, 2 * triton.cdiv(tokens, block_s) + triton.cdiv(dim, QKV_CHANNELS))
        with on(qkv):
            _quantize_qkv_kernel[grid](
                qkv, *codes, q_scale, k_scale, v_scale, num_heads, tokens, dim, qkv.stride(0), qkv.stride(1),
                BLOCK_S=block_s, BLOCK_D=block_d, BLOCK_C=QKV_CHANNELS, num_warps=4, **EXACT,
            )  # fmt: skip
    return *codes, q_scale, k_scale, v_scale


def quantize_values(v):
    """Codes (B, H, S, D) and scales (B, H, D) of contiguous fp32 values (B, S, H, D): `quantize_qkv` for v alone."""
    batch, tokens, heads, dim = v.shape
    codes = torch.empty((batch, heads, tokens, dim), dtype=torch.int8, device=v.device)
    scale = torch.empty((batch, heads, dim), dtype=torch.float32, device=v.device)
    if batch:
        block_s = max(16, QKV_TILE // triton.next_power_of_2(dim))
        with on(v):
            _quantize_values_kernel[(batch * heads, triton.cdiv(dim, QKV_CHANNELS))](
                v, codes, scale, heads, tokens, dim, BLOCK_S=block_s, BLOCK_C=QKV_CHANNELS, num_warps=4, **EXACT
            )
    return codes, scale
