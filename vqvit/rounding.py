"""Error-aware weight rounding: codes chosen by the error of the output, not of each weight (numerics §2, §3, §6).

A layer computes X Wᵀ + b in float, and X̂ Ŵᵀ + b̂ in integers, X̂ being what the codes of its input stand for. Over the
calibration tokens

    ‖X̂ Ŵᵀ - X Wᵀ‖² + λ ‖Ŵ - W‖²  =  tr (Ŵ - V) (H + λ I) (Ŵ - V)ᵀ + constant,
    H = X̂ᵀ X̂,   V = W + W Sᵀ (H + λ I)⁻¹,   S = X̂ᵀ (X - X̂)

so that V corrects what earlier layers and the activations' rounding do on average (numerics §3). It has as many free
numbers as W, and what it learns from few tokens may be noise: λ is chosen, and the correction left out, by its gain on
tokens of other images. Rounding V on a grid is the closest
lattice point in the norm of H. It is found column by column: what rounding one column leaves is made up for by the
columns that are still free (optimal brain surgeon; Frantar et al., "GPTQ", 2022). A bias takes the mean of the error
(numerics §6), which makes H and S those of deviations from the mean.

Notation as in `vqvit.numerics`: W (N, K), X (T, K). Sums and factorisations are fp64, the search for codes is fp32.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from vqvit import low_bit
from vqvit import numerics as nm

DAMPING = 0.01
"""λ of rounding in units of the mean of diag(H)."""

RIDGES = (0.01, 0.1, 1.0)
"""Candidates of λ for V in the same units."""

FLOOR = 2.0**-18
"""What rounding of fp32 products leaves of a second moment after its mean is subtracted, with room."""

BETAS = (-2.0, -1.5, -1.0, -0.5, 0.5, 1.0)
"""Candidates of the spread term of a row's range (numerics §2), besides 0."""

BETA_STEP = 0.25
"""Distance at which the neighbours of the best candidate are tried."""

BLOCK = 128
"""Columns rounded before the columns behind them are updated, in one product."""


class Moments:
    """Streaming sums over calibration tokens of one layer's input: X̂ᵀ X̂, X̂ᵀ (X - X̂), Σ x̂, Σ (x - x̂) and T, fp64.

    Products of one batch are fp32 where its rows are; their sums are fp64.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.shift = torch.zeros_like(self.gram)
        self.sum_hat = torch.zeros(width, dtype=torch.float64, device=device)
        self.sum_shift = torch.zeros_like(self.sum_hat)
        self.count = 0

    def add(self, x_hat: Tensor, x: Tensor | None = None) -> None:
        """Take in rows: `x_hat` float (T, K) as the integer layer sees them, `x` (T, K) as the float layer does (the
        same if not given). Raises `ValueError` for other shapes.
        """
        width = self.gram.shape[0]
        if x_hat.dim() != 2 or x_hat.shape[1] != width or (x is not None and x.shape != x_hat.shape):
            other = None if x is None else tuple(x.shape)
            raise ValueError(f"moments: expected two inputs (T, {width}); got {tuple(x_hat.shape)} and {other}")
        self.gram += (x_hat.t() @ x_hat).double()
        self.sum_hat += x_hat.sum(0, dtype=torch.float64)
        self.count += len(x_hat)
        if x is not None:
            difference = x - x_hat
            self.shift += (x_hat.t() @ difference).double()
            self.sum_shift += difference.sum(0, dtype=torch.float64)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of the tokens of both."""
        total = Moments(len(self.sum_hat), self.gram.device)
        for name in ("gram", "shift", "sum_hat", "sum_shift", "count"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def power(self) -> float:
        """Mean of diag(X̂ᵀ X̂)."""
        return self.gram.diagonal().mean().item()

    def second(self, centred: bool) -> tuple[Tensor, Tensor]:
        """H and S; of deviations from the means if `centred`: what a bias cannot correct."""
        if not centred:
            return self.gram, self.shift
        mean = self.sum_hat / max(self.count, 1)
        return self.gram - torch.outer(mean, self.sum_hat), self.shift - torch.outer(mean, self.sum_shift)


@dataclass(frozen=True)
class Grid:
    """The values that a weight row can take: step · q, low <= q <= high.

    step fp32 (N, 1), or (N, K) if groups of columns have steps of their own; low and high: integers, or (N, 1).
    """

    step: Tensor
    low: Tensor | int
    high: Tensor | int

    def nearest(self, weight: Tensor) -> Tensor:
        """q of a weight (N, K), or of one column with the grid of that column; fp32 integers."""
        return torch.round(weight / self.step).clamp(self.low, self.high)


@dataclass(frozen=True)
class Weights:
    """An integer weight: codes int8 (N, K), scale fp32 (N,), and perhaps zero points int32 (N,), or multipliers uint8
    (N, ⌈K / 128⌉) of a weight below 8 bits (see `vqvit.low_bit`).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    multipliers: Tensor | None = None

    def dequantize(self) -> Tensor:
        """fp32 (N, K)."""
        return nm.dequantize(self.codes, self.scale, self.zero_point)


def damp(gram: Tensor, damping: float = DAMPING, power: float = 0.0) -> Tensor:
    """H + λ I with λ = damping · mean(diag H) + `FLOOR` · power; a column without any input gets 1, so that H can be
    factored. `power` is the mean square of what H was computed from, where a mean was subtracted from that.
    """
    ridge = damping * gram.diagonal().mean() + FLOOR * power
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damped.diagonal().add_((damped.diagonal() <= 0).to(gram.dtype))
    return damped


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """d H dᵀ of each row d of `difference` (N, K): squared output error summed over tokens, (N,)."""
    return ((difference @ gram) * difference).sum(-1)


def ridge_target(weight: Tensor, gram: Tensor, shift: Tensor) -> Tensor:
    """V = W + W Sᵀ (H + λ I)⁻¹ for a damped `gram`: the float weight that serves integer inputs best, (N, K) fp64."""
    factor = torch.linalg.cholesky(gram)
    return weight + torch.cholesky_solve(shift @ weight.t(), factor).t()


def correct_inputs(weight: Tensor, fit: Moments, held_out: Moments, biased: bool) -> Tensor:
    """V (N, K) fp64 of all tokens, with the λ of `RIDGES` that gains most on `held_out` when fitted on `fit`; W itself
    if none gains. `biased`: a bias takes the means.
    """
    gram, shift = held_out.second(biased)
    best, least = None, 0.0
    for ridge in RIDGES:
        difference = _ridge(weight, fit, ridge, biased) - weight
        # ‖X̂ Vᵀ - X Wᵀ‖² - ‖X̂ Wᵀ - X Wᵀ‖² on the held-out tokens
        growth = ((difference @ gram) * difference - 2 * (difference @ shift) * weight).sum().item()
        if growth < least:
            best, least = ridge, growth
    return weight if best is None else _ridge(weight, fit + held_out, best, biased)


def _ridge(weight: Tensor, moments: Moments, ridge: float, biased: bool) -> Tensor:
    gram, shift = moments.second(biased)
    return ridge_target(weight, damp(gram, ridge, moments.power), shift)


def search_scale(weight: Tensor, gram: Tensor) -> Tensor:
    """The int8 scale of each row that gives the least output error with nearest rounding, fp32 (N,).

    Candidates are those of `numerics.weight_scale` with one β in [-2, 1] for a row (numerics §2): `BETAS`, then the
    neighbours of the best.
    """
    span, spread = weight.abs().amax(-1), weight.std(-1, correction=0)
    best = torch.zeros_like(span)
    least = _nearest_error(weight, gram, _scale(span, spread, best))
    for beta in BETAS:
        best, least = _better_beta(weight, gram, torch.full_like(best, beta), best, least)
    around = best
    for beta in (around - BETA_STEP, around + BETA_STEP):
        best, least = _better_beta(weight, gram, beta.clamp(BETAS[0], BETAS[-1]), best, least)
    return _scale(span, spread, best)


def round_error_aware(target: Tensor, grid: Grid, gram: Tensor) -> Tensor:
    """q (N, K) fp32 integers on `grid` with small output error tr (Ŵ - V) H (Ŵ - V)ᵀ for a damped `gram`.

    Columns go in order of falling diag(H): those that matter most have the most others left to make up for them.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(gram[order][:, order].double()).float()
    rest = target.float()[:, order].t().contiguous()  # (K, N): a column of W is a row here
    step = grid.step.expand(target.shape)[:, order].t().contiguous()
    low, high = (v.squeeze(-1) if isinstance(v, Tensor) else v for v in (grid.low, grid.high))
    q = torch.empty_like(rest)
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        errors = rest.new_empty(stop - start, rest.shape[1])
        for i in range(start, stop):
            q[i] = torch.round(rest[i] / step[i]).clamp(low, high)
            errors[i - start] = (rest[i] - q[i] * step[i]) / factor[i, i]
            rest[i + 1 : stop] -= torch.outer(factor[i, i + 1 : stop], errors[i - start])
        rest[stop:] -= factor[start:stop, stop:].t() @ errors
    result = torch.empty_like(q)
    result[order] = q
    return result.t()


def refine(q: Tensor, target: Tensor, grid: Grid, gram: Tensor, sweeps: int = 1) -> Tensor:
    """Coordinate descent on the output error: each column in turn takes its best value given the others, in place of
    `q` (N, K). The error never grows.
    """
    step = grid.step.expand(target.shape)
    low, high = (v.squeeze(-1) if isinstance(v, Tensor) else v for v in (grid.low, grid.high))
    q, step_t, gram = q.t().contiguous(), step.t().contiguous(), gram.float()
    left = target.float().t() - q * step_t  # (K, N)
    diagonal = gram.diagonal()
    for _ in range(sweeps):
        for start in range(0, len(q), BLOCK):
            block = slice(start, min(start + BLOCK, len(q)))
            within, pull = gram[block, block], gram[block] @ left
            for i in range(len(within)):
                k = start + i
                best = torch.round(q[k] + pull[i] / (diagonal[k] * step_t[k])).clamp(low, high)
                change = (q[k] - best) * step_t[k]
                q[k] = best
                left[k] += change
                pull += torch.outer(within[:, i], change)
    return q.t()


def solve(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    present: Weights,
    bits: int = 8,
    per_channel: bool = True,
    mu: float = 1.0,
    held_out: Moments | None = None,
) -> tuple[Weights, Tensor | None]:
    """The weights and the bias fp64 (N,) of an integer layer, from its float weight and its calibration inputs.

    Args:
        weight: float (N, K), the equaliser folded in.
        bias: float (N,) or None. Without one nothing takes the mean of the error.
        moments: of the layer's inputs.
        present: the weights that the layer has. A row keeps them where they are better. With zero points, and with one
            scale for the matrix, all scales stay.
        bits, per_channel: as in `LayerPlan`.
        mu: share of the mean error that the bias takes (numerics §6).
        held_out: of the inputs from other images. Without it the target is W, not V.
    """
    weight = weight.double()
    target = weight
    if held_out is not None:
        target = correct_inputs(weight, moments, held_out, bias is not None)
        moments = moments + held_out
    target = target.float()
    gram = damp(moments.second(bias is not None)[0], power=moments.power).float()
    candidate, grid = _empty_weights(target, gram, present, bits, per_channel)
    q = refine(round_error_aware(target, grid, gram), target, grid, gram)
    chosen = _better_rows(_fill(candidate, q), present, target, gram)
    if bias is not None:
        bias = bias.double() + mu * mean_error(weight, chosen.dequantize().double(), moments)
    return chosen, bias


def _empty_weights(
    target: Tensor, gram: Tensor, present: Weights, bits: int, per_channel: bool
) -> tuple[Weights, Grid]:
    """Scales for `target` with its codes still to come, and the grid on which to round them."""
    codes = torch.empty_like(present.codes)
    if bits < 8:
        scale, multipliers = low_bit.search_steps(target, bits, gram)
        limit = low_bit.code_limit(bits)
        steps = low_bit.column_steps(scale, multipliers, target.shape[1])
        return Weights(codes, scale, None, multipliers), Grid(steps, -limit, limit)
    if present.zero_point is not None:
        zero = present.zero_point.unsqueeze(-1)
        grid = Grid(present.scale.unsqueeze(-1), -nm.QMAX - zero, nm.QMAX - zero)
        return Weights(codes, present.scale, present.zero_point), grid
    scale = search_scale(target, gram) if per_channel else present.scale
    return Weights(codes, scale), Grid(scale.unsqueeze(-1), -nm.QMAX, nm.QMAX)


def _fill(weights: Weights, q: Tensor) -> Weights:
    """`weights` with the codes that the integers q (N, K) of their grid stand for."""
    if weights.multipliers is not None:
        codes = low_bit.expand(q.to(torch.int8), weights.multipliers)
    else:
        codes = (q if weights.zero_point is None else q + weights.zero_point.unsqueeze(-1)).to(torch.int8)
    return dataclasses.replace(weights, codes=codes)


def mean_error(weight: Tensor, effective: Tensor, moments: Moments) -> Tensor:
    """E[X Wᵀ - X̂ Ŵᵀ] over the calibration tokens, (N,) fp64."""
    mean_hat, mean_shift = moments.sum_hat / moments.count, moments.sum_shift / moments.count
    return weight @ mean_shift + (weight - effective) @ mean_hat


def _scale(span: Tensor, spread: Tensor, beta: Tensor) -> Tensor:
    return ((span + beta * spread) / nm.QMAX).clamp(min=nm.SCALE_MIN)


def _better_beta(weight: Tensor, gram: Tensor, beta: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the better of the betas `beta` and `best`, and its error; `least` is that of `best`."""
    scale = _scale(weight.abs().amax(-1), weight.std(-1, correction=0), beta)
    error = _nearest_error(weight, gram, scale)
    return torch.where(error < least, beta, best), torch.minimum(error, least)


def _nearest_error(weight: Tensor, gram: Tensor, scale: Tensor) -> Tensor:
    step = scale.unsqueeze(-1)
    rounded = torch.round(weight / step).clamp(-nm.QMAX, nm.QMAX) * step
    return output_error(rounded - weight, gram)


def _better_rows(first: Weights, second: Weights, target: Tensor, gram: Tensor) -> Weights:
    """Of two weights with the same zero points the better rows."""
    errors = [output_error(weights.dequantize() - target, gram) for weights in (first, second)]
    keep = errors[0] <= errors[1]
    return Weights(
        torch.where(keep.unsqueeze(-1), first.codes, second.codes),
        torch.where(keep, first.scale, second.scale),
        first.zero_point,
        None if first.multipliers is None else torch.where(keep.unsqueeze(-1), first.multipliers, second.multipliers),
    )


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = H⁻¹: row k holds what rounding column k does to the columns behind it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)
