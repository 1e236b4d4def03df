"""INT8 attention, bit for bit that of `vqvit.reference`.

    l_ij = (α_q[i] · sm_scale log2 e · α_k[j]) · Σ_d q[i, d] k[j, d]     int8 products, fp32 logits in units of log2
    e_ij = rne(65535 · 2^(l_ij - max_j l_ij)) = 256 hi_ij + lo_ij       u16 codes of two u8 digits, not normalised
    out[i, d] = α_v[d] · fma(Σ_j hi_ij v[j, d], 256, Σ_j lo_ij v[j, d]) / Σ_j e_ij     int8 products, a division a row

Shapes: q (B, H, Sq, D), k and v (B, H, Sk, D) int8; scales q (B, H, Sq), k (B, H, Sk), v (B, H, D) -> out (B, Sq, H D).
Grid: one program per BLOCK_M queries of a head, or of the heads of 128 columns whose codes share a scale. The codes
need the true row maximum: up to ONE_PASS_KEYS keys the whole row of logits stays in registers, beyond them a first pass
over the keys finds the maximum and a second recomputes the logits. Triton multiplies s8 by s8 only, so digits go in
minus 128 and 128 · Σ_j v[j, d] is added back: exact.
Masked keys have e = 0 and zero rows of v, so they add nothing. D is padded to a power of two, at least 64.
Bytes: q, k, v and out once from DRAM; each block of queries reads its head's k and v again from L2.
Operations: 6 Sq Sk D int8 and 22 Sq Sk fp32 for a head, most of them the degree-4 exponential: that is what bounds it.
v has D contiguous while its product contracts over tokens: its tile is transposed byte by byte in shared memory, about
Sk · D stores a program.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vqvit import numerics as contract
from vqvit.kernels import numerics as nm
from vqvit.kernels import tuned
from vqvit.kernels.launch import EXACT, Device, device_of, on
from vqvit.kernels.quantize import quantize_per_group

# p + CODE_MAGIC rounds p to e; its bits are CODE_BITS + e, and the low byte of bits is lo - 128, that of
# (bits + 128) >> 8 is hi - 128.
CODE_MAGIC = tl.constexpr(nm.MAGIC.value - 128 * (contract.P_BASE + 1))
CODE_BITS = tl.constexpr(nm.MAGIC_BITS.value - 128 * (int(contract.P_BASE) + 1))


@dataclass(frozen=True)
class AttentionConfig:
    """Queries of a tile, and keys of a tile in two passes."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


ONE_PASS_KEYS = 256
ONE_PASS_DIM = 128

# The softmax takes several times as long as the products, so it decides, and one table serves every architecture.
# 32 queries x 256 keys are 64 logits a thread: two or three blocks fit a multiprocessor, 197 queries fill 7 blocks to
# 88 % (64 would fill 77 %), and batch 1 of ViT-B has 84 blocks.
ONE_PASS_CONFIG = AttentionConfig(block_m=32, block_n=ONE_PASS_KEYS, num_warps=4, num_stages=1)

# By the head dimension up to which they apply.
TWO_PASS_CONFIGS = {
    64: AttentionConfig(64, 64, 4, 2),
    128: AttentionConfig(64, 64, 8, 1),
    256: AttentionConfig(32, 32, 8, 1),  # two accumulators of 256 and more channels crowd out the logits
    1024: AttentionConfig(16, 32, 8, 1),  # beyond 512 a few registers spill; no vision transformer is that wide
}


@triton.jit
def _load_tokens(ptr, tokens, dims, S, D):
    """A (tokens, dims) int8 tile of one head, 0 outside (S, D)."""
    return tl.load(ptr + tokens * D + dims, mask=(tokens < S) & (dims < D), other=0)


@triton.jit
def _logits(q, row_factor, k_ptr, k_scale_ptr, start, SK, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """fp32 logits of a query tile for BLOCK_N keys from `start`, -Inf beyond SK; a scale of Inf poisons like NaN."""
    keys = start + tl.arange(0, BLOCK_N)
    k = _load_tokens(k_ptr, keys[None, :], tl.arange(0, BLOCK_D)[:, None], SK, D)
    k_scale = tl.load(k_scale_ptr + keys, mask=keys < SK, other=0.0)
    k_scale = tl.where(tl.abs(k_scale) < nm.INF, k_scale, float("nan"))
    acc = tl.dot(q, k, out_dtype=tl.int32)
    if BLOCK_D <= 256:  # |acc| <= 256 · 127² < 2^22
        acc = nm.small_int_to_fp32(acc)
    else:
        acc = acc.to(tl.float32)
    return tl.where(keys[None, :] < SK, row_factor * k_scale[None, :] * acc, -nm.INF)


@triton.jit
def _numerators(logits, row_max):
    """Digits hi - 128 and lo - 128 in s8, row sums Σ e in int32, and 0, or NaN for a row that holds NaN."""
    steps, power = nm.exp2_factors(logits - row_max, nm.NUMERATOR_COEFFICIENTS, 4)
    bits = nm.fma(steps, power, CODE_MAGIC).to(tl.int32, bitcast=True)
    poison = tl.sum(steps, axis=1) * 0.0
    return ((bits + 128) >> 8).to(tl.int8), bits.to(tl.int8), tl.sum(bits - CODE_BITS, axis=1), poison


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, sm_scale_log2, head, queries, SQ, SK, D,
    ONE_PASS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """fp32 output (BLOCK_M, BLOCK_D) of the queries of one head, `head` counted over the batch."""
    # offsets
    dims = tl.arange(0, BLOCK_D)
    k_ptr += head * SK * D
    v_ptr += head * SK * D
    k_scale_ptr += head * SK
    q = _load_tokens(q_ptr + head * SQ * D, queries[:, None], dims[None, :], SQ, D)
    q_scale = tl.load(q_scale_ptr + head * SQ + queries, mask=queries < SQ, other=0.0)
    row_factor = (q_scale * sm_scale_log2)[:, None]

    # logits, codes, values
    if ONE_PASS:
        logits = _logits(q, row_factor, k_ptr, k_scale_ptr, 0, SK, D, BLOCK_N, BLOCK_D)
        high, low, total, poison = _numerators(logits, tl.max(logits, axis=1)[:, None])
        v = _load_tokens(v_ptr, tl.arange(0, BLOCK_N)[:, None], dims[None, :], SK, D)
        high_acc = tl.dot(high, v, out_dtype=tl.int32)
        low_acc = tl.dot(low, v, out_dtype=tl.int32)
        v_sum = tl.sum(v.to(tl.int32), axis=0)
    else:
        row_max = tl.full((BLOCK_M,), -nm.INF, tl.float32)
        for start in range(0, SK, BLOCK_N):
            logits = _logits(q, row_factor, k_ptr, k_scale_ptr, start, SK, D, BLOCK_N, BLOCK_D)
            row_max = tl.maximum(row_max, tl.max(logits, axis=1))
        total = tl.zeros((BLOCK_M,), tl.int32)
        poison = tl.zeros((BLOCK_M,), tl.float32)
        high_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        low_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        v_sum = tl.zeros((BLOCK_D,), tl.int32)
        for start in range(0, SK, BLOCK_N):
            logits = _logits(q, row_factor, k_ptr, k_scale_ptr, start, SK, D, BLOCK_N, BLOCK_D)
            high, low, block_total, block_poison = _numerators(logits, row_max[:, None])
            v = _load_tokens(v_ptr, (start + tl.arange(0, BLOCK_N))[:, None], dims[None, :], SK, D)
            high_acc = tl.dot(high, v, high_acc, out_dtype=tl.int32)
            low_acc = tl.dot(low, v, low_acc, out_dtype=tl.int32)
            v_sum += tl.sum(v.to(tl.int32), axis=0)
            total += block_total
            poison += block_poison

    # digits, quotient
    v_scale = tl.load(v_scale_ptr + head * D + dims, mask=dims < D, other=0.0)
    high_sum = (high_acc + 128 * v_sum[None, :]).to(tl.float32)
    low_sum = (low_acc + 128 * v_sum[None, :]).to(tl.float32)
    inverse = tl.div_rn(1.0, total.to(tl.float32) + poison)
    return (nm.fma(high_sum, nm.P_BASE, low_sum) * inverse[:, None]) * v_scale[None, :]


@triton.jit
def _int8_attention_kernel(
    q_ptr,  # (B, H, SQ, D) int8
    k_ptr,  # (B, H, SK, D) int8
    v_ptr,  # (B, H, SK, D) int8
    q_scale_ptr,  # (B, H, SQ) fp32
    k_scale_ptr,  # (B, H, SK) fp32
    v_scale_ptr,  # (B, H, D) fp32
    out_ptr,  # (B, SQ, H, D) float
    sm_scale_log2,  # sm_scale · log2 e
    H,
    SQ,
    SK,
    D,
    ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # program ids: neighbours share a head's keys
    tiles = tl.cdiv(SQ, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    queries = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)

    out = _attend(
        q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, sm_scale_log2, head, queries, SQ, SK, D,
        ONE_PASS, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    # store
    dims = tl.arange(0, BLOCK_D)
    row = (head // H) * SQ + queries
    out_ptrs = out_ptr + (row * H + head % H)[:, None] * D + dims[None, :]
    inside = (queries[:, None] < SQ) & (dims[None, :] < D)
    tl.store(out_ptrs, nm.from_fp32(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _int8_attention_quantize_kernel(
    q_ptr,  # (B, H, SQ, D) int8
    k_ptr,  # (B, H, SK, D) int8
    v_ptr,  # (B, H, SK, D) int8
    q_scale_ptr,  # (B, H, SQ) fp32
    k_scale_ptr,  # (B, H, SK) fp32
    v_scale_ptr,  # (B, H, D) fp32
    codes_ptr,  # (B, SQ, H, D) int8
    scale_ptr,  # (B, SQ, cdiv(H D, GROUP)) fp32
    sm_scale_log2,  # sm_scale · log2 e
    H,
    SQ,
    SK,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # program ids: a group is one head, or two, of which the last may not exist
    tiles = tl.cdiv(SQ, BLOCK_M)
    groups = tl.cdiv(H * D, GROUP)
    image = (tl.program_id(0) // tiles // groups).to(tl.int64)
    group = tl.program_id(0) // tiles % groups
    head = group * GROUP // D
    queries = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)

    # heads: of a pair in a loop, since unrolled ones are scheduled into each other and spill
    if D == GROUP:
        out = _attend(
            q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, sm_scale_log2, image * H + head, queries,
            SQ, SK, D, ONE_PASS, BLOCK_M, BLOCK_N, D,
        )  # fmt: skip
    else:
        first = tl.zeros((BLOCK_M, D), tl.float32)
        second = tl.zeros((BLOCK_M, D), tl.float32)
        last = tl.minimum(head + 1, H - 1)
        for i in tl.range(0, last - head + 1, num_stages=1):
            second = first
            first = _attend(
                q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, sm_scale_log2, image * H + last - i,
                queries, SQ, SK, D, ONE_PASS, BLOCK_M, BLOCK_N, D,
            )  # fmt: skip
        out = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (BLOCK_M, GROUP))

    # store
    columns = group * GROUP + tl.arange(0, GROUP)
    inside = (queries[:, None] < SQ) & (columns[None, :] < H * D)
    codes, scale = nm.quantize_rows(out, True, inside, GROUP, 0.0, False)
    row = (image * SQ + queries)[:, None]
    tl.store(scale_ptr + row * groups + group, scale, mask=queries[:, None] < SQ)
    tl.store(codes_ptr + row * H * D + columns[None, :], codes, mask=inside)


def choose(head_dim: int, keys: int) -> tuple[AttentionConfig, bool, int]:
    """(config, one pass?, BLOCK_N)."""
    if keys <= ONE_PASS_KEYS and head_dim <= ONE_PASS_DIM:
        return ONE_PASS_CONFIG, True, max(32, triton.next_power_of_2(keys))
    config = TWO_PASS_CONFIGS[min(limit for limit in TWO_PASS_CONFIGS if head_dim <= limit)]
    return config, False, config.block_n


def int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale, out_dtype=torch.float32):
    batch, heads, queries, dim = q.shape
    out = torch.empty((batch, queries, heads * dim), dtype=out_dtype, device=q.device)
    if out.numel() == 0:
        return out
    c, one_pass, block_n = choose(dim, k.shape[2])
    operands = (t.contiguous() for t in (q, k, v, q_scale, k_scale, v_scale))
    with on(q):
        _int8_attention_kernel[(triton.cdiv(queries, c.block_m) * batch * heads,)](
            *operands, out, sm_scale * contract.LOG2_E, heads, queries, k.shape[2], dim,
            ONE_PASS=one_pass, BLOCK_M=c.block_m, BLOCK_N=block_n, BLOCK_D=max(64, triton.next_power_of_2(dim)),
            num_warps=c.num_warps, num_stages=c.num_stages, **EXACT,
        )  # fmt: skip
    return out


GROUP_HEAD_DIMS = (64, 128)
"""Heads that fill a group of columns, in pairs or alone."""


def fits_one_launch(head_dim: int, keys: int) -> bool:
    """Pairs of heads in two passes do not: they spill at 4 warps, and at 8 one block takes every register."""
    return head_dim in GROUP_HEAD_DIMS and (choose(head_dim, keys)[1] or head_dim == contract.GROUP)


@dataclass(frozen=True)
class Launches:
    """Of `int8_attention_quantize`: one, or attention and then its quantization."""

    count: int


LAUNCHES = (Launches(1), Launches(2))


def predict_launches(device: Device, m: int, heads: int, head_dim: int, queries: int, keys: int) -> Launches:
    """Two where one would leave multiprocessors idle. m: queries of all images."""
    config, _, _ = choose(head_dim, keys)
    tiles = triton.cdiv(queries, config.block_m) * (m // max(1, queries))
    return LAUNCHES[tiles * triton.cdiv(heads * head_dim, contract.GROUP) < device.sms]


def choose_launches(device: Device, m: int, shape: tuple[int, ...]) -> Launches:
    """Those of a tuned table, else the predicted ones. shape: heads, head dimension, queries, keys."""
    found = tuned.find(device, tuned.Launch("attention_quantize", m, shape))
    return found or predict_launches(device, m, *shape)


def int8_attention_quantize(q, k, v, q_scale, k_scale, v_scale, sm_scale):
    batch, heads, queries, dim = q.shape
    c, one_pass, block_n = choose(dim, k.shape[2])
    groups = triton.cdiv(heads * dim, contract.GROUP)
    programs = triton.cdiv(queries, c.block_m) * batch * groups
    shape = heads, dim, queries, k.shape[2]
    if not fits_one_launch(dim, k.shape[2]) or choose_launches(device_of(q), batch * queries, shape).count == 2:
        return quantize_per_group(int8_attention(q, k, v, q_scale, k_scale, v_scale, sm_scale).flatten(0, 1))
    codes = torch.empty((batch * queries, heads * dim), dtype=torch.int8, device=q.device)
    scale = torch.empty((batch * queries, groups), dtype=torch.float32, device=q.device)
    operands = (t.contiguous() for t in (q, k, v, q_scale, k_scale, v_scale))
    with on(q):
        _int8_attention_quantize_kernel[(programs,)](
            *operands, codes, scale, sm_scale * contract.LOG2_E, heads, queries, k.shape[2], dim,
            GROUP=contract.GROUP, ONE_PASS=one_pass, BLOCK_M=c.block_m, BLOCK_N=block_n,
            num_warps=c.num_warps, num_stages=c.num_stages, **EXACT,
        )  # fmt: skip
    return codes, scale
