// Int8 tiles without VNNI: codes widen to int16, vpmaddwd multiplies and adds pairs exactly. (vpmaddubsw saturates.)
#pragma once

#include <immintrin.h>

#include "dot.h"

namespace vqvit {
namespace {

struct DotAvx2 {
    static constexpr int kRows = 4;  // 4 rows x 16 columns: 8 accumulators, 4 weights, 2 activations of 16 registers
    static constexpr int kGroupBytes = kKGroup * sizeof(int16_t);

    // A group (a0, a1, a2, a3) is stored as int16 (a0, a2, a1, a3): the pairs that even and odd weight bytes meet.
    static void prepare(const int8_t* row, int64_t k, bool is_unsigned, uint8_t* prepared) {
        int16_t* target = reinterpret_cast<int16_t*>(prepared);
        const int64_t groups = ceil_div(k, kKGroup);
        const __m128i pairs = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        const __m256i swap = _mm256_broadcastsi128_si256(pairs);
        int64_t i = 0;
        for (; i + 16 <= k; i += 16) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
            const __m256i wide = is_unsigned ? _mm256_cvtepu8_epi16(codes) : _mm256_cvtepi8_epi16(codes);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), _mm256_shuffle_epi8(wide, swap));
        }
        for (; i < groups * kKGroup; ++i) {
            const int64_t position = i % kKGroup == 1 ? i + 1 : i % kKGroup == 2 ? i - 1 : i;
            target[position] = i >= k ? 0 : is_unsigned ? static_cast<uint8_t>(row[i]) : row[i];
        }
    }

    template <int R>
    static void tile_16(
        const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t groups, int32_t* out, int64_t out_stride) {
        __m256i acc[R][2];
        for (auto& row : acc) row[0] = row[1] = _mm256_setzero_si256();
        for (int64_t g = 0; g < groups; ++g) {
            const __m256i* weights = reinterpret_cast<const __m256i*>(b + g * vqvit::kGroupBytes);
            __m256i even[2], odd[2];
            for (int v = 0; v < 2; ++v) {
                const __m256i w = _mm256_loadu_si256(weights + v);
                even[v] = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
                odd[v] = _mm256_srai_epi16(w, 8);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                int32_t pair[2];
                std::memcpy(pair, a + r * a_stride + g * kGroupBytes, sizeof pair);
                const __m256i a_even = _mm256_set1_epi32(pair[0]), a_odd = _mm256_set1_epi32(pair[1]);
                for (int v = 0; v < 2; ++v) {
                    acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(even[v], a_even));
                    acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(odd[v], a_odd));
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < 2; ++v) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * out_stride + v * 8), acc[r][v]);
            }
        }
    }

    static void tile(
        int rows, int vectors, const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups, bool,
        int32_t* out, int64_t out_stride) {
        using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*, int64_t);
        static constexpr Tile by_rows[kRows] = {tile_16<1>, tile_16<2>, tile_16<3>, tile_16<4>};
        for (int v = 0; v < vectors; ++v) {
            by_rows[rows - 1](a, a_stride, panel + v * 16 * kKGroup, groups, out + v * 16, out_stride);
        }
    }

    static void pack_panel(const int8_t* b, int64_t b_stride, int64_t columns, int64_t k, int8_t* panel) {
        pack_panel_portable(b, b_stride, columns, k, panel);
    }
};

}  // namespace
}  // namespace vqvit
