"""INT8 GEMM with fused epilogues, bit for bit that of `vqvit.reference`.

    acc = Σ_k a[m, k] · b[n, k]                                                                exact int32
    acc += -z_a[m] Σ_k b[n, k] - z_b[n] Σ_k a[m, k] + K z_a[m] z_b[n]                          optional zero points
    y = act(fma(acc, α_a[m] α_b[n], bias[n]));  fma(y, layer_scale[n], residual[m, n])         fp32
    store int32 acc, or y as float, or as int8 with a static scale or one for each row and 128 columns

With group scales α_a (M, ⌈K / 128⌉) the products of each 128 columns are promoted on their own, g in order:
s = fma(acc_g, α_a[m, g], s), and y = act(fma(s, α_b[n], bias[n])).

Shapes: a (M, K) int8 row-major, b (N, K) int8 with K contiguous (weights as stored), vectors (M,) and (N,), out (M, N).
Layout: both operands have K contiguous, as int8 tensor cores want them; wgmma reads both from shared memory.
Grid: one program per BLOCK_M x BLOCK_N tile, tiles swizzled in groups of GROUP_M rows to share operands in L2.
Split K: where that fills no device, programs of a second grid axis share a tile's K, store int32 sums, exact in any
order, and a second launch (`kernels/gemm_s8_split_k.py`) adds and finishes them.
Operations: 2 · M · N · K int8, and for each output 3 to dequantize, 13 for GELU, 8 for static codes (counted in SASS).
Bytes: M · K + N · K + M · N · output size from DRAM; (BLOCK_M + BLOCK_N) · K per tile from L2.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vqvit import numerics as contract
from vqvit.kernels import numerics as nm
from vqvit.kernels import tuned
from vqvit.kernels.gemm_s8_epilogue import epilogue
from vqvit.kernels.gemm_s8_split_k import reduce_shares
from vqvit.kernels.launch import EXACT, INTERPRETER, Device, absent, device_of, on, row_major, vector
from vqvit.kernels.quantize import quantize_per_token
from vqvit.kernels.quantize_qkv import quantize_qkv, quantize_values


@dataclass(frozen=True)
class GemmConfig:
    """ctas: blocks that share a multiprocessor, which caps registers; subtile_n: columns of an epilogue step; split_k:
    programs that share a tile's K.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    ctas: int
    subtile_n: int = 64
    group_m: int = 8
    split_k: int = 1

    @property
    def max_registers(self) -> int:
        return min(255, REGISTERS // (self.ctas * self.num_warps * 32) // 8 * 8)


REGISTERS = 65536  # of a multiprocessor, on every architecture here

# mma.sync keeps operand fragments in registers beside the accumulators: 128 x 256 spills, 64 accumulators a thread do
# not. Shared memory (48, 36, 24 and 18 KiB) leaves room on parts with 99 KiB too.
MMA_SYNC_CONFIGS = (
    GemmConfig(128, 128, 64, 8, 4, ctas=1),
    GemmConfig(64, 128, 64, 4, 4, ctas=2),
    GemmConfig(64, 64, 64, 4, 4, ctas=3),
    GemmConfig(64, 32, 64, 4, 4, ctas=4, subtile_n=32),
)

# By architecture: the tile of most reuse first, then the ones that fill the device when M · N shrinks.
GEMM_CONFIGS = {
    90: (
        GemmConfig(128, 256, 128, 8, 3, ctas=1),  # fc2 of large batches: 170 operations per L2 byte
        GemmConfig(128, 128, 128, 8, 3, ctas=2, subtile_n=32),  # large batches: epilogues hide under the other's loop
        GemmConfig(64, 128, 128, 4, 3, ctas=3),  # last waves, and batch 1 with N >= 2304
        GemmConfig(64, 64, 128, 4, 4, ctas=3),  # batch 1 (M = 197): more blocks
        GemmConfig(64, 32, 128, 4, 4, ctas=4, subtile_n=32),  # batch 1 with N = 768: 96 blocks
    ),
    86: MMA_SYNC_CONFIGS,
    80: MMA_SYNC_CONFIGS,
    INTERPRETER: (GemmConfig(64, 64, 64, 4, 1, ctas=1, subtile_n=32),),
}

# Rows that 16-byte loads do not divide (K = 588 of 14 x 14 patches) need a pointer for every 1 to 8 bytes.
RAGGED_CONFIG = GemmConfig(64, 64, 64, 4, 3, ctas=2)


# Group scales keep an fp32 sum beside the int32 products, and a group's store needs 128 columns of a row at once: no
# tile of 256 columns, and registers for one or two blocks.
GROUP_CONFIGS = {
    90: (GemmConfig(128, 128, 128, 8, 3, ctas=1), GemmConfig(64, 128, 128, 4, 3, ctas=2)),
    86: (GemmConfig(128, 128, 64, 8, 3, ctas=1), GemmConfig(64, 128, 64, 4, 3, ctas=2)),
    80: (GemmConfig(128, 128, 64, 8, 4, ctas=1), GemmConfig(64, 128, 64, 4, 4, ctas=2)),
    INTERPRETER: (GemmConfig(64, 128, 64, 4, 1, ctas=1),),
}

RAGGED_GROUP_CONFIG = GemmConfig(64, 128, 64, 8, 3, ctas=1)


# A roofline of one multiprocessor of the H200, to compare tiles with. The epilogue's operations are counted in SASS; L2
# bandwidth and the cost of a step (Triton waits for each int8 wgmma before the next loads) are estimates, not measured.
MACS_PER_CYCLE = 4096
L2_BYTES_PER_CYCLE = 40
EPILOGUE_OPERATIONS = 20
OPERATIONS_PER_CYCLE = 128
STEP_CYCLES = 150
PARTIAL_BYTES = 4  # of an output in each share of K, stored and read again
SECOND_LAUNCH_CYCLES = 2750  # 1 µs between two kernels of a CUDA graph, and the latency of loads, sums and stores

SPLITS = (2, 4, 8)
"""Shares of K to choose from; none for group scales, whose sums are fp32 and in a fixed order."""


def wave_cycles(c: GemmConfig, blocks: int, k: int, split: bool = False) -> float:
    """Time of `blocks` tiles, k columns deep, that share a multiprocessor: the busiest unit, or one tile's latency.

    `split`: k is a share, and the accumulators are stored as they are.
    """
    area = c.block_m * c.block_n
    tensor = area * k / MACS_PER_CYCLE
    epilogue = 0.0 if split else area * EPILOGUE_OPERATIONS / OPERATIONS_PER_CYCLE
    l2 = ((c.block_m + c.block_n) * k + split * PARTIAL_BYTES * area) / L2_BYTES_PER_CYCLE
    return max(blocks * tensor, blocks * l2, blocks * epilogue, tensor + k / c.block_k * STEP_CYCLES + epilogue)


def k_shares(c: GemmConfig, k: int) -> tuple[int, int]:
    """(columns of a share of K, in whole steps of a tile; number of shares, none of them empty)."""
    share_k = triton.cdiv(max(k, 1), c.block_k * c.split_k) * c.block_k
    return share_k, triton.cdiv(max(k, 1), share_k)


def reduction_cycles(shares: int, outputs: float) -> float:
    """Time to add the shares of `outputs` outputs a multiprocessor, and of the launch that does it."""
    if shares == 1:
        return 0.0
    read = PARTIAL_BYTES * shares * outputs / L2_BYTES_PER_CYCLE
    return SECOND_LAUNCH_CYCLES + max(read, outputs * EPILOGUE_OPERATIONS / OPERATIONS_PER_CYCLE)


def choose(device: Device, m: int, n: int, k: int, unit: int, groups: bool = False) -> GemmConfig:
    """The config of a tuned table, else the predicted one. `groups`: on either side."""
    if unit < 16 and device.arch != INTERPRETER:
        return RAGGED_GROUP_CONFIG if groups else RAGGED_CONFIG
    launch = tuned.Launch("gemm_groups" if groups else "gemm", m, (n, k))
    return tuned.find(device, launch) or predict(device, m, n, k, groups)


@functools.cache
def predict(device: Device, m: int, n: int, k: int, groups: bool = False) -> GemmConfig:
    """The config whose waves of tiles take the least time; ties go to the earlier entry."""

    def cycles(c: GemmConfig) -> float:
        share_k, shares = k_shares(c, k)
        blocks = triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n) * shares
        full_waves, rest = divmod(blocks, device.sms * c.ctas)
        last_wave = wave_cycles(c, triton.cdiv(rest, device.sms), share_k, shares > 1) if rest else 0.0
        waves = full_waves * wave_cycles(c, c.ctas, share_k, shares > 1) + last_wave
        return waves + reduction_cycles(shares, m * n / device.sms)

    return min(configs(device.arch, groups), key=cycles)


def configs(arch: int, groups: bool = False) -> tuple[GemmConfig, ...]:
    """Every config to choose from: the shipped tiles, then their splits of K."""
    tiles = (GROUP_CONFIGS if groups else GEMM_CONFIGS)[arch]
    splits = () if groups else SPLITS
    return *tiles, *(dataclasses.replace(c, split_k=s) for s in splits for c in tiles)


@triton.jit
def tile_ids(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile (pid_m, pid_n) of this program: GROUP_M rows of tiles are walked column by column."""
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = pid // in_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + pid % in_group % group_m, pid % in_group // group_m


@triton.jit
def multiples(size, UNIT: tl.constexpr):
    """`size`, which UNIT divides, in a form that tells the compiler so: loads then take UNIT bytes at once."""
    if UNIT < 16:  # it finds out about 16 by itself
        size = size // UNIT * UNIT
    return size


@triton.jit
def load_k(ptrs, offs_k, k, K, EVEN_K: tl.constexpr):
    """The next tile along K, zero beyond K; offs_k has the tile's rank."""
    if EVEN_K:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=offs_k < K - k, other=0)


@triton.jit
def _int8_gemm_kernel(
    a_ptr,  # (M, K) int8
    b_ptr,  # (N, K) int8
    out_ptr,  # (M, N) int32 (raw accumulators), float or int8 (static codes); (shares, M, N) int32 for SPLIT_K
    a_scale_ptr,  # (M,) fp32, or (M, cdiv(K, GROUP))
    b_scale_ptr,  # (N,) fp32
    bias_ptr,  # (N,) float or None
    layer_scale_ptr,  # (N,) float or None
    residual_ptr,  # (M, N) float or None
    a_zero_ptr,  # (M,) int32 or None, with b_sum
    a_sum_ptr,  # (M,) int32 or None
    b_zero_ptr,  # (N,) int32 or None, with a_sum
    b_sum_ptr,  # (N,) int32 or None
    out_scale_ptr,  # () fp32 for static codes
    row_scale_ptr,  # (M,) fp32 for static codes, holds out_scale: rows with NaN or Inf are overwritten with NaN
    #                 (M, cdiv(N, SUBTILE_N)) fp32 for codes by group
    row_sum_ptr,  # (M,) int32 or None, holds 0
    v_ptr,  # (M, H D) fp32 for the projection to q, k and v, whose codes are (2, B, H, S, D) with scales (2, B, H, S)
    M,
    N,
    K,
    tokens,
    stride_am,
    stride_bn,
    stride_rm,
    share_k,  # columns of a and b that a program reads, for SPLIT_K
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    K_UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUBTILE_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # sizes, program ids
    K, stride_am, stride_bn = multiples(K, K_UNIT), multiples(stride_am, K_UNIT), multiples(stride_bn, K_UNIT)
    pid_m, pid_n = tile_ids(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first_m = pid_m * BLOCK_M
    first_n = pid_n * BLOCK_N
    first_k, end_k = 0, K
    if SPLIT_K:
        first_k = tl.program_id(1) * share_k
        end_k = tl.minimum(K, first_k + share_k)
        out_ptr += tl.program_id(1).to(tl.int64) * M * N

    # offsets; rows beyond M and N repeat the last one, so that the main loop needs no masks for them
    offs_k = tl.arange(0, BLOCK_K)
    rows_a = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)
    rows_b = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first_n)
    a_ptrs = a_ptr + first_m.to(tl.int64) * stride_am + first_k + (rows_a[:, None] * stride_am + offs_k[None, :])
    b_ptrs = b_ptr + first_n.to(tl.int64) * stride_bn + first_k + (rows_b[None, :] * stride_bn + offs_k[:, None])

    # main loop
    if GROUP > 0:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        group_ptrs = a_scale_ptr + (first_m + rows_a).to(tl.int64) * tl.cdiv(K, GROUP)
        for group_k in range(0, K, GROUP):
            products = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
            for step in tl.static_range(0, GROUP, BLOCK_K):
                a = load_k(a_ptrs, offs_k[None, :], group_k + step, K, EVEN_K)
                b = load_k(b_ptrs, offs_k[:, None], group_k + step, K, EVEN_K)
                products = tl.dot(a, b, products, out_dtype=tl.int32)
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K
            acc = nm.fma(nm.small_int_to_fp32(products), tl.load(group_ptrs)[:, None], acc)
            group_ptrs += 1
        a_scale_ptr = None
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for k in range(first_k, end_k, BLOCK_K):
            a = load_k(a_ptrs, offs_k[None, :], k, K, EVEN_K)
            b = load_k(b_ptrs, offs_k[:, None], k, K, EVEN_K)
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
            a_ptrs += BLOCK_K
            b_ptrs += BLOCK_K

    # epilogue, store
    epilogue(
        acc, out_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, layer_scale_ptr, residual_ptr, a_zero_ptr, a_sum_ptr,
        b_zero_ptr, b_sum_ptr, out_scale_ptr, row_scale_ptr, row_sum_ptr, v_ptr, M, N, K, tokens, stride_rm, first_m,
        first_n, ACTIVATION, HEADS, BLOCK_M, BLOCK_N, SUBTILE_N,
    )  # fmt: skip


def _launch(
    a, b, out, a_scale=None, b_scale=None, bias=None, activation="none", layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_scale=None, row_scale=None, row_sum=None, v=None,
):  # fmt: skip
    """Codes are by group if `row_scale` is (M, groups), by head if `out` is (2, B, H, S, D), with `v` (M, H D)."""
    (m, k), n = a.shape, b.shape[0]
    if m == 0 or n == 0:
        return
    a, b, residual = row_major(a), row_major(b), None if residual is None else row_major(residual)
    unit = math.gcd(16, k, a.stride(0), b.stride(0))
    grouped, store_groups = a_scale is not None and a_scale.dim() == 2, row_scale is not None and row_scale.dim() == 2
    c = choose(device_of(a), m, n, k, unit, grouped or store_groups or v is not None)
    heads, tokens, subtile = (0, 1, contract.GROUP if store_groups else c.subtile_n) if v is None else out.shape[2:]
    finish = (
        vector(a_scale), vector(b_scale), vector(bias), vector(layer_scale), residual, vector(a_zero), vector(a_sum),
        vector(b_zero), vector(b_sum), out_scale, row_scale, row_sum, v,
    )  # fmt: skip
    stride_rm = 0 if residual is None else residual.stride(0)
    share_k, shares = k_shares(c, k)
    split = shares > 1
    partial = torch.empty((shares, m, n), dtype=torch.int32, device=a.device) if split else out
    with on(a):
        _int8_gemm_kernel[(triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n), shares)](
            a, b, partial, *((None,) * len(finish) if split else finish), m, n, k, tokens,
            a.stride(0), b.stride(0), stride_rm, share_k,
            ACTIVATION="none" if split else activation, EVEN_K=k % (contract.GROUP if grouped else c.block_k) == 0,
            K_UNIT=unit, GROUP=contract.GROUP if grouped else 0, HEADS=heads, SPLIT_K=split,
            BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k, SUBTILE_N=subtile, GROUP_M=c.group_m,
            num_warps=c.num_warps, num_stages=c.num_stages, maxnreg=c.max_registers, **EXACT,
        )  # fmt: skip
        if split:
            reduce_shares(partial, out, finish, stride_rm, k, activation)


def int8_mm(a, b):
    out = torch.empty((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    _launch(a, b, out)
    return out


def int8_linear(
    a, a_scale, b, b_scale, bias=None, activation="none", layer_scale=None, residual=None,
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_dtype=torch.float32,
):  # fmt: skip
    out = torch.empty((a.shape[0], b_scale.shape[0]), dtype=out_dtype, device=a.device)
    _launch(a, b, out, a_scale, b_scale, bias, activation, layer_scale, residual, a_zero, a_sum, b_zero, b_sum)
    return out


def int8_linear_quantize(
    a, a_scale, b, b_scale, bias=None, activation="none",
    a_zero=None, a_sum=None, b_zero=None, b_sum=None, out_scale=None, symmetric=True, row_sum=False,
    per_group=False,
):  # fmt: skip
    zero_points = (a_zero, a_sum, b_zero, b_sum)
    if per_group:
        m, n = a.shape[0], b_scale.shape[0]
        codes = torch.empty((m, n), dtype=torch.int8, device=a.device)
        scale = torch.empty((m, triton.cdiv(n, contract.GROUP)), dtype=torch.float32, device=a.device)
        _launch(a, b, codes, a_scale, b_scale, bias, activation, None, None, *zero_points, None, scale)
        return codes, scale, absent(a), absent(a)
    if out_scale is None:  # a row's scale needs all of its tiles: fp32 through memory, and a second launch
        y = int8_linear(a, a_scale, b, b_scale, bias, activation, None, None, *zero_points)
        return quantize_per_token(y, 0.0, None, symmetric, row_sum)
    m = a.shape[0]
    codes = torch.empty((m, b_scale.shape[0]), dtype=torch.int8, device=a.device)
    row_scale = out_scale.expand(m).contiguous()
    sums = torch.zeros(m, dtype=torch.int32, device=a.device) if row_sum else None
    _launch(
        a, b, codes, a_scale, b_scale, bias, activation, None, None, *zero_points, out_scale, row_scale, sums
    )  # fmt: skip
    return codes, row_scale, absent(a), sums if row_sum else absent(a)


HEAD_DIMS = (32, 64, 128)
"""Heads whose columns a tile holds whole; others take a GEMM and `quantize_qkv`."""


def int8_linear_qkv(a, a_scale, b, b_scale, bias, tokens, num_heads, a_zero=None, a_sum=None, b_zero=None, b_sum=None):
    m, head_dim = a.shape[0], b_scale.shape[0] // (3 * num_heads)
    images, zero_points = m // tokens, (a_zero, a_sum, b_zero, b_sum)
    if head_dim not in HEAD_DIMS:
        y = int8_linear(a, a_scale, b, b_scale, bias, "none", None, None, *zero_points)
        return quantize_qkv(y.view(images, tokens, y.shape[1]), num_heads)
    codes = torch.empty((2, images, num_heads, tokens, head_dim), dtype=torch.int8, device=a.device)
    scale = torch.empty((2, images, num_heads, tokens), dtype=torch.float32, device=a.device)
    v = torch.empty((m, num_heads * head_dim), dtype=torch.float32, device=a.device)
    _launch(a, b, codes, a_scale, b_scale, bias, "none", None, None, *zero_points, None, scale, None, v)
    v_codes, v_scale = quantize_values(v.view(images, tokens, num_heads, head_dim))
    return codes[0], codes[1], v_codes, scale[0], scale[1], v_scale
