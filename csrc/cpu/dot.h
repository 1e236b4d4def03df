// Int8 dot-product tiles in plain C++, and the panel packing every instruction set can fall back to.
//
// A Dot is the inner kernel of an instruction set:
//   kRows             rows of a tile
//   kReadsU8          tiles read unsigned rows as they are, zero padded to groups
//   kReadsS8          tiles read rows of codes as they are, of whole groups
//   kReadsS16         prepared rows are int16, and store_s16 puts a vector of them in place
//   kGroupBytes       bytes that four input channels of one row take once prepared
//   prepare           one row of s8 codes in the layout the tile reads, padded to groups; of u8 too unless kReadsU8
//   tile              out[r][n] = Σ_k a[r][k] b[n][k] for `rows` <= kRows rows and 16 · `vectors` columns of a panel;
//                     `sums`: Σ_k b[n][k] over the same groups, read where kReadsU8; NULL: a is u8. `ahead`: `groups`
//                     cache lines that tiles will read soon, a hint, or NULL
//   finish_tile       if kFinishesTiles: finish(r, sums of row r) for every row of a tile of s8 codes and all columns
//                     of a panel, from the registers that hold the sums; `ahead` as of `tile`
//   kReadsStrips      GEMMs run on weights in strips (strips.h) too, by `pack_strips`, `row_bytes`, `prepare_rows` and
//                     `gemm_tile` (dot_avx2.h)
//   pack_panel        one panel from rows of b: see pack_panel_portable
//   pack_transposed   one panel from columns of b, without sums: see pack_transposed_portable
#pragma once

#include <cstring>

#include "kernels.h"
#include "strips.h"

namespace vqvit {
namespace {

constexpr int kTileVectors = kPanel / 16;

// Sixteens of columns in a tile that has `columns` columns left, one panel at most.
inline int tile_vectors(int64_t columns) { return static_cast<int>(smaller(ceil_div(columns, 16), kTileVectors)); }

// The column sums that close a panel of `groups` groups.
inline const int32_t* column_sums(const int8_t* panel, int64_t groups) {
    return reinterpret_cast<const int32_t*>(panel + groups * kGroupBytes);
}

// Groups [first, first + count) of a packed panel, as a tile multiplies them.
struct PanelGroups {
    const int8_t* panel;
    bool in_strips;  // only where kReadsStrips
    int64_t first, count;
    const int32_t* sums;  // as of a Dot's tile
    const int8_t* ahead;

    const int8_t* codes() const { return panel + first * kGroupBytes; }
};

// One panel from b, (columns, k) with rows b_stride apart: groups of (64 columns, 4 input channels), then column sums.
inline void pack_panel_portable(const int8_t* b, int64_t b_stride, int64_t columns, int64_t k, int8_t* panel) {
    const int64_t groups = ceil_div(k, kKGroup), whole = k / kKGroup;
    int32_t sums[kPanel] = {};
    if (columns < kPanel) std::memset(panel, 0, static_cast<size_t>(groups * kGroupBytes));
    for (int64_t n = 0; n < columns; ++n) {
        const int8_t* row = b + n * b_stride;
        int8_t* target = panel + n * kKGroup;
        for (int64_t g = 0; g < whole; ++g) std::memcpy(target + g * kGroupBytes, row + g * kKGroup, kKGroup);
        for (int64_t i = whole * kKGroup; i < groups * kKGroup; ++i) {
            target[whole * kGroupBytes + i % kKGroup] = i < k ? row[i] : 0;
        }
        for (int64_t i = 0; i < k; ++i) sums[n] += row[i];
    }
    std::memcpy(panel + groups * kGroupBytes, sums, sizeof sums);
}

// Inverse of pack_panel_portable: the rows of b, adjacent.
inline void unpack_panel(const int8_t* panel, int64_t columns, int64_t k, int8_t* b) {
    const int64_t whole = k / kKGroup;
    for (int64_t n = 0; n < columns; ++n, b += k) {
        const int8_t* source = panel + n * kKGroup;
        for (int64_t g = 0; g < whole; ++g) std::memcpy(b + g * kKGroup, source + g * kGroupBytes, kKGroup);
        for (int64_t i = whole * kKGroup; i < k; ++i) b[i] = source[whole * kGroupBytes + i % kKGroup];
    }
}

// One panel from v, (k, columns) with rows v_stride apart: groups of (64 columns, 4 rows). No column sums.
inline void pack_transposed_portable(const int8_t* v, int64_t v_stride, int64_t columns, int64_t k, int8_t* panel) {
    std::memset(panel, 0, static_cast<size_t>(ceil_div(k, kKGroup) * kGroupBytes));
    for (int64_t i = 0; i < k; ++i) {
        int8_t* target = panel + i / kKGroup * kGroupBytes + i % kKGroup;
        for (int64_t n = 0; n < columns; ++n) target[n * kKGroup] = v[i * v_stride + n];
    }
}

struct DotScalar {
    static constexpr int kRows = 4;
    static constexpr int kGroupBytes = kKGroup * sizeof(int16_t);
    static constexpr bool kReadsU8 = false;
    static constexpr bool kReadsS8 = false;
    static constexpr bool kReadsS16 = false;
    static constexpr bool kFinishesTiles = false;
    static constexpr bool kReadsStrips = false;

    template <class Code>  // int8_t or uint8_t
    static void prepare(const Code* row, int64_t k, uint8_t* prepared) {
        int16_t* target = reinterpret_cast<int16_t*>(prepared);
        for (int64_t i = 0; i < k; ++i) target[i] = row[i];
        for (int64_t i = k; i % kKGroup != 0; ++i) target[i] = 0;
    }

    static void tile(
        int rows, int vectors, const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t groups,
        const int32_t*, int32_t* out, int64_t out_stride, const int8_t* = nullptr) {
        const int columns = vectors * 16;
        for (int r = 0; r < rows; ++r) {
            int32_t acc[kPanel] = {};
            const int16_t* row = reinterpret_cast<const int16_t*>(a + r * a_stride);
            for (int64_t g = 0; g < groups; ++g) {
                const int8_t* b = panel + g * vqvit::kGroupBytes;
                for (int n = 0; n < columns; ++n) {
                    for (int i = 0; i < kKGroup; ++i) acc[n] += row[g * kKGroup + i] * b[n * kKGroup + i];
                }
            }
            std::memcpy(out + r * out_stride, acc, static_cast<size_t>(columns) * sizeof(int32_t));
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
