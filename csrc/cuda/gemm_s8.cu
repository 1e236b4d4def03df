// INT8 GEMM on mma.sync with fused epilogues: every GPU from compute capability 7.5 on (formulas: kernels/gemm_s8.py).
//
//     acc = Σ_k a[m, k] · b[n, k] in int32; with group scales s = fma(acc_g, α_a[m, g], s) for each 128 columns of K
//
// Shapes: a (M, K) int8 row-major, b (N, K) int8 row-major, out (M, N). Grid: one block a tile, swizzled (tile_index).
// Warps are stacked along M and each holds all columns of the tile, so that a row's codes need no barrier.
// Operations: 2 · M · N · K int8. Bytes: (kRows + kColumns) · K a tile from L2.
#include "gemm_s8.h"
#include "library.h"
#include "mma_tiles.h"

namespace vqvit {
namespace {

template <int MI, int NJ, int Warps, int Stages>
struct Tile {
    static constexpr int kThreads = Warps * kWarp;
    static constexpr int kRows = 16 * MI * Warps, kColumns = 8 * NJ;
    static constexpr int kStageBytes = (kRows + kColumns) * kBlockK;
    // The epilogue takes the place of the stages.
    using Finish = Epilogue<kColumns>;
    static constexpr int kSharedBytes =
        Stages * kStageBytes > Warps * Finish::kStagingBytes ? Stages * kStageBytes : Warps * Finish::kStagingBytes;

    VQVIT_DEVICE static Finish finish(const GemmTask& task, int64_t first_column) {
        return Finish(task, first_column, shared_memory() + warp_id() * Finish::kStagingBytes);
    }
};

template <int MI, int NJ, int Warps, int Stages, int Blocks>
VQVIT_KERNEL(Warps* kWarp, Blocks, gemm_kernel, const GemmTask task) {
    using T = Tile<MI, NJ, Warps, Stages>;
    const vqvit_gemm& g = task.g;
    auto* stages = reinterpret_cast<int8_t*>(shared_memory());
    const TileIndex tile = tile_index(block_x(), ceil_div(g.m, T::kRows), ceil_div(g.n, T::kColumns));
    const int64_t first_row = tile.row * T::kRows, first_column = tile.column * T::kColumns;
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
    T::finish(task, first_column)(acc, first_row + warp_row);
}

// The same with a scale for each 128 columns of a row of a: int32 sums are promoted to fp32 after each of them.
template <int NJ, int Warps, int Stages, int Blocks>
VQVIT_KERNEL(Warps* kWarp, Blocks, grouped_gemm_kernel, const GemmTask task) {
    using T = Tile<1, NJ, Warps, Stages>;
    const vqvit_gemm& g = task.g;
    auto* stages = reinterpret_cast<int8_t*>(shared_memory());
    const TileIndex tile = tile_index(block_x(), ceil_div(g.m, T::kRows), ceil_div(g.n, T::kColumns));
    const int64_t first_row = tile.row * T::kRows, first_column = tile.column * T::kColumns;
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
    T::finish(task, first_column)(sum, first_row + warp_row);
}

// Every row's scale is out_scale until a value of its row is not finite, and its sum of codes starts at 0.
VQVIT_KERNEL(256, 1, start_rows_kernel, const float* out_scale, float* scale, int32_t* row_sum, int64_t rows) {
    const int64_t row = block_x() * 256 + thread_id();
    if (row >= rows) return;
    scale[row] = *out_scale;
    if (row_sum != nullptr) row_sum[row] = 0;
}

template <int MI, int NJ, int Warps, int Stages, int Blocks>
int launch_tile(const GemmTask& task, void* stream) {
    using T = Tile<MI, NJ, Warps, Stages>;
    const auto tiles = static_cast<unsigned>(ceil_div(task.g.m, T::kRows) * ceil_div(task.g.n, T::kColumns));
    return launch(
        gemm_kernel<MI, NJ, Warps, Stages, Blocks>, Dim3(tiles), T::kThreads, T::kSharedBytes, stream, task);
}

template <int NJ, int Warps, int Stages, int Blocks>
int launch_grouped(const GemmTask& task, void* stream) {
    using T = Tile<1, NJ, Warps, Stages>;
    const auto tiles = static_cast<unsigned>(ceil_div(task.g.m, T::kRows) * ceil_div(task.g.n, T::kColumns));
    return launch(
        grouped_gemm_kernel<NJ, Warps, Stages, Blocks>, Dim3(tiles), T::kThreads, T::kSharedBytes, stream, task);
}

// The tile of most reuse that still gives every multiprocessor a block. Codes by group or head need 128 columns.
int run_gemm(const GemmTask& task, void* stream) {
    if (task.g.m == 0 || task.g.n == 0) return VQVIT_OK;
    if (takes_wgmma(task)) return run_gemm_wgmma(task, stream);
    if (task.g.a_groups != 0) return launch_grouped<16, 4, 4, 2>(task, stream);
    const bool whole_rows = task.store == Store::kGroupCodes || task.store == Store::kProjection;
    const auto blocks = [&](int64_t rows, int64_t columns) {
        return ceil_div(task.g.m, rows) * ceil_div(task.g.n, columns);
    };
    const int64_t enough = multiprocessors();
    if (blocks(128, 128) >= enough) return launch_tile<2, 16, 4, 3, 2>(task, stream);
    if (whole_rows || blocks(64, 128) >= enough) return launch_tile<1, 16, 4, 4, 2>(task, stream);
    return launch_tile<1, 8, 4, 4, 3>(task, stream);
}

GemmTask task_of(const vqvit_gemm& g, Store store, void* out) {
    GemmTask task = {};
    task.g = g;
    task.store = store;
    task.out = out;
    return task;
}

}  // namespace
}  // namespace vqvit

using namespace vqvit;

extern "C" {

int vqvit_cuda_int8_mm(const vqvit_gemm* gemm, int32_t* acc, void* stream) {
    return run_gemm(task_of(*gemm, Store::kInt32, acc), stream);
}

int vqvit_cuda_int8_linear(const vqvit_gemm* gemm, void* y, int dtype, void* stream) {
    if (const int status = checked(*gemm)) return status;
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    GemmTask task = task_of(*gemm, Store::kFloat, y);
    task.dtype = dtype;
    return run_gemm(task, stream);
}

int vqvit_cuda_int8_linear_quantize(
    const vqvit_gemm* gemm, const float* out_scale, int8_t* codes, float* scale, int32_t* row_sum, void* stream) {
    if (const int status = checked(*gemm)) return status;
    GemmTask task = task_of(*gemm, out_scale != nullptr ? Store::kStaticCodes : Store::kGroupCodes, codes);
    task.out_scale = out_scale;
    task.scale = scale;
    task.row_sum = row_sum;
    if (out_scale != nullptr) {
        const Dim3 blocks(static_cast<unsigned>(ceil_div(gemm->m, 256)));
        if (const int status = launch(start_rows_kernel, blocks, 256, 0, stream, out_scale, scale, row_sum, gemm->m)) {
            return status;
        }
    }
    return run_gemm(task, stream);
}

int vqvit_cuda_int8_linear_qkv(
    const vqvit_gemm* gemm, int64_t tokens, int64_t heads, int8_t* codes, float* scale, float* v, void* stream) {
    if (const int status = checked(*gemm)) return status;
    GemmTask task = task_of(*gemm, Store::kProjection, codes);
    task.scale = scale;
    task.v = v;
    task.tokens = static_cast<int>(tokens);
    task.heads = static_cast<int>(heads);
    task.head_dim = static_cast<int>(gemm->n / (3 * heads));
    return run_gemm(task, stream);
}

}  // extern "C"
