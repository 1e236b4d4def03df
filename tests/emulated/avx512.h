// The AVX-512 and AVX-VNNI intrinsics that csrc/cpu uses, in plain C++, so that a CPU with AVX2 runs the same sources
// (tests/emulate.py). Each does what Intel's Intrinsics Guide says of it, lane by lane, and is not fast.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace emulated {

#define EMULATED __attribute__((always_inline)) static inline

// Lanes of type T of a vector of `Bytes` bytes.
template <class T, int Bytes = 64>
struct Lanes {
    static constexpr int count = Bytes / static_cast<int>(sizeof(T));
    T lane[count];

    template <class Vector>
    EMULATED Lanes of(const Vector& v) {
        static_assert(sizeof(Vector) == Bytes, "of a vector of another size");
        Lanes lanes;
        std::memcpy(&lanes, &v, Bytes);
        return lanes;
    }
    template <class Vector>
    __attribute__((always_inline)) inline Vector as() const {
        static_assert(sizeof(Vector) == Bytes, "as a vector of another size");
        Vector v;
        std::memcpy(&v, this, Bytes);
        return v;
    }
};

// f(i) in each lane.
template <class Vector, class T, class F>
EMULATED Vector make(const F& f) {
    Lanes<T, sizeof(Vector)> lanes;
    for (int i = 0; i < lanes.count; ++i) lanes.lane[i] = static_cast<T>(f(i));
    return lanes.template as<Vector>();
}
template <class T, class Vector, class F>
EMULATED Vector map(const Vector& a, const F& f) {
    const auto x = Lanes<T, sizeof(Vector)>::of(a);
    return make<Vector, T>([&](int i) { return f(x.lane[i]); });
}
template <class T, class Vector, class F>
EMULATED Vector map(const Vector& a, const Vector& b, const F& f) {
    const auto x = Lanes<T, sizeof(Vector)>::of(a), y = Lanes<T, sizeof(Vector)>::of(b);
    return make<Vector, T>([&](int i) { return f(x.lane[i], y.lane[i]); });
}
// The same bits as another type.
template <class To, class From>
EMULATED To cast(const From& a) {
    return Lanes<uint8_t>::of(a).template as<To>();
}
// Lanes of type T as integers of To's size for as many lanes, the excess of wider ones cut off.
template <class To, class T, class From>
EMULATED To convert(const From& a) {
    const auto x = Lanes<T, sizeof(From)>::of(a);
    using Target = std::conditional_t<sizeof(To) == 64, int32_t, std::conditional_t<sizeof(To) == 32, int16_t, int8_t>>;
    return make<To, Target>([&](int i) { return x.lane[i]; });
}
template <class T, class F>
EMULATED T fold(const Lanes<T>& x, const F& f) {
    T result = x.lane[0];
    for (int i = 1; i < x.count; ++i) result = f(x.lane[i], result);
    return result;
}

// ---- floats -----------------------------------------------------------------------------------------------------

EMULATED __m512 set1_ps(float v) { return make<__m512, float>([=](int) { return v; }); }
EMULATED __m512 add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
EMULATED __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
EMULATED __m512 div_ps(__m512 a, __m512 b) { return a / b; }
EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return make<__m512, float>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
EMULATED float max(float a, float b) { return a > b ? a : b; }  // b if either is NaN
EMULATED float min(float a, float b) { return a < b ? a : b; }
EMULATED __m512 max_ps(__m512 a, __m512 b) { return map<float>(a, b, max); }
EMULATED __m512 min_ps(__m512 a, __m512 b) { return map<float>(a, b, min); }
EMULATED float reduce_max_ps(__m512 v) { return fold(Lanes<float>::of(v), max); }
EMULATED float reduce_min_ps(__m512 v) { return fold(Lanes<float>::of(v), min); }
EMULATED __m512 roundscale_ps(__m512 v, int) { return map<float>(v, [](float x) { return std::nearbyint(x); }); }
EMULATED __m512 scalef_ps(__m512 v, __m512 n) {
    return map<float>(v, n, [](float x, float e) {
        if (e != e) return e;
        return std::scalbn(x, static_cast<int>(std::floor(max(min(e, 1000.0f), -1000.0f))));
    });
}
EMULATED __m512i cvtps_epi32(__m512 v) {
    return make<__m512i, int32_t>([&](int i) {
        return v[i] >= -0x1p31f && v[i] < 0x1p31f ? static_cast<int32_t>(std::lrint(v[i])) : INT32_MIN;
    });
}
EMULATED __m512 cvtepi32_ps(__m512i v) {
    const auto x = Lanes<int32_t>::of(v);
    return make<__m512, float>([&](int i) { return static_cast<float>(x.lane[i]); });
}
EMULATED __m512 cvtph_ps(__m256i v) {
    const auto x = Lanes<__m128i, 32>::of(v);
    const __m256 low = _mm256_cvtph_ps(x.lane[0]), high = _mm256_cvtph_ps(x.lane[1]);
    return make<__m512, float>([&](int i) { return i < 8 ? low[i] : high[i - 8]; });
}
EMULATED __m256i cvtps_ph(__m512 v, int) {
    const auto x = Lanes<__m256>::of(v);
    const Lanes<__m128i, 32> halves = {{_mm256_cvtps_ph(x.lane[0], 0), _mm256_cvtps_ph(x.lane[1], 0)}};
    return halves.as<__m256i>();
}
template <int Predicate>
EMULATED __mmask16 compare(__m512 a, __m512 b) {
    static_assert(Predicate == _CMP_UNORD_Q, "the only one in use");
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(std::isnan(a[i]) || std::isnan(b[i])) << i;
    return static_cast<__mmask16>(mask);
}

// ---- integers ---------------------------------------------------------------------------------------------------

template <class T>
EMULATED __m512i set1(T v) {
    return make<__m512i, T>([=](int) { return v; });
}
EMULATED __m512i and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i add_epi64(__m512i a, __m512i b) {
    return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x + y; });
}
EMULATED __m512i add_epi32(__m512i a, __m512i b) {
    return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
EMULATED __m512i sub_epi32(__m512i a, __m512i b) {
    return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
EMULATED __m512i mullo_epi32(__m512i a, __m512i b) {
    return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
EMULATED __m512i mul_epi32(__m512i a, __m512i b) {
    return map<int64_t>(a, b, [](int64_t x, int64_t y) {
        return int64_t{static_cast<int32_t>(x)} * static_cast<int32_t>(y);
    });
}
EMULATED int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
EMULATED int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
EMULATED __m512i max_epi32(__m512i a, __m512i b) { return map<int32_t>(a, b, larger); }
EMULATED __m512i min_epi32(__m512i a, __m512i b) { return map<int32_t>(a, b, smaller); }
EMULATED int32_t reduce_max_epi32(__m512i v) { return fold(Lanes<int32_t>::of(v), larger); }
EMULATED int32_t reduce_add_epi32(__m512i v) {
    return static_cast<int32_t>(fold(Lanes<uint32_t>::of(v), [](uint32_t x, uint32_t y) { return x + y; }));
}
EMULATED int64_t reduce_add_epi64(__m512i v) {
    return static_cast<int64_t>(fold(Lanes<uint64_t>::of(v), [](uint64_t x, uint64_t y) { return x + y; }));
}
EMULATED __m512i slli_epi32(__m512i v, int n) { return map<uint32_t>(v, [=](uint32_t x) { return x << n; }); }
EMULATED __m512i srli_epi16(__m512i v, int n) { return map<uint16_t>(v, [=](uint16_t x) { return x >> n; }); }
EMULATED __m512i srli_epi32(__m512i v, int n) { return map<uint32_t>(v, [=](uint32_t x) { return x >> n; }); }
EMULATED __m512i srli_epi64(__m512i v, int n) { return map<uint64_t>(v, [=](uint64_t x) { return x >> n; }); }

template <class Vector>
EMULATED Vector dpbusd(const Vector& sums, const Vector& a, const Vector& b) {
    constexpr int bytes = sizeof(Vector);
    const auto s = Lanes<uint32_t, bytes>::of(sums);
    const auto u = Lanes<uint8_t, bytes>::of(a);
    const auto v = Lanes<int8_t, bytes>::of(b);
    return make<Vector, uint32_t>([&](int i) {
        int32_t sum = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j) sum += u.lane[j] * v.lane[j];
        return s.lane[i] + static_cast<uint32_t>(sum);
    });
}

// ---- order ------------------------------------------------------------------------------------------------------

template <class... Ints>
EMULATED __m512i setr_epi32(Ints... values) {
    return Lanes<int32_t>{{values...}}.template as<__m512i>();
}
EMULATED __m512i permutexvar_epi32(__m512i index, __m512i v) {
    const auto from = Lanes<int32_t>::of(index), x = Lanes<int32_t>::of(v);
    return make<__m512i, int32_t>([&](int i) { return x.lane[from.lane[i] & 15]; });
}
EMULATED __m512i shuffle_i32x4(__m512i a, __m512i b, int order) {
    const auto x = Lanes<__m128i>::of(a), y = Lanes<__m128i>::of(b);
    const Lanes<__m128i> chosen = {
        {x.lane[order & 3], x.lane[order >> 2 & 3], y.lane[order >> 4 & 3], y.lane[order >> 6 & 3]}};
    return chosen.as<__m512i>();
}
// Elements of T from the low or the high half of each 128 bits of a and b in turn.
template <class T, bool High>
EMULATED __m512i unpack(__m512i a, __m512i b) {
    constexpr int part = 16 / static_cast<int>(sizeof(T));
    const auto x = Lanes<T>::of(a), y = Lanes<T>::of(b);
    return make<__m512i, T>([&](int i) {
        const int from = i / part * part + i % part / 2 + (High ? part / 2 : 0);
        return i % 2 == 0 ? x.lane[from] : y.lane[from];
    });
}
// Wide elements of each 128 bits of a, then of b, saturated to Narrow.
template <class Narrow, class Wide>
EMULATED __m512i pack(__m512i a, __m512i b) {
    constexpr int part = 16 / static_cast<int>(sizeof(Wide)), most = (1 << 8 * sizeof(Narrow)) - 1;
    const auto x = Lanes<Wide>::of(a), y = Lanes<Wide>::of(b);
    return make<__m512i, Narrow>([&](int i) {
        const int from = i / (2 * part) * part + i % part;
        const int32_t value = i % (2 * part) < part ? x.lane[from] : y.lane[from];
        return smaller(larger(value, 0), most);
    });
}

// ---- masks and memory -------------------------------------------------------------------------------------------

template <class Vector>
EMULATED Vector mask_mov(const Vector& otherwise, unsigned mask, const Vector& v) {
    const auto x = Lanes<int32_t>::of(v), y = Lanes<int32_t>::of(otherwise);
    return make<Vector, int32_t>([&](int i) { return (mask >> i & 1) != 0 ? x.lane[i] : y.lane[i]; });
}
EMULATED __m512i maskz_loadu_epi8(uint64_t mask, const void* p) {
    return make<__m512i, int8_t>([&](int i) { return (mask >> i & 1) != 0 ? static_cast<const int8_t*>(p)[i] : 0; });
}
template <class Vector>
EMULATED Vector load(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class Vector>
EMULATED void store(void* p, const Vector& v) {
    std::memcpy(p, &v, sizeof v);
}

#undef EMULATED

}  // namespace emulated

#pragma GCC pop_options

#undef _mm512_add_ps
#undef _mm512_sub_ps
#undef _mm512_mul_ps
#undef _mm512_div_ps
#undef _mm512_fmadd_ps
#undef _mm512_max_ps
#undef _mm512_min_ps
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_min_ps
#undef _mm512_roundscale_ps
#undef _mm512_scalef_ps
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_set1_ps
#undef _mm512_and_si512
#undef _mm512_or_si512
#undef _mm512_xor_si512
#undef _mm512_add_epi64
#undef _mm512_add_epi32
#undef _mm512_sub_epi32
#undef _mm512_mullo_epi32
#undef _mm512_mul_epi32
#undef _mm512_max_epi32
#undef _mm512_min_epi32
#undef _mm512_reduce_max_epi32
#undef _mm512_reduce_add_epi32
#undef _mm512_reduce_add_epi64
#undef _mm512_slli_epi32
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32
#undef _mm512_srli_epi64
#undef _mm512_setr_epi32
#undef _mm512_permutexvar_epi32
#undef _mm512_shuffle_i32x4
#undef _mm512_maskz_loadu_epi8
#undef _mm512_set1_epi8
#undef _mm512_set1_epi16
#undef _mm512_set1_epi32
#undef _mm512_setzero_si512
#undef _mm512_castps_si512
#undef _mm512_castsi512_ps
#undef _mm512_dpbusd_epi32
#undef _mm512_mask_mov_ps
#undef _mm512_mask_mov_epi32
#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_packus_epi16
#undef _mm512_packus_epi32
#undef _mm512_loadu_ps
#undef _mm512_loadu_si512
#undef _mm512_storeu_ps
#undef _mm512_storeu_si512
#undef _mm512_cmp_ps_mask
#undef _mm512_unpacklo_epi8
#undef _mm512_unpackhi_epi8
#undef _mm512_unpacklo_epi16
#undef _mm512_unpackhi_epi16
#undef _mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#undef _mm256_dpbusd_avx_epi32

#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_reduce_min_ps emulated::reduce_min_ps
#define _mm512_roundscale_ps emulated::roundscale_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_add_epi64 emulated::add_epi64
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_mullo_epi32 emulated::mullo_epi32
#define _mm512_mul_epi32 emulated::mul_epi32
#define _mm512_max_epi32 emulated::max_epi32
#define _mm512_min_epi32 emulated::min_epi32
#define _mm512_reduce_max_epi32 emulated::reduce_max_epi32
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_reduce_add_epi64 emulated::reduce_add_epi64
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_srli_epi64 emulated::srli_epi64
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_permutexvar_epi32 emulated::permutexvar_epi32
#define _mm512_shuffle_i32x4 emulated::shuffle_i32x4
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_set1_epi8(v) emulated::set1<int8_t>(v)
#define _mm512_set1_epi16(v) emulated::set1<int16_t>(v)
#define _mm512_set1_epi32(v) emulated::set1<int32_t>(v)
#define _mm512_setzero_si512() emulated::set1<int32_t>(0)
#define _mm512_castps_si512 emulated::cast<__m512i>
#define _mm512_castsi512_ps emulated::cast<__m512>
#define _mm512_dpbusd_epi32 emulated::dpbusd<__m512i>
#define _mm512_mask_mov_ps emulated::mask_mov<__m512>
#define _mm512_mask_mov_epi32 emulated::mask_mov<__m512i>
#define _mm512_cvtepi32_epi8 (emulated::convert<__m128i, int32_t, __m512i>)
#define _mm512_cvtepi32_epi16 (emulated::convert<__m256i, int32_t, __m512i>)
#define _mm512_cvtepi8_epi32 (emulated::convert<__m512i, int8_t, __m128i>)
#define _mm512_cvtepu16_epi32 (emulated::convert<__m512i, uint16_t, __m256i>)
#define _mm512_packus_epi16 (emulated::pack<uint8_t, int16_t>)
#define _mm512_packus_epi32 (emulated::pack<uint16_t, int32_t>)
#define _mm512_loadu_ps emulated::load<__m512>
#define _mm512_loadu_si512 emulated::load<__m512i>
#define _mm512_storeu_ps emulated::store<__m512>
#define _mm512_storeu_si512 emulated::store<__m512i>
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::compare<predicate>(a, b)
#define _mm512_unpacklo_epi8 (emulated::unpack<int8_t, false>)
#define _mm512_unpackhi_epi8 (emulated::unpack<int8_t, true>)
#define _mm512_unpacklo_epi16 (emulated::unpack<int16_t, false>)
#define _mm512_unpackhi_epi16 (emulated::unpack<int16_t, true>)
#define _mm512_unpacklo_epi32 (emulated::unpack<int32_t, false>)
#define _mm512_unpackhi_epi32 (emulated::unpack<int32_t, true>)
#define _mm512_unpacklo_epi64 (emulated::unpack<int64_t, false>)
#define _mm512_unpackhi_epi64 (emulated::unpack<int64_t, true>)
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<__m256i>

// Registers of 64 bytes that sources name to keep values in: there are none.
#define asm(...)
