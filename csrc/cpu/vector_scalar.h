// One fp32 lane in plain C++: the vector interface of vector_avx512.h for machines without AVX2.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vqvit {
namespace {

struct Scalar {
    static constexpr int lanes = 1;
    using F = float;
    using I = int32_t;
    using L = int64_t;  // exact sums

    static F set(float v) { return v; }
    static I set_i(int32_t v) { return v; }
    static F load(const float* p) { return *p; }
    static I load_i(const int32_t* p) { return *p; }
    static I load_s8(const int8_t* p) { return *p; }
    static F load_bf16(const uint16_t* p) { return from_bits(static_cast<I>(static_cast<uint32_t>(*p) << 16)); }
    static F load_f16(const uint16_t* p) {
        const uint32_t half = *p, sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
        if (rest >= 0x7c00u) return from_bits(static_cast<I>(sign | 0x7f800000u | (rest & 0x3ffu) << 13));
        const float magnitude = from_bits(static_cast<I>(rest << 13));  // exponent field still biased by 15
        const float value = magnitude * 0x1p112f;                       // exact, denormals included
        return sign ? -value : value;
    }
    static void store(float* p, F v) { *p = v; }
    static void store_i(int32_t* p, I v) { *p = v; }
    static void store_low_byte(void* p, I v) { *static_cast<uint8_t*>(p) = static_cast<uint8_t>(v); }
    static void store_digits(uint8_t* high, uint8_t* low, const I (&v)[4]) {
        for (int i = 0; i < 4; ++i) {
            store_low_byte(high + i * lanes, shift_right_8(v[i]));
            store_low_byte(low + i * lanes, v[i]);
        }
    }
    static void store_bf16(uint16_t* p, F v) {
        const uint32_t b = static_cast<uint32_t>(bits(v));
        *p = v != v ? 0x7fc0 : static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
    }
    static void store_f16(uint16_t* p, F v) {
        const uint32_t b = static_cast<uint32_t>(bits(v)), sign = b >> 16 & 0x8000u, rest = b & 0x7fffffffu;
        uint32_t half;
        if (rest > 0x7f800000u) {
            half = 0x7e00u;
        } else if (rest >= 0x47800000u) {  // 2^16 and above, infinity included
            half = 0x7c00u;
        } else if (rest < 0x38800000u) {  // below 2^-14: adding 1/2 aligns the denormal's last bit with fp32's
            half = static_cast<uint32_t>(bits(from_bits(static_cast<I>(rest)) + 0.5f)) - 0x3f000000u;
        } else {
            half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
        }
        *p = static_cast<uint16_t>(sign | half);
    }

    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F fma(F a, F b, F c) { return std::fma(a, b, c); }
    static F min(F a, F b) { return a < b ? a : b; }  // b if either is NaN
    static F max(F a, F b) { return a > b ? a : b; }  // b if either is NaN
    static F minus_abs(F v) { return -std::fabs(v); }

    static F round(F v) { return to_float(to_int(v)); }
    static F mul_pow2(F v, F n) { return v * from_bits(static_cast<I>(static_cast<uint32_t>(to_int(n) + 127) << 23)); }
    static I to_int(F v) {  // rne; NaN and out of range give INT32_MIN, as cvtps2dq does
        return v >= -0x1p31f && v < 0x1p31f ? static_cast<I>(std::lrintf(v)) : INT32_MIN;
    }
    static F to_float(I v) { return static_cast<float>(v); }
    static I bits(F v) {
        I i;
        std::memcpy(&i, &v, sizeof i);
        return i;
    }
    static F from_bits(I v) {
        F f;
        std::memcpy(&f, &v, sizeof f);
        return f;
    }
    // Wrapping integer arithmetic.
    static I add_i(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
    static I sub_i(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
    static I mul_i(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
    static I and_i(I a, I b) { return a & b; }
    static I min_i(I a, I b) { return a < b ? a : b; }
    static I max_i(I a, I b) { return a > b ? a : b; }
    static I shift_right_8(I v) { return static_cast<I>(static_cast<uint32_t>(v) >> 8); }

    static F first_or(F v, int n, F other) { return n >= 1 ? v : other; }

    static L zero_l() { return 0; }
    static L add_products(L sum, I a, I b) { return sum + static_cast<int64_t>(a) * b; }

    static float reduce_min(F v) { return v; }
    static float reduce_max(F v) { return v; }
    static int32_t reduce_max_i(I v) { return v; }
    static int32_t reduce_add_i(I v) { return v; }
    static int64_t reduce_add_l(L v) { return v; }
};

}  // namespace
}  // namespace vqvit
