// Eight fp32 lanes of AVX2 + FMA + F16C, with the interface and the NaN rules of vector_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace vqvit {
namespace {

struct Avx2 {
    static constexpr int lanes = 8;
    using F = __m256;
    using I = __m256i;
    using L = __m256i;  // exact sums: four int64

    static F set(float v) { return _mm256_set1_ps(v); }
    static I set_i(int32_t v) { return _mm256_set1_epi32(v); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static I load_i(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static I load_s8(const int8_t* p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(as_128(p))); }
    static F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(as_128(p))); }
    static F load_bf16(const uint16_t* p) {
        return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(as_128(p))), 16));
    }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static void store_i(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
    static void store_low_byte(void* p, I v) {
        const __m256i first_bytes = _mm256_setr_epi8(
            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i quads = _mm256_shuffle_epi8(v, first_bytes);
        const __m128i eight = _mm_unpacklo_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
        _mm_storel_epi64(static_cast<__m128i*>(p), eight);
    }
    static void store_digits(uint8_t* high, uint8_t* low, const I (&v)[4]) {
        for (int i = 0; i < 4; ++i) {
            store_low_byte(high + i * lanes, shift_right_8(v[i]));
            store_low_byte(low + i * lanes, v[i]);
        }
    }
    static void store_f16(uint16_t* p, F v) {
        store_128(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static void store_bf16(uint16_t* p, F v) {
        const I b = bits(v), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), set_i(1));
        const I rounded = _mm256_srli_epi32(add_i(b, add_i(odd, set_i(0x7fff))), 16);
        const I nan = bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        const I words = _mm256_blendv_epi8(rounded, set_i(0x7fc0), nan);
        store_128(p, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }

    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F minus_abs(F v) { return _mm256_or_ps(v, set(-0.0f)); }

    static F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F mul_pow2(F v, F n) {
        return mul(v, from_bits(_mm256_slli_epi32(add_i(to_int(n), set_i(127)), 23)));
    }
    static I to_int(F v) { return _mm256_cvtps_epi32(v); }
    static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
    static I bits(F v) { return _mm256_castps_si256(v); }
    static F from_bits(I v) { return _mm256_castsi256_ps(v); }
    static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
    static I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static I and_i(I a, I b) { return _mm256_and_si256(a, b); }
    static I min_i(I a, I b) { return _mm256_min_epi32(a, b); }
    static I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
    static I shift_right_8(I v) { return _mm256_srli_epi32(v, 8); }

    static F first_or(F v, int n, F other) {
        const I index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_blendv_ps(other, v, from_bits(_mm256_cmpgt_epi32(set_i(n), index)));
    }

    static L zero_l() { return _mm256_setzero_si256(); }
    static L add_products(L sum, I a, I b) {
        const L even = _mm256_mul_epi32(a, b);
        const L odd = _mm256_mul_epi32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
        return _mm256_add_epi64(sum, _mm256_add_epi64(even, odd));
    }

    static float reduce_min(F v) {
        const __m128 four = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
    }
    static float reduce_max(F v) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static int32_t reduce_max_i(I v) {
        const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
    static int32_t reduce_add_i(I v) {
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
    static int64_t reduce_add_l(L v) {
        const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        return _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
    }

private:
    static const __m128i* as_128(const void* p) { return static_cast<const __m128i*>(p); }
    static void store_128(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
};

}  // namespace
}  // namespace vqvit
