// How INT8 attention stores its fp32 outputs: as floats, or as int8 codes whose scale 128 columns share.
#pragma once

#include "attention_s8.h"

namespace vqvit {

constexpr int kUnitColumns = 64;                           // of codes that a lane holds at once
constexpr int kSlabBytes = kBlockRows * kUnitColumns * 4;  // first 64 of 128 columns, fp32

// ---- outputs --------------------------------------------------------------------------------------------------------

template <class T>
VQVIT_DEVICE void store_four(void* out, int64_t at, const float (&x)[4], int valid, bool vector) {
    struct alignas(4 * sizeof(T)) Four {
        T x[4];
    };
    T* p = static_cast<T*>(out) + at;
    if (vector && valid >= 4) {
        *reinterpret_cast<Four*>(p) = {from_fp32<T>(x[0]), from_fp32<T>(x[1]), from_fp32<T>(x[2]), from_fp32<T>(x[3])};
        return;
    }
    VQVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (i < valid) p[i] = from_fp32<T>(x[i]);
    }
}

// Of head `head` of an image, whose columns begin at `channel`.
VQVIT_DEVICE void store_floats(
    const Attention& t, int64_t image, int head, int first, int channel, const Outputs& out) {
    VQVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int j = i / 2, r = i % 2;
        const int row = first + lane_id() / 4 + 8 * r, column = channel + 16 * j + 4 * (lane_id() % 4);
        if (row >= t.queries) continue;
        const int64_t at = ((image * t.queries + row) * t.heads + head) * t.head_dim + column;
        const int valid = t.head_dim - column;
        if (t.dtype == VQVIT_F32) {
            store_four<float>(t.out, at, out[j][r], valid, t.vector);
        } else if (t.dtype == VQVIT_F16) {
            store_four<Half>(t.out, at, out[j][r], valid, t.vector);
        } else {
            store_four<BFloat16>(t.out, at, out[j][r], valid, t.vector);
        }
    }
}

// Outputs of 128 columns: 64 of them in registers, the 64 before them, if any, in this lane's part of a slab.
struct Group {
    Outputs out[2];
    int32_t largest[2] = {0, 0};
};

VQVIT_DEVICE void update_largest(Group& group) {
    VQVIT_UNROLL
    for (int i = 0; i < 32; ++i) {
        const int32_t bits = magnitude_bits(group.out[i / 16][i / 8 % 2][i / 4 % 2][i % 4]);
        int32_t& largest = group.largest[i / 4 % 2];
        largest = bits > largest ? bits : largest;
    }
}

VQVIT_DEVICE float& slab_at(float* slab, int i) { return slab[i / 4 * 4 * kWarp + 4 * lane_id() + i % 4]; }

// Codes and scale of the columns `units` · 64 from group · 128 on.
VQVIT_DEVICE void store_codes(
    const Attention& t, int64_t image, int index, int groups, int first, Group& group, int units, float* slab) {
    float scale[2];
    Encoder encode[2];
    VQVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
        scale[r] = symmetric_scale(group_max<4>(group.largest[r]));
        encode[r] = Encoder::in_range(scale[r]);
        const int row = first + lane_id() / 4 + 8 * r;
        if (row < t.queries && lane_id() % 4 == 0) t.scale[(image * t.queries + row) * groups + index] = scale[r];
    }
    for (int unit = units - 1; unit >= 0; --unit) {
        VQVIT_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int chunk = i / 4, j = i / 2 % 2, r = i % 2;
            const int row = first + lane_id() / 4 + 8 * r;
            const int column = kGroup * index + kUnitColumns * unit + kChunk * chunk + 16 * j + 4 * (lane_id() % 4);
            const uint32_t word = encode_4(encode[r], group.out[chunk][j][r]) & (scale[r] == scale[r] ? ~0u : 0u);
            if (row >= t.queries) continue;
            int8_t* p = t.codes + (image * t.queries + row) * t.heads * t.head_dim + column;
            if (t.vector) {
                *reinterpret_cast<uint32_t*>(p) = word;
            } else {
                VQVIT_UNROLL
                for (int c = 0; c < 4; ++c) p[c] = static_cast<int8_t>(word >> 8 * c);
            }
        }
        if (unit == 0) break;
        VQVIT_UNROLL
        for (int i = 0; i < 32; ++i) group.out[i / 16][i / 8 % 2][i / 4 % 2][i % 4] = slab_at(slab, i);
    }
}

VQVIT_DEVICE void spill(const Group& group, float* slab) {
    VQVIT_UNROLL
    for (int i = 0; i < 32; ++i) slab_at(slab, i) = group.out[i / 16][i / 8 % 2][i / 4 % 2][i % 4];
}

}  // namespace vqvit
