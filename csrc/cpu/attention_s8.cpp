// int8_attention: heads, and blocks of queries where heads are few, shared out to threads. See attention_s8.h.
#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

using namespace vqvit;

extern "C" int vqvit_cpu_int8_attention(
    const int8_t* q, const int8_t* k, const int8_t* v, const float* q_scale, const float* k_scale,
    const float* v_scale, float logit_scale, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
    int64_t head_dim, void* out, int dtype, int threads) try {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (batch * heads * queries == 0) return VQVIT_OK;
    const Kernels& isa = kernels();
    const AttentionTask task = {
        q, k, v, q_scale, k_scale, v_scale, logit_scale, heads, queries, keys, head_dim, out, dtype,
    };
    // A thread packs the keys and values of a head once, so heads are cut only where whole ones leave threads idle.
    const int64_t tiles = ceil_div(queries, isa.tile_rows);
    const int64_t wanted = ceil_div(threads * kTasksPerThread, batch * heads);
    const int64_t blocks = batch * heads % threads == 0 ? 1 : std::min(tiles, wanted);
    const int64_t work = batch * heads * queries * keys * (2 * head_dim + kRowOperations);
    parallel_for<LoadedHead>(batch * heads * blocks, work, threads, [&](LoadedHead& loaded, int64_t i) {
        const int64_t head = i / blocks, block = i % blocks;
        const int64_t first = block_start(block, blocks, tiles) * isa.tile_rows;
        const int64_t last = std::min(block_start(block + 1, blocks, tiles) * isa.tile_rows, queries);
        isa.attention_head(task, head / heads, head % heads, first, last, loaded);
    });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY
