"""The numerical contract, in code: what every backend computes, bit for bit.

Every function below is a fixed sequence of IEEE-754 fp32 operations (add, multiply, divide, square root, fused
multiply-add, each rounded once) and of exact integer operations, so the C++, Triton and torch backends return the same
bits for codes, accumulators and float results alike. Three rules make that possible:

1. A multiply followed by an add is a fused multiply-add exactly where this file says `fma`, and nowhere else.
2. Row statistics are sums of integers on a fixed-point grid set by the row's largest magnitude: exact, hence the same
   in any summation order.
3. Transcendental functions are the polynomials of this file.

docs/numerics.md says the same in words; "numerics §n" in docstrings is a section of it.

Notation: rne = round half to even, Q = 127, sd = population standard deviation, α = scale, x ≈ α·q.
"""

import torch
from torch import Tensor

QMAX = 127
"""Largest int8 code. -128 is never produced, so that |code| <= 127 and negation stays in range."""

SCALE_MIN = 1e-8
"""Smallest scale: an all-zero row gets this scale and codes 0."""

ASYM_STEPS = 254
"""Steps between the smallest (-127) and the largest (127) code of an asymmetric quantizer."""

RESIDUAL_STEPS = 254.0
"""Residual codes count in units of scale / 254: |x - scale * code| <= scale / 2 maps to |residual code| <= 127."""

INT32_MAX = 2**31 - 1

K_MAX_SYMMETRIC = INT32_MAX // QMAX**2  # 133,144
K_MAX_ONE_ZERO_POINT = INT32_MAX // (QMAX * ASYM_STEPS)  # 66,572
K_MAX_TWO_ZERO_POINTS = INT32_MAX // ASYM_STEPS**2  # 33,286
"""Longest inner dimension for which the int32 accumulator, zero-point terms included, cannot overflow."""

GROUP = 128
"""Columns that share a scale in per-token-group quantization; the last group of a row may be shorter."""

MEAN_GRID_BITS = 21
"""Row statistics count in units of 2^-21 of the power of two above the row's largest magnitude."""

NORM_K_MAX = 2**16
"""Longest row with statistics: 2^16 squares of at most 2^44 stay below 2^63."""

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu")

# gelu(x) = max(x, 0) + n Φ(n), n = -|x|, and Φ(n) = P(max(n, -5.25))^8, minimax of n P(n)^8:
# |gelu error| <= 1.6e-6 + 1e-7 |x|. The eighth root falls so slowly that a short polynomial follows it.
GELU_CLAMP = 5.25
GELU_SQUARINGS = 3
GELU_COEFFICIENTS = {
    "gelu": (
        0.9170035123825073, 0.09149139374494553, -0.03172072768211365, 0.001108962926082313,
        0.0019399621523916721, 0.00019099067139904946,
    ),
    "gelu_tanh": (
        0.9170040488243103, 0.09150636941194534, -0.03160079941153526, 0.0013836867874488235,
        0.0024451403878629208, 0.00046842312440276146, 3.7065710785100237e-05,
    ),
}  # fmt: skip

# 2^f for f in [-1/2, 1/2], minimax of degree 5 in relative error, constant term pinned to 1: 2e-7.
EXP2_COEFFICIENTS = (
    1.0, 0.6931469440460205, 0.24022120237350464, 0.05550713092088699, 0.009675540961325169, 0.0013276472454890609,
)  # fmt: skip
EXP2_MIN = -126.0
LOG2_E = 1.4426950408889634
QUICK_GELU_SLOPE = 1.702

P_STEPS = 65535.0
"""Unnormalised softmax numerators are u16 codes rne(65535 · exp(logit - row max)), multiplied as two u8 digits.

One digit loses every key below 1/510 of the largest: about 3 dB of DINOv2-small's CLS feature (benchmarks/results).
"""

# 65535 · 2^f for f in [-1/2, 1/2], minimax of degree 4 in relative error, first term pinned: 2.8e-6, a fifth of a step.
NUMERATOR_COEFFICIENTS = (P_STEPS, 45423.875, 15744.1650390625, 3663.927490234375, 628.1386108398438)

P_BASE = 256.0
"""A numerator is P_BASE · high digit + low digit."""

MAX_KEYS = 32768
"""Most keys of a query: the sum of their numerators stays below 2^31."""


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """fl32(a · b + c) rounded once, for fp32 operands (Python numbers are rounded to fp32 first).

    The product is exact in fp64. The fp64 sum is rounded to odd (Boldo & Melquiond 2008), which makes the final
    rounding to fp32 the only one that shows.
    """
    a64, b64, c64 = (_fp64(v, a.device) for v in (a, b, c))
    product = a64 * b64
    total = product + c64
    shadow = total - product
    error = (product - (total - shadow)) + (c64 - shadow)
    even = (total.view(torch.int64) & 1) == 0
    toward_error = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    adjust = even & (error != 0) & torch.isfinite(total)
    return torch.where(adjust, torch.nextafter(total, toward_error), total).float()


def _fp64(value: Tensor | float, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float32, device=device)
    return value.double()


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded fp32 square root. torch.sqrt is not on the CPU (2.13: one last bit in five); fp64's,
    rounded, is.
    """
    return x.double().sqrt().float()


def divide(x: Tensor, value: float) -> Tensor:
    """x / value, rounded once. CUDA tensors divided by a Python number are multiplied by its reciprocal instead."""
    return x / torch.full_like(x, value)


def polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Σ c_i x^i by Horner's rule, one fma a step."""
    value = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = fma(value, x, c)
    return value


def pow2(exponent: Tensor) -> Tensor:
    """2^exponent as fp32 for integers -126 <= exponent <= 127, assembled from its bits."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def exp2(x: Tensor, coefficients: tuple[float, ...] = EXP2_COEFFICIENTS) -> Tensor:
    """2^x for x <= 126 in fp32: n = rne(x), P(x - n) · 2^n, times what P's `coefficients` hold; x below -126 counts as
    -126. NaN stays NaN.
    """
    x = torch.where(x < EXP2_MIN, EXP2_MIN, x)
    n = torch.round(x)
    return polynomial(x - n, coefficients) * pow2(n)


def softmax_numerators(x: Tensor) -> Tensor:
    """rne(65535 · 2^x) as fp32, for logits x <= 0 less the largest of their row, in units of log 2."""
    return torch.round(exp2(x, NUMERATOR_COEFFICIENTS))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + 2^(-x log2 e)), with the exponent clamped to 126."""
    return 1.0 / (1.0 + exp2(torch.clamp(x * -round_fp32(LOG2_E), max=-EXP2_MIN)))


def activation(x: Tensor, name: str) -> Tensor:
    """Elementwise activation of an fp32 tensor; `name` is one of `ACTIVATIONS`."""
    match name:
        case "none":
            return x
        case "relu":
            return torch.where(x < 0, 0.0, x)
        case "silu":
            return x * sigmoid(x)
        case "quick_gelu":
            return x * sigmoid(x * round_fp32(QUICK_GELU_SLOPE))
        case "gelu" | "gelu_tanh":
            n = -x.abs()
            root = polynomial(torch.where(n < -GELU_CLAMP, -GELU_CLAMP, n), GELU_COEFFICIENTS[name])
            for _ in range(GELU_SQUARINGS):
                root = root * root
            return fma(n, root, torch.where(x > 0, x, 0.0))
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}; got {name!r}")


def round_fp32(value: float) -> float:
    """The fp32 number nearest to `value`, as a Python float."""
    return torch.tensor(value, dtype=torch.float32).item()


def grid_exponent(absmax: Tensor) -> Tensor:
    """Smallest integer e >= -100 with absmax < 2^e, read off the fp32 exponent field; int32."""
    return ((absmax.float().view(torch.int32) >> 23) - 126).clamp(min=-100)


def _grid_mean(x: Tensor, exponent: Tensor, power: int) -> Tensor:
    """fl32 of the mean of x^power, x in units u = 2^(e - 21): (Σ rne(x / u)^power as an integer) / K · u^power in
    fp64.
    """
    unit = exponent - MEAN_GRID_BITS
    steps = torch.round(x * pow2(-unit)).to(torch.int64)
    mean = divide((steps**power).sum(-1, keepdim=True).double(), x.shape[-1])
    return (mean * pow2(unit).double() ** power).float()


def row_mean(x: Tensor, exponent: Tensor) -> Tensor:
    """fp32 mean over the last dimension of fp32 `x` whose magnitudes are below 2^exponent; (..., 1)."""
    return _grid_mean(x, exponent, 1)


def row_variance(deviation: Tensor, exponent: Tensor) -> Tensor:
    """fp32 population variance from the deviations x - mean, on the same grid; (..., 1)."""
    return _grid_mean(deviation, exponent, 2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, paper: bool = False) -> Tensor:
    """LayerNorm over the last dimension, fp32: fma((x - mean) · rstd, weight, bias); rows with NaN or Inf become NaN.

    rstd is 1 / sqrt(var + eps), or the paper's 1 / (sd + eps) if `paper`.
    """
    x = x.float()
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    exponent = grid_exponent(x.abs().amax(-1, keepdim=True))
    deviation = x - row_mean(x, exponent)
    variance = row_variance(deviation, exponent)
    spread = sqrt(variance) + round_fp32(eps) if paper else sqrt(variance + round_fp32(eps))
    normalized = fma(deviation * (1.0 / spread), weight.float(), bias.float())
    return torch.where(finite, normalized, torch.nan)


def to_codes(x: Tensor, scale: Tensor) -> Tensor:
    """clamp(rne(x / scale), -127, 127) as int8; NaN becomes 0 (its row's scale is NaN, so the poison still shows)."""
    return torch.nan_to_num(torch.round(x / scale), nan=0.0).clamp(-QMAX, QMAX).to(torch.int8)


def row_scale(x: Tensor, delta: float = 0.0) -> Tensor:
    """max(1e-8, (max|x| + delta · sd(x)) / 127) over the last dimension, fp32; NaN where the row holds NaN or Inf."""
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, 0.0)
    span = x.abs().amax(-1, keepdim=True)
    if delta != 0.0:
        exponent = grid_exponent(span)
        sd = sqrt(row_variance(x - row_mean(x, exponent), exponent))
        span = fma(sd, delta, span)
    scale = divide(span, QMAX).clamp(min=SCALE_MIN)
    return torch.where(finite, scale, torch.nan).squeeze(-1)


def group_count(width: int) -> int:
    """Scales of a row of `width` elements that are quantized by group."""
    return -(-width // GROUP)


def groups(x: Tensor) -> Tensor:
    """(..., K) as (..., ⌈K / 128⌉, 128), padded with zeros, which change no scale."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def row_scale_asymmetric(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale fp32 and zero point int32 of each row: α = (hi - lo) / 254, z = -127 - rne(lo / α), x ≈ α (q - z).

    hi and lo include 0, so that zero has a code. A row with NaN or Inf gets scale NaN and zero point 0.
    """
    finite = torch.isfinite(x).all(-1)
    x = torch.where(finite.unsqueeze(-1), x, 0.0)
    low, high = x.amin(-1).clamp(max=0.0), x.amax(-1).clamp(min=0.0)
    scale = divide(high - low, ASYM_STEPS).clamp(min=SCALE_MIN)
    zero_point = -QMAX - torch.round(low / scale).to(torch.int32)
    return torch.where(finite, scale, torch.nan), torch.where(finite, zero_point, 0)


def to_codes_asymmetric(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """clamp(rne(x / scale) + zero_point, -127, 127) as int8; NaN becomes 0."""
    shifted = torch.round(x / scale) + zero_point
    return torch.nan_to_num(shifted, nan=0.0).clamp(-QMAX, QMAX).to(torch.int8)


def weight_scale(weight: Tensor, beta: float = 0.0, per_channel: bool = True) -> Tensor:
    """max(1e-8, (max|W_n| + beta · sd(W_n)) / 127) for each output channel, fp32 (N,).

    With `per_channel=False` one range serves the whole matrix and is repeated N times: kernels know one layout.
    """
    rows = weight.float() if per_channel else weight.float().reshape(1, -1)
    span = rows.abs().amax(-1) + beta * rows.std(-1, correction=0)
    return divide(span, QMAX).clamp(min=SCALE_MIN).expand(weight.shape[0]).contiguous()


def quantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Symmetric int8 codes (N, K) of a float weight (N, K) for scales (N,)."""
    return to_codes(weight.float(), scale.unsqueeze(-1))


def quantize_weight_asymmetric(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 (N, K), scale fp32 (N,), zero point int32 (N,) of a float weight (N, K): the `int8_asym` tier."""
    scale, zero_point = row_scale_asymmetric(weight.float())
    return to_codes_asymmetric(weight.float(), scale[:, None], zero_point[:, None]), scale, zero_point


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """scale · (codes - zero_point) along rows, fp32."""
    shifted = codes.float() if zero_point is None else codes.float() - zero_point.float().unsqueeze(-1)
    return shifted * scale.unsqueeze(-1)
