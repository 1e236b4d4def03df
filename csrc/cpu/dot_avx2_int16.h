// Int8 products without VNNI at 32 a vpmaddubsw: sums stay in int16 for a chunk of 16 input channels, exactly.
//
//   Σ_k a b = Σ_chunks Σ_lanes s16 + Σ_extras e b        s16 = -128 Σ a' + Σ a' (b + 128)     modulo 2^16
//
// vpmaddubsw multiplies u8 by s8 and adds pairs with saturation, then int16 sums wrap. Neither may change a result:
//   pairs   a = a' + e with |a'[2i] + a'[2i+1]| <= 128, so that no pair of products b + 128 <= 255 can saturate. What
//           exceeds that, e, is an extra: one group of one row, multiplied apart.
//   chunks  a lane sums 8 products of a column; |Σ a' b| <= ‖a'‖ ‖b‖ (Cauchy-Schwarz). Where the largest norms of a
//           chunk's rows and columns allow more than int16 holds, the chunk is summed in int32.
// In the layers of DINOv2-small, 0.1 to 2.2 % of a row's groups have an extra, and 0 to 5 % of a tile's chunks take
// int32; most patches of pixels have too many extras. Such tiles keep the int16 codes of dot_avx2.h.
// b + 128 and its norms: strips.h.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "dot.h"
#include "strips.h"

namespace vqvit {
namespace {

constexpr int kTileRows = 6;  // x 16 columns: 12 sums, 2 weights, 1 group of codes, 1 product: 16 registers
constexpr int kPairLimit = 128;

// ‖a‖² ‖b‖² below which a lane's sum is within int16. Squares of -128 count as 128 · 127.
constexpr float kNormBound = 32767.0f * 32767.0f * (127.0f / 128.0f) * (127.0f / 128.0f) * 0.9999f;

// A group of one row that is multiplied apart.
struct Extra {
    int32_t codes;
    int32_t group : 28;
    int32_t row : 4;
};

// A tile's rows: header, then either int16 codes (dot_avx2.h) or, if `is_int16`,
//   blocks   (chunks) of 6 rows x 16 codes, then 6 starts of two lanes: -128 Σ a' modulo 2^16
//   norms    (chunks) fp32, the largest ‖a'‖² over rows and lanes
//   extras   in the order of chunks; `ends`: how many there are up to the end of each segment of kGroup channels
struct RowsLayout {
    static constexpr int64_t kHeader = kLineBytes;
    static constexpr int64_t kBlock = 2 * kLineBytes;
    static constexpr int64_t kStarts = kTileRows * kChunk;  // within a block

    int64_t chunks, most_extras, norms_at, ends_at, extras_at;
    int64_t wide_stride;  // of rows of int16 codes

    explicit RowsLayout(int64_t k) : chunks(ceil_div(k, kChunk)) {
        most_extras = chunks * kChunkGroups * kTileRows / 8;  // an extra costs two groups
        norms_at = kHeader + chunks * kBlock;
        ends_at = norms_at + round_up(chunks, kNormLanes) * int64_t{sizeof(float)};
        extras_at = ends_at + ceil_div(k, kGroup) * int64_t{sizeof(int32_t)};
        wide_stride = round_up(k, kKGroup) * int64_t{sizeof(int16_t)};
    }
    // The tile's bytes, for each of its rows.
    int64_t row_bytes() const {
        const int64_t int16 = extras_at + most_extras * int64_t{sizeof(Extra)};
        const int64_t wide = kHeader + kTileRows * wide_stride;
        return round_up(ceil_div(std::max(int16, wide), kTileRows), kLineBytes);
    }
};

struct RowsHeader {
    int32_t is_int16;
};

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline int32_t load_32(const void* p) {
    int32_t v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// The parts of rows that `prepare_int16_rows` wrote.
struct Int16Rows {
    const uint8_t* blocks;
    const float* norms;
    const int32_t* ends;
    const Extra* extras;

    Int16Rows(const uint8_t* tile, const RowsLayout& layout)
        : blocks(tile + RowsLayout::kHeader), norms(reinterpret_cast<const float*>(tile + layout.norms_at)),
          ends(reinterpret_cast<const int32_t*>(tile + layout.ends_at)),
          extras(reinterpret_cast<const Extra*>(tile + layout.extras_at)) {}
};

// The strips of a panel. `ahead`: as of a Dot's tile.
struct Int16Panel {
    const int8_t* data;
    StripLayout layout;
    const int8_t* ahead;

    const int8_t* codes(int strip) const { return data + strip * layout.strip_bytes; }
    // What goes to L2 while a strip is multiplied, a line for each chunk.
    const int8_t* lines(int strip) const {
        return ahead == nullptr ? codes(strip) : ahead + strip * layout.chunks * kLineBytes;
    }
    const float* norms(int strip) const { return reinterpret_cast<const float*>(codes(strip) + layout.norms_at()); }
};

// Squares of codes, added in pairs: u16.
inline __m256i pair_squares(__m256i codes) {
    const __m256i magnitudes = _mm256_abs_epi8(codes);
    return _mm256_maddubs_epi16(magnitudes, _mm256_min_epu8(magnitudes, _mm256_set1_epi8(127)));
}

// As pack_strips_portable.
inline void pack_int16_strips(const int8_t* panel, int64_t k, int8_t* strips) {
    const StripLayout layout(k);
    const int64_t groups = ceil_div(k, kKGroup);
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(128));
    for (int s = 0; s < kStrips; ++s) {
        int8_t* norms = strips + s * layout.strip_bytes + layout.norms_at();
        std::memset(norms, 0, static_cast<size_t>(layout.strip_bytes - layout.norms_at()));
    }
    for (int64_t c = 0; c < layout.chunks; ++c) {
        for (int s = 0; s < kStrips; ++s) {
            __m256i squares[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            int8_t* strip = strips + s * layout.strip_bytes;
            int8_t* target = strip + c * kStripChunk;
            for (int64_t g = 0; g < kChunkGroups; ++g, target += kStripGroup) {
                const bool inside = c * kChunkGroups + g < groups;
                const int8_t* source = panel + (c * kChunkGroups + g) * kGroupBytes + s * kStripGroup;
                for (int v = 0; v < 2; ++v) {
                    const __m256i b = inside ? load_256(source + v * 32) : _mm256_setzero_si256();
                    store_256(target + v * 32, _mm256_xor_si256(b, flip));
                    squares[v] = _mm256_adds_epu16(squares[v], pair_squares(b));
                }
            }
            const __m256i larger = _mm256_max_epu16(squares[0], squares[1]);
            const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(larger), _mm256_extracti128_si256(larger, 1));
            const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
            float* norms = reinterpret_cast<float*>(strip + layout.norms_at());
            norms[c] = norm_of(static_cast<uint32_t>(0xffff ^ _mm_extract_epi16(least, 0)));
        }
    }
}

// Two chunks of one row: takes what exceeds kPairLimit from the groups in `over`, four bits for each.
// `add(group, codes)` gets what was taken.
template <class Add>
inline void take_extras(int8_t (&codes)[2 * kChunk], uint32_t over, const Add& add) {
    while (over != 0) {
        const int g = __builtin_ctz(over) / kKGroup;
        over &= ~(uint32_t{0xf} << g * kKGroup);
        int8_t extra[kKGroup] = {};
        for (int i = 0; i < kKGroup; i += 2) {
            int8_t* pair = codes + g * kKGroup + i;
            const int sum = pair[0] + pair[1], beyond = std::abs(sum) - kPairLimit;
            if (beyond <= 0) continue;
            const int larger = std::abs(pair[1]) > std::abs(pair[0]);
            extra[i + larger] = static_cast<int8_t>(sum > 0 ? beyond : -beyond);
            pair[larger] = static_cast<int8_t>(pair[larger] - extra[i + larger]);
        }
        add(g, load_32(extra));
    }
}

// Σ over the four groups of each chunk, a chunk in each 128 bits; every 32 bits then hold the sums of its two lanes.
template <bool Saturates>
inline __m256i sum_groups(__m256i pairs) {
    for (const bool far : {true, false}) {
        const __m256i others = far ? _mm256_shuffle_epi32(pairs, 0x4e) : _mm256_shuffle_epi32(pairs, 0xb1);
        pairs = Saturates ? _mm256_adds_epu16(pairs, others) : _mm256_add_epi16(pairs, others);
    }
    return pairs;
}

// Prepares `rows` <= 6 rows of int8 a, a_stride apart; false, with `tile` undefined, if they have too many extras.
inline bool prepare_int16_rows(const int8_t* a, int64_t a_stride, int rows, int64_t k, uint8_t* tile) {
    const RowsLayout layout(k);
    float* norms = reinterpret_cast<float*>(tile + layout.norms_at);
    int32_t* ends = reinterpret_cast<int32_t*>(tile + layout.ends_at);
    Extra* extras = reinterpret_cast<Extra*>(tile + layout.extras_at);
    int64_t count = 0;
    const __m256i ones = _mm256_set1_epi8(1), limit = _mm256_set1_epi16(kPairLimit);
    for (int64_t c = 0; c < layout.chunks; c += 2) {
        uint8_t* block = tile + RowsLayout::kHeader + c * RowsLayout::kBlock;
        const int64_t left = k - c * kChunk;
        const bool both = c + 1 < layout.chunks;
        __m256i largest = _mm256_setzero_si256();
        for (int r = 0; r < rows; ++r) {
            const int8_t* source = a + r * a_stride + c * kChunk;
            alignas(32) int8_t codes[2 * kChunk] = {};
            if (left < 2 * kChunk) {
                std::memcpy(codes, source, static_cast<size_t>(left));
                source = codes;
            }
            __m256i v = load_256(source), pairs = _mm256_maddubs_epi16(ones, v);
            const __m256i beyond = _mm256_cmpgt_epi16(_mm256_abs_epi16(pairs), limit);
            if (const auto over = static_cast<uint32_t>(_mm256_movemask_epi8(beyond)); over != 0) {
                if (count + 2 * kChunkGroups > layout.most_extras) return false;
                store_256(codes, v);
                take_extras(codes, over, [&](int g, int32_t extra) {
                    extras[count++] = {extra, static_cast<int32_t>(c * kChunkGroups + g), r};
                });
                v = load_256(codes);
                pairs = _mm256_maddubs_epi16(ones, v);
            }
            largest = _mm256_max_epu16(largest, sum_groups<true>(pair_squares(v)));
            const __m256i sums = _mm256_slli_epi16(sum_groups<false>(pairs), 7);
            const __m256i starts = _mm256_sub_epi16(_mm256_setzero_si256(), sums);
            uint8_t* target = block + r * kChunk;
            uint8_t* start = block + RowsLayout::kStarts + r * sizeof(int32_t);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_castsi256_si128(v));
            _mm_storeu_si32(start, _mm256_castsi256_si128(starts));
            if (both) {
                const auto next = reinterpret_cast<__m128i*>(target + RowsLayout::kBlock);
                _mm_storeu_si128(next, _mm256_extracti128_si256(v, 1));
                _mm_storeu_si32(start + RowsLayout::kBlock, _mm256_extracti128_si256(starts, 1));
            }
        }
        const uint32_t low = static_cast<uint32_t>(_mm256_extract_epi32(largest, 0));
        const uint32_t high = static_cast<uint32_t>(_mm256_extract_epi32(largest, 4));
        norms[c] = norm_of(std::max(low & 0xffff, low >> 16));
        if (both) norms[c + 1] = norm_of(std::max(high & 0xffff, high >> 16));
        ends[c * kChunk / kGroup] = static_cast<int32_t>(count);
    }
    for (int64_t c = layout.chunks; c % kNormLanes != 0; ++c) norms[c] = 0.0f;
    return true;
}

// out[r] += Σ_k a'[r] b over chunks [first, last) whose lanes stay within int16, for the 16 columns of a strip. `lines`: of
// all chunks.
template <int R>
__attribute__((noinline)) void add_chunks(
    const uint8_t* blocks, const int8_t* strip, int64_t first, int64_t last, const int8_t* lines, int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t* block = blocks + first * RowsLayout::kBlock;
    const int8_t* b = strip + first * kStripChunk;
    for (int64_t c = first; c < last; ++c, block += RowsLayout::kBlock, b += kStripChunk) {
        _mm_prefetch(reinterpret_cast<const char*>(lines + c * kLineBytes), _MM_HINT_T1);
        __m256i sums[R][2];
#pragma GCC unroll 4
        for (int g = 0; g < kChunkGroups; ++g) {
            const __m256i b0 = load_256(b + g * kStripGroup), b1 = load_256(b + g * kStripGroup + 32);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                if (g == 0) {
                    sums[r][0] = sums[r][1] = _mm256_set1_epi32(load_32(block + RowsLayout::kStarts + r * 4));
                }
                const __m256i codes = _mm256_set1_epi32(load_32(block + r * kChunk + g * kKGroup));
                sums[r][0] = _mm256_add_epi16(sums[r][0], _mm256_maddubs_epi16(b0, codes));
                sums[r][1] = _mm256_add_epi16(sums[r][1], _mm256_maddubs_epi16(b1, codes));
                asm("" : "+x"(sums[r][0]), "+x"(sums[r][1]));  // else GCC adds products of two groups first, and spills
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                int32_t* target = out + r * kPanel + v * 8;
                store_256(target, _mm256_add_epi32(load_256(target), _mm256_madd_epi16(sums[r][v], ones)));
            }
        }
    }
}

// out += a b of a strip and N groups of one row, whose pairs are within kPairLimit.
template <int N>
inline void add_groups_in_int32(const void* codes, const int8_t* b, int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1), offset = _mm256_set1_epi8(static_cast<char>(128));
    __m256i sums[2] = {load_256(out), load_256(out + 8)};
#pragma GCC unroll 4
    for (int g = 0; g < N; ++g) {
        const __m256i a = _mm256_set1_epi32(load_32(static_cast<const int8_t*>(codes) + g * kKGroup));
        const __m256i excess = _mm256_maddubs_epi16(offset, a);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const __m256i products = _mm256_maddubs_epi16(load_256(b + g * kStripGroup + v * 32), a);
            sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(_mm256_sub_epi16(products, excess), ones));
        }
    }
    store_256(out, sums[0]);
    store_256(out + 8, sums[1]);
}

// out (R, 16 of 64) = Σ a' b over chunks [first, last) of a tile's rows and the s-th strip; `first`: a multiple of
// kNormLanes.
template <int R>
void add_strip(const Int16Rows& a, const Int16Panel& b, int s, int64_t first, int64_t last, int32_t* out) {
    const int8_t* strip = b.codes(s);
    const int8_t* lines = b.lines(s);
    const float* strip_norms = b.norms(s);
    for (int r = 0; r < R; ++r) {
        store_256(out + r * kPanel, _mm256_setzero_si256());
        store_256(out + r * kPanel + 8, _mm256_setzero_si256());
    }
    int64_t begin = first;
    const __m256 bound = _mm256_set1_ps(kNormBound);
    for (int64_t c = first; c < last; c += kNormLanes) {
        const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(a.norms + c), _mm256_loadu_ps(strip_norms + c));
        int wide = _mm256_movemask_ps(_mm256_cmp_ps(product, bound, _CMP_NLE_UQ));  // NaN counts
        for (; wide != 0; wide &= wide - 1) {
            const int64_t chunk = c + __builtin_ctz(static_cast<unsigned>(wide));
            add_chunks<R>(a.blocks, strip, begin, chunk, lines, out);
            const uint8_t* codes = a.blocks + chunk * RowsLayout::kBlock;
            for (int r = 0; r < R; ++r) {
                add_groups_in_int32<kChunkGroups>(codes + r * kChunk, strip + chunk * kStripChunk, out + r * kPanel);
            }
            begin = chunk + 1;
        }
    }
    add_chunks<R>(a.blocks, strip, begin, last, lines, out);
}

// out (rows, 64) += e b of the extras of chunks [first, last), of which the first begins a segment.
inline void add_extras(
    int rows, const Int16Rows& a, const Int16Panel& b, int64_t first, int64_t last, int32_t* out) {
    constexpr int64_t kSegment = kGroup / kChunk;
    const Extra* end = a.extras + a.ends[ceil_div(last, kSegment) - 1];
    for (const Extra* e = a.extras + (first == 0 ? 0 : a.ends[first / kSegment - 1]); e < end; ++e) {
        if (e->row >= rows) continue;
        int32_t* row = out + e->row * kPanel;
#pragma GCC unroll 4
        for (int s = 0; s < kStrips; ++s) {
            add_groups_in_int32<1>(&e->codes, b.codes(s) + e->group * kStripGroup, row + s * kStrip);
        }
    }
}

// out (rows, 64) = Σ a b over chunks [first, last) of a tile's rows and a panel's strips.
inline void int16_tile(
    int rows, const uint8_t* tile, int64_t k, const Int16Panel& b, int64_t first, int64_t last, int32_t* out) {
    using Strip = void (*)(const Int16Rows&, const Int16Panel&, int, int64_t, int64_t, int32_t*);
    static constexpr Strip by_rows[kTileRows] = {add_strip<1>, add_strip<2>, add_strip<3>,
                                                 add_strip<4>, add_strip<5>, add_strip<6>};
    const Int16Rows a(tile, RowsLayout(k));
    for (int s = 0; s < kStrips; ++s) by_rows[rows - 1](a, b, s, first, last, out + s * kStrip);
    add_extras(rows, a, b, first, last, out);
}

}  // namespace
}  // namespace vqvit
