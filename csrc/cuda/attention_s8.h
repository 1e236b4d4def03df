// INT8 attention: what a warp does with 16 queries of a head. Kernels and launches: attention_s8.cu.
//
//   l_ij = (α_q[i] · sm_scale log2 e · α_k[j]) · Σ_d q[i, d] k[j, d]     int8 products, fp32 logits in units of log2
//   e_ij = rne(65535 · 2^(l_ij - max_j l_ij)) = 256 hi_ij + lo_ij       u16 codes of two u8 digits, not normalised
//   out[i, d] = α_v[d] · fma(Σ_j hi_ij v[j, d], 256, Σ_j lo_ij v[j, d]) / Σ_j e_ij     u8 x s8 products
//
// Lane l of a warp has, with g = l / 4 and c = l % 4, queries g and g + 8. The first product leaves it logits of keys
// 2c and 2c + 1 of every 8. The digits of two such blocks make a word of the second product's operand, whose keys then
// come in the order 2c, 2c + 1, 8 + 2c, 9 + 2c of every 16; a transposing load of pairs of bytes of v delivers the same
// order, so that neither digits nor v are moved between lanes: one byte permutation a word of v takes its even and odd
// channels apart, and the lane ends with channels 4c ... 4c + 3 of every 16.
//
// Rows of k and v beyond the last key and bytes beyond head_dim are read as shared memory holds them: q is zero there,
// digits are zero there, and channels beyond head_dim are not stored. Keys beyond the last have a scale of NaN, which a
// maximum passes over and a numerator turns into 0.
#pragma once

#include <climits>

#include "divisor.h"
#include "numerics.h"

namespace vqvit {

struct Attention {
    const int8_t *q, *k, *v;                   // (batch, heads, tokens, head_dim), tokens being queries or keys
    const float *q_scale, *k_scale, *v_scale;  // (batch, heads, tokens); of v (batch, heads, head_dim)
    float logit_scale;
    int heads, queries, keys, head_dim;
    int unit;     // bytes of a copy of codes: 16, 4 or 1, as alignment allows
    bool vector;  // whether four channels of floats load and store as one
    void* out;    // (batch, queries, heads, head_dim) of dtype
    int dtype;
    int8_t* codes;  // (batch, queries, heads, head_dim)
    float* scale;   // (batch, queries, ceil(heads · head_dim / 128))
    int group_heads;     // heads of 128 columns
    Divisor blocks;      // of 64 queries
    Divisor head_units;  // heads of an image, or its groups of heads whose codes share a scale
    Divisor copies;      // of a row of k or v, `unit` bytes each
    Divisor slice_copies, last_slice_copies;  // of a row of a slice of v
};

constexpr int kWarps = 4;          // of a block
constexpr int kRows = 16;          // queries of a warp
constexpr int kBlockRows = kWarps * kRows;
constexpr int kBlockThreads = kWarps * kWarp;
constexpr int kStep = 16;          // keys of a step of logits
constexpr int kChunk = 32;         // head dimensions of an int8 product, and output channels of a pair of accumulators

constexpr int kMaxBiasedDim = 256;  // |Σ q k| <= 2^22: accumulators may start at kMagicBits
constexpr int kMaxSharedBytes = 64 * 1024;  // of a block on every supported GPU

VQVIT_HOST_DEVICE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Bytes from row to row: an odd multiple of 16, so that eight rows lie in different banks.
VQVIT_HOST_DEVICE int row_stride(int64_t dims) { return static_cast<int>(round_up(dims, kChunk)) + 16; }

// ---- staging --------------------------------------------------------------------------------------------------------

template <int Unit>
VQVIT_DEVICE void copy_rows_by(
    unsigned char* to, int stride, const int8_t* from, int dim, int rows, const Divisor& copies) {
    const auto units = static_cast<int>(copies.divisor), thread = thread_id();
    const auto row_step = static_cast<int>(copies.quotient(kBlockThreads)), unit_step = kBlockThreads - row_step * units;
    auto row = static_cast<int>(copies.quotient(static_cast<uint32_t>(thread)));
    int unit = thread - row * units;
    while (row < rows) {
        unsigned char* target = to + row * stride + unit * Unit;
        const int8_t* source = from + static_cast<int64_t>(row) * dim + unit * Unit;
        if (Unit == 16) {
            copy_async_16(target, source, 16);
        } else if (Unit == 4) {
            copy_async_4(target, source);
        } else {
            *target = static_cast<unsigned char>(*source);
        }
        row += row_step, unit += unit_step;
        if (unit >= units) unit -= units, ++row;
    }
}

// `copies` units of each of `rows` rows, `dim` apart in memory and `stride` apart in shared memory.
VQVIT_DEVICE void copy_rows(
    unsigned char* to, int stride, const int8_t* from, int dim, int rows, const Divisor& copies, int unit) {
    if (unit == 16) {
        copy_rows_by<16>(to, stride, from, dim, rows, copies);
    } else if (unit == 4) {
        copy_rows_by<4>(to, stride, from, dim, rows, copies);
    } else {
        copy_rows_by<1>(to, stride, from, dim, rows, copies);
    }
}

// `keys` scales, and NaN after them up to `padded`.
VQVIT_DEVICE void copy_key_scales(float* to, const float* from, int keys, int padded) {
    for (int j = thread_id(); j < padded; j += kBlockThreads) {
        if (j < keys) {
            copy_async_4(to + j, from + j);
        } else {
            to[j] = not_a_number();
        }
    }
}

// ---- operands -------------------------------------------------------------------------------------------------------

// Four codes, of which the first `valid` exist.
VQVIT_DEVICE uint32_t load_word(const int8_t* p, int valid, int unit) {
    if (valid <= 0) return 0;
    if (unit >= 4) return *reinterpret_cast<const uint32_t*>(p);
    uint32_t word = 0;
    for (int i = 0; i < 4 && i < valid; ++i) word |= uint32_t{static_cast<uint8_t>(p[i])} << 8 * i;
    return word;
}

// Queries first ... first + 15 of a head, dimensions of one chunk: an operand of mma_s8, zero where q does not reach.
VQVIT_DEVICE void load_queries(uint32_t (&a)[4], const Attention& t, int64_t head, int first, int chunk) {
    VQVIT_UNROLL
    for (int i = 0; i < 4; ++i) {
        const int row = first + lane_id() / 4 + 8 * (i & 1);
        const int column = kChunk * chunk + 16 * (i / 2) + 4 * (lane_id() % 4);
        const int8_t* p = t.q + (head * t.queries + row) * t.head_dim + column;
        a[i] = row < t.queries ? load_word(p, t.head_dim - column, t.unit) : 0;
    }
}

// Where this lane's row starts for load_matrices of 16 keys x 32 bytes, and for load_matrices_transposed of 32 x 16.
VQVIT_DEVICE int key_offset(int stride) {
    const int lane = lane_id();
    return (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 16;
}
VQVIT_DEVICE int value_offset(int stride) { return lane_id() * stride; }

// acc[block] += q kᵀ for 16 keys, two blocks of eight, and one chunk of dimensions.
VQVIT_DEVICE void multiply_keys(int32_t (&acc)[2][4], const uint32_t (&q)[4], const unsigned char* keys) {
    uint32_t k[4];
    load_matrices(k, keys);
    mma_s8(acc[0], q, k[0], k[1]);
    mma_s8(acc[1], q, k[2], k[3]);
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Of this lane's two queries.
struct Softmax {
    float factor[2];  // α_q · sm_scale log2 e; 0 beyond the last query
    float top[2];     // largest logit
    uint32_t sum[2];  // Σ e, plus kMagicBits a key
};

VQVIT_DEVICE Softmax begin_softmax(const Attention& t, int64_t head, int first) {
    Softmax s;
    VQVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first + lane_id() / 4 + 8 * r;
        s.factor[r] = row < t.queries ? t.q_scale[head * t.queries + row] * t.logit_scale : 0.0f;
        s.top[r] = -from_bits(kInfinityBits);
        s.sum[r] = 0;
    }
    return s;
}

// Accumulators of 16 keys to the bits of their logits. `Biased` ones started at kMagicBits, which a subtraction takes
// away; that needs kMaxBiasedDim.
template <bool Biased>
VQVIT_DEVICE void to_logits(int32_t (&acc)[2][4], const Softmax& s, const float* key_scales) {
    VQVIT_UNROLL
    for (int b = 0; b < 2; ++b) {
        const float* scales = key_scales + 8 * b + 2 * (lane_id() % 4);
        const float scale[2] = {scales[0], scales[1]};
        VQVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float x = Biased ? from_bits(acc[b][i]) - kMagic : static_cast<float>(acc[b][i]);
            acc[b][i] = bits_of((s.factor[i / 2] * scale[i % 2]) * x);
        }
    }
}

VQVIT_DEVICE void update_top(Softmax& s, const int32_t (&logits)[2][4]) {
    VQVIT_UNROLL
    for (int i = 0; i < 8; ++i) s.top[i / 2 % 2] = fmaxf(s.top[i / 2 % 2], from_bits(logits[i / 4][i % 4]));
}

VQVIT_DEVICE void share_top(Softmax& s) {
    VQVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
        s.top[r] = fmaxf(s.top[r], shuffle_xor(s.top[r], 1));
        s.top[r] = fmaxf(s.top[r], shuffle_xor(s.top[r], 2));
    }
}

// kMagicBits + rne(65535 · 2^x) for x <= 0; 0 for NaN. The power of two scales exactly, so the fma rounds once, to the
// integer.
VQVIT_DEVICE uint32_t numerator(float x) {
    const float coefficients[] = {VQVIT_NUMERATOR_COEFFICIENTS};
    x = fmaxf(x, kExp2Min);
    const float shifted = x + kMagic;
    const float steps = polynomial(x - (shifted - kMagic), coefficients);
    return static_cast<uint32_t>(bits_of(fmaf(steps, pow2_of_shifted(shifted), kMagic)));
}

// Logits of 16 keys to this lane's words of both digits, for either query.
VQVIT_DEVICE void to_digits(const int32_t (&logits)[2][4], Softmax& s, uint32_t* high, uint32_t* low) {
    VQVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
        uint32_t e[4];
        VQVIT_UNROLL
        for (int i = 0; i < 4; ++i) e[i] = numerator(from_bits(logits[i / 2][2 * r + i % 2]) - s.top[r]);
        s.sum[r] += e[0] + e[1];
        s.sum[r] += e[2] + e[3];
        const uint32_t front = permute_bytes(e[0], e[1], 0x5140), back = permute_bytes(e[2], e[3], 0x5140);
        low[r] = permute_bytes(front, back, 0x5410);
        high[r] = permute_bytes(front, back, 0x7632);
    }
}

// Largest magnitude, as bits, of `keys` scales, in every lane of a warp; above Inf's if one is NaN.
VQVIT_DEVICE int32_t largest_bits(const float* key_scales, int keys) {
    int32_t largest = 0;
    for (int j = lane_id(); j < keys; j += kWarp) {
        const int32_t bits = magnitude_bits(key_scales[j]);
        largest = bits > largest ? bits : largest;
    }
    return group_max(largest);
}

// Whether a logit of this query is Inf · 0: its factors overflow and its product is 0. The quad shares the keys.
VQVIT_DEVICE bool has_undefined_logit(const Attention& t, int64_t head, int row, float factor) {
    for (int j = lane_id() % 4; j < t.keys; j += 4) {
        if (magnitude_bits(factor * t.k_scale[head * t.keys + j]) < kInfinityBits) continue;
        const int8_t* q = t.q + (head * t.queries + row) * t.head_dim;
        const int8_t* k = t.k + (head * t.keys + j) * t.head_dim;
        int32_t acc = 0;
        for (int d = 0; d < t.head_dim; ++d) acc += q[d] * k[d];
        if (acc == 0) return true;
    }
    return false;
}

// 1 / Σ e of either query, of which `summed` keys were added in this lane; NaN where the reference's is: a scale or the
// largest logit is not finite, or a logit is NaN.
VQVIT_DEVICE void finish_softmax(
    float (&inverse)[2], const Softmax& s, const Attention& t, int64_t head, int first, int summed, int32_t largest) {
    VQVIT_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first + lane_id() / 4 + 8 * r;
        const float factor = s.factor[r];
        bool poisoned = largest >= kInfinityBits || magnitude_bits(factor) >= kInfinityBits ||
            magnitude_bits(s.top[r]) >= kInfinityBits;
        const bool overflows =
            !poisoned && row < t.queries && magnitude_bits(factor * from_bits(largest)) >= kInfinityBits;
        if (warp_any(overflows)) {
            const int undefined = overflows && has_undefined_logit(t, head, row, factor);
            poisoned |= group_max<4>(undefined) != 0;
        }
        const uint32_t bias = static_cast<uint32_t>(summed) * static_cast<uint32_t>(kMagicBits);
        const auto total = static_cast<int32_t>(group_sum<4>(s.sum[r] - bias));
        inverse[r] = poisoned ? not_a_number() : 1.0f / static_cast<float>(total);
    }
}

// ---- values ---------------------------------------------------------------------------------------------------------

// Σ hi v and Σ lo v of 32 channels: two groups of 16, even and odd channels, as mma_s8 leaves them.
struct Values {
    int32_t high[2][2][4], low[2][2][4];
};

VQVIT_DEVICE void clear(Values& values) {
    VQVIT_UNROLL
    for (int i = 0; i < 16; ++i) values.high[i / 8][i / 4 % 2][i % 4] = values.low[i / 8][i / 4 % 2][i % 4] = 0;
}

// Adds 32 keys; `v` is this lane's row of them, at the first channel.
VQVIT_DEVICE void multiply_values(
    Values& values, const uint32_t (&high)[4], const uint32_t (&low)[4], const unsigned char* v) {
    VQVIT_UNROLL
    for (int j = 0; j < 2; ++j) {
        uint32_t pairs[4];
        load_matrices_transposed(pairs, v + 16 * j);
        VQVIT_UNROLL
        for (int odd = 0; odd < 2; ++odd) {
            const uint32_t selector = odd ? 0x7531 : 0x6420;
            const uint32_t b0 = permute_bytes(pairs[0], pairs[1], selector);
            const uint32_t b1 = permute_bytes(pairs[2], pairs[3], selector);
            mma_s8<true>(values.high[j][odd], high, b0, b1);
            mma_s8<true>(values.low[j][odd], low, b0, b1);
        }
    }
}

// fma(hi, 256, lo) rounded once; up to kOneIntegerKeys keys 256 hi + lo is an int32.
constexpr int kOneIntegerKeys = INT_MAX / (65535 * 127);
template <bool OneInteger>
VQVIT_DEVICE float join_digits(int32_t high, int32_t low) {
    if (OneInteger) return static_cast<float>(high * 256 + low);
    return fmaf(static_cast<float>(high), kPBase, static_cast<float>(low));
}

// Of 32 channels: two groups of 16, two queries, four neighbouring channels.
using Outputs = float[2][2][4];

template <bool OneInteger>
VQVIT_DEVICE void to_outputs(
    Outputs& out, const Values& values, const float (&inverse)[2], const Attention& t, int64_t head, int channel) {
    VQVIT_UNROLL
    for (int j = 0; j < 2; ++j) {
        const int first = channel + 16 * j + 4 * (lane_id() % 4);
        const float* p = t.v_scale + head * t.head_dim + first;
        VQVIT_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float scale = first + i < t.head_dim ? p[i] : 0.0f;
            VQVIT_UNROLL
            for (int r = 0; r < 2; ++r) {
                const int at = 2 * r + i / 2;
                const float acc = join_digits<OneInteger>(values.high[j][i % 2][at], values.low[j][i % 2][at]);
                out[j][r][i] = (acc * inverse[r]) * scale;
            }
        }
    }
}

}  // namespace vqvit
