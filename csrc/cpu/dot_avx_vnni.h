// Int8 tiles of 6 rows x 16 columns on the 256-bit vpdpbusd of AVX-VNNI. Signed codes become u8 as in
// dot_avx512_vnni.h: a + 128, from a start of -128 Σ_k b[n, k].
#pragma once

#include <immintrin.h>

#include "dot.h"

namespace vqvit {
namespace {

struct DotAvxVnni {
    static constexpr int kRows = 6;  // x 16 columns: 12 accumulators, 2 weights, 1 activation of 16 registers
    static constexpr int kGroupBytes = kKGroup;
    static constexpr bool kReadsU8 = true;
    static constexpr bool kReadsS8 = false;
    static constexpr bool kReadsS16 = false;
    static constexpr bool kFinishesTiles = false;
    static constexpr bool kReadsStrips = false;

    static void prepare(const int8_t* row, int64_t k, uint8_t* prepared) {
        constexpr int kOffset = 128;
        const __m256i flip = _mm256_set1_epi8(static_cast<char>(kOffset));
        int64_t i = 0;
        for (; i + 32 <= k; i += 32) {
            const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(prepared + i), _mm256_xor_si256(codes, flip));
        }
        for (; i < k; ++i) prepared[i] = static_cast<uint8_t>(row[i] ^ kOffset);
        for (; i % kKGroup != 0; ++i) prepared[i] = 0;
    }

    template <int R>
    static void tile_16(
        const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t groups, const __m256i (&start)[2], int32_t* out,
        int64_t out_stride) {
        __m256i acc[R][2];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            acc[r][0] = start[0];
            acc[r][1] = start[1];
        }
        for (int64_t g = 0; g < groups; ++g, a += kGroupBytes, b += vqvit::kGroupBytes) {
            const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
            const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b) + 1);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                int32_t codes;
                std::memcpy(&codes, a + r * a_stride, sizeof codes);
                const __m256i broadcast = _mm256_set1_epi32(codes);
                acc[r][0] = _mm256_dpbusd_avx_epi32(acc[r][0], broadcast, w0);
                acc[r][1] = _mm256_dpbusd_avx_epi32(acc[r][1], broadcast, w1);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * out_stride), acc[r][0]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * out_stride) + 1, acc[r][1]);
        }
    }

    static void tile(
        int rows, int vectors, const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups,
        const int32_t* sums, int32_t* out, int64_t out_stride, const int8_t* = nullptr) {
        using Tile =
            void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, const __m256i(&)[2], int32_t*, int64_t);
        static constexpr Tile by_rows[kRows] = {tile_16<1>, tile_16<2>, tile_16<3>, tile_16<4>, tile_16<5>, tile_16<6>};
        for (int v = 0; v < vectors; ++v) {
            __m256i start[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            if (sums != nullptr) {
                const __m256i* s = reinterpret_cast<const __m256i*>(sums + v * 16);
                start[0] = _mm256_sub_epi32(start[0], _mm256_slli_epi32(_mm256_loadu_si256(s), 7));
                start[1] = _mm256_sub_epi32(start[1], _mm256_slli_epi32(_mm256_loadu_si256(s + 1), 7));
            }
            by_rows[rows - 1](a, a_stride, panel + v * 16 * kKGroup, groups, start, out + v * 16, out_stride);
        }
    }

    static void pack_panel(const int8_t* b, int64_t b_stride, int64_t columns, int64_t k, int8_t* panel) {
        pack_panel_portable(b, b_stride, columns, k, panel);
    }

    static void pack_transposed(const int8_t* v, int64_t v_stride, int64_t columns, int64_t k, int8_t* panel) {
        pack_transposed_portable(v, v_stride, columns, k, panel);
    }
};

}  // namespace
}  // namespace vqvit
