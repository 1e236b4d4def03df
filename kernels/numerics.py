"""The numerical contract of `vqvit.numerics` as Triton device functions: the same fp32 operations in the same order.

A multiply followed by an add is fused exactly where `fma` is written: every kernel is launched with
`enable_fp_fusion=False`. Division and square root are the correctly rounded ones. Row statistics are exact int64 sums.
No libdevice and no inline assembly, so that the interpreter (TRITON_INTERPRET=1) runs the very same code.

Row functions take a tile x (ROWS, BLOCK) in fp32 whose lanes beyond k hold 0, and return one value per row, (ROWS, 1).
"""

import triton
import triton.language as tl

from vqvit import numerics as contract

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

QMAX = tl.constexpr(float(contract.QMAX))
SCALE_MIN = tl.constexpr(contract.SCALE_MIN)
ASYM_STEPS = tl.constexpr(float(contract.ASYM_STEPS))
RESIDUAL_STEPS = tl.constexpr(contract.RESIDUAL_STEPS)
MEAN_GRID_BITS = tl.constexpr(contract.MEAN_GRID_BITS)
GELU_CLAMP = tl.constexpr(contract.GELU_CLAMP)
GELU_SQUARINGS = tl.constexpr(contract.GELU_SQUARINGS)
GELU_ERF = tl.constexpr(contract.GELU_COEFFICIENTS["gelu"])
GELU_TANH = tl.constexpr(contract.GELU_COEFFICIENTS["gelu_tanh"])
EXP2_COEFFICIENTS = tl.constexpr(contract.EXP2_COEFFICIENTS)
NUMERATOR_COEFFICIENTS = tl.constexpr(contract.NUMERATOR_COEFFICIENTS)
EXP2_MIN = tl.constexpr(contract.EXP2_MIN)
EXP2_MAX = tl.constexpr(-contract.EXP2_MIN)
MINUS_LOG2_E = tl.constexpr(-contract.LOG2_E)
QUICK_GELU_SLOPE = tl.constexpr(contract.QUICK_GELU_SLOPE)
P_BASE = tl.constexpr(contract.P_BASE)

# v + MAGIC has an ulp of 1 for |v| <= 2^22, so the addition rounds v to nearest even, and the sum's bits are
# MAGIC_BITS + rne(v), whose low byte is rne(v) modulo 256.
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2^23
MAGIC_BITS = tl.constexpr(0x4B400000)
ONE_BITS = tl.constexpr(0x3F800000)
INF_BITS = tl.constexpr(0x7F800000)
ABS_MASK = tl.constexpr(0x7FFFFFFF)
INF = tl.constexpr(float("inf"))

# Between these, neither 1 / scale nor the remainder of x / scale underflows where a code can change.
SCALE_SMALL = tl.constexpr(2.0**-64)
SCALE_LARGE = tl.constexpr(2.0**100)


@triton.jit
def _fma_hardware(a, b, c):
    return tl.fma(a, b, c)


@triton.jit
def _fma_round_to_odd(a, b, c):
    """`vqvit.numerics.fma` in Triton: older interpreters round the product too."""
    c = tl.cast(tl.cast(c, tl.float32), tl.float64)
    product = a.to(tl.float64) * tl.cast(tl.cast(b, tl.float32), tl.float64)
    total = product + c
    shadow = total - product
    error = (product - (total - shadow)) + (c - shadow)
    bits = total.to(tl.int64, bitcast=True)
    adjust = ((bits & 1) == 0) & (error != 0.0) & (tl.abs(total) < INF)
    away_from_zero = (error > 0.0) == (total > 0.0)
    bits = tl.where(adjust, tl.where(away_from_zero, bits + 1, bits - 1), bits)
    return bits.to(tl.float64, bitcast=True).to(tl.float32)


fma = _fma_round_to_odd if INTERPRETED.value else _fma_hardware


@triton.jit
def to_fp32(x):
    """Exact conversion of a float tile. The interpreter stores bfloat16 as integers and converts it wrongly."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def from_fp32(x, dtype: tl.constexpr):
    """Conversion to `dtype`, rounded to nearest even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def rne(x):
    """Round half to even for |x| <= 2^22; NaN stays NaN."""
    return (x + MAGIC) - MAGIC


@triton.jit
def rne_int(x):
    """Round half to even for |x| <= 2^22, as int32."""
    return (x + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def rne_int8(x):
    """Round half to even for |x| < 127.5: the code is the low byte of x + MAGIC."""
    return (x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def small_int_to_fp32(x):
    """int32 |x| < 2^22 to fp32 by two additions, several times faster than the conversion instruction."""
    return (x + MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def pow2(exponent):
    """2^exponent for int32 -126 <= exponent <= 127, assembled from its bits."""
    return ((exponent << 23) + ONE_BITS).to(tl.float32, bitcast=True)


@triton.jit
def polynomial(x, coefficients: tl.constexpr, DEGREE: tl.constexpr):
    """Σ c_i x^i by Horner's rule, one fma a step."""
    value = fma(x, coefficients[DEGREE], coefficients[DEGREE - 1])
    for i in tl.static_range(DEGREE - 2, -1, -1):
        value = fma(value, x, coefficients[i])
    return value


@triton.jit
def exp2_factors(x, coefficients: tl.constexpr, DEGREE: tl.constexpr):
    """P(x - n) and 2^n for n = rne(x), x <= 126; x below -126 counts as -126. NaN stays NaN in the first."""
    x = tl.maximum(x, EXP2_MIN, propagate_nan=tl.PropagateNan.ALL)
    shifted = x + MAGIC
    n = shifted.to(tl.int32, bitcast=True) << 23  # the bits of MAGIC leave on the left
    power = (n + ONE_BITS).to(tl.float32, bitcast=True)
    return polynomial(x - (shifted - MAGIC), coefficients, DEGREE), power


@triton.jit
def exp2(x):
    """2^x for x <= 126."""
    mantissa, power = exp2_factors(x, EXP2_COEFFICIENTS, 5)
    return mantissa * power


@triton.jit
def sigmoid(x):
    return tl.div_rn(1.0, 1.0 + exp2(tl.minimum(x * MINUS_LOG2_E, EXP2_MAX)))


@triton.jit
def activation(x, NAME: tl.constexpr):
    """Elementwise activation. NaN survives: each one multiplies by x or |x|, or lets it through."""
    if NAME == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif NAME == "silu":
        x = x * sigmoid(x)
    elif NAME == "quick_gelu":
        x = x * sigmoid(x * QUICK_GELU_SLOPE)
    elif NAME == "gelu" or NAME == "gelu_tanh":
        n = -tl.abs(x)
        clamped = tl.maximum(n, -GELU_CLAMP)
        if NAME == "gelu":
            root = polynomial(clamped, GELU_ERF, 5)
        else:
            root = polynomial(clamped, GELU_TANH, 6)
        for _ in tl.static_range(GELU_SQUARINGS):
            root = root * root
        x = fma(n, root, tl.where(x > 0.0, x, 0.0))
    return x


@triton.jit
def magnitude_bits(x):
    """|x| as an integer that orders like |x|: Inf is INF_BITS, NaN lies above."""
    return x.to(tl.int32, bitcast=True) & ABS_MASK


@triton.jit
def row_absmax(x):
    """(largest |x| of each row, or 0 if the row holds NaN or Inf; whether it holds neither)."""
    bits = tl.max(magnitude_bits(x), axis=1)[:, None]
    finite = bits < INF_BITS
    return tl.where(finite, bits, 0).to(tl.float32, bitcast=True), finite


@triton.jit
def grid_exponent(absmax):
    """Smallest integer e >= -100 with absmax < 2^e."""
    return tl.maximum((absmax.to(tl.int32, bitcast=True) >> 23) - 126, -100)


@triton.jit
def grid_sum(x, exponent, POWER: tl.constexpr):
    """Σ rne(x / u)^power in int64, exact in any order; u = 2^(exponent - 21)."""
    steps = rne_int(x * pow2(-(exponent - MEAN_GRID_BITS))).to(tl.int64)
    if POWER == 2:
        steps = steps * steps
    return tl.sum(steps, axis=1)[:, None]


@triton.jit
def grid_mean(total, exponent, k, POWER: tl.constexpr):
    """fl32(total / k · u^power) for a `grid_sum` over k values."""
    unit = pow2(exponent - MEAN_GRID_BITS).to(tl.float64)
    if POWER == 2:
        unit = unit * unit
    return (total.to(tl.float64) / tl.cast(k, tl.float64) * unit).to(tl.float32)


@triton.jit
def row_deviation(x, valid, exponent, k):
    """(x - mean, 0 where not valid; population variance) of rows whose magnitudes are below 2^exponent."""
    deviation = tl.where(valid, x - grid_mean(grid_sum(x, exponent, 1), exponent, k, 1), 0.0)
    return deviation, grid_mean(grid_sum(deviation, exponent, 2), exponent, k, 2)


@triton.jit
def scale_of(span, steps):
    """max(1e-8, span / steps)."""
    scale = tl.div_rn(span, steps)
    return tl.where(scale < SCALE_MIN, SCALE_MIN, scale)


@triton.jit
def _corrected_codes(x, divisor, reciprocal):
    """rne(x / divisor) in int8 for |x / divisor| < 127.5, reciprocal = fl(1 / divisor), without a division.

    x · reciprocal, corrected by its exact remainder, has the codes of fl(x / divisor): checked for the divisor's 2^23
    significands at every tie and the five floats on either side of it. x · reciprocal alone misses 2.5 % of those.
    """
    quotient = x * reciprocal
    return rne_int8(fma(fma(-quotient, divisor, x), reciprocal, quotient))


@triton.jit
def to_codes(x, scale):
    """clamp(rne(x / scale), -127, 127) in int8; NaN becomes 0."""
    quotient = tl.div_rn(x, scale)
    return rne_int8(tl.minimum(tl.maximum(tl.where(quotient == quotient, quotient, 0.0), -QMAX), QMAX))


@triton.jit
def to_codes_in_range(x, scale):
    """`to_codes` for |x| <= 127 · scale and 1e-8 <= scale < 2^126 (nothing to clamp), or x = 0 and a scale of NaN."""
    reciprocal = tl.div_rn(1.0, scale)
    known = scale == scale
    return _corrected_codes(x, tl.where(known, scale, 0.0), tl.where(known, reciprocal, 0.0))


@triton.jit
def to_codes_static(x, scale):
    """`to_codes` for one scale > 0 and x without NaN."""
    if (scale >= SCALE_SMALL) & (scale <= SCALE_LARGE):
        limit = scale * QMAX
        codes = _corrected_codes(tl.minimum(tl.maximum(x, -limit), limit), scale, tl.div_rn(1.0, scale))
    else:
        codes = to_codes(x, scale)
    return codes


@triton.jit
def quantize_rows(x, sound, valid, k, delta, HAS_DELTA: tl.constexpr):
    """Codes of the rows of x, and scales (max|x| + delta · sd(x)) / 127, NaN where a row is not finite or not sound."""
    absmax, finite = row_absmax(x)
    finite = finite & sound
    x = tl.where(finite, x, 0.0)
    if HAS_DELTA:
        _, variance = row_deviation(x, valid, grid_exponent(absmax), k)
        span = fma(tl.sqrt_rn(variance), delta, absmax)
        scale = tl.where(finite, scale_of(span, QMAX), float("nan"))
        codes = to_codes(x, scale)
    else:
        scale = tl.where(finite, scale_of(absmax, QMAX), float("nan"))
        codes = to_codes_in_range(x, scale)
    return codes, scale


@triton.jit
def quantize_rows_static(x, static_scale):
    """Codes for one scale, which is every row's scale, or NaN where the row is not finite."""
    _, finite = row_absmax(x)
    codes = to_codes_static(tl.where(x == x, x, 0.0), static_scale)
    return codes, tl.where(finite, static_scale, float("nan"))


@triton.jit
def asymmetric_range(low, high, finite):
    """Scale and zero point of rows between low <= 0 and high >= 0; NaN and 0 where not finite."""
    scale = scale_of(high - low, ASYM_STEPS)
    zero_point = -127 - rne_int(tl.div_rn(low, scale))
    return tl.where(finite, scale, float("nan")), tl.where(finite, zero_point, 0)


@triton.jit
def to_codes_asymmetric(x, scale, zero_point):
    """clamp(rne(x / scale) + zero_point, -127, 127) in int8 for finite x; 0 where the scale is NaN."""
    codes = rne_int(tl.div_rn(x, tl.where(scale == scale, scale, 1.0))) + zero_point
    return tl.minimum(tl.maximum(codes, -127), 127).to(tl.int8)


@triton.jit
def quantize_rows_asymmetric(x):
    """Codes, scales and zero points of the rows of x, whose ranges include 0."""
    _, finite = row_absmax(x)
    x = tl.where(finite, x, 0.0)
    low = tl.minimum(tl.min(x, axis=1), 0.0)[:, None]
    high = tl.maximum(tl.max(x, axis=1), 0.0)[:, None]
    scale, zero_point = asymmetric_range(low, high, finite)
    return to_codes_asymmetric(x, scale, zero_point), scale, zero_point
