// Int8 tiles without VNNI: codes widen to int16, vpmaddwd multiplies and adds pairs exactly. GEMMs of weights in strips
// take dot_avx2_int16.h instead, where their codes allow it: 1.5 times as fast on Zen 3.
#pragma once

#include <immintrin.h>

#include "dot_avx2_int16.h"

namespace vqvit {
namespace {

struct DotAvx2 {
    static constexpr int kRows = kTileRows;  // 12 accumulators, 2 weights, 1 activation, 1 product: 16 registers
    static constexpr int kGroupBytes = kKGroup * sizeof(int16_t);
    static constexpr bool kReadsU8 = false;
    static constexpr bool kReadsS8 = false;
    static constexpr bool kReadsS16 = true;
    static constexpr bool kFinishesTiles = false;
    static constexpr bool kReadsStrips = true;

    // A group (a0, a1, a2, a3) is stored as int16 (a0, a2, a1, a3): the pairs that even and odd weight bytes meet.
    static __m128i pair_order() {
        return _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    }

    template <class Code>  // int8_t or uint8_t
    static void prepare(const Code* row, int64_t k, uint8_t* prepared) {
        constexpr bool kSigned = Code(-1) < 0;
        int16_t* target = reinterpret_cast<int16_t*>(prepared);
        const int64_t groups = ceil_div(k, kKGroup);
        const __m256i swap = _mm256_broadcastsi128_si256(pair_order());
        int64_t i = 0;
        for (; i + 16 <= k; i += 16) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
            const __m256i wide = kSigned ? _mm256_cvtepi8_epi16(codes) : _mm256_cvtepu8_epi16(codes);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), _mm256_shuffle_epi8(wide, swap));
        }
        for (; i < groups * kKGroup; ++i) {
            const int64_t position = i % kKGroup == 1 ? i + 1 : i % kKGroup == 2 ? i - 1 : i;
            target[position] = i < k ? row[i] : 0;
        }
    }

    // Eight int16 values, each in a lane of v, as two prepared groups.
    static void store_s16(__m256i v, uint8_t* prepared) {
        const __m128i eight = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(prepared), _mm_shuffle_epi8(eight, pair_order()));
    }

    // acc += weights · activations for pairs (even: channels 0 and 2 of a group; odd: 1 and 3) of 16 columns.
    template <int R>
    static void add_pairs(__m256i (&acc)[R][2], const __m256i (&weights)[2], const uint8_t* a, int64_t a_stride) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            int32_t pair;
            std::memcpy(&pair, a + r * a_stride, sizeof pair);
            const __m256i activations = _mm256_set1_epi32(pair);
            acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(weights[0], activations));
            acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(weights[1], activations));
            // Keeps GCC from adding even and odd products first, which would need twelve registers more.
            asm("" : "+x"(acc[r][0]), "+x"(acc[r][1]));
        }
    }

    // Sixteen columns of a panel, or a strip.
    template <int R, bool Strip>
    static void tile_16(
        const uint8_t* a, int64_t a_stride, const int8_t* b, int64_t groups, int32_t* out, int64_t out_stride) {
        constexpr int64_t kStep = Strip ? kStripGroup : vqvit::kGroupBytes;
        const __m256i flip = Strip ? _mm256_set1_epi8(static_cast<char>(128)) : _mm256_setzero_si256();
        __m256i acc[R][2];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (int64_t g = 0; g < groups; ++g, a += kGroupBytes, b += kStep) {
            __m256i w0 = load_256(b), w1 = load_256(b + 32);
            if (Strip) {
                w0 = _mm256_xor_si256(w0, flip);
                w1 = _mm256_xor_si256(w1, flip);
            }
            const __m256i even[2] = {
                _mm256_srai_epi16(_mm256_slli_epi16(w0, 8), 8),
                _mm256_srai_epi16(_mm256_slli_epi16(w1, 8), 8),
            };
            add_pairs<R>(acc, even, a, a_stride);
            const __m256i odd[2] = {_mm256_srai_epi16(w0, 8), _mm256_srai_epi16(w1, 8)};
            add_pairs<R>(acc, odd, a + kGroupBytes / 2, a_stride);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            store_256(out + r * out_stride, acc[r][0]);
            store_256(out + r * out_stride + 8, acc[r][1]);
        }
    }

    using Tile16 = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*, int64_t);

    template <bool Strip>
    static Tile16 tile_of_rows(int rows) {
        static constexpr Tile16 by_rows[kRows] = {tile_16<1, Strip>, tile_16<2, Strip>, tile_16<3, Strip>,
                                                  tile_16<4, Strip>, tile_16<5, Strip>, tile_16<6, Strip>};
        return by_rows[rows - 1];
    }

    static void tile(
        int rows, int vectors, const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups,
        const int32_t*, int32_t* out, int64_t out_stride, const int8_t* = nullptr) {
        const Tile16 tile = tile_of_rows<false>(rows);
        for (int v = 0; v < vectors; ++v) {
            tile(a, a_stride, panel + v * 16 * kKGroup, groups, out + v * 16, out_stride);
        }
    }

    static int64_t row_bytes(int64_t k) { return RowsLayout(k).row_bytes(); }

    // `rows` <= kRows rows of a, for weights in strips if `for_strips`.
    static void prepare_rows(
        const int8_t* a, int64_t a_stride, int rows, int64_t k, bool for_strips, uint8_t* prepared) {
        RowsHeader header = {for_strips && prepare_int16_rows(a, a_stride, rows, k, prepared)};
        std::memcpy(prepared, &header, sizeof header);
        const RowsLayout layout(k);
        for (int r = 0; r < rows && header.is_int16 == 0; ++r) {
            prepare(a + r * a_stride, k, prepared + RowsLayout::kHeader + r * layout.wide_stride);
        }
    }

    // out (rows, 64) = Σ a b over b's groups, which begin at a multiple of kGroup channels. `prepared`: by `prepare_rows`.
    static void gemm_tile(int rows, const uint8_t* prepared, int64_t k, const PanelGroups& b, int32_t* out) {
        RowsHeader header;
        std::memcpy(&header, prepared, sizeof header);
        if (header.is_int16 != 0) {
            const int64_t first = b.first / kChunkGroups, last = ceil_div(b.first + b.count, kChunkGroups);
            return int16_tile(rows, prepared, k, {b.panel, StripLayout(k), b.ahead}, first, last, out);
        }
        const uint8_t* a = prepared + RowsLayout::kHeader + b.first * kGroupBytes;
        const int64_t stride = RowsLayout(k).wide_stride;
        if (!b.in_strips) return tile(rows, kTileVectors, a, stride, b.codes(), b.count, nullptr, out, kPanel);
        const int8_t* strip = b.panel + b.first * kStripGroup;
        for (int s = 0; s < kStrips; ++s, strip += StripLayout(k).strip_bytes) {
            tile_of_rows<true>(rows)(a, stride, strip, b.count, out + s * kStrip, kPanel);
        }
    }

    static void pack_strips(const int8_t* panel, int64_t k, int8_t* strips) { pack_int16_strips(panel, k, strips); }

    static void pack_panel(const int8_t* b, int64_t b_stride, int64_t columns, int64_t k, int8_t* panel) {
        pack_panel_portable(b, b_stride, columns, k, panel);
    }

    static void pack_transposed(const int8_t* v, int64_t v_stride, int64_t columns, int64_t k, int8_t* panel) {
        pack_transposed_portable(v, v_stride, columns, k, panel);
    }
};

}  // namespace
}  // namespace vqvit
