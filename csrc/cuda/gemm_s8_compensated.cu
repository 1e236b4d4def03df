// Error-compensated INT8 GEMM on mma.sync (formula: kernels/gemm_s8_compensated.py; numerics §6).
//
//     y = α_a α_bᵀ ∘ (Aq Bqᵀ + [R_A Bqᵀ + Aq R_Bᵀ] / 254 + μ R_A R_Bᵀ / 254²) + bias, then the epilogue of gemm_s8.h
//
// Shapes: a and its residual codes (M, K) int8, b and its residual codes (N, K) int8, out (M, N) float. Up to four
// products of the same tiles share one loop: each tile is copied once, and one int32 accumulator serves each power of
// 1 / 254.
// Operations: 2 · M · N · K int8 for each product. Bytes: twice those of the plain GEMM with both residuals.
#include "gemm_s8_epilogue.h"
#include "library.h"
#include "mma_tiles.h"

namespace vqvit {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kStages = 3;
constexpr int kNJ = 8, kRows = 16 * kWarps, kColumns = 8 * kNJ;
constexpr int kOperandBytes = kRows * kBlockK;
constexpr int kStageBytes = 4 * kOperandBytes;  // a, its residual, b, its residual
static_assert(kRows == kColumns, "the four operands of a stage have one size");
template <int Activation>
using Finish = Epilogue<kColumns, Store::kFloat, Activation>;
constexpr int kStagingBytes = Finish<VQVIT_NONE>::kStagingBytes;
static_assert(kWarps * kStagingBytes <= kStages * kStageBytes, "the epilogue takes the place of the stages");

enum Term { kResidualA = 1, kResidualB = 2, kBothResiduals = 4 };

struct CompensatedTask {
    GemmTask gemm;
    const int8_t* a_residual;
    const int8_t* b_residual;
    int terms;
    float first_order, second_order;
};

template <int Activation>
VQVIT_KERNEL(kThreads, 1, compensated_gemm_kernel, const CompensatedTask task) {
    const vqvit_gemm& g = task.gemm.g;
    auto* stages = reinterpret_cast<int8_t*>(shared_memory());
    const TileIndex tile = task.gemm.tiles[static_cast<uint32_t>(block_x())];
    const int64_t first_row = int64_t{tile.row} * kRows;
    const int first_column = tile.column * kColumns;
    const int warp_row = 16 * warp_id();
    const bool reads_a_residual = (task.terms & (kResidualA | kBothResiduals)) != 0;
    const bool reads_b_residual = (task.terms & (kResidualB | kBothResiduals)) != 0;
    const Operand a(g.a, g.m, g.a_stride, g.k), b(g.b, g.n, g.k, g.k);
    const Operand a_residual(task.a_residual, g.m, g.a_stride, g.k), b_residual(task.b_residual, g.n, g.k, g.k);

    int32_t acc[1][kNJ][4] = {}, first[1][kNJ][4] = {}, second[1][kNJ][4] = {};
    walk_k<kStages>(
        g.k,
        [&](int stage, int64_t k) {
            int8_t* tiles = stages + stage * kStageBytes;
            a.copy_tile<kRows, kThreads>(tiles, first_row, k);
            b.copy_tile<kColumns, kThreads>(tiles + 2 * kOperandBytes, first_column, k);
            if (reads_a_residual) a_residual.copy_tile<kRows, kThreads>(tiles + kOperandBytes, first_row, k);
            if (reads_b_residual) b_residual.copy_tile<kColumns, kThreads>(tiles + 3 * kOperandBytes, first_column, k);
        },
        [&](int stage, int64_t) {
            int8_t* tiles = stages + stage * kStageBytes;
            int8_t *const ra = tiles + kOperandBytes, *const bq = ra + kOperandBytes, *const rb = bq + kOperandBytes;
            multiply<1, kNJ>(acc, tiles, bq, warp_row);
            if (task.terms & kResidualA) multiply<1, kNJ>(first, ra, bq, warp_row);
            if (task.terms & kResidualB) multiply<1, kNJ>(first, tiles, rb, warp_row);
            if (task.terms & kBothResiduals) multiply<1, kNJ>(second, ra, rb, warp_row);
        });

    float sum[1][kNJ][4];
    VQVIT_UNROLL
    for (int j = 0; j < kNJ; ++j) {
        VQVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
            float y = static_cast<float>(acc[0][j][i]);
            if (task.terms & (kResidualA | kResidualB)) {
                y = fmaf(static_cast<float>(first[0][j][i]), task.first_order, y);
            }
            if (task.terms & kBothResiduals) y = fmaf(static_cast<float>(second[0][j][i]), task.second_order, y);
            sum[0][j][i] = y;
        }
    }
    Finish<Activation> epilogue(task.gemm, first_column, shared_memory() + warp_id() * kStagingBytes);
    epilogue.template finish<true>(sum, first_row + warp_row, 16);
}

}  // namespace
}  // namespace vqvit

using namespace vqvit;

extern "C" {

int vqvit_cuda_int8_linear_compensated(
    const vqvit_gemm* gemm, const int8_t* a_residual, const int8_t* b_residual, int terms, float first_order,
    float second_order, void* y, int dtype, void* stream) {
    if (const int status = checked(*gemm)) return status;
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (terms < 0 || terms > (kResidualA | kResidualB | kBothResiduals)) return VQVIT_UNKNOWN_MODE;
    CompensatedTask task = {};
    task.gemm = float_task(*gemm, y, dtype);
    task.gemm.tiles = Tiles(gemm->m, gemm->n, kRows, kColumns);
    task.a_residual = a_residual;
    task.b_residual = b_residual;
    task.terms = terms;
    task.first_order = first_order;
    task.second_order = second_order;
    const bool none = gemm->activation == VQVIT_NONE;
    const auto kernel = none ? compensated_gemm_kernel<VQVIT_NONE> : compensated_gemm_kernel<kAnyActivation>;
    return launch(kernel, Dim3(task.gemm.tiles.count()), kThreads, kStages * kStageBytes, stream, task);
}

}  // extern "C"
