// The functions of vqvit/numerics.py for one value, in the same fp32 operations, and what rows share.
#pragma once

#include "constants.h"
#include "device.h"
#include "vqvit.h"

namespace vqvit {

constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23: v + kMagic rounds |v| <= 2^22 to nearest even,
constexpr int32_t kMagicBits = 0x4b400000;  // and its bits are kMagicBits + rne(v)
constexpr int32_t kNotANumberBits = 0x7fc00000;

VQVIT_DEVICE float not_a_number() { return from_bits(kNotANumberBits); }

// Round half to even of |x| <= 2^22.
VQVIT_DEVICE int32_t rne_int(float x) {
    return static_cast<int32_t>(static_cast<uint32_t>(bits_of(x + kMagic)) - kMagicBits);  // wraps where x has no integer
}
// The same for |x| < 127.5: the code is the low byte. A NaN has no code: the twin gives it the low byte of a GPU's NaN.
VQVIT_DEVICE uint32_t rne_byte(float x) {
#ifndef __CUDACC__
    if (x != x) return 0xff;
#endif
    return static_cast<uint32_t>(bits_of(x + kMagic));
}
VQVIT_DEVICE int8_t rne_int8(float x) { return static_cast<int8_t>(rne_byte(x)); }
// int32 |x| < 2^22 as fp32. Below sm_86 the conversion instruction takes four times as long as an addition.
VQVIT_DEVICE float small_int_to_fp32(int32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 860
    return static_cast<float>(x);
#else
    return from_bits(x + kMagicBits) - kMagic;
#endif
}
// 2^e for -126 <= e <= 127.
VQVIT_DEVICE float pow2(int32_t e) { return from_bits((e + 127) << 23); }

// Σ c_i x^i by Horner's rule, one fma a step.
template <int N>
VQVIT_DEVICE float polynomial(float x, const float (&c)[N]) {
    float value = c[N - 1];
    VQVIT_UNROLL
    for (int i = N - 2; i >= 0; --i) value = fmaf(value, x, c[i]);
    return value;
}

// 2^n for n + kMagic, whose own bits leave on the left.
VQVIT_DEVICE float pow2_of_shifted(float shifted) {
    return from_bits(static_cast<int32_t>((static_cast<uint32_t>(bits_of(shifted)) << 23) + 0x3f800000u));
}

// 2^x for x <= 126; below -126 counts as -126; NaN stays NaN.
VQVIT_DEVICE float exp2(float x) {
    const float coefficients[] = {VQVIT_EXP2_COEFFICIENTS};
    x = x < kExp2Min ? kExp2Min : x;
    const float shifted = x + kMagic;
    return polynomial(x - (shifted - kMagic), coefficients) * pow2_of_shifted(shifted);
}

// 1 / (1 + 2^(-x log2 e)).
VQVIT_DEVICE float sigmoid(float x) {
    const float exponent = x * -kLog2E;
    return 1.0f / (1.0f + exp2(exponent > -kExp2Min ? -kExp2Min : exponent));
}

// max(x, 0) + n · Φ(n) with n = -|x| and Φ(n) = P(n)^8 on [-kGeluClamp, 0]. A NaN comes through n.
template <int N>
VQVIT_DEVICE float gelu(float x, const float (&coefficients)[N]) {
    const float n = -fabsf(x);
    float root = polynomial(fmaxf(n, -kGeluClamp), coefficients);
    VQVIT_UNROLL
    for (int i = 0; i < kGeluSquarings; ++i) root *= root;
    return fmaf(n, root, x > 0.0f ? x : 0.0f);
}

template <int Kind>
VQVIT_DEVICE float activation(float x) {
    if (Kind == VQVIT_GELU) {
        const float coefficients[] = {VQVIT_GELU_COEFFICIENTS};
        return gelu(x, coefficients);
    }
    if (Kind == VQVIT_GELU_TANH) {
        const float coefficients[] = {VQVIT_GELU_TANH_COEFFICIENTS};
        return gelu(x, coefficients);
    }
    if (Kind == VQVIT_QUICK_GELU) return x * sigmoid(x * kQuickGeluSlope);
    if (Kind == VQVIT_SILU) return x * sigmoid(x);
    if (Kind == VQVIT_RELU) return x < 0.0f ? 0.0f : x;
    return x;
}

// |x| as an integer that orders like |x|: Inf is kInfinityBits, NaN lies above.
VQVIT_DEVICE int32_t magnitude_bits(float x) { return bits_of(x) & kAbsMask; }

// ---- codes ----------------------------------------------------------------------------------------------------------

// max(1e-8, span / steps); NaN stays NaN.
VQVIT_DEVICE float scale_of(float span, float steps) {
    const float scale = span / steps;
    return scale < kScaleMin ? kScaleMin : scale;
}

// Scale of a row whose largest magnitude has these bits: NaN if it is not finite. x / 127 is rounded correctly without
// a division: once by the reciprocal, then by the exact remainder (every significand was tried; what underflows is
// below the smallest scale).
VQVIT_DEVICE float symmetric_scale(int32_t absmax_bits) {
    constexpr float kReciprocal = 1.0f / kQMax;
    const float x = from_bits(absmax_bits), quotient = x * kReciprocal;
    const float scale = fmaxf(fmaf(fmaf(-quotient, kQMax, x), kReciprocal, quotient), kScaleMin);
    return absmax_bits < kInfinityBits ? scale : not_a_number();
}

// clamp(rne(x / scale), -127, 127); NaN becomes 0.
VQVIT_DEVICE int8_t to_code(float x, float scale) {
    const float quotient = x / scale;
    return quotient == quotient ? rne_int8(fminf(fmaxf(quotient, -kQMax), kQMax)) : int8_t{0};
}

// Divides by one scale many times without a division: x · reciprocal, corrected by its exact remainder, has the codes
// of the rounded quotient (see kernels/numerics.py for the check).
struct Encoder {
    float scale, reciprocal;

    // For rows with |x| <= 127 · scale and 1e-8 <= scale < 2^126. Codes of a scale of NaN mean nothing: callers mask them.
    VQVIT_DEVICE static Encoder in_range(float scale) { return {scale, 1.0f / scale}; }

    // The code in the low byte. |x / scale| < 127.5.
    VQVIT_DEVICE uint32_t byte(float x) const {
        const float quotient = x * reciprocal;
        return rne_byte(fmaf(fmaf(-quotient, scale, x), reciprocal, quotient));
    }
    VQVIT_DEVICE int8_t operator()(float x) const { return static_cast<int8_t>(byte(x)); }
};

// Codes for one scale > 0 and any x; NaN becomes 0. Between the bounds neither the reciprocal nor a remainder
// underflows where a code can change.
struct StaticEncoder {
    float scale, limit;
    Encoder encoder;
    bool divides;

    VQVIT_DEVICE explicit StaticEncoder(float scale_)
        : scale(scale_), limit(scale_ * kQMax), encoder(Encoder::in_range(scale_)),
          divides(!(scale_ >= 0x1p-64f && scale_ <= 0x1p100f)) {}

    VQVIT_DEVICE uint32_t byte(float x) const {
        if (divides) return static_cast<uint8_t>(to_code(x, scale));
        return encoder.byte(x == x ? fminf(fmaxf(x, -limit), limit) : 0.0f);
    }
};

// Codes of four values, the first one in the lowest byte.
template <class Encode>
VQVIT_DEVICE uint32_t encode_4(const Encode& encode, const float* x) {
    const uint32_t front = permute_bytes(encode.byte(x[0]), encode.byte(x[1]), 0x0040);
    return permute_bytes(front, permute_bytes(encode.byte(x[2]), encode.byte(x[3]), 0x0040), 0x5410);
}

// Σ of the codes in a word.
VQVIT_DEVICE int32_t sum_codes(uint32_t word) {
#ifdef __CUDACC__
    return __dp4a(static_cast<int>(word), 0x01010101, 0);
#else
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(word >> (8 * i));
    return sum;
#endif
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Smallest integer e >= -100 with |x| < 2^e, from the bits of |x|.
VQVIT_DEVICE int32_t grid_exponent(int32_t absmax_bits) {
    const int32_t exponent = (absmax_bits >> 23) - 126;
    return exponent < kGridExponentMin ? kGridExponentMin : exponent;
}

// fl32 of the mean of x^power in units u = 2^(e - 21), from Σ rne(x / u)^power over k values.
VQVIT_DEVICE float grid_mean(int64_t sum, int64_t k, int32_t exponent, int power) {
    const double unit = pow2(exponent - kMeanGridBits);
    const double mean = static_cast<double>(sum) / static_cast<double>(k);
    return static_cast<float>(mean * (power == 1 ? unit : unit * unit));
}

}  // namespace vqvit
