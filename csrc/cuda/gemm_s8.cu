// INT8 GEMM on mma.sync with fused epilogues: every GPU from compute capability 7.5 on (formulas: kernels/gemm_s8.py).
//
//     acc = Σ_k a[m, k] · b[n, k] in int32; with group scales s = fma(acc_g, α_a[m, g], s) for each 128 columns of K
//
// Shapes: a (M, K) int8 row-major, b (N, K) int8 row-major, out (M, N). Grid: one block a tile, swizzled (tile_index).
// Warps are stacked along M and each holds all columns of the tile, so that a row's codes need two shuffles and no
// barrier. K is walked 64 bytes at a time through a ring of stages filled by cp.async; 16-byte chunk c of row r lies at
// c ^ (r / 2 % 4), which lets ldmatrix read eight rows without a bank conflict.
// Operations: 2 · M · N · K int8. Bytes: (kRows + kColumns) · K a tile from L2.
#include "gemm_s8.h"

#include "library.h"

namespace vqvit {
namespace {

constexpr int kBlockK = 64;  // bytes of a row in a stage
constexpr int kChunks = kBlockK / 16;

VQVIT_DEVICE int8_t* chunk_of(int8_t* tile, int row, int chunk) {
    return tile + row * kBlockK + ((chunk ^ (row / 2 % kChunks)) * 16);
}

// One operand: `rows` rows `stride` apart, of k bytes.
struct Operand {
    const int8_t* data;
    int64_t rows, stride, k;
    bool aligned;  // every chunk may be copied as 16 bytes

    VQVIT_DEVICE Operand(const int8_t* data_, int64_t rows_, int64_t stride_, int64_t k_)
        : data(data_), rows(rows_), stride(stride_), k(k_),
          aligned(reinterpret_cast<uintptr_t>(data_) % 16 == 0 && stride_ % 16 == 0 && k_ % 16 == 0) {}

    // 16 bytes from (row, first_k), zeros outside.
    VQVIT_DEVICE void copy_chunk(int8_t* to, int64_t row, int64_t first_k) const {
        const bool inside = row < rows && first_k < k;
        const int8_t* from = inside ? data + row * stride + first_k : data;
        if (aligned) return copy_async_16(to, from, inside ? 16 : 0);
        const auto valid = static_cast<int>(!inside ? 0 : k - first_k < 16 ? k - first_k : 16);
        uint32_t words[4] = {};
        VQVIT_UNROLL
        for (int i = 0; i < 16; ++i) {
            if (i < valid) words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << (8 * (i % 4));
        }
        VQVIT_UNROLL
        for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
    }

    // `Rows` rows from (first_row, first_k) into a stage, by `Threads` threads.
    template <int Rows, int Threads>
    VQVIT_DEVICE void copy_tile(int8_t* tile, int64_t first_row, int64_t first_k) const {
        VQVIT_UNROLL
        for (int i = thread_id(); i < Rows * kChunks; i += Threads) {
            const int row = i / kChunks, chunk = i % kChunks;
            copy_chunk(chunk_of(tile, row, chunk), first_row + row, first_k + 16 * chunk);
        }
    }
};

// A fragments of 16 rows, or B fragments of 16 rows (two of 8), for 32 bytes of K from chunk 2 · step.
VQVIT_DEVICE void load_a(uint32_t (&a)[4], int8_t* tile, int first_row, int step) {
    const int matrix = lane_id() / 8;
    load_matrices(a, chunk_of(tile, first_row + matrix % 2 * 8 + lane_id() % 8, 2 * step + matrix / 2));
}
VQVIT_DEVICE void load_b(uint32_t (&b)[4], int8_t* tile, int first_row, int step) {
    const int matrix = lane_id() / 8;
    load_matrices(b, chunk_of(tile, first_row + matrix / 2 * 8 + lane_id() % 8, 2 * step + matrix % 2));
}

// A warp's (16 · MI, 8 · NJ) products with 64 bytes of K.
template <int MI, int NJ>
VQVIT_DEVICE void multiply(int32_t (&acc)[MI][NJ][4], int8_t* a_tile, int8_t* b_tile, int first_row) {
    VQVIT_UNROLL
    for (int step = 0; step < kBlockK / 32; ++step) {
        uint32_t a[MI][4];
        VQVIT_UNROLL
        for (int i = 0; i < MI; ++i) load_a(a[i], a_tile, first_row + 16 * i, step);
        VQVIT_UNROLL
        for (int j = 0; j < NJ; j += 2) {
            uint32_t b[4];
            load_b(b, b_tile, 8 * j, step);
            VQVIT_UNROLL
            for (int i = 0; i < MI; ++i) {
                mma_s8(acc[i][j], a[i], b[0], b[1]);
                mma_s8(acc[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

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

// Fills a ring of stages ahead of the products: load(stage, first_k) queues a stage, use(stage, first_k) multiplies it.
template <int Stages, class Load, class Use>
VQVIT_DEVICE void walk_k(int64_t k, const Load& load, const Use& use) {
    const auto steps = static_cast<int>(ceil_div(k, kBlockK));
    VQVIT_UNROLL
    for (int s = 0; s < Stages - 1; ++s) {
        if (s < steps) load(s, s * kBlockK);
        copy_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<Stages - 2>();
        block_barrier();  // this stage is filled, and every warp is done with the one that is filled next
        const int next = step + Stages - 1;
        if (next < steps) load(next % Stages, next * kBlockK);
        copy_async_commit();
        use(step % Stages, step * kBlockK);
    }
    copy_async_wait<0>();
    block_barrier();
}

template <int MI, int NJ, int Warps, int Stages, int Blocks>
VQVIT_KERNEL(Warps* kWarp, Blocks)
gemm_kernel(const GemmTask task) {
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
VQVIT_KERNEL(Warps* kWarp, Blocks)
grouped_gemm_kernel(const GemmTask task) {
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
VQVIT_KERNEL(256, 1)
start_rows_kernel(const float* out_scale, float* scale, int32_t* row_sum, int64_t rows) {
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
    return launch(grouped_gemm_kernel<NJ, Warps, Stages, Blocks>, Dim3(tiles), T::kThreads, T::kSharedBytes, stream, task);
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

bool known_dtype(int dtype) { return dtype >= VQVIT_F32 && dtype <= VQVIT_BF16; }

int checked(const vqvit_gemm& g) {
    if (!known_dtype(g.bias_dtype) || !known_dtype(g.layer_scale_dtype) || !known_dtype(g.residual_dtype)) {
        return VQVIT_UNKNOWN_DTYPE;
    }
    return g.activation >= VQVIT_NONE && g.activation <= VQVIT_RELU ? VQVIT_OK : VQVIT_UNKNOWN_ACTIVATION;
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
