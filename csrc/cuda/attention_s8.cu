// INT8 attention, bit for bit that of vqvit/reference.py: kernels and launches. Formulas and layouts: attention_s8.h.
//
// Shapes: q (B, H, Sq, D), k and v (B, H, Sk, D) int8, row-major; scales q (B, H, Sq), k (B, H, Sk), v (B, H, D) fp32.
// Grid: a block for 64 queries, 16 a warp, of a head, or of the heads of 128 columns whose codes share a scale.
// The codes need the true row maximum before the first exponential:
//   resident: k and v of a head fit shared memory and a row's logits, at most 272, fit registers: 4 instructions a
//     logit less than a second product.
//   streaming: tiles of keys; a first pass finds the maximum, a second one recomputes the logits.
// Bytes: q and the output once from DRAM, k and v once and again from L2 for every 64 queries.
// Operations: 6 Sq Sk D int8 and about 18 Sq Sk fp32 a head. The exponential's 11 instructions a logit bound it.
#include "attention_s8_store.h"
#include "library.h"

namespace vqvit {
namespace {

constexpr int kTileKeys = 64, kWideTileKeys = 32;  // of a streamed tile
constexpr int kWideChunks = 4;                     // of a block where the head has more

// What a block works on: heads `head` to `head + heads - 1` of an image, and its warp's first query.
struct Place {
    int64_t image;
    int head, group, groups, heads, first;

    // The first head, counted over the batch.
    VQVIT_DEVICE int64_t first_head(const Attention& t) const { return image * t.heads + head; }
};

template <bool Codes>
VQVIT_DEVICE Place place(const Attention& t) {
    const auto block = static_cast<uint32_t>(block_x());
    const uint32_t unit = t.blocks.quotient(block), image = t.head_units.quotient(unit);
    const int first = static_cast<int>(block - unit * t.blocks.divisor) * kBlockRows + warp_id() * kRows;
    const auto group = static_cast<int>(unit - image * t.head_units.divisor);
    if (!Codes) return {image, group, 0, 0, 1, first};
    const int head = group * t.group_heads, left = t.heads - head, heads = left < t.group_heads ? left : t.group_heads;
    return {image, head, group, static_cast<int>(t.head_units.divisor), heads, first};
}

// ---- resident -------------------------------------------------------------------------------------------------------

// Offsets in shared memory. The slab of one head of 128 lies where its keys were.
struct ResidentLayout {
    int stride, values, scales, slab, bytes;

    VQVIT_HOST_DEVICE ResidentLayout(int keys, int dims, bool codes) {
        stride = row_stride(dims);
        const bool reuse = codes && dims == kGroup;
        const auto key_bytes = static_cast<int>(round_up(keys, 4 * kStep)) * stride;
        values = reuse && key_bytes < kSlabBytes ? kSlabBytes : key_bytes;
        scales = values + static_cast<int>(round_up(keys, 2 * kStep)) * stride;
        const int end = scales + static_cast<int>(round_up(keys, kStep)) * 4;
        slab = reuse ? 0 : end;
        bytes = end + (codes && !reuse ? kSlabBytes : 0);
    }
};

// Steps: of 16 keys, at most. Dim: head_dim rounded up to whole chunks, or 0 if known at run time only.
template <int Steps, int Dim, bool Codes>
VQVIT_KERNEL(kBlockThreads, Steps <= 13 && Dim > 0 && !Codes ? 3 : 2, attention_resident_kernel, Attention t) {
    constexpr bool kOneInteger = Steps * kStep <= kOneIntegerKeys;
    const Place at = place<Codes>(t);
    const int dims = Dim > 0 ? Dim : static_cast<int>(round_up(t.head_dim, kChunk));
    const int chunks = dims / kChunk, stride = dims + 16;
    const ResidentLayout layout(t.keys, dims, Codes);
    unsigned char* shared = shared_memory();
    auto* scales = reinterpret_cast<float*>(shared + layout.scales);
    float* slab = reinterpret_cast<float*>(shared + layout.slab) + warp_id() * kRows * kUnitColumns;
    const int steps = static_cast<int>(ceil_div(t.keys, kStep));
    const bool active = at.first < t.queries;
    Group group;

    for (int i = 0; i < at.heads; ++i) {
        const int64_t head = at.first_head(t) + i, rows = head * t.keys;
        if (i > 0) block_barrier();
        copy_rows(shared, stride, t.k + rows * t.head_dim, t.head_dim, t.keys, t.copies, t.unit);
        copy_key_scales(scales, t.k_scale + rows, t.keys, steps * kStep);
        copy_async_commit();
        copy_rows(shared + layout.values, stride, t.v + rows * t.head_dim, t.head_dim, t.keys, t.copies, t.unit);
        copy_async_commit();

        // logits, by groups of four steps, numerators
        int32_t acc[Steps][2][4];
        uint32_t high[(Steps + 1) / 2][4] = {}, low[(Steps + 1) / 2][4] = {};
        float inverse[2];
        VQVIT_UNROLL
        for (int n = 0; n < Steps * 8; ++n) acc[n / 8][n / 4 % 2][n % 4] = kMagicBits;
        copy_async_wait<1>();
        block_barrier();
        if (active) {
            const unsigned char* keys = shared + key_offset(stride);
            VQVIT_UNROLL_BY(Dim > 0 ? Dim / kChunk : 1)
            for (int chunk = 0; chunk < chunks; ++chunk) {
                uint32_t q[4];
                load_queries(q, t, head, at.first, chunk);
                VQVIT_UNROLL
                for (int s = 0; s < Steps; s += 4) {
                    if (s >= steps) continue;
                    VQVIT_UNROLL
                    for (int n = s; n < s + 4 && n < Steps; ++n) {
                        multiply_keys(acc[n], q, keys + n * kStep * stride + chunk * kChunk);
                    }
                }
            }
            Softmax softmax = begin_softmax(t, head, at.first);
            VQVIT_UNROLL
            for (int s = 0; s < Steps; ++s) {
                if (s >= steps) continue;
                to_logits<true>(acc[s], softmax, scales + s * kStep);
                update_top(softmax, acc[s]);
            }
            share_top(softmax);
            VQVIT_UNROLL
            for (int s = 0; s < Steps; ++s) {
                if (s < steps) to_digits(acc[s], softmax, high[s / 2] + s % 2 * 2, low[s / 2] + s % 2 * 2);
            }
            const int32_t largest = largest_bits(scales, t.keys);
            finish_softmax(inverse, softmax, t, head, at.first, 4 * steps, largest);
        }

        // values
        copy_async_wait<0>();
        block_barrier();
        if (!active) continue;
        const unsigned char* values = shared + layout.values + value_offset(stride);
        for (int chunk = 0; chunk < chunks; chunk += Codes ? 2 : 1) {
            VQVIT_UNROLL
            for (int half = 0; half < (Codes ? 2 : 1); ++half) {
                Values sums;
                clear(sums);
                VQVIT_UNROLL
                for (int s = 0; s < Steps; s += 2) {
                    if (s >= steps) continue;
                    const unsigned char* v = values + s * kStep * stride + (chunk + half) * kChunk;
                    multiply_values(sums, high[s / 2], low[s / 2], v);
                }
                const int channel = (chunk + half) * kChunk;
                to_outputs<kOneInteger>(group.out[half], sums, inverse, t, head, channel);
                if (!Codes) store_floats(t, at.image, at.head, at.first, channel, group.out[0]);
            }
            if (Codes) {
                update_largest(group);
                if (i + 1 < at.heads || chunk + 2 < chunks) spill(group, slab);
            }
        }
    }
    if (Codes && active) {
        const int units = at.heads * t.head_dim / kUnitColumns;
        store_codes(t, at.image, at.group, at.groups, at.first, group, units, slab);
    }
}

// ---- streaming ------------------------------------------------------------------------------------------------------

// Offsets in a buffer of a tile, and of the slab behind the buffers.
struct StreamingLayout {
    int keys, buffers, key_stride, value_stride, values, scales, buffer_bytes, slab, bytes;

    VQVIT_HOST_DEVICE StreamingLayout(int dims, int chunks, bool wide, bool codes) {
        keys = wide ? kWideTileKeys : kTileKeys;
        buffers = wide ? 1 : 2;
        key_stride = row_stride(wide ? dims : chunks * kChunk);
        value_stride = row_stride(chunks * kChunk);
        values = keys * key_stride;
        scales = values + keys * value_stride;
        buffer_bytes = scales + keys * 4;
        slab = buffers * buffer_bytes;
        bytes = slab + (codes ? kSlabBytes : 0);
    }
};

// Chunks: of output channels; of the head, or (Wide) of this block, whose y counts them.
template <int Chunks, bool Wide, bool Codes>
VQVIT_KERNEL(kBlockThreads, Chunks <= 2 && !Codes ? 3 : 2, attention_streaming_kernel, Attention t) {
    const Place at = place<Codes>(t);
    const StreamingLayout layout(t.head_dim, Chunks, Wide, Codes);
    unsigned char* shared = shared_memory();
    float* slab = reinterpret_cast<float*>(shared + layout.slab) + warp_id() * kRows * kUnitColumns;
    const int channel = Wide ? static_cast<int>(block_y()) * Chunks * kChunk : 0;
    const bool whole_slice = t.head_dim - channel >= Chunks * kChunk;
    const Divisor& value_copies = !Wide ? t.copies : whole_slice ? t.slice_copies : t.last_slice_copies;
    const auto tiles = static_cast<int>(ceil_div(t.keys, layout.keys));
    const bool active = at.first < t.queries;
    const int heads = Codes && Chunks * kChunk < kGroup ? at.heads : 1;
    Group group;

    for (int i = 0; i < heads; ++i) {
        const int64_t head = at.first_head(t) + i;
        Softmax softmax = begin_softmax(t, head, at.first);
        int32_t largest = 0;
        uint32_t q[Wide ? 1 : Chunks][4];
        VQVIT_UNROLL
        for (int c = 0; c < (Wide ? 0 : Chunks); ++c) load_queries(q[c], t, head, at.first, c);

        const auto stage = [&](int n, bool with_values) {
            unsigned char* to = shared + n % layout.buffers * layout.buffer_bytes;
            const int start = n * layout.keys, left = t.keys - start;
            const int keys = left < layout.keys ? left : layout.keys;
            const int64_t from = (head * t.keys + start) * t.head_dim;
            copy_rows(to, layout.key_stride, t.k + from, t.head_dim, keys, t.copies, t.unit);
            copy_key_scales(
                reinterpret_cast<float*>(to + layout.scales), t.k_scale + head * t.keys + start, keys, layout.keys);
            if (with_values) {
                unsigned char* values = to + layout.values;
                copy_rows(values, layout.value_stride, t.v + from + channel, t.head_dim, keys, value_copies, t.unit);
            }
            copy_async_commit();
        };
        const auto logits = [&](int32_t(&acc)[2][4], const unsigned char* tile, int step) {
            VQVIT_UNROLL
            for (int n = 0; n < 8; ++n) acc[n / 4][n % 4] = Wide ? 0 : kMagicBits;
            const unsigned char* keys = tile + step * kStep * layout.key_stride + key_offset(layout.key_stride);
            if (Wide) {
                for (int c = 0; c * kChunk < t.head_dim; ++c) {
                    load_queries(q[0], t, head, at.first, c);
                    multiply_keys(acc, q[0], keys + c * kChunk);
                }
            } else {
                VQVIT_UNROLL
                for (int c = 0; c < Chunks; ++c) multiply_keys(acc, q[Wide ? 0 : c], keys + c * kChunk);
            }
            to_logits<!Wide>(acc, softmax, reinterpret_cast<const float*>(tile + layout.scales) + step * kStep);
        };
        // Calls `work` with each tile, while the next one is on its way.
        const auto for_tiles = [&](bool with_values, auto work) {
            block_barrier();  // the buffers are free
            if (layout.buffers > 1) stage(0, with_values);
            for (int n = 0; n < tiles; ++n) {
                if (layout.buffers == 1) {
                    if (n > 0) block_barrier();
                    stage(n, with_values);
                }
                copy_async_wait<0>();
                block_barrier();
                if (layout.buffers > 1 && n + 1 < tiles) stage(n + 1, with_values);
                const int left = t.keys - n * layout.keys;
                if (active) work(shared + n % layout.buffers * layout.buffer_bytes, left);
            }
        };

        for_tiles(false, [&](const unsigned char* tile, int left) {
            VQVIT_UNROLL
            for (int s = 0; s < (Wide ? kWideTileKeys : kTileKeys) / kStep; ++s) {
                if (s * kStep >= left) continue;
                int32_t acc[2][4];
                logits(acc, tile, s);
                update_top(softmax, acc);
            }
            const auto* scales = reinterpret_cast<const float*>(tile + layout.scales);
            for (int j = lane_id(); j < layout.keys && j < left; j += kWarp) {
                const int32_t bits = magnitude_bits(scales[j]);
                largest = bits > largest ? bits : largest;
            }
        });
        share_top(softmax);
        Values sums[Chunks];
        VQVIT_UNROLL
        for (int c = 0; c < Chunks; ++c) clear(sums[c]);
        for_tiles(true, [&](const unsigned char* tile, int left) {
            for (int s = 0; s < layout.keys / kStep; s += 2) {
                if (s * kStep >= left) continue;
                uint32_t high[4], low[4];
                VQVIT_UNROLL
                for (int half = 0; half < 2; ++half) {
                    int32_t acc[2][4];
                    logits(acc, tile, s + half);
                    to_digits(acc, softmax, high + 2 * half, low + 2 * half);
                }
                const unsigned char* v = tile + layout.values + s * kStep * layout.value_stride;
                VQVIT_UNROLL
                for (int c = 0; c < Chunks; ++c) {
                    multiply_values(sums[c], high, low, v + value_offset(layout.value_stride) + c * kChunk);
                }
            }
        });
        if (!active) continue;

        float inverse[2];
        const int summed = static_cast<int>(round_up(t.keys, 2 * kStep)) / 4;
        finish_softmax(inverse, softmax, t, head, at.first, summed, group_max(largest));
        VQVIT_UNROLL
        for (int c = 0; c < Chunks; ++c) {
            to_outputs<false>(group.out[c % 2], sums[c], inverse, t, head, channel + c * kChunk);
            if (!Codes) store_floats(t, at.image, at.head, at.first, channel + c * kChunk, group.out[c % 2]);
            if (Codes && c % 2 == 1) {
                update_largest(group);
                if (i + 1 < heads || c + 1 < Chunks) spill(group, slab);
            }
        }
    }
    if (Codes && active) {
        const int units = heads * t.head_dim / kUnitColumns;
        store_codes(t, at.image, at.group, at.groups, at.first, group, units, slab);
    }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// 208 keys at three blocks a multiprocessor, 272 (257 and 261 are common) at two.
constexpr int kResidentSteps = 13, kLongResidentSteps = 17;

template <int Steps, int Dim, bool Codes>
int launch_resident(const Attention& t, int64_t blocks, int shared_bytes, void* stream) {
    const Dim3 grid(static_cast<unsigned>(blocks));
    return launch(attention_resident_kernel<Steps, Dim, Codes>, grid, kBlockThreads, shared_bytes, stream, t);
}

template <int Chunks, bool Wide, bool Codes>
int launch_streaming(const Attention& t, int64_t blocks, void* stream) {
    const StreamingLayout layout(t.head_dim, Chunks, Wide, Codes);
    const auto slices = static_cast<unsigned>(Wide ? ceil_div(t.head_dim, Chunks * kChunk) : 1);
    const Dim3 grid(static_cast<unsigned>(blocks), slices);
    return launch(attention_streaming_kernel<Chunks, Wide, Codes>, grid, kBlockThreads, layout.bytes, stream, t);
}

template <bool Codes>
int attend(Attention t, int64_t batch, void* stream) {
    const int64_t heads = Codes ? ceil_div(static_cast<int64_t>(t.heads) * t.head_dim, kGroup) : t.heads;
    const int64_t blocks_of_head = ceil_div(t.queries, kBlockRows), blocks = batch * heads * blocks_of_head;
    if (blocks == 0) return VQVIT_OK;
    const int slice = kWideChunks * kChunk, last_slice = t.head_dim % slice;
    t.group_heads = kGroup / t.head_dim;
    t.blocks = Divisor(blocks_of_head);
    t.head_units = Divisor(heads);
    t.copies = Divisor(t.head_dim / t.unit);
    t.slice_copies = Divisor(slice / t.unit);
    t.last_slice_copies = Divisor(last_slice / t.unit);
    const auto dims = static_cast<int>(round_up(t.head_dim, kChunk));
    const bool longer = t.keys > kResidentSteps * kStep;
    const int bytes = ResidentLayout(t.keys, dims, Codes).bytes;
    if (t.keys <= kLongResidentSteps * kStep && bytes <= kMaxSharedBytes) {
        if (dims == 64) {
            return longer ? launch_resident<kLongResidentSteps, 64, Codes>(t, blocks, bytes, stream)
                          : launch_resident<kResidentSteps, 64, Codes>(t, blocks, bytes, stream);
        }
        if (dims <= kMaxBiasedDim && !longer) {
            return launch_resident<kResidentSteps, 0, Codes>(t, blocks, bytes, stream);
        }
    }
    if (dims <= 64) return launch_streaming<2, false, Codes>(t, blocks, stream);
    if (Codes) return VQVIT_UNKNOWN_MODE;  // accumulators of 128 channels and a group's codes do not fit registers
    if (dims <= 96) return launch_streaming<3, false, false>(t, blocks, stream);
    if (dims <= 128) return launch_streaming<4, false, false>(t, blocks, stream);
    return launch_streaming<kWideChunks, true, false>(t, blocks, stream);
}

Attention operands(
    const int8_t* q, const int8_t* k, const int8_t* v, const float* q_scale, const float* k_scale,
    const float* v_scale, float logit_scale, int64_t heads, int64_t queries, int64_t keys, int64_t head_dim) {
    const uintptr_t low_bits = reinterpret_cast<uintptr_t>(q) | reinterpret_cast<uintptr_t>(k) |
        reinterpret_cast<uintptr_t>(v) | static_cast<uintptr_t>(head_dim);
    Attention t{};
    t.q = q, t.k = k, t.v = v, t.q_scale = q_scale, t.k_scale = k_scale, t.v_scale = v_scale;
    t.logit_scale = logit_scale;
    t.heads = static_cast<int>(heads), t.queries = static_cast<int>(queries), t.keys = static_cast<int>(keys);
    t.head_dim = static_cast<int>(head_dim);
    t.unit = low_bits % 16 == 0 ? 16 : low_bits % 4 == 0 ? 4 : 1;
    return t;
}

}  // namespace
}  // namespace vqvit

extern "C" int vqvit_cuda_int8_attention(
    const int8_t* q, const int8_t* k, const int8_t* v, const float* q_scale, const float* k_scale,
    const float* v_scale, float logit_scale, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
    int64_t head_dim, void* out, int dtype, void* stream) {
    using namespace vqvit;
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    Attention t = operands(q, k, v, q_scale, k_scale, v_scale, logit_scale, heads, queries, keys, head_dim);
    t.out = out, t.dtype = dtype;
    t.vector = head_dim % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
    return attend<false>(t, batch, stream);
}

extern "C" int vqvit_cuda_int8_attention_quantize(
    const int8_t* q, const int8_t* k, const int8_t* v, const float* q_scale, const float* k_scale,
    const float* v_scale, float logit_scale, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
    int64_t head_dim, int8_t* codes, float* scale, void* stream) {
    using namespace vqvit;
    Attention t = operands(q, k, v, q_scale, k_scale, v_scale, logit_scale, heads, queries, keys, head_dim);
    t.codes = codes, t.scale = scale;
    t.vector = reinterpret_cast<uintptr_t>(codes) % 4 == 0;
    return attend<true>(t, batch, stream);
}
