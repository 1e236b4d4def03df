// softmax(sm_scale · q kᵀ) v of one head, a few queries at a time: the logits of a tile's rows never leave L1.
//
//   l_ij = (α_q[i] sm_scale log2 e · α_k[j]) · Σ_d q[i, d] k[j, d]
//   e_ij = rne(255 · 2^(l_ij - max_j l_ij))  as u8
//   out  = α_v · (Σ_j e_ij v[j]) / Σ_j e_ij
#pragma once

#include <cmath>

#include "rows.h"
#include "scratch.h"

namespace vqvit {
namespace {

// Where the parts of one head's working set lie in the attention scratch; sizes in bytes, multiples of a cache line.
struct HeadScratch {
    int64_t key_panels, key_columns, value_groups;
    int8_t* k;             // panels of k, (keys, head_dim)
    int8_t* v;             // panels of vᵀ, (head_dim, keys)
    float* k_scale;        // (key_columns), zero beyond the keys
    float k_scale_absmax;
    uint8_t* q;            // kRows prepared rows
    uint8_t* p;            // kRows rows of u8 numerators
    uint8_t* p_prepared;   // kRows rows of them as the tile reads them
    int32_t* logits;       // (kRows, key_columns): accumulators, then fp32 logits
    int32_t* out;          // (kRows, 64)

    HeadScratch(const AttentionTask& t, int64_t rows, int64_t group_bytes) {
        constexpr int64_t kLine = 64;
        key_panels = ceil_div(t.keys, kPanel);
        key_columns = key_panels * kPanel;
        value_groups = ceil_div(t.keys, kKGroup);
        const int64_t sizes[] = {
            key_panels * panel_bytes(t.head_dim),
            ceil_div(t.head_dim, kPanel) * panel_bytes(t.keys),
            key_columns * 4,
            round_up(rows * ceil_div(t.head_dim, kKGroup) * group_bytes, kLine),
            rows * key_columns,
            round_up(rows * value_groups * group_bytes, kLine),
            rows * key_columns * 4,
            rows * kPanel * 4,
        };
        int64_t total = 0;
        for (const int64_t size : sizes) total += size;
        char* next = static_cast<char*>(scratch(Slot::kAttention, total));
        char* part[8];
        for (int i = 0; i < 8; ++i) {
            part[i] = next;
            next += sizes[i];
        }
        k = reinterpret_cast<int8_t*>(part[0]);
        v = reinterpret_cast<int8_t*>(part[1]);
        k_scale = reinterpret_cast<float*>(part[2]);
        q = reinterpret_cast<uint8_t*>(part[3]);
        p = reinterpret_cast<uint8_t*>(part[4]);
        p_prepared = reinterpret_cast<uint8_t*>(part[5]);
        logits = reinterpret_cast<int32_t*>(part[6]);
        out = reinterpret_cast<int32_t*>(part[7]);
    }
};

// acc to logits, in place; returns their maximum, or NaN if a logit is NaN or the maximum is not finite: then every
// numerator of the row is NaN.
template <class V>
float logits_row(int32_t* acc, const HeadScratch& s, int64_t keys, float row_factor) {
    float* logits = reinterpret_cast<float*>(acc);
    const typename V::F factor = V::set(row_factor), lowest = V::set(-INFINITY);
    typename V::F largest = lowest;
    for_vectors<V>(keys, [&](int64_t j, auto extent) {
        const typename V::F scale = V::mul(factor, V::load(s.k_scale + j));
        const typename V::F l = keep_or<V>(V::mul(scale, V::to_float(V::load_i(acc + j))), extent, lowest);
        V::store(logits + j, l);
        largest = V::max(l, largest);
    });
    const float top = V::reduce_max(largest);
    if (!std::isfinite(top)) return NAN;
    if (!std::isfinite(row_factor * s.k_scale_absmax)) {  // a factor overflows, so Inf · 0 = NaN is possible
        for (int64_t j = 0; j < keys; ++j) {
            if (std::isnan(logits[j])) return NAN;
        }
    }
    return top;
}

// p[j] = e_j = rne(255 · 2^(logits[j] - top)), zero up to a whole vector; returns Σ e_j.
template <class V>
int32_t numerators_row(const int32_t* acc, int64_t keys, float top, uint8_t* p) {
    const float* logits = reinterpret_cast<const float*>(acc);
    const typename V::F reference = V::set(top);
    typename V::I total = V::set_i(0);
#pragma GCC unroll 4
    for (int64_t j = 0; j < keys; j += V::lanes) {
        const typename V::F power = exp2<V>(V::sub(V::load(logits + j), reference));
        const typename V::I e = V::to_int(V::mul(power, V::set(kPSteps)));
        V::store_low_byte(p + j, e);
        total = V::add_i(total, e);
    }
    return V::reduce_add_i(total);
}

template <class V>
void store_head_row(
    const AttentionTask& t, char* out, const int32_t* acc, const float* v_scale, int64_t d0, float total) {
    const typename V::F inverse = V::set(1.0f / total);
    with_dtype(t.dtype, [&](auto dtype) {
        for_vectors<V>(t.head_dim - d0 < kPanel ? t.head_dim - d0 : kPanel, [&](int64_t i, auto extent) {
            const typename V::F mean = V::mul(V::to_float(V::load_i(acc + i)), inverse);
            const typename V::F y = V::mul(mean, load_row<V>(v_scale, d0 + i, extent));
            store_as<V>(out, d0 + i, y, dtype, extent);
        });
    });
}

template <class V, class Dot>
void attention_head(const AttentionTask& t, int64_t batch, int64_t head, int64_t first, int64_t last) {
    const int64_t bh = batch * t.heads + head, d = t.head_dim;
    const int64_t q_stride = ceil_div(d, kKGroup) * Dot::kGroupBytes;
    HeadScratch s(t, Dot::kRows, Dot::kGroupBytes);
    const int64_t p_stride = s.value_groups * Dot::kGroupBytes;

    // Pack the head's keys and values.
    const int8_t* k = t.k + bh * t.keys * d;
    for (int64_t panel = 0; panel < s.key_panels; ++panel) {
        const int64_t j = panel * kPanel, columns = t.keys - j < kPanel ? t.keys - j : kPanel;
        Dot::pack_panel(k + j * d, d, columns, d, s.k + panel * panel_bytes(d));
    }
    const int8_t* v = t.v + bh * t.keys * d;
    for (int64_t d0 = 0; d0 < d; d0 += kPanel) {
        const int64_t columns = d - d0 < kPanel ? d - d0 : kPanel;
        Dot::pack_transposed(v + d0, d, columns, t.keys, s.v + d0 / kPanel * panel_bytes(t.keys));
    }
    const Row k_scale = read_row<V>(t.k_scale + bh * t.keys, Dtype<VQVIT_F32>{}, t.keys, nullptr, nullptr);
    std::memset(s.k_scale, 0, static_cast<size_t>(s.key_columns) * sizeof(float));
    std::memcpy(s.k_scale, k_scale.x, static_cast<size_t>(t.keys) * sizeof(float));
    s.k_scale_absmax = from_bits(k_scale.absmax_bits);

    const int64_t out_row_bytes = t.heads * d * dtype_size(t.dtype);
    char* out = static_cast<char*>(t.out) + batch * t.queries * out_row_bytes + head * d * dtype_size(t.dtype);
    for (int64_t i = first; i < last; i += Dot::kRows) {
        const int rows = static_cast<int>(last - i < Dot::kRows ? last - i : Dot::kRows);

        // Logit accumulators q kᵀ.
        for (int r = 0; r < rows; ++r) {
            Dot::prepare(t.q + (bh * t.queries + i + r) * d, d, false, s.q + r * q_stride);
        }
        for (int64_t panel = 0; panel < s.key_panels; ++panel) {
            const int64_t left = t.keys - panel * kPanel;
            const int vectors = static_cast<int>(left < kPanel ? ceil_div(left, 16) : kPanel / 16);
            Dot::tile(
                rows, vectors, s.q, q_stride, s.k + panel * panel_bytes(d), ceil_div(d, kKGroup), false,
                s.logits + panel * kPanel, s.key_columns);
        }

        // Softmax numerators. A scale that is not finite poisons its query, or every query if it is a key's.
        float top[Dot::kRows], total[Dot::kRows];
        for (int r = 0; r < rows; ++r) {
            const float row_factor = t.q_scale[bh * t.queries + i + r] * t.logit_scale;
            top[r] = logits_row<V>(s.logits + r * s.key_columns, s, t.keys, row_factor);
            if (!k_scale.finite() || !std::isfinite(row_factor)) top[r] = NAN;
        }
        for (int r = 0; r < rows; ++r) {
            uint8_t* p = s.p + r * s.key_columns;
            const int32_t sum = numerators_row<V>(s.logits + r * s.key_columns, t.keys, top[r], p);
            total[r] = std::isnan(top[r]) ? NAN : static_cast<float>(sum);
            Dot::prepare(reinterpret_cast<const int8_t*>(p), t.keys, true, s.p_prepared + r * p_stride);
        }

        // p v, normalised.
        for (int64_t d0 = 0; d0 < d; d0 += kPanel) {
            const int64_t left = d - d0;
            const int vectors = static_cast<int>(left < kPanel ? ceil_div(left, 16) : kPanel / 16);
            Dot::tile(
                rows, vectors, s.p_prepared, p_stride, s.v + d0 / kPanel * panel_bytes(t.keys), s.value_groups, true,
                s.out, kPanel);
            for (int r = 0; r < rows; ++r) {
                char* row = out + (i + r) * out_row_bytes;
                store_head_row<V>(t, row, s.out + r * kPanel, t.v_scale + bh * d, d0, total[r]);
            }
        }
    }
}

}  // namespace
}  // namespace vqvit
