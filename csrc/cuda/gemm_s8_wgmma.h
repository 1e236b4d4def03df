// INT8 GEMM for Hopper: wgmma on tiles that TMA copies, two consumer warpgroups in ping-pong (formulas: gemm_s8.cu).
//
// Grid: one block a multiprocessor, which walks tiles of 64 · MI rows and 128 columns. Warpgroup 0 fills a ring of
// stages of 128 bytes of K; warpgroups 1 and 2 take turns: one multiplies its tile while the other finishes the one before, so
// that an epilogue as long as the main loop (GELU and codes at K = 768) hides under it.
// The stages of a tile follow those of the tile before, and a main loop begins when the one before has waited for its
// last stage. A wait by parity tells a phase from the one before only, so a consumer that waited further ahead would
// pass at the wrong fill: tests/test_ring_protocol.py shows it.
// With group scales a stage is a group: its products land in one of two sets of registers, and while the next stage is
// multiplied into the other one, they are promoted to fp32.
// Shared memory: stages, swizzled over 128 bytes as wgmma reads them, and 10.1 KiB for each consumer warp's epilogue.
// Operations: 2 · M · N · K int8. Bytes: (64 · MI + 128) · K a tile from L2.
#pragma once

#include "gemm_s8_epilogue.h"
#include "hopper.h"
#include "library.h"

namespace vqvit {

constexpr int kColumns = kWgmmaColumns, kStageK = kSwizzleBytes;
constexpr int kConsumers = 2, kConsumerWarps = 4;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;  // 2 · 240 + 24 <= 65536 / 128
constexpr int kStagingBytes = Epilogue<kColumns, Store::kInt32, VQVIT_NONE>::kStagingBytes;  // of every kind

template <int MI>
struct Ring {
    static constexpr int kRows = 64 * MI;
    static constexpr int kStageBytes = (kRows + kColumns) * kStageK;
    static constexpr int kStages = MI == 1 ? 6 : 4;
    static constexpr int kAllStagingBytes = kConsumers * kConsumerWarps * kStagingBytes;
    static constexpr int kBarriers = 2 * kStages + kConsumers;
    static constexpr int kSharedBytes =
        kStages * kStageBytes + kAllStagingBytes + kBarriers * static_cast<int>(sizeof(SharedBarrier));

    int8_t* stages = reinterpret_cast<int8_t*>(shared_memory());
    unsigned char* staging = shared_memory() + kStages * kStageBytes;
    SharedBarrier* full = reinterpret_cast<SharedBarrier*>(staging + kAllStagingBytes);
    SharedBarrier* empty = full + kStages;
    SharedBarrier* turns = empty + kStages;  // of the consumers: a phase ends when the other has waited for its stages

    // Use number `use` of the ring, counted over all tiles of the block.
    VQVIT_DEVICE static int stage(int use) { return use % kStages; }
    VQVIT_DEVICE static int parity(int use) { return use / kStages % 2; }
    VQVIT_DEVICE int8_t* a(int use) const { return stages + stage(use) * kStageBytes; }
    VQVIT_DEVICE int8_t* b(int use) const { return a(use) + kRows * kStageK; }

    VQVIT_DEVICE void init() const {
        if (thread_id() == 0) {
            for (int s = 0; s < kStages; ++s) {
                barrier_init(full + s, 1);
                barrier_init(empty + s, kConsumerWarps);
            }
            for (int c = 0; c < kConsumers; ++c) barrier_init(turns + c, kConsumerWarps);
            barrier_init_done();
        }
        block_barrier();
    }

    VQVIT_DEVICE void fill(int use, const TensorMap& a_map, const TensorMap& b_map, int k, int row, int column) const {
        SharedBarrier* barrier = full + stage(use);
        barrier_wait(empty + stage(use), parity(use) ^ 1);
        barrier_expect(barrier, kStageBytes);
        copy_box(a(use), a_map, k, row, barrier);
        copy_box(b(use), b_map, k, column, barrier);
    }

    // The calling warp no longer reads the stage of `use`.
    VQVIT_DEVICE void release(int use) const {
        if (lane_id() == 0) barrier_arrive(empty + stage(use));
    }

    // Tile number `turn` of the block: its consumer waits for the one before, and lets the one after begin.
    VQVIT_DEVICE void begin_turn(int turn) const {
        const int round = turn / kConsumers, first = turn % kConsumers == 0;  // nobody comes before tile 0
        barrier_wait(turns + turn % kConsumers, (round + first) % 2);
    }
    VQVIT_DEVICE void end_turn(int turn) const {
        if (lane_id() == 0) barrier_arrive(turns + (turn + 1) % kConsumers);
    }

    // Queue the products of a stage as one group.
    VQVIT_DEVICE void multiply(int use, int32_t (&acc)[MI][kColumns / 8][4], bool add) const {
        barrier_wait(full + stage(use), parity(use));
        wgmma_fence();
        VQVIT_UNROLL
        for (int k = 0; k < kStageK; k += 32) {
            VQVIT_UNROLL
            for (int i = 0; i < MI; ++i) wgmma_s8(acc[i], a(use) + i * 64 * kStageK + k, b(use) + k, add || k > 0);
        }
        wgmma_commit();
    }
};

template <int GroupsLeft, int MI>
VQVIT_DEVICE void wait_all(int32_t (&acc)[MI][kColumns / 8][4]) {
    VQVIT_UNROLL
    for (int i = 0; i < MI; ++i) wgmma_wait<GroupsLeft>(acc[i]);
}

// First row of the fragments acc[0] of this warp; those of acc[i] are 64 i further down.
VQVIT_DEVICE int warp_row() { return 16 * (thread_id() % kWarpgroup / kWarp); }

// One scale a row: sums of the whole of K.
template <int MI, class Finish>
VQVIT_DEVICE void plain_tile(const Ring<MI>& ring, Finish& epilogue, int64_t first_row, int turn, int steps) {
    const int first_use = turn * steps;
    int32_t acc[MI][kColumns / 8][4];
    ring.begin_turn(turn);
    for (int step = 0; step < steps; ++step) {
        ring.multiply(first_use + step, acc, step > 0);
        if (step == 0) continue;
        wait_all<1>(acc);
        ring.release(first_use + step - 1);
    }
    ring.end_turn(turn);
    wait_all<0>(acc);
    ring.release(first_use + steps - 1);
    epilogue.template finish<true>(acc, first_row + warp_row(), 64);
}

// A scale for each row and stage.
template <class Finish>
VQVIT_DEVICE void grouped_tile(
    const GemmTask& task, const Ring<1>& ring, Finish& epilogue, int64_t first_row, int turn, int steps) {
    const int first_use = turn * steps;
    const int64_t groups = ceil_div(task.g.k, kGroup);
    const int64_t row = first_row + warp_row() + lane_id() / 4;
    const auto scale_of = [&](int64_t m, int step) { return m < task.g.m ? task.g.a_scale[m * groups + step] : 0.0f; };
    float sum[1][kColumns / 8][4] = {};
    int32_t even[1][kColumns / 8][4], odd[1][kColumns / 8][4];

    const auto promote = [&](int32_t (&acc)[1][kColumns / 8][4], int step) {
        const float scale[2] = {scale_of(row, step), scale_of(row + 8, step)};
        ring.release(first_use + step);
        VQVIT_UNROLL
        for (int j = 0; j < kColumns / 8; ++j) {
            VQVIT_UNROLL
            for (int i = 0; i < 4; ++i) {  // |acc| <= 128 · 127² < 2^22
                sum[0][j][i] = fmaf(small_int_to_fp32(acc[0][j][i]), scale[i / 2], sum[0][j][i]);
            }
        }
    };
    ring.begin_turn(turn);
    ring.multiply(first_use, even, false);
    int step = 0;
    for (; step + 2 < steps; step += 2) {
        ring.multiply(first_use + step + 1, odd, false);
        wait_all<1>(even);
        promote(even, step);
        ring.multiply(first_use + step + 2, even, false);
        wait_all<1>(odd);
        promote(odd, step + 1);
    }
    if (step + 1 < steps) {
        ring.multiply(first_use + step + 1, odd, false);
        ring.end_turn(turn);
        wait_all<1>(even);
        promote(even, step);
        wait_all<0>(odd);
        promote(odd, step + 1);
    } else {
        ring.end_turn(turn);
        wait_all<0>(even);
        promote(even, step);
    }
    epilogue.template finish<false>(sum, first_row + warp_row(), 64);
}

#ifdef __CUDACC__
#define VQVIT_GRID_CONSTANT __grid_constant__
#else
#define VQVIT_GRID_CONSTANT
#endif

template <int MI, bool Grouped, int StoreKind, int Activation>
VQVIT_KERNEL(
    kThreads, 1, wgmma_kernel, const VQVIT_GRID_CONSTANT TensorMap a_map, const VQVIT_GRID_CONSTANT TensorMap b_map,
    const VQVIT_GRID_CONSTANT GemmTask task) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const Ring<MI> ring;
    ring.init();
    const auto tiles = task.tiles.count(), blocks = static_cast<unsigned>(grid_x());
    const auto steps = static_cast<int>(ceil_div(task.g.k, kStageK));
    const int warpgroup = thread_id() / kWarpgroup;
    if (warpgroup == 0) {
        lower_registers<kProducerRegisters>();
        if (thread_id() != 0) return;
        prefetch(a_map);
        prefetch(b_map);
        int use = 0;
        for (auto index = static_cast<unsigned>(block_x()); index < tiles; index += blocks) {
            const TileIndex tile = task.tiles[index];
            const int row = tile.row * Ring<MI>::kRows, column = tile.column * kColumns;
            for (int step = 0; step < steps; ++step) ring.fill(use++, a_map, b_map, step * kStageK, row, column);
        }
        return;
    }
    raise_registers<kConsumerRegisters>();
    unsigned char* staging = ring.staging + (warp_id() - kConsumerWarps) * kStagingBytes;
    int turn = warpgroup - 1;
    for (auto index = static_cast<unsigned>(block_x()) + turn * blocks; index < tiles; index += kConsumers * blocks) {
        const TileIndex tile = task.tiles[index];
        Epilogue<kColumns, StoreKind, Activation> epilogue(task, tile.column * kColumns, staging);
        const int64_t first_row = int64_t{tile.row} * Ring<MI>::kRows;
        if constexpr (Grouped) {
            grouped_tile(task, ring, epilogue, first_row, turn, steps);
        } else {
            plain_tile<MI>(ring, epilogue, first_row, turn, steps);
        }
        turn += kConsumers;
    }
#endif
}

template <int MI, bool Grouped, int StoreKind, int Activation>
int launch_wgmma(GemmTask task, void* stream) {
    const vqvit_gemm& g = task.g;
    TensorMap a, b;
    if (const int status = describe_tensor(&a, g.a, g.m, g.k, g.a_stride, Ring<MI>::kRows)) return status;
    if (const int status = describe_tensor(&b, g.b, g.n, g.k, g.k, kColumns)) return status;
    task.tiles = Tiles(g.m, g.n, Ring<MI>::kRows, kColumns);
    const unsigned tiles = task.tiles.count(), most = static_cast<unsigned>(multiprocessors());
    const Dim3 blocks(tiles < most ? tiles : most);
    const auto kernel = wgmma_kernel<MI, Grouped, StoreKind, Activation>;
    return launch(kernel, blocks, kThreads, Ring<MI>::kSharedBytes, stream, a, b, task);
}

template <int StoreKind, int Activation>
int run_wgmma(const GemmTask& task, void* stream) {
    if constexpr (StoreKind != Store::kInt32) {
        constexpr int kGrouped = grouped_activation(StoreKind, Activation);
        if (task.g.a_groups != 0) return launch_wgmma<1, true, StoreKind, kGrouped>(task, stream);
    }
    const int64_t large = ceil_div(task.g.m, 128) * ceil_div(task.g.n, kColumns);
    if (large >= multiprocessors()) return launch_wgmma<2, false, StoreKind, Activation>(task, stream);
    return launch_wgmma<1, false, StoreKind, Activation>(task, stream);
}

}  // namespace vqvit
