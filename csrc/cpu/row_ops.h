// The row-wise tasks of `Kernels`: quantize, quantize_residual, layernorm_quantize, patchify_quantize, quantize_qkv.
#pragma once

#include "rows.h"
#include "scratch.h"

namespace vqvit {
namespace {

// `rows` fp32 rows of k elements, each with room for a whole last vector.
inline float* row_scratch(int64_t k, int64_t rows = 1) {
    return static_cast<float*>(scratch(Slot::kRow, rows * padded_length(k) * int64_t{sizeof(float)}));
}

template <class V>
void quantize_rows(const QuantizeRows& t, int64_t first, int64_t last) {
    float* buffer = row_scratch(t.k);
    with_dtype(t.dtype, [&](auto dtype) {
        const char* x = static_cast<const char*>(t.x);
        for (int64_t m = first; m < last; ++m) {
            const Row row = read_row<V>(x + m * t.k * dtype.size, dtype, t.k, t.equalizer, buffer);
            quantize_row<V>(row, t.k, t.out, m);
        }
    });
}

// R = rne(254 (x - α q) / α).
template <class V>
void quantize_residual(const QuantizeResidual& t, int64_t first, int64_t last) {
    with_dtype(t.dtype, [&](auto dtype) {
        for (int64_t m = first; m < last; ++m) {
            const char* x = static_cast<const char*>(t.x) + m * t.k * dtype.size;
            const int8_t* codes = t.codes + m * t.k;
            int8_t* out = t.residual_codes + m * t.k;
            const typename V::F scale = V::set(t.scale[m]);
            for_vectors<V>(t.k, [&](int64_t i, auto extent) {
                const typename V::F q = V::to_float(load_codes<V>(codes + i, extent));
                const typename V::F remainder = V::sub(load_as<V>(x, i, dtype, extent), V::mul(scale, q));
                store_codes<V>(out + i, to_codes<V>(V::mul(V::set(kResidualSteps), remainder), scale), extent);
            });
        }
    });
}

// y = fma((x - mean) · rstd, weight, bias); a row with NaN or Inf becomes NaN. y may be row.x.
template <class V>
Row normalize_row(const Row& row, const LayerNormRows& t, float* y) {
    float mean = NAN, rstd = NAN;
    if (row.finite()) {
        const int exponent = grid_exponent(row.absmax_bits);
        mean = row_mean<V>(row.x, t.k, exponent);
        const float variance = row_variance<V>(row.x, t.k, mean, exponent);
        rstd = 1.0f / (t.paper ? std::sqrt(variance) + t.eps : std::sqrt(variance + t.eps));
    }
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

template <class V>
void layernorm_rows(const LayerNormRows& t, int64_t first, int64_t last) {
    float* buffer = row_scratch(t.k);
    with_dtype(t.dtype, [&](auto dtype) {
        const char* x = static_cast<const char*>(t.x);
        for (int64_t m = first; m < last; ++m) {
            Row row = read_row<V>(x + m * t.k * dtype.size, dtype, t.k, nullptr, buffer);
            if (t.residual != nullptr) {
                with_dtype(t.residual_dtype, [&](auto residual_dtype) {
                    row = add_residual_row<V>(row.x, t, residual_dtype, m, buffer);
                });
            }
            quantize_row<V>(normalize_row<V>(row, t, buffer), t.k, t.out, m);
        }
    });
}

// Row m is patch (batch, y, x) in raster order: channels · patch_height runs of patch_width pixels.
template <class V>
void patchify_rows(const Patchify& t, int64_t first, int64_t last) {
    const int64_t patches_x = t.width / t.patch_width, patches_y = t.height / t.patch_height;
    const int64_t k = t.channels * t.patch_height * t.patch_width;
    float* buffer = row_scratch(k, 2);
    char* patch = reinterpret_cast<char*>(buffer + padded_length(k));
    with_dtype(t.dtype, [&](auto dtype) {
        const char* pixels = static_cast<const char*>(t.pixels);
        const int64_t run = t.patch_width * dtype.size;
        for (int64_t m = first; m < last; ++m) {
            const int64_t x = m % patches_x * t.patch_width, y = m / patches_x % patches_y * t.patch_height;
            const int64_t batch = m / (patches_x * patches_y);
            char* target = patch;
            for (int64_t c = 0; c < t.channels; ++c) {
                const int64_t source = ((batch * t.channels + c) * t.height + y) * t.width + x;
                for (int64_t dy = 0; dy < t.patch_height; ++dy, target += run) {
                    const char* start = pixels + (source + dy * t.width) * dtype.size;
                    std::memcpy(target, start, static_cast<size_t>(run));
                }
            }
            quantize_row<V>(read_row<V>(patch, dtype, k, t.equalizer, buffer), k, t.out, m);
        }
    });
}

// q or k of one head: a scale per token.
template <class V, int D>
void quantize_head_tokens(const char* x, int64_t stride, Dtype<D> dtype, const QkvTask& t, int8_t* codes, float* scale) {
    float* buffer = row_scratch(t.head_dim);
    Codes out = {};
    out.codes = codes;
    out.scale = scale;
    out.symmetric = true;
    for (int64_t s = 0; s < t.tokens; ++s) {
        quantize_row<V>(read_row<V>(x + s * stride, dtype, t.head_dim, nullptr, buffer), t.head_dim, out, s);
    }
}

// v of one head: a scale per channel over the tokens.
template <class V, int D>
void quantize_head_channels(
    const char* x, int64_t stride, Dtype<D> dtype, const QkvTask& t, int8_t* codes, float* scale) {
    const int64_t d = t.head_dim;
    float* scales = row_scratch(d, 2);
    int32_t* largest = reinterpret_cast<int32_t*>(scales + padded_length(d));
    std::memset(largest, 0, static_cast<size_t>(padded_length(d)) * sizeof(int32_t));
    for (int64_t s = 0; s < t.tokens; ++s) {
        for_vectors<V>(d, [&](int64_t i, auto extent) {
            const typename V::I magnitude = magnitude_bits<V>(load_as<V>(x + s * stride, i, dtype, extent));
            V::store_i(largest + i, V::max_i(V::load_i(largest + i), magnitude));
        });
    }
    for (int64_t i = 0; i < d; ++i) {
        scale[i] = scales[i] = largest[i] < kInfinityBits ? symmetric_scale(from_bits(largest[i])) : NAN;
    }
    for (int64_t s = 0; s < t.tokens; ++s) {
        for_vectors<V>(d, [&](int64_t i, auto extent) {
            const typename V::F v = load_as<V>(x + s * stride, i, dtype, extent);
            store_codes<V>(codes + s * d + i, to_codes<V>(v, V::load(scales + i)), extent);
        });
    }
}

template <class V>
void quantize_qkv_head(const QkvTask& t, int64_t batch, int64_t head) {
    with_dtype(t.dtype, [&](auto dtype) {
        const int64_t d = t.head_dim, width = t.heads * d, bh = batch * t.heads + head;
        const int64_t stride = 3 * width * dtype.size, codes = bh * t.tokens * d, scales = bh * t.tokens;
        const char* q = static_cast<const char*>(t.qkv) + batch * t.tokens * stride + head * d * dtype.size;
        const char* k = q + width * dtype.size;
        const char* v = k + width * dtype.size;
        quantize_head_tokens<V>(q, stride, dtype, t, t.q + codes, t.q_scale + scales);
        quantize_head_tokens<V>(k, stride, dtype, t, t.k + codes, t.k_scale + scales);
        quantize_head_channels<V>(v, stride, dtype, t, t.v + codes, t.v_scale + bh * d);
    });
}

}  // namespace
}  // namespace vqvit
