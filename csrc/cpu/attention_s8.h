// softmax(sm_scale · q kᵀ) v of one head, a few queries at a time: the logits of a tile's rows never leave L1.
//
//   l_ij = (α_q[i] sm_scale log2 e · α_k[j]) · Σ_d q[i, d] k[j, d]
//   e_ij = rne(65535 · 2^(l_ij - max_j l_ij)) = 256 hi_ij + lo_ij, two u8 digits
//   out  = α_v · fma(Σ_j hi_ij v[j], 256, Σ_j lo_ij v[j]) / Σ_j e_ij
//
// Where tiles read int16 and Σ_j e_ij v[j] fits int32, it is summed at once: the fma rounds the same integer, since
// either digit's sum is below 2^24.
#pragma once

#include <cmath>

#include "rows.h"

namespace vqvit {
namespace {

// Σ_j e_j v[j] fits int32 for so many keys.
constexpr int64_t kMostKeysAtOnce = INT32_MAX / (static_cast<int64_t>(kPSteps) * 127);
constexpr int kNumeratorOffset = 1 << 15;  // e - kNumeratorOffset is int16

// Where the parts of one head's working set lie in this thread's scratch.
struct HeadScratch {
    int64_t key_panels, key_columns, value_groups;
    int8_t* k;            // panels of k, (keys, head_dim)
    int8_t* v;            // panels of vᵀ, (head_dim, keys)
    float* k_scale;       // (key_columns), zero beyond the keys
    uint8_t* q;           // (kRows) prepared rows of q
    int32_t* logits;      // (kRows, key_columns): accumulators, then fp32 logits
    uint8_t* digits;      // (2, kRows, key_columns): high digits of the numerators, then low ones
    uint8_t* p;           // (2, kRows) prepared rows of digits; the digits themselves if tiles read u8
    int32_t* out;         // (2, kRows, 64) accumulators of either digit
    int32_t* offsets;     // (head_dim up to whole panels): -kNumeratorOffset Σ_j v[j]

    HeadScratch(const AttentionTask& t, int64_t rows, int64_t group_bytes) {
        key_panels = ceil_div(t.keys, kPanel);
        key_columns = key_panels * kPanel;
        value_groups = ceil_div(t.keys, kKGroup);

        int64_t bytes = 0;
        const auto place = [&](int64_t size) {
            const int64_t offset = bytes;
            bytes += round_up(size, kLineBytes);
            return offset;
        };
        const int64_t k_at = place(key_panels * panel_bytes(t.head_dim));
        const int64_t v_at = place(ceil_div(t.head_dim, kPanel) * panel_bytes(t.keys));
        const int64_t k_scale_at = place(key_columns * int64_t{sizeof(float)});
        const int64_t q_at = place(rows * ceil_div(t.head_dim, kKGroup) * group_bytes);
        const int64_t logits_at = place(rows * key_columns * int64_t{sizeof(int32_t)});
        const int64_t digits_at = place(2 * rows * key_columns);
        const int64_t p_at = place(2 * rows * value_groups * group_bytes);
        const int64_t out_at = place(2 * rows * kPanel * int64_t{sizeof(int32_t)});
        const int64_t offsets_at = place(round_up(t.head_dim, kPanel) * int64_t{sizeof(int32_t)});

        char* base = static_cast<char*>(scratch(Slot::kAttention, bytes));
        k = reinterpret_cast<int8_t*>(base + k_at);
        v = reinterpret_cast<int8_t*>(base + v_at);
        k_scale = reinterpret_cast<float*>(base + k_scale_at);
        q = reinterpret_cast<uint8_t*>(base + q_at);
        logits = reinterpret_cast<int32_t*>(base + logits_at);
        digits = reinterpret_cast<uint8_t*>(base + digits_at);
        p = reinterpret_cast<uint8_t*>(base + p_at);
        out = reinterpret_cast<int32_t*>(base + out_at);
        offsets = reinterpret_cast<int32_t*>(base + offsets_at);
    }
};

// The keys, values and key scales of head `bh` into `s`.
template <class V, class Dot>
LoadedHead load_head(const AttentionTask& t, int64_t bh, HeadScratch& s) {
    const int64_t d = t.head_dim;
    const int8_t* k = t.k + bh * t.keys * d;
    for (int64_t j = 0; j < t.keys; j += kPanel) {
        Dot::pack_panel(k + j * d, d, smaller(t.keys - j, kPanel), d, s.k + j / kPanel * panel_bytes(d));
    }
    const int8_t* v = t.v + bh * t.keys * d;
    for (int64_t i = 0; i < d; i += kPanel) {
        Dot::pack_transposed(v + i, d, smaller(d - i, kPanel), t.keys, s.v + i / kPanel * panel_bytes(t.keys));
    }
    if constexpr (Dot::kReadsS16) {
        int16_t* row = reinterpret_cast<int16_t*>(s.p);
        std::fill_n(row, s.value_groups * kKGroup, static_cast<int16_t>(-kNumeratorOffset));
        for (int64_t i = 0; i < d; i += kPanel) {
            const int8_t* panel = s.v + i / kPanel * panel_bytes(t.keys);
            Dot::tile(1, kTileVectors, s.p, 0, panel, s.value_groups, nullptr, s.offsets + i, kPanel);
        }
    }
    const Row k_scale = read_row<V>(t.k_scale + bh * t.keys, Dtype<VQVIT_F32>{}, t.keys, nullptr, nullptr);
    std::memset(s.k_scale, 0, static_cast<size_t>(s.key_columns) * sizeof(float));
    std::memcpy(s.k_scale, k_scale.x, static_cast<size_t>(t.keys) * sizeof(float));
    return {bh, k_scale.finite(), from_bits(k_scale.absmax_bits)};
}

// The logits of a tile's rows, in `HeadScratch::logits`, and what is known of them.
template <class V, int Rows>
struct LogitRows {
    float factor[Rows];                         // α_q sm_scale log2 e
    alignas(64) float largest[Rows][V::lanes];  // by lane

    LogitRows(const float* q_scale, float logit_scale, int rows) {
        for (int r = 0; r < rows; ++r) {
            factor[r] = q_scale[r] * logit_scale;
            V::store(largest[r], V::set(-INFINITY));
        }
    }

    // Row r's accumulators of a whole panel of keys, from registers. Their scales are at k_scale.
    template <int N>
    __attribute__((always_inline)) void add_panel(
        int r, const typename V::I (&acc)[N], const float* k_scale, float* logits) {
        const typename V::F row_factor = V::set(factor[r]);
        typename V::F most = V::load(largest[r]);
        for (int v = 0; v < N; ++v) {
            const typename V::F l = logit(acc[v], row_factor, k_scale + v * V::lanes);
            V::store(logits + v * V::lanes, l);
            most = V::max(l, most);
        }
        V::store(largest[r], most);
    }

    // Row r's accumulators of `keys` keys, in place.
    void add(int r, int32_t* acc, const float* k_scale, int64_t keys) {
        float* logits = reinterpret_cast<float*>(acc);
        const typename V::F row_factor = V::set(factor[r]), lowest = V::set(-INFINITY);
        typename V::F most = V::load(largest[r]);
        for_vectors<V>(keys, [&](int64_t j, auto extent) {
            const typename V::F l = keep_or<V>(logit(V::load_i(acc + j), row_factor, k_scale + j), extent, lowest);
            V::store(logits + j, l);
            most = V::max(l, most);
        });
        V::store(largest[r], most);
    }

    // The largest logit of row r, or NaN if a logit is NaN or the largest is not finite: then every numerator is NaN.
    float top(int r, const HeadScratch& s, float k_scale_absmax, int64_t keys) const {
        const float top = V::reduce_max(V::load(largest[r]));
        if (!std::isfinite(top) || !std::isfinite(factor[r])) return NAN;
        if (!std::isfinite(factor[r] * k_scale_absmax)) {  // a factor overflows, so Inf · 0 = NaN is possible
            const float* logits = reinterpret_cast<const float*>(s.logits + r * s.key_columns);
            for (int64_t j = 0; j < keys; ++j) {
                if (std::isnan(logits[j])) return NAN;
            }
        }
        return top;
    }

private:
    static typename V::F logit(typename V::I acc, typename V::F row_factor, const float* k_scale) {
        return V::mul(V::mul(row_factor, V::load(k_scale)), V::to_float(acc));
    }
};

template <class V>
inline typename V::I numerators_of(const float* logits, typename V::F top) {
    return V::to_int(exp2<V>(V::sub(V::load(logits), top), kNumerator));
}

// e_j - kNumeratorOffset as a prepared row, e_j as below; returns Σ e_j by lane.
template <class V, class Dot>
typename V::I int16_numerators_row(const int32_t* acc, int64_t keys, float top, uint8_t* prepared) {
    const float* logits = reinterpret_cast<const float*>(acc);
    const typename V::F reference = V::set(top);
    const typename V::I offset = V::set_i(kNumeratorOffset);
    typename V::I total = V::set_i(0);
    for (int64_t j = 0; j < keys; j += V::lanes) {
        const typename V::I e = numerators_of<V>(logits + j, reference);
        total = V::add_i(total, e);
        Dot::store_s16(V::sub_i(e, offset), prepared + j * int64_t{sizeof(int16_t)});
    }
    return total;
}

// The digits of e_j = rne(65535 · 2^(logits[j] - top)), zero up to a whole vector; returns Σ e_j by lane.
template <class V>
typename V::I numerators_row(const int32_t* acc, int64_t keys, float top, uint8_t* high, uint8_t* low) {
    const float* logits = reinterpret_cast<const float*>(acc);
    const typename V::F reference = V::set(top);
    const auto numerators = [=](int64_t j) __attribute__((always_inline)) {
        return numerators_of<V>(logits + j, reference);
    };
    typename V::I total = V::set_i(0);
    int64_t j = 0;
    for (; j + 3 * V::lanes < keys; j += 4 * V::lanes) {
        typename V::I e[4];
        for (int v = 0; v < 4; ++v) e[v] = numerators(j + v * V::lanes);
        for (int v = 0; v < 4; ++v) total = V::add_i(total, e[v]);
        V::store_digits(high + j, low + j, e);
    }
    for (; j < keys; j += V::lanes) {
        const typename V::I e = numerators(j);
        V::store_low_byte(high + j, V::shift_right_8(e));
        V::store_low_byte(low + j, e);
        total = V::add_i(total, e);
    }
    return total;
}

// Channels [d0, d0 + 64) of one query from sum(i), Σ e v of channel d0 + i on.
template <class V, class Sum>
void store_head_row(
    const AttentionTask& t, char* out, const float* v_scale, int64_t d0, float total, const Sum& sum) {
    const typename V::F inverse = V::set(1.0f / total);
    with_dtype(t.dtype, [&](auto dtype) {
        for_vectors<V>(smaller(t.head_dim - d0, kPanel), [&](int64_t i, auto extent) {
            const typename V::F mean = V::mul(sum(i), inverse);
            const typename V::F y = V::mul(mean, load_row<V>(v_scale, d0 + i, extent));
            store_as<V>(out, d0 + i, y, dtype, extent);
        });
    });
}

template <class V, class Dot>
void attention_head(
    const AttentionTask& t, int64_t batch, int64_t head, int64_t first, int64_t last, LoadedHead& loaded) {
    const int64_t bh = batch * t.heads + head, d = t.head_dim, q_groups = ceil_div(d, kKGroup);
    HeadScratch s(t, Dot::kRows, Dot::kGroupBytes);
    const bool as_they_are = Dot::kReadsS8 && d % kKGroup == 0;
    const int64_t q_stride = as_they_are ? d : q_groups * Dot::kGroupBytes;
    const int64_t p_stride = Dot::kReadsU8 ? s.key_columns : s.value_groups * Dot::kGroupBytes;
    const uint8_t* p = Dot::kReadsU8 ? s.digits : s.p;
    const bool one_sum = Dot::kReadsS16 && t.keys <= kMostKeysAtOnce;  // of int16 numerators less kNumeratorOffset
    if (loaded.index != bh) loaded = load_head<V, Dot>(t, bh, s);

    const int64_t out_stride = t.heads * d * dtype_size(t.dtype);
    char* out = static_cast<char*>(t.out) + batch * t.queries * out_stride + head * d * dtype_size(t.dtype);
    for (int64_t i = first; i < last; i += Dot::kRows) {
        const int rows = static_cast<int>(smaller(last - i, Dot::kRows));

        // Where the results go comes from memory meanwhile.
        for (int r = 0; r < rows; ++r) {
            char* target = out + (i + r) * out_stride;
            for (int64_t n = 0; n < d * dtype_size(t.dtype); n += kLineBytes) __builtin_prefetch(target + n, 1);
        }

        // Logits q kᵀ.
        const int8_t* codes = t.q + (bh * t.queries + i) * d;
        const uint8_t* q = as_they_are ? reinterpret_cast<const uint8_t*>(codes) : s.q;
        for (int r = 0; r < rows && !as_they_are; ++r) Dot::prepare(codes + r * d, d, s.q + r * q_stride);
        LogitRows<V, Dot::kRows> logits(t.q_scale + bh * t.queries + i, t.logit_scale, rows);
        for (int64_t j = 0; j < t.keys; j += kPanel) {
            const int8_t* panel = s.k + j / kPanel * panel_bytes(d);
            const int32_t* sums = column_sums(panel, q_groups);
            int32_t* acc = s.logits + j;
            const float* k_scale = s.k_scale + j;
            if constexpr (Dot::kFinishesTiles) {
                if (j + kPanel <= t.keys) {
                    float* target = reinterpret_cast<float*>(acc);
                    const int64_t stride = s.key_columns;
                    Dot::finish_tile(
                        rows, q, q_stride, panel, q_groups, sums, nullptr,
                        [=, &logits](int r, const typename V::I(&row)[kPanel / V::lanes])
                            __attribute__((always_inline)) { logits.add_panel(r, row, k_scale, target + r * stride); });
                    continue;
                }
            }
            Dot::tile(rows, tile_vectors(t.keys - j), q, q_stride, panel, q_groups, sums, acc, s.key_columns);
            const int64_t count = smaller(t.keys - j, kPanel);
            for (int r = 0; r < rows; ++r) logits.add(r, acc + r * s.key_columns, k_scale, count);
        }

        // Softmax numerators. A scale that is not finite poisons its query, or every query if it is a key's.
        float top[Dot::kRows], total[Dot::kRows];
        typename V::I totals[Dot::kRows];
        for (int r = 0; r < rows; ++r) {
            top[r] = loaded.finite_keys ? logits.top(r, s, loaded.k_scale_absmax, t.keys) : NAN;
        }
        for (int r = 0; r < rows; ++r) {
            if (std::isnan(top[r])) continue;  // its outputs are NaN, whatever digits an earlier row left here
            if constexpr (Dot::kReadsS16) {
                if (one_sum) {
                    uint8_t* row = s.p + r * p_stride;
                    totals[r] = int16_numerators_row<V, Dot>(s.logits + r * s.key_columns, t.keys, top[r], row);
                    continue;
                }
            }
            uint8_t* high = s.digits + r * s.key_columns;
            uint8_t* low = high + Dot::kRows * s.key_columns;
            totals[r] = numerators_row<V>(s.logits + r * s.key_columns, t.keys, top[r], high, low);
            if constexpr (!Dot::kReadsU8) {
                Dot::prepare(high, t.keys, s.p + r * p_stride);
                Dot::prepare(low, t.keys, s.p + (Dot::kRows + r) * p_stride);
            }
        }
        for (int r = 0; r < rows; ++r) {
            total[r] = std::isnan(top[r]) ? NAN : static_cast<float>(V::reduce_add_i(totals[r]));
        }

        // p v, normalised.
        for (int64_t d0 = 0; d0 < d; d0 += kPanel) {
            const int8_t* panel = s.v + d0 / kPanel * panel_bytes(t.keys);
            int32_t* high = s.out;
            int32_t* low = s.out + Dot::kRows * kPanel;
            const uint8_t* p_low = p + Dot::kRows * p_stride;
            const int vectors = tile_vectors(d - d0);
            Dot::tile(rows, vectors, p, p_stride, panel, s.value_groups, nullptr, high, kPanel);
            if (!one_sum) Dot::tile(rows, vectors, p_low, p_stride, panel, s.value_groups, nullptr, low, kPanel);
            const float* v_scale = t.v_scale + bh * d;
            for (int r = 0; r < rows; ++r, high += kPanel, low += kPanel) {
                char* row = out + (i + r) * out_stride;
                if (one_sum) {
                    store_head_row<V>(t, row, v_scale, d0, total[r], [&](int64_t n) __attribute__((always_inline)) {
                        return V::to_float(V::sub_i(V::load_i(high + n), V::load_i(s.offsets + d0 + n)));
                    });
                } else {
                    store_head_row<V>(t, row, v_scale, d0, total[r], [&](int64_t n) __attribute__((always_inline)) {
                        const typename V::F low_sum = V::to_float(V::load_i(low + n));
                        return V::fma(V::to_float(V::load_i(high + n)), V::set(kPBase), low_sum);
                    });
                }
            }
        }
    }
}

}  // namespace
}  // namespace vqvit
