// Int8 tiles of 6 rows x 64 columns on vpdpbusd: 24 of the 32 zmm registers accumulate, four hold weights.
//
// vpdpbusd multiplies u8 by s8. Signed codes a become a + 128 in the register and the tile starts from -128 Σ_k b[n, k],
// which the panel carries: exact modulo 2^32, hence exact. That addition (a sign bit flipped) costs nothing measurable.
#pragma once

#include <immintrin.h>

#include "dot.h"

namespace vqvit {
namespace {

struct DotAvx512Vnni {
    static constexpr int kRows = 6;
    static constexpr int kGroupBytes = kKGroup;
    static constexpr bool kReadsU8 = true;
    static constexpr bool kReadsS8 = true;
    static constexpr bool kReadsS16 = false;
    static constexpr bool kFinishesTiles = true;
    static constexpr bool kReadsStrips = false;
    static constexpr int kColumns = 16;  // of a zmm register

    static void prepare(const int8_t* row, int64_t k, uint8_t* prepared) {
        std::memcpy(prepared, row, static_cast<size_t>(k));
        for (; k % kKGroup != 0; ++k) prepared[k] = 0;
    }

    // finish(r, acc[r]) for each row of sums in registers. `ahead`: lines for L2, one a group, or NULL.
    template <bool Signed, int R, int N, class Finish>
    __attribute__((always_inline)) static void accumulate(
        const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups, const int32_t* sums,
        const int8_t* ahead, const Finish finish) {  // a copy: no store can alias what it holds
        const __m512i flip = _mm512_set1_epi8(static_cast<char>(128));
        const int8_t* lines = ahead == nullptr ? panel : ahead;
        __m512i acc[R][N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            __m512i start = _mm512_setzero_si512();
            if (Signed) start = _mm512_sub_epi32(start, _mm512_slli_epi32(_mm512_loadu_si512(sums + n * kColumns), 7));
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) acc[r][n] = start;
        }
        for (int64_t g = 0; g < groups; ++g) {
            _mm_prefetch(reinterpret_cast<const char*>(lines + g * kLineBytes), _MM_HINT_T1);
            __m512i b[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) b[n] = _mm512_loadu_si512(panel + g * vqvit::kGroupBytes + n * 64);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                int32_t codes;
                std::memcpy(&codes, a + r * a_stride + g * kGroupBytes, sizeof codes);
                __m512i broadcast = _mm512_set1_epi32(codes);
                if (Signed) broadcast = _mm512_xor_si512(broadcast, flip);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) acc[r][n] = _mm512_dpbusd_epi32(acc[r][n], broadcast, b[n]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) asm("" : "+v"(acc[r][n]));  // else GCC 12 spills them in the loop for `finish`
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) finish(r, acc[r]);
    }

    template <bool Signed, int R, int N>
    static void tile_fixed(
        const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups, const int32_t* sums,
        int32_t* out, int64_t out_stride, const int8_t* ahead) {
        const auto store = [=](int r, const __m512i(&acc)[N]) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) _mm512_storeu_si512(out + r * out_stride + n * kColumns, acc[n]);
        };
        accumulate<Signed, R, N>(a, a_stride, panel, groups, sums, ahead, store);
    }

    using Tile = void (*)(
        const uint8_t*, int64_t, const int8_t*, int64_t, const int32_t*, int32_t*, int64_t, const int8_t*);

    template <bool Signed>
    static Tile tile_of_shape(int rows, int vectors) {
        static constexpr Tile by_shape[kRows][4] = {
            {tile_fixed<Signed, 1, 1>, tile_fixed<Signed, 1, 2>, tile_fixed<Signed, 1, 3>, tile_fixed<Signed, 1, 4>},
            {tile_fixed<Signed, 2, 1>, tile_fixed<Signed, 2, 2>, tile_fixed<Signed, 2, 3>, tile_fixed<Signed, 2, 4>},
            {tile_fixed<Signed, 3, 1>, tile_fixed<Signed, 3, 2>, tile_fixed<Signed, 3, 3>, tile_fixed<Signed, 3, 4>},
            {tile_fixed<Signed, 4, 1>, tile_fixed<Signed, 4, 2>, tile_fixed<Signed, 4, 3>, tile_fixed<Signed, 4, 4>},
            {tile_fixed<Signed, 5, 1>, tile_fixed<Signed, 5, 2>, tile_fixed<Signed, 5, 3>, tile_fixed<Signed, 5, 4>},
            {tile_fixed<Signed, 6, 1>, tile_fixed<Signed, 6, 2>, tile_fixed<Signed, 6, 3>, tile_fixed<Signed, 6, 4>},
        };
        return by_shape[rows - 1][vectors - 1];
    }

    static void tile(
        int rows, int vectors, const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups,
        const int32_t* sums, int32_t* out, int64_t out_stride, const int8_t* ahead = nullptr) {
        const Tile tile = sums != nullptr ? tile_of_shape<true>(rows, vectors) : tile_of_shape<false>(rows, vectors);
        tile(a, a_stride, panel, groups, sums, out, out_stride, ahead);
    }

    // Inlined into a large function, its loops would spill.
    template <class Finish>
    __attribute__((noinline)) static void finish_tile(
        int rows, const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups, const int32_t* sums,
        const int8_t* ahead, const Finish& finish) {
        switch (rows) {
            case 1:
                return accumulate<true, 1, kTileVectors>(a, a_stride, panel, groups, sums, ahead, finish);
            case 2:
                return accumulate<true, 2, kTileVectors>(a, a_stride, panel, groups, sums, ahead, finish);
            case 3:
                return accumulate<true, 3, kTileVectors>(a, a_stride, panel, groups, sums, ahead, finish);
            case 4:
                return accumulate<true, 4, kTileVectors>(a, a_stride, panel, groups, sums, ahead, finish);
            case 5:
                return accumulate<true, 5, kTileVectors>(a, a_stride, panel, groups, sums, ahead, finish);
            default:
                return accumulate<true, 6, kTileVectors>(a, a_stride, panel, groups, sums, ahead, finish);
        }
    }

    // Sixteen rows of 16 groups become 16 groups of 16 rows: a transpose of 4-byte elements.
    static void transpose_16x16(__m512i (&r)[16]) {
        __m512i t[16];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // r[4 i + c]: column c of rows 4 i .. 4 i + 3, in every 128-bit lane
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
            t[0] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);  // lanes 0, 2 of both
            t[1] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);  // lanes 1, 3
            t[2] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
            t[3] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
            r[c] = _mm512_shuffle_i32x4(t[0], t[2], 0x88);
            r[4 + c] = _mm512_shuffle_i32x4(t[1], t[3], 0x88);
            r[8 + c] = _mm512_shuffle_i32x4(t[0], t[2], 0xdd);
            r[12 + c] = _mm512_shuffle_i32x4(t[1], t[3], 0xdd);
        }
    }

    static void pack_panel(const int8_t* b, int64_t b_stride, int64_t columns, int64_t k, int8_t* panel) {
        const int64_t groups = ceil_div(k, kKGroup);
        const __m512i ones = _mm512_set1_epi8(1);
        for (int64_t n = 0; n < kPanel; n += kColumns) {
            __m512i sums = _mm512_setzero_si512();
            for (int64_t g = 0; g < groups; g += 16) {
                const int64_t left = k - g * kKGroup;
                const __mmask64 valid = left >= 64 ? ~__mmask64{0} : ~__mmask64{0} >> (64 - left);
                __m512i r[16];
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    const __mmask64 mask = n + i < columns ? valid : 0;
                    r[i] = _mm512_maskz_loadu_epi8(mask, b + (n + i) * b_stride + g * kKGroup);
                }
                transpose_16x16(r);
                int8_t* target = panel + g * vqvit::kGroupBytes + n * kKGroup;
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    if (g + i < groups) _mm512_storeu_si512(target + i * vqvit::kGroupBytes, r[i]);
                    sums = _mm512_dpbusd_epi32(sums, ones, r[i]);
                }
            }
            _mm512_storeu_si512(panel + groups * vqvit::kGroupBytes + n * kKGroup, sums);
        }
    }

    // Four rows of 64 columns become one group: their bytes interleaved.
    static void pack_transposed(const int8_t* v, int64_t v_stride, int64_t columns, int64_t k, int8_t* panel) {
        const __mmask64 valid = columns >= 64 ? ~__mmask64{0} : ~__mmask64{0} >> (64 - columns);
        for (int64_t i = 0; i < k; i += kKGroup, v += kKGroup * v_stride, panel += vqvit::kGroupBytes) {
            __m512i r[kKGroup], t[kKGroup];
#pragma GCC unroll 4
            for (int j = 0; j < kKGroup; ++j) {
                r[j] = _mm512_maskz_loadu_epi8(i + j < k ? valid : 0, v + j * v_stride);
            }
            t[0] = _mm512_unpacklo_epi8(r[0], r[1]);
            t[1] = _mm512_unpackhi_epi8(r[0], r[1]);
            t[2] = _mm512_unpacklo_epi8(r[2], r[3]);
            t[3] = _mm512_unpackhi_epi8(r[2], r[3]);
            r[0] = _mm512_unpacklo_epi16(t[0], t[2]);  // columns 0-3 of every 16
            r[1] = _mm512_unpackhi_epi16(t[0], t[2]);  // 4-7
            r[2] = _mm512_unpacklo_epi16(t[1], t[3]);  // 8-11
            r[3] = _mm512_unpackhi_epi16(t[1], t[3]);  // 12-15
            t[0] = _mm512_shuffle_i32x4(r[0], r[1], 0x44);  // lanes 0, 1 of both: columns 0-3, 16-19, 4-7, 20-23
            t[1] = _mm512_shuffle_i32x4(r[2], r[3], 0x44);
            t[2] = _mm512_shuffle_i32x4(r[0], r[1], 0xee);  // lanes 2, 3 of both
            t[3] = _mm512_shuffle_i32x4(r[2], r[3], 0xee);
            _mm512_storeu_si512(panel, _mm512_shuffle_i32x4(t[0], t[1], 0x88));
            _mm512_storeu_si512(panel + 64, _mm512_shuffle_i32x4(t[0], t[1], 0xdd));
            _mm512_storeu_si512(panel + 128, _mm512_shuffle_i32x4(t[2], t[3], 0x88));
            _mm512_storeu_si512(panel + 192, _mm512_shuffle_i32x4(t[2], t[3], 0xdd));
        }
    }
};

}  // namespace
}  // namespace vqvit
