// The main loop of GEMMs on mma.sync: K is walked 64 bytes at a time through a ring of stages filled by cp.async. The
// 16-byte chunk c of row r lies at c ^ (r / 2 % 4), which lets ldmatrix read eight rows without a bank conflict.
#pragma once

#include "device.h"

namespace vqvit {

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

}  // namespace vqvit
