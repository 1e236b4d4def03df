// The functions of vqvit/numerics.py on vectors, in the same fp32 operations: polynomials, activations, grids, codes.
#pragma once

#include <cstdint>

#include "constants.h"
#include "vqvit.h"

namespace vqvit {
namespace {

constexpr float kExp2[] = {VQVIT_EXP2_COEFFICIENTS};
constexpr float kNumerator[] = {VQVIT_NUMERATOR_COEFFICIENTS};
constexpr float kGelu[] = {VQVIT_GELU_COEFFICIENTS};
constexpr float kGeluTanh[] = {VQVIT_GELU_TANH_COEFFICIENTS};

// Σ c_i x^i by Horner's rule, one fma a step.
template <class V, int N>
inline typename V::F polynomial(typename V::F x, const float (&c)[N]) {
    typename V::F value = V::set(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) value = V::fma(value, x, V::set(c[i]));
    return value;
}

// 2^x, times what the coefficients hold, for x <= 126; below -126 counts as -126; NaN stays NaN.
template <class V, int N>
inline typename V::F exp2(typename V::F x, const float (&coefficients)[N]) {
    x = V::max(V::set(kExp2Min), x);
    const typename V::F n = V::round(x);
    return V::mul_pow2(polynomial<V>(V::sub(x, n), coefficients), n);
}

// 1 / (1 + 2^(-x log2 e)).
template <class V>
inline typename V::F sigmoid(typename V::F x) {
    const typename V::F exponent = V::min(V::set(-kExp2Min), V::mul(x, V::set(-kLog2E)));
    return V::div(V::set(1.0f), V::add(V::set(1.0f), exp2<V>(exponent, kExp2)));
}

// max(x, 0) + n · Φ(n) with n = -|x| and Φ(n) = P(n)^8 on [-kGeluClamp, 0].
template <class V, int N>
inline typename V::F gelu(typename V::F x, const float (&coefficients)[N]) {
    const typename V::F n = V::minus_abs(x);
    typename V::F root = polynomial<V>(V::max(V::set(-kGeluClamp), n), coefficients);
    for (int i = 0; i < kGeluSquarings; ++i) root = V::mul(root, root);
    return V::fma(n, root, V::max(x, V::set(0.0f)));
}

// Activation number `Kind` of enum vqvit_activation.
template <class V, int Kind>
inline typename V::F activation(typename V::F x) {
    switch (Kind) {
        case VQVIT_GELU:
            return gelu<V>(x, kGelu);
        case VQVIT_GELU_TANH:
            return gelu<V>(x, kGeluTanh);
        case VQVIT_QUICK_GELU:
            return V::mul(x, sigmoid<V>(V::mul(x, V::set(kQuickGeluSlope))));
        case VQVIT_SILU:
            return V::mul(x, sigmoid<V>(x));
        case VQVIT_RELU:  // max returns its second operand for NaN and for zeros: both stay as they are
            return V::max(V::set(0.0f), x);
        default:
            return x;
    }
}

template <int K>
struct Activation {
    static constexpr int kind = K;
};

// body(Activation<K>{}) for the K that `kind` names.
template <class Body>
inline void with_activation(int kind, const Body& body) {
    switch (kind) {
        case VQVIT_GELU:
            return body(Activation<VQVIT_GELU>{});
        case VQVIT_GELU_TANH:
            return body(Activation<VQVIT_GELU_TANH>{});
        case VQVIT_QUICK_GELU:
            return body(Activation<VQVIT_QUICK_GELU>{});
        case VQVIT_SILU:
            return body(Activation<VQVIT_SILU>{});
        case VQVIT_RELU:
            return body(Activation<VQVIT_RELU>{});
        default:
            return body(Activation<VQVIT_NONE>{});
    }
}

// |x| as integers: their order is that of the magnitudes, with NaN above Inf above all finite numbers.
template <class V>
inline typename V::I magnitude_bits(typename V::F x) {
    return V::and_i(V::bits(x), V::set_i(kAbsMask));
}

// clamp(rne(x / scale), -127, 127), with INT32_MIN (low byte 0: the code of NaN) where the quotient is NaN.
template <class V>
inline typename V::I to_codes(typename V::F x, typename V::F scale) {
    const typename V::F quotient = V::div(x, scale);
    return V::to_int(V::min(V::set(kQMax), V::max(V::set(-kQMax), quotient)));
}

// The codes of any x.
template <class V>
struct ClampedQuotient {
    typename V::F divisor;

    explicit ClampedQuotient(float scale) : divisor(V::set(scale)) {}

    typename V::I operator()(typename V::F x) const { return to_codes<V>(x, divisor); }
};

// The codes of x with |x| <= 127 scale, up to its rounding, by a multiplication and two fma in place of a division:
// y = x · (1 / scale) is off by less than two last bits, and fma(remainder, 1 / scale, y) rounds to the integer that
// x / scale rounds to. tests/quotients.cpp tries every mantissa of a scale at every tie.
template <class V>
struct Quotient {
    typename V::F reciprocal, minus_scale;

    explicit Quotient(float scale) : reciprocal(V::set(1.0f / scale)), minus_scale(V::set(-scale)) {}

    typename V::I operator()(typename V::F x) const {
        const typename V::F y = V::mul(x, reciprocal), remainder = V::fma(y, minus_scale, x);
        return V::to_int(V::fma(remainder, reciprocal, y));
    }
};

// clamp(codes, -127, 127).
template <class V>
inline typename V::I clamp_codes(typename V::I codes) {
    return V::min_i(V::set_i(127), V::max_i(V::set_i(-127), codes));
}

inline float from_bits(int32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

// Smallest integer e >= -100 with |x| < 2^e, from the bits of |x|.
inline int grid_exponent(int32_t absmax_bits) {
    const int exponent = (absmax_bits >> 23) - 126;
    return exponent < kGridExponentMin ? kGridExponentMin : exponent;
}

inline float pow2(int exponent) { return from_bits((exponent + 127) << 23); }

// max(1e-8, span / 127); NaN stays NaN.
inline float symmetric_scale(float span) {
    const float scale = span / kQMax;
    return scale < kScaleMin ? kScaleMin : scale;
}

template <class V>
inline typename V::F load_as_float(const void* p, int dtype, int64_t index) {
    switch (dtype) {
        case VQVIT_F16:
            return V::load_f16(static_cast<const uint16_t*>(p) + index);
        case VQVIT_BF16:
            return V::load_bf16(static_cast<const uint16_t*>(p) + index);
        default:
            return V::load(static_cast<const float*>(p) + index);
    }
}

template <class V>
inline void store_float_as(void* p, int dtype, int64_t index, typename V::F v) {
    switch (dtype) {
        case VQVIT_F16:
            V::store_f16(static_cast<uint16_t*>(p) + index, v);
            break;
        case VQVIT_BF16:
            V::store_bf16(static_cast<uint16_t*>(p) + index, v);
            break;
        default:
            V::store(static_cast<float*>(p) + index, v);
    }
}

inline int64_t dtype_size(int dtype) { return dtype == VQVIT_F32 ? 4 : 2; }

}  // namespace
}  // namespace vqvit
