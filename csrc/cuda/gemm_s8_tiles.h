// The kernels of the INT8 GEMM on mma.sync (formulas: kernels/gemm_s8.py), for files that instantiate some of them.
//
//     acc = Σ_k a[m, k] · b[n, k] in int32; with group scales s = fma(acc_g, α_a[m, g], s) for each 128 columns of K
//
// Shapes: a (M, K) int8 row-major, b (N, K) int8 row-major, out (M, N). Grid: one block a tile, swizzled (Tiles).
// Warps are stacked along M and each holds all columns of the tile, so that a row's codes need no barrier.
// Operations: 2 · M · N · K int8. Bytes: (kRows + kColumns) · K a tile from L2.
#pragma once

#include "gemm_s8_epilogue.h"
#include "library.h"
#include "mma_tiles.h"

namespace vqvit {

template <int MI, int NJ, int Warps, int Stages, int StoreKind, int Activation>
struct Tile {
    static constexpr int kThreads = Warps * kWarp;
    static constexpr int kRows = 16 * MI * Warps, kColumns = 8 * NJ;
    static constexpr int kStageBytes = (kRows + kColumns) * kBlockK;
    // The epilogue takes the place of the stages.
    using Finish = Epilogue<kColumns, StoreKind, Activation>;
    static constexpr int kSharedBytes =
        Stages * kStageBytes > Warps * Finish::kStagingBytes ? Stages * kStageBytes : Warps * Finish::kStagingBytes;

    VQVIT_DEVICE static Finish finish(const GemmTask& task, int first_column) {
        return Finish(task, first_column, shared_memory() + warp_id() * Finish::kStagingBytes);
    }
};

template <int MI, int NJ, int Warps, int Stages, int Blocks, int StoreKind, int Activation>
VQVIT_KERNEL(Warps* kWarp, Blocks, gemm_kernel, const GemmTask task) {
    using T = Tile<MI, NJ, Warps, Stages, StoreKind, Activation>;
    const vqvit_gemm& g = task.g;
    auto* stages = reinterpret_cast<int8_t*>(shared_memory());
    const TileIndex tile = task.tiles[static_cast<uint32_t>(block_x())];
    const int64_t first_row = int64_t{tile.row} * T::kRows;
    const int first_column = tile.column * T::kColumns;
    const Operand a(g.a, g.m, g.a_stride, g.k), b(g.b, g.n, g.k, g.k);
    const int warp_row = warp_id() * 16 * MI;

    int32_t acc[MI][NJ][4] = {};
    walk_k<Stages>(
        g.k,
        [&](int stage, int64_t first_k) {
            int8_t* tiles = stages + stage * T::kStageBytes;
            a.template copy_tile<T::kRows, T::kThreads>(tiles, first_row, first_k);
            b.template copy_tile<T::kColumns, T::kThreads>(tiles + T::kRows * kBlockK, first_column, first_k);
        },
        [&](int stage, int64_t) {
            int8_t* tiles = stages + stage * T::kStageBytes;
            multiply<MI, NJ>(acc, tiles, tiles + T::kRows * kBlockK, warp_row);
        });
    T::finish(task, first_column).template finish<true>(acc, first_row + warp_row, 16);
}

// The same with a scale for each 128 columns of a row of a: int32 sums are promoted to fp32 after each of them.
template <int NJ, int Warps, int Stages, int Blocks, int StoreKind, int Activation>
VQVIT_KERNEL(Warps* kWarp, Blocks, grouped_gemm_kernel, const GemmTask task) {
    using T = Tile<1, NJ, Warps, Stages, StoreKind, Activation>;
    const vqvit_gemm& g = task.g;
    auto* stages = reinterpret_cast<int8_t*>(shared_memory());
    const TileIndex tile = task.tiles[static_cast<uint32_t>(block_x())];
    const int64_t first_row = int64_t{tile.row} * T::kRows;
    const int first_column = tile.column * T::kColumns;
    const Operand a(g.a, g.m, g.a_stride, g.k), b(g.b, g.n, g.k, g.k);
    const int warp_row = warp_id() * 16;
    const int64_t groups = ceil_div(g.k, kGroup);

    const auto scale_of_row = [&](int half, int64_t group) {
        const int64_t m = first_row + warp_row + lane_id() / 4 + 8 * half;
        return m < g.m ? g.a_scale[m * groups + group] : 0.0f;
    };
    float sum[1][NJ][4] = {};
    int32_t acc[1][NJ][4] = {};
    walk_k<Stages>(
        g.k,
        [&](int stage, int64_t first_k) {
            int8_t* tiles = stages + stage * T::kStageBytes;
            a.template copy_tile<T::kRows, T::kThreads>(tiles, first_row, first_k);
            b.template copy_tile<T::kColumns, T::kThreads>(tiles + T::kRows * kBlockK, first_column, first_k);
        },
        [&](int stage, int64_t first_k) {
            int8_t* tiles = stages + stage * T::kStageBytes;
            multiply<1, NJ>(acc, tiles, tiles + T::kRows * kBlockK, warp_row);
            if (first_k % kGroup == 0 && first_k + kBlockK < g.k) return;  // the group goes on
            const float scale[2] = {scale_of_row(0, first_k / kGroup), scale_of_row(1, first_k / kGroup)};
            VQVIT_UNROLL
            for (int j = 0; j < NJ; ++j) {
                VQVIT_UNROLL
                for (int i = 0; i < 4; ++i) {  // |acc| <= 128 · 127² < 2^22
                    sum[0][j][i] = fmaf(small_int_to_fp32(acc[0][j][i]), scale[i / 2], sum[0][j][i]);
                    acc[0][j][i] = 0;
                }
            }
        });
    T::finish(task, first_column).template finish<false>(sum, first_row + warp_row, 16);
}

template <int StoreKind, int Activation, int MI, int NJ, int Warps, int Stages, int Blocks>
int launch_tile(GemmTask task, void* stream) {
    using T = Tile<MI, NJ, Warps, Stages, StoreKind, Activation>;
    task.tiles = Tiles(task.g.m, task.g.n, T::kRows, T::kColumns);
    const auto kernel = gemm_kernel<MI, NJ, Warps, Stages, Blocks, StoreKind, Activation>;
    return launch(kernel, Dim3(task.tiles.count()), T::kThreads, T::kSharedBytes, stream, task);
}

template <int StoreKind, int Activation, int NJ, int Warps, int Stages, int Blocks>
int launch_grouped(GemmTask task, void* stream) {
    using T = Tile<1, NJ, Warps, Stages, StoreKind, Activation>;
    task.tiles = Tiles(task.g.m, task.g.n, T::kRows, T::kColumns);
    const auto kernel = grouped_gemm_kernel<NJ, Warps, Stages, Blocks, StoreKind, Activation>;
    return launch(kernel, Dim3(task.tiles.count()), T::kThreads, T::kSharedBytes, stream, task);
}

// The tile of most reuse that still gives every multiprocessor a block. Codes by group or head need 128 columns.
template <int StoreKind, int Activation>
int run_tiles(const GemmTask& task, void* stream) {
    if constexpr (StoreKind != Store::kInt32) {
        constexpr int kGrouped = grouped_activation(StoreKind, Activation);
        if (task.g.a_groups != 0) return launch_grouped<StoreKind, kGrouped, 16, 4, 4, 2>(task, stream);
    }
    constexpr bool kWholeRows = StoreKind == Store::kGroupCodes || StoreKind == Store::kProjection;
    const auto blocks = [&](int64_t rows, int64_t columns) {
        return ceil_div(task.g.m, rows) * ceil_div(task.g.n, columns);
    };
    const int64_t enough = multiprocessors();
    if (blocks(128, 128) >= enough) return launch_tile<StoreKind, Activation, 2, 16, 4, 3, 2>(task, stream);
    if (kWholeRows || blocks(64, 128) >= enough) {
        return launch_tile<StoreKind, Activation, 1, 16, 4, 4, 2>(task, stream);
    }
    if constexpr (!kWholeRows) return launch_tile<StoreKind, Activation, 1, 8, 4, 4, 3>(task, stream);
}

}  // namespace vqvit
