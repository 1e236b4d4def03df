"""Weights of 4 and 3 bits that run as int8 (numerics §2): each group of 128 input columns has a step of its own.

The step of group g of row n is an integer multiple m[n, g] of the row's int8 scale α_n, so that

    w ≈ α_n · m[n, g] · q,   |q| <= 2^(bits - 1) - 1,   1 <= m <= ⌊127 / (2^(bits - 1) - 1)⌋

and m · q is an int8 code exactly: the integer product is that of 8-bit weights, and nothing is rounded twice. A
checkpoint holds q packed (two in a byte, or eight in three bytes), m as uint8 and α as fp32.
"""

import torch
from torch import Tensor

from vqvit import numerics as nm

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Candidates of a row's largest step, as a share of the step that clips nothing."""

GROUP_SHRINKS = tuple(1 - i / 20 for i in range(11))
"""Candidates of a group's step in the same sense: down to half."""


def code_limit(bits: int) -> int:
    """Largest |q| of `bits` bits: 7 or 3."""
    return 2 ** (bits - 1) - 1


def multiplier_limit(bits: int) -> int:
    """Largest m for which m · q stays an int8 code: 18 for 4 bits, 42 for 3."""
    return nm.QMAX // code_limit(bits)


def column_steps(scale: Tensor, multipliers: Tensor, width: int) -> Tensor:
    """α_n · m[n, g] of each column, fp32 (N, K)."""
    return (scale.unsqueeze(-1) * multipliers).repeat_interleave(nm.GROUP, -1)[:, :width]


def expand(q: Tensor, multipliers: Tensor) -> Tensor:
    """int8 codes m · q (N, K) of q int8 (N, K) and multipliers uint8 (N, G)."""
    return q * multipliers.to(torch.int8).repeat_interleave(nm.GROUP, -1)[:, : q.shape[1]]


def contract(codes: Tensor, multipliers: Tensor) -> Tensor:
    """q int8 (N, K) of the int8 codes m · q: the inverse of `expand`."""
    columns = multipliers.to(torch.int8).repeat_interleave(nm.GROUP, -1)[:, : codes.shape[1]]
    return torch.div(codes, columns, rounding_mode="trunc")


def check_codes(name: str, codes: Tensor, multipliers: Tensor, bits: int) -> None:
    """Raises `ValueError` unless every code int8 (N, K) is a multiple m · q with |q| in `bits` bits, m in range."""
    shape = (codes.shape[0], nm.group_count(codes.shape[1]))
    limit = multiplier_limit(bits)
    if multipliers.shape != shape or multipliers.dtype != torch.uint8:
        received = f"{tuple(multipliers.shape)} {multipliers.dtype}"
        raise ValueError(f"{name}: expected multipliers {shape} uint8; got {received}")
    if multipliers.numel() and not 1 <= int(multipliers.min()) <= int(multipliers.max()) <= limit:
        received = f"{int(multipliers.min())} to {int(multipliers.max())}"
        raise ValueError(f"{name}: expected multipliers of 1 to {limit}; got {received}")
    q = contract(codes, multipliers)
    if not torch.equal(expand(q, multipliers), codes) or (q.numel() and int(q.abs().max()) > code_limit(bits)):
        raise ValueError(f"{name}: expected codes that are multiples m q with |q| <= {code_limit(bits)}; got others")


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 (N, K), scale fp32 (N,) and multipliers uint8 (N, ⌈K / 128⌉) of a float weight, by weight error."""
    if weight.is_meta:
        n, k = weight.shape
        return (
            torch.empty(n, k, dtype=torch.int8, device="meta"),
            torch.empty(n, device="meta"),
            torch.empty(n, nm.group_count(k), dtype=torch.uint8, device="meta"),
        )
    scale, multipliers = search_steps(weight, bits)
    limit = code_limit(bits)
    q = torch.round(weight.float() / column_steps(scale, multipliers, weight.shape[1])).clamp(-limit, limit)
    return expand(q.to(torch.int8), multipliers), scale, multipliers


def search_steps(weight: Tensor, bits: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale fp32 (N,) and multipliers uint8 (N, G) that round a weight (N, K) to nearest with the least error.

    With the Gram matrix (K, K) of the layer's input the error is that of the output, between groups left out: the
    steps of a group are then independent of the others'. Without, it is the squared error of the weight.
    """
    groups = nm.groups(weight.float())  # (N, G, 128)
    blocks = None if gram is None else _diagonal_blocks(gram.float())
    span = groups.abs().amax((-1, -2))  # (N,)
    best_error = torch.full_like(span, torch.inf)
    best_scale = span.clone()
    best_multipliers = torch.ones(groups.shape[:2], dtype=torch.uint8, device=weight.device)
    for shrink in SHRINKS:
        scale = (shrink * span / (code_limit(bits) * multiplier_limit(bits))).clamp(min=nm.SCALE_MIN)
        multipliers, error = _best_multipliers(groups, scale, bits, blocks)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_multipliers = torch.where(better.unsqueeze(-1), multipliers, best_multipliers)
    return best_scale, best_multipliers


def _best_multipliers(groups: Tensor, scale: Tensor, bits: int, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The multipliers (N, G) of least error for given scales, and the error of each row."""
    limit = code_limit(bits)
    best_error = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    best = torch.ones(groups.shape[:2], dtype=torch.uint8, device=groups.device)
    unclipped = groups.abs().amax(-1) / (limit * scale.unsqueeze(-1))
    for shrink in GROUP_SHRINKS:
        multiplier = torch.round(shrink * unclipped).clamp(1, multiplier_limit(bits))
        step = (scale.unsqueeze(-1) * multiplier).unsqueeze(-1)
        difference = torch.round(groups / step).clamp(-limit, limit) * step - groups
        if blocks is None:
            error = difference.square().sum(-1)
        else:
            error = (torch.einsum("ngk,gkl->ngl", difference, blocks) * difference).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, multiplier.to(torch.uint8), best)
    return best, best_error.sum(-1)


def _diagonal_blocks(gram: Tensor) -> Tensor:
    """(G, 128, 128): the part of a Gram matrix (K, K) inside each group, padded with zeros."""
    padding = -len(gram) % nm.GROUP
    padded = torch.nn.functional.pad(gram, (0, padding, 0, padding))
    count = len(padded) // nm.GROUP
    return torch.stack([padded[s : s + nm.GROUP, s : s + nm.GROUP] for s in range(0, count * nm.GROUP, nm.GROUP)])


def packed_width(width: int, bits: int) -> int:
    """Bytes of a packed row of `width` codes."""
    return -(-width // 2) if bits == 4 else 3 * -(-width // 8)


def pack(q: Tensor, bits: int) -> Tensor:
    """q int8 (N, K) as uint8 (N, `packed_width`): bit j of the row's stream is bit j mod `bits` of q[j // bits]."""
    per_word, bytes_per_word = (2, 1) if bits == 4 else (8, 3)
    padded = torch.nn.functional.pad(q, (0, -q.shape[1] % per_word))
    fields = (padded.to(torch.int32) & (2**bits - 1)).unflatten(-1, (-1, per_word))
    shifts = bits * torch.arange(per_word, dtype=torch.int32, device=q.device)
    words = (fields << shifts).sum(-1, dtype=torch.int32)
    bytes_ = 8 * torch.arange(bytes_per_word, dtype=torch.int32, device=q.device)
    return ((words.unsqueeze(-1) >> bytes_) & 255).flatten(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The q int8 (N, width) that `pack` packed."""
    per_word, bytes_per_word = (2, 1) if bits == 4 else (8, 3)
    bytes_ = packed.to(torch.int32).unflatten(-1, (-1, bytes_per_word))
    words = (bytes_ << (8 * torch.arange(bytes_per_word, dtype=torch.int32, device=packed.device))).sum(
        -1, dtype=torch.int32
    )
    fields = words.unsqueeze(-1) >> (bits * torch.arange(per_word, dtype=torch.int32, device=packed.device))
    fields = (fields & (2**bits - 1)).flatten(1)[:, :width]
    return torch.where(fields >= 2 ** (bits - 1), fields - 2**bits, fields).to(torch.int8).contiguous()
