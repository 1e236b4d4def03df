"""The second launch of a GEMM whose K is shared by several programs: add the shares, then finish as one program would.

    acc = Σ_share partial[share, m, n]                                                         exact int32, any order

and what follows in `kernels/gemm_s8.py`, by the same `epilogue`: the bits are those of the unsplit product.

Shapes: partial (SHARES, M, N) int32, out (M, N). Each call allocates its partial sums, so that two streams, or a CUDA
graph and its neighbour, never meet in them.
Grid: one program per BLOCK_M x BLOCK_N tile, small enough that few rows still occupy the device.
Operations: SHARES additions and the epilogue's for each output. Bytes: 4 · SHARES · M · N from L2, and out.

A launch of its own, not a counter by which the last program of a tile finishes it: counters have to be zeroed before
each call, which is a launch too; the last program alone would read the shares of a whole tile, here every
multiprocessor reads some; and the order of two launches makes the sums visible, without fences or atomics.
"""

import torch
import triton
import triton.language as tl

from vqvit.kernels.gemm_s8_epilogue import epilogue
from vqvit.kernels.launch import EXACT

TILE = {"BLOCK_M": 8, "BLOCK_N": 128}
"""8 accumulators a thread, in two 16-byte loads for each share; 150 programs at 197 x 768."""


@triton.jit
def _reduce_shares_kernel(
    partial_ptr,  # (SHARES, M, N) int32
    out_ptr,  # what follows is as in gemm_s8
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    layer_scale_ptr,
    residual_ptr,
    a_zero_ptr,
    a_sum_ptr,
    b_zero_ptr,
    b_sum_ptr,
    out_scale_ptr,
    row_scale_ptr,
    row_sum_ptr,
    v_ptr,
    M,
    N,
    K,
    stride_rm,
    stride_share,
    SHARES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # program ids, offsets
    tiles_n = tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // tiles_n * BLOCK_M
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    partial_ptrs = partial_ptr + (offs_m[:, None].to(tl.int64) * N + offs_n[None, :])

    # sum; unrolled, so that the loads of all shares are under way at once
    acc = tl.load(partial_ptrs, mask=inside, other=0)
    for _ in tl.static_range(1, SHARES):
        partial_ptrs += stride_share
        acc += tl.load(partial_ptrs, mask=inside, other=0)

    # epilogue, store
    epilogue(
        acc, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, a_zero_ptr, a_sum_ptr,
        b_zero_ptr, b_sum_ptr, out_scale_ptr, row_scale_ptr, row_sum_ptr, v_ptr, M, N, K, 1, stride_rm, first_m,
        first_n, ACTIVATION, 0, BLOCK_M, BLOCK_N, BLOCK_N,
    )  # fmt: skip


def reduce_shares(
    partial: torch.Tensor, out: torch.Tensor, operands: tuple, stride_rm: int, k: int, activation: str
) -> None:
    """Finish `partial` (SHARES, M, N) into `out` (M, N); `operands`: the epilogue's, from a_scale to v in its order."""
    shares, m, n = partial.shape
    tiles = triton.cdiv(m, TILE["BLOCK_M"]) * triton.cdiv(n, TILE["BLOCK_N"])
    _reduce_shares_kernel[(tiles,)](
        partial, out, *operands, m, n, k, stride_rm, m * n, SHARES=shares, ACTIVATION=activation, **TILE,
        num_warps=4, **EXACT,
    )  # fmt: skip
