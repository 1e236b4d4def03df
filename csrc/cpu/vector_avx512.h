// Sixteen fp32 lanes of AVX-512. Every operation rounds once, to nearest even; min and max return their second operand
// if either is NaN (the x86 rule), which the callers use to let NaN pass a clamp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace vqvit {
namespace {

struct Avx512 {
    static constexpr int lanes = 16;
    using F = __m512;
    using I = __m512i;
    using L = __m512i;  // exact sums: eight int64

    static F set(float v) { return _mm512_set1_ps(v); }
    static I set_i(int32_t v) { return _mm512_set1_epi32(v); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
    static I load_s8(const int8_t* p) { return _mm512_cvtepi8_epi32(load_128(p)); }
    static F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(load_256(p)); }
    static F load_bf16(const uint16_t* p) {
        return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16));
    }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static void store_i(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static void store_low_byte(void* p, I v) {
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
    }
    // 4 · lanes u16 as their high and their low bytes.
    static void store_digits(uint8_t* high, uint8_t* low, const I (&v)[4]) {
        const I low_byte = _mm512_set1_epi16(255);
        const I in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const I a = _mm512_packus_epi32(v[0], v[1]), b = _mm512_packus_epi32(v[2], v[3]);
        const I highs = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
        const I lows = _mm512_packus_epi16(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte));
        _mm512_storeu_si512(high, _mm512_permutexvar_epi32(in_order, highs));
        _mm512_storeu_si512(low, _mm512_permutexvar_epi32(in_order, lows));
    }
    static void store_f16(uint16_t* p, F v) {
        store_256(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store_bf16(uint16_t* p, F v) {  // rne on the bits; vcvtneps2bf16 would flush denormals
        const I b = bits(v), odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), set_i(1));
        const I rounded = _mm512_srli_epi32(add_i(b, add_i(odd, set_i(0x7fff))), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        store_256(p, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, set_i(0x7fc0))));
    }

    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F minus_abs(F v) { return from_bits(_mm512_or_si512(bits(v), set_i(INT32_MIN))); }

    static F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }  // rne
    static F mul_pow2(F v, F n) { return _mm512_scalef_ps(v, n); }  // v · 2^n for whole n from -126 to 127
    static I to_int(F v) { return _mm512_cvtps_epi32(v); }  // rne; NaN gives INT32_MIN
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static I bits(F v) { return _mm512_castps_si512(v); }
    static F from_bits(I v) { return _mm512_castsi512_ps(v); }
    static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static I and_i(I a, I b) { return _mm512_and_si512(a, b); }
    static I min_i(I a, I b) { return _mm512_min_epi32(a, b); }
    static I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
    static I shift_right_8(I v) { return _mm512_srli_epi32(v, 8); }

    // The first n lanes of v, then those of `other`; n >= 1.
    static F first_or(F v, int n, F other) {
        return n >= lanes ? v : _mm512_mask_mov_ps(other, static_cast<__mmask16>((1u << n) - 1), v);
    }

    static L zero_l() { return _mm512_setzero_si512(); }
    static L add_products(L sum, I a, I b) {  // all sixteen a · b, exact
        const L even = _mm512_mul_epi32(a, b);
        const L odd = _mm512_mul_epi32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
        return _mm512_add_epi64(sum, _mm512_add_epi64(even, odd));
    }

    static float reduce_min(F v) { return _mm512_reduce_min_ps(v); }
    static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
    static int32_t reduce_max_i(I v) { return _mm512_reduce_max_epi32(v); }
    static int32_t reduce_add_i(I v) { return _mm512_reduce_add_epi32(v); }
    static int64_t reduce_add_l(L v) { return _mm512_reduce_add_epi64(v); }

private:
    static __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static void store_256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
};

}  // namespace
}  // namespace vqvit
