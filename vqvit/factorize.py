"""Factorised scales of the patch embedding: α[n, c] = α_spatial[n] · α_channel[c] (numerics §8).

Input side: pixels of a patch are divided by c_k, the weight's columns multiplied by it; α_spatial is then the per-token
scale of the patch and the product stays an exact integer GEMM. Output side: the table T of scales that every token n
and channel d would need is covered by s_n c_d, so that codes of different channels differ by one factor for each
channel, and by a shift where c_d is a power of two.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vqvit import numerics as nm

ROUNDS = 50

MAX_SHIFT = 8
"""Largest k_d: 127 << 8 is the longest shift of a code that an int16 residual stream holds."""

REACH_MIN = 1e-5
"""Smallest range of a channel that counts, on both sides: what is always zero needs no factor."""


class Factors(NamedTuple):
    """Scales s_n c_d >= T[n, d]."""

    tokens: Tensor  # (N,) fp32
    channels: Tensor  # (D,) fp32


class ShiftedFactors(NamedTuple):
    """Scales s_n 2^k_d >= T[n, d]."""

    tokens: Tensor  # (N,) fp32
    shifts: Tensor  # (D,) int32, 0 <= k_d <= MAX_SHIFT


def input_factors(reach: Tensor, weight: Tensor) -> Tensor:
    """c_k = sqrt(max|X_k| / max_n |W_nk|), geometric mean 1: fp32 (K,) for ranges (K,) and a weight (N, K)."""
    largest = weight.detach().float().abs().amax(0).clamp(min=REACH_MIN)
    factors = (reach.float().clamp(min=REACH_MIN) / largest).sqrt()
    return factors / factors.log().mean().exp()


def output_table(z: Tensor) -> Tensor:
    """T[n, d] = max_b |Z[b, n, d]| / 127, fp32 (N, D), of embeddings (B, N, D); at least 1e-8."""
    return (z.float().abs().amax(0) / nm.QMAX).clamp(min=nm.SCALE_MIN)


def output_factors(table: Tensor, rounds: int = ROUNDS) -> Factors:
    """The cover s_n c_d of a positive table (N, D) by `rounds` of c_d = max_n T / s_n, s_n = max_d T / c_d.

    It never clips: s_n c_d >= T[n, d], up to one rounding. Raises `ValueError` for a table that is not positive.
    """
    if table.dim() != 2 or not (table > 0).all():
        raise ValueError(f"output_factors: expected a positive table (tokens, channels); got {tuple(table.shape)}")
    tokens = torch.ones_like(table[:, 0])
    for _ in range(rounds):
        channels = (table / tokens[:, None]).amax(0)
        tokens = (table / channels).amax(1)
    return Factors(tokens, channels)


def shifted_factors(table: Tensor, factors: Factors, max_shift: int = MAX_SHIFT) -> ShiftedFactors:
    """The integer form: c_d = c_0 2^k_d with c_0 the least c_d and k_d = rne(log2(c_d / c_0)), then s_n fitted again.

    The next LayerNorm reads codes << k_d; c_0 is part of s_n.
    """
    shifts = torch.round(torch.log2(factors.channels / factors.channels.amin())).clamp(0, max_shift).to(torch.int32)
    return ShiftedFactors((table / torch.exp2(shifts.float())).amax(1), shifts)
