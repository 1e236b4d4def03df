// (Residual add, then) LayerNorm of rows, then codes or the rows themselves, a few at a time while they are in L1.
#pragma once

#include "rows.h"

namespace vqvit {
namespace {

template <class V>
float mean_of(const Row& row, int64_t k) {
    return row.finite() ? row_mean<V>(row.x, k, grid_exponent(row.absmax_bits)) : NAN;
}

// 1 / sqrt(var + ε), or the paper's 1 / (sd + ε).
template <class V>
float inverse_spread(const Row& row, float mean, const LayerNormRows& t) {
    if (!row.finite()) return NAN;
    const float variance = row_variance<V>(row.x, t.k, mean, grid_exponent(row.absmax_bits));
    return 1.0f / (t.paper ? std::sqrt(variance) + t.eps : std::sqrt(variance + t.eps));
}

// y = fma((x - mean) · rstd, weight, bias); a row with NaN or Inf becomes NaN. y may be row.x.
template <class V>
Row normalize_row(const Row& row, float mean, float rstd, const LayerNormRows& t, float* y) {
    const typename V::F center = V::set(mean), factor = V::set(rstd);
    typename V::I largest = V::set_i(0);
    for_vectors<V>(t.k, [&](int64_t i, auto extent) {
        const typename V::F normalized = V::mul(V::sub(load_row<V>(row.x, i, extent), center), factor);
        const typename V::F scaled =
            V::fma(normalized, load_row<V>(t.weight, i, extent), load_row<V>(t.bias, i, extent));
        const typename V::F v = keep<V>(scaled, extent);
        V::store(y + i, v);
        largest = V::max_i(largest, magnitude_bits<V>(v));
    });
    return {y, V::reduce_max_i(largest)};
}

// stream = residual + layer_scale ∘ x, rounded to residual's dtype, and as an fp32 row.
template <class V, int D>
Row add_residual_row(const float* x, const LayerNormRows& t, Dtype<D> dtype, int64_t m, float* sum) {
    const int64_t offset = m * t.k * dtype.size;
    const char* residual = static_cast<const char*>(t.residual) + offset;
    char* stream = static_cast<char*>(t.stream) + offset;
    typename V::I largest = V::set_i(0);
    for_vectors<V>(t.k, [&](int64_t i, auto extent) {
        const typename V::F base = load_as<V>(residual, i, dtype, extent);
        typename V::F y = load_row<V>(x, i, extent);
        y = t.layer_scale == nullptr ? V::add(base, y) : V::fma(y, load_row<V>(t.layer_scale, i, extent), base);
        store_as<V>(stream, i, y, dtype, extent);
        if (D != VQVIT_F32) y = load_as<V>(stream, i, dtype, extent);
        V::store(sum + i, y);
        largest = V::max_i(largest, magnitude_bits<V>(y));
    });
    return {sum, V::reduce_max_i(largest)};
}

// Row m of out, (rows, k) of dtype, from a row of k elements.
template <class V, int D>
void store_row(const Row& row, int64_t k, void* out, Dtype<D> dtype, int64_t m) {
    char* y = static_cast<char*>(out) + m * k * dtype.size;
    for_vectors<V>(k, [&](int64_t i, auto extent) { store_as<V>(y, i, load_row<V>(row.x, i, extent), dtype, extent); });
}

template <class V>
void layernorm_rows(const LayerNormRows& t, int64_t first, int64_t last) {
    float* buffer = row_scratch(t.k, kRowsAtOnce);
    const int64_t stride = padded_length(t.k);
    with_dtype(t.dtype, [&](auto dtype) {
        const char* x = static_cast<const char*>(t.x);
        for (int64_t m = first; m < last; m += kRowsAtOnce) {
            const int rows = static_cast<int>(smaller(last - m, kRowsAtOnce));
            Row row[kRowsAtOnce];
            float mean[kRowsAtOnce], rstd[kRowsAtOnce];
            for (int r = 0; r < rows; ++r) {
                row[r] = read_row<V>(x + (m + r) * t.k * dtype.size, dtype, t.k, nullptr, buffer + r * stride);
                if (t.residual == nullptr) continue;
                with_dtype(t.residual_dtype, [&](auto residual_dtype) {
                    row[r] = add_residual_row<V>(row[r].x, t, residual_dtype, m + r, buffer + r * stride);
                });
            }
            for (int r = 0; r < rows; ++r) mean[r] = mean_of<V>(row[r], t.k);
            for (int r = 0; r < rows; ++r) rstd[r] = inverse_spread<V>(row[r], mean[r], t);
            for (int r = 0; r < rows; ++r) row[r] = normalize_row<V>(row[r], mean[r], rstd[r], t, buffer + r * stride);
            if (t.normalized != nullptr) {
                for (int r = 0; r < rows; ++r) store_row<V>(row[r], t.k, t.normalized, dtype, m + r);
            } else {
                for (int r = 0; r < rows; ++r) quantize_row<V>(row[r], t.k, t.out, m + r);
            }
        }
    });
}

}  // namespace
}  // namespace vqvit
