// What the INT8 GEMMs of this folder share: the task, its tiles, and which kernel runs it.
//
// Kernels are compiled for each kind of result (Store) and, where it pays, activation, so that each is short. They are
// spread over files that compile side by side: gemm_s8_<kind>.cu for mma.sync, gemm_s8_wgmma_<kind>.cu for Hopper.
#pragma once

#include "divisor.h"
#include "numerics.h"

namespace vqvit {

// Kinds of results: parameters of kernels, whose names then hold plain numbers.
struct Store {
    enum : int {
        kInt32,        // raw accumulators
        kFloat,        // y in `dtype`
        kStaticCodes,  // int8 with out_scale; scale holds it already, row_sum holds zeros
        kGroupCodes,   // int8 with a scale for each row and 128 columns
        kProjection,   // q and k as codes by head, v as fp32
    };
};

// In the place of a vqvit_activation: the task's, whichever it is. Such kernels have no loop for whole tiles.
constexpr int kAnyActivation = VQVIT_RELU + 1;

// Of kernels for group scales. Layers that take those, an attention's output and the second of an MLP, have floats
// without an activation as results: other kinds need not be fast.
constexpr int grouped_activation(int store_kind, int activation) {
    return store_kind == Store::kFloat && activation == VQVIT_NONE ? VQVIT_NONE : kAnyActivation;
}

struct TileIndex {
    int row, column;
};

// The tiles of a result in the order of their numbers, of which there are less than 2^31: kTileRows rows of tiles are
// walked column by column, to share operands in L2.
struct Tiles {
    static constexpr int kTileRows = 8;

    int rows, columns;
    Divisor in_group, last_rows;  // tiles of a group of rows; rows of the last group, if they are fewer

    Tiles() = default;
    Tiles(int64_t m, int64_t n, int rows_of_tile, int columns_of_tile)
        : rows(static_cast<int>(ceil_div(m, rows_of_tile))), columns(static_cast<int>(ceil_div(n, columns_of_tile))),
          in_group(int64_t{kTileRows} * columns),
          last_rows(rows % kTileRows > 0 ? rows % kTileRows : kTileRows) {}

    VQVIT_HOST_DEVICE unsigned count() const { return static_cast<unsigned>(rows) * static_cast<unsigned>(columns); }

    VQVIT_DEVICE TileIndex operator[](uint32_t tile) const {
        const uint32_t group = in_group.quotient(tile), inside = tile - group * in_group.divisor;
        const bool last = (group + 1) * kTileRows > static_cast<uint32_t>(rows);
        const uint32_t column = last ? last_rows.quotient(inside) : inside / kTileRows;
        const uint32_t row = inside - column * (last ? last_rows.divisor : kTileRows);
        return {static_cast<int>(group * kTileRows + row), static_cast<int>(column)};
    }
};

// Where the scales of q and k lie in (2, images, heads, tokens): head `segment`, counted from the first of q, of row m.
struct Projection {
    Divisor tokens, heads;
    int64_t rows_of_part = 0;  // images · heads · tokens
    uint32_t image_step = 0;   // (heads - 1) · tokens

    Projection() = default;
    Projection(int64_t m, int64_t tokens_, int64_t heads_)
        : tokens(tokens_), heads(heads_), rows_of_part(m * heads_),
          image_step(static_cast<uint32_t>((heads_ - 1) * tokens_)) {}

    // Of (head, m): first_row(head) + row(m). A projection has less than 2^31 rows: v alone has 128 bytes for each.
    VQVIT_DEVICE int64_t first_row(int segment) const {
        const uint32_t part = heads.quotient(static_cast<uint32_t>(segment));
        const uint32_t head = static_cast<uint32_t>(segment) - part * heads.divisor;
        return part * rows_of_part + int64_t{head} * tokens.divisor;
    }
    VQVIT_DEVICE int64_t row(int64_t m) const {
        return m + static_cast<int64_t>(uint64_t{tokens.quotient(static_cast<uint32_t>(m))} * image_step);
    }
};

struct GemmTask {
    vqvit_gemm g;
    void* out;  // (m, n), or the codes (2, images, heads, tokens, head_dim)
    int dtype;
    bool whole;  // tiles that n does not cut load and store four columns at a time, and have no zero points
    Tiles tiles;
    const float* out_scale;
    float* scale;  // (m), (m, ceil(n / 128)) or (2, images, heads, tokens)
    int32_t* row_sum;
    float* v;  // (m, heads · head_dim)
    int heads, head_dim, head_bits;  // head_dim = 2^head_bits: 32, 64 or 128
    Projection projection;
};

VQVIT_DEVICE float load_float(const void* p, int dtype, int64_t i) {
    if (dtype == VQVIT_F16) return to_fp32(static_cast<const Half*>(p)[i]);
    if (dtype == VQVIT_BF16) return to_fp32(static_cast<const BFloat16*>(p)[i]);
    return static_cast<const float*>(p)[i];
}

// y in dtype, its activation and residual those of `g`.
GemmTask float_task(const vqvit_gemm& g, void* y, int dtype);

// The task on mma.sync, by tiles of the size that suits it, and on wgmma. Each file instantiates those of its kind.
template <int StoreKind, int Activation>
int run_tiles(const GemmTask& task, void* stream);
template <int StoreKind, int Activation>
int run_wgmma(const GemmTask& task, void* stream);

}  // namespace vqvit
