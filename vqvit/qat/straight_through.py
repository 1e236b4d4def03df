"""Differentiable quantizers: the exact codes of `vqvit.numerics` forward, straight-through and LSQ gradients backward.

For x̂ = α q with q = clamp(rne(x / α), -Q, Q), Q = 127, and an upstream gradient g (numerics §10; LSQ is Esser et al.,
2020):

    ∂x̂/∂x = 1 inside the range, else 0
    ∂x̂/∂α = q - x / α inside the range, else q = ±Q

Inside is where rounding needs no clamp, |x / α| < Q + 1/2: the largest element of a row, which has x / α = Q up to a
rounding of α, is then inside whatever that rounding was. A range that is read off x itself (per token, per group, or
with a zero point) is a constant for the gradient of x.
"""

import math

import torch
from torch import Tensor
from torch.autograd import Function

from vqvit import numerics as nm

EXACT_K = 2**24 // nm.QMAX**2  # 1040
"""Longest sum of code products whose every partial sum is an integer that fp32 holds exactly, in any order."""


EDGE = nm.QMAX + 0.5
"""|x / α| from which on a code is clamped."""


class _Lsq(Function):
    @staticmethod
    def forward(ctx, x, scale, codes):
        ctx.save_for_backward(x, scale, codes)
        return codes * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale, codes = ctx.saved_tensors
        ratio = x / scale
        inside = ratio.abs() < EDGE
        slope = codes - torch.where(inside, ratio, 0.0)
        return grad * inside, (grad * slope).sum_to_size(scale.shape), None


class _Identity(Function):
    @staticmethod
    def forward(ctx, x, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GradientScale(Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class _SpreadScale(Function):
    @staticmethod
    def forward(ctx, spread, scale, deviation):
        ctx.save_for_backward(scale, deviation)
        return scale.view_as(scale)

    @staticmethod
    def backward(ctx, grad):
        scale, deviation = ctx.saved_tensors
        free = scale > nm.SCALE_MIN
        return (grad * deviation * free).sum() / nm.QMAX, None, None


class _Product(Function):
    @staticmethod
    def forward(ctx, x, weight, value):
        ctx.save_for_backward(x, weight)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.transpose(-1, -2) @ x, None


def quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x̂ = α q of fp32 x and a scale that broadcasts against it, and the codes int8; gradients to both."""
    codes = nm.to_codes(x.detach(), scale.detach())
    return _Lsq.apply(x, scale, codes), codes


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` forward, the identity of x backward."""
    return _Identity.apply(x, value)


def product(x: Tensor, weight: Tensor, value: Tensor) -> Tensor:
    """`value` forward; backward the gradients of x (M, K) times weight (N, K) transposed."""
    return _Product.apply(x, weight, value)


def learned_scale(log_scale: Tensor, elements: int) -> Tensor:
    """α = max(1e-8, exp(log α)) fp32; the gradient on log α is multiplied by 1 / sqrt(n Q), n the `elements` that
    share a scale.
    """
    scaled = _GradientScale.apply(log_scale, 1 / math.sqrt(elements * nm.QMAX))
    return scaled.double().exp().float().clamp(min=nm.SCALE_MIN)


def log_scale(scale: Tensor) -> Tensor:
    """The parameter that stands for a scale: log α, fp32."""
    return scale.double().log().float()


def token_scale(x: Tensor, delta: Tensor | None) -> Tensor:
    """`numerics.row_scale` of each row of x (M, K); the gradient to δ is Σ_t g_t sd(x_t) / Q. None is δ = 0."""
    x = x.detach()
    if delta is None:
        return nm.row_scale(x)
    scale = nm.row_scale(x, delta.item())
    return _SpreadScale.apply(delta, scale, x.std(-1, correction=0))


def spread_scale(weight: Tensor, beta: Tensor, per_channel: bool) -> Tensor:
    """`numerics.weight_scale` of a weight (N, K), fp32 (N,); ∂α_n/∂β = sd(W_n) / Q (numerics §2)."""
    weight = weight.detach()
    scale = nm.weight_scale(weight, beta.item(), per_channel)
    rows = weight if per_channel else weight.reshape(1, -1)
    return _SpreadScale.apply(beta, scale, rows.std(-1, correction=0).expand_as(scale))


def code_product(a: Tensor, b: Tensor) -> Tensor:
    """int32 (M, N) = Σ_k a (M, K) · b (N, K) of int8 codes, exact, by fp32 products of at most `EXACT_K` columns."""
    chunks = zip(a.split(EXACT_K, -1), b.split(EXACT_K, -1), strict=True)
    with torch.autocast(a.device.type, enabled=False):
        return sum((x.float() @ y.float().t()).to(torch.int32) for x, y in chunks)
