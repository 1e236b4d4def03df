// The row-wise tasks of `Kernels`: quantize, quantize_residual, layernorm_quantize, patchify_quantize, quantize_qkv.
#pragma once

#include "rows.h"
#include "scratch.h"

namespace vqvit {
namespace {

inline float* row_scratch(int64_t k) {
    return static_cast<float*>(scratch(Slot::kRow, padded_length(k) * static_cast<int64_t>(sizeof(float))));
}

template <class V>
void quantize_rows(const QuantizeRows& t, int64_t first, int64_t last) {
    float* row = row_scratch(t.k);
    for (int64_t m = first; m < last; ++m) {
        const int32_t absmax_bits = load_row<V>(t.x, t.dtype, m * t.k, t.k, t.equalizer, row);
        quantize_row<V>(row, absmax_bits, t.k, t.out, m);
    }
}

// R = rne(254 (x - α q) / α).
template <class V>
void quantize_residual(const QuantizeResidual& t, int64_t first, int64_t last) {
    float* row = row_scratch(t.k);
    for (int64_t m = first; m < last; ++m) {
        load_row<V>(t.x, t.dtype, m * t.k, t.k, nullptr, row);
        const typename V::F scale = V::set(t.scale[m]);
        alignas(64) int8_t tail[V::lanes] = {};
        for (int64_t i = 0; i < t.k; i += V::lanes) {
            const int8_t* codes = t.codes + m * t.k + i;
            if (i + V::lanes > t.k) {
                std::memcpy(tail, codes, static_cast<size_t>(t.k - i));
                codes = tail;
            }
            const typename V::F approximation = V::mul(scale, V::to_float(V::load_s8(codes)));
            const typename V::F remainder = V::sub(V::load(row + i), approximation);
            const typename V::I residual = to_codes<V>(V::mul(V::set(kResidualSteps), remainder), scale);
            store_codes<V>(t.residual_codes + m * t.k, i, t.k, residual);
        }
    }
}

// row = fma((row - mean) · rstd, weight, bias), in place. Returns the bits of its largest magnitude; a row with NaN or
// Inf becomes NaN.
template <class V>
int32_t normalize_row(float* row, int32_t absmax_bits, const LayerNormRows& t) {
    typename V::F center = V::set(NAN), rstd = V::set(NAN);
    if (absmax_bits < kInfinityBits) {
        const int exponent = grid_exponent(absmax_bits);
        const float mean = row_mean<V>(row, t.k, exponent);
        const float variance = row_variance<V>(row, t.k, mean, exponent);
        const float spread = t.paper ? std::sqrt(variance) + t.eps : std::sqrt(variance + t.eps);
        center = V::set(mean);
        rstd = V::set(1.0f / spread);
    }
    typename V::I largest = V::set_i(0);
    for (int64_t i = 0; i < t.k; i += V::lanes) {
        const typename V::F weight = load_padded<V>(t.weight, VQVIT_F32, i, t.k);
        const typename V::F bias = load_padded<V>(t.bias, VQVIT_F32, i, t.k);
        typename V::F y = V::fma(V::mul(V::sub(V::load(row + i), center), rstd), weight, bias);
        if (i + V::lanes > t.k) y = V::first_or(y, static_cast<int>(t.k - i), V::set(0.0f));
        V::store(row + i, y);
        largest = V::max_i(largest, magnitude_bits<V>(y));
    }
    return V::reduce_max_i(largest);
}

// row = residual + layer_scale ∘ row rounded to residual's dtype; also stored to the stream.
template <class V>
int32_t add_residual_row(float* row, const LayerNormRows& t, int64_t m) {
    typename V::I largest = V::set_i(0);
    const int64_t offset = m * t.k * dtype_size(t.residual_dtype);
    const char* residual = static_cast<const char*>(t.residual) + offset;
    char* stream = static_cast<char*>(t.stream) + offset;
    for (int64_t i = 0; i < t.k; i += V::lanes) {
        typename V::F y = V::load(row + i);
        const typename V::F base = load_padded<V>(residual, t.residual_dtype, i, t.k);
        y = t.layer_scale == nullptr ? V::add(base, y)
                                     : V::fma(y, load_padded<V>(t.layer_scale, VQVIT_F32, i, t.k), base);
        store_padded<V>(stream, t.residual_dtype, i, t.k, y);
        if (t.residual_dtype != VQVIT_F32) y = load_padded<V>(stream, t.residual_dtype, i, t.k);
        V::store(row + i, y);
        largest = V::max_i(largest, magnitude_bits<V>(y));
    }
    return V::reduce_max_i(largest);
}

template <class V>
void layernorm_rows(const LayerNormRows& t, int64_t first, int64_t last) {
    float* row = row_scratch(t.k);
    for (int64_t m = first; m < last; ++m) {
        int32_t absmax_bits = load_row<V>(t.x, t.dtype, m * t.k, t.k, nullptr, row);
        if (t.residual != nullptr) absmax_bits = add_residual_row<V>(row, t, m);
        quantize_row<V>(row, normalize_row<V>(row, absmax_bits, t), t.k, t.out, m);
    }
}

// Row m is patch (batch, y, x) in raster order: channels · patch_height runs of patch_width pixels.
template <class V>
void patchify_rows(const Patchify& t, int64_t first, int64_t last) {
    const int64_t patches_x = t.width / t.patch_width, patches_y = t.height / t.patch_height;
    const int64_t k = t.channels * t.patch_height * t.patch_width, size = dtype_size(t.dtype);
    float* row = row_scratch(2 * padded_length(k));
    char* gathered = reinterpret_cast<char*>(row + padded_length(k));
    const char* pixels = static_cast<const char*>(t.pixels);
    for (int64_t m = first; m < last; ++m) {
        const int64_t x = m % patches_x * t.patch_width, y = m / patches_x % patches_y * t.patch_height;
        const int64_t batch = m / (patches_x * patches_y);
        char* target = gathered;
        for (int64_t c = 0; c < t.channels; ++c) {
            for (int64_t dy = 0; dy < t.patch_height; ++dy) {
                const int64_t source = ((batch * t.channels + c) * t.height + y + dy) * t.width + x;
                std::memcpy(target, pixels + source * size, static_cast<size_t>(t.patch_width * size));
                target += t.patch_width * size;
            }
        }
        quantize_row<V>(row, load_row<V>(gathered, t.dtype, 0, k, t.equalizer, row), k, t.out, m);
    }
}

// q and k of one head: a scale per token. v: a scale per channel over the tokens.
template <class V>
void quantize_qkv_head(const QkvTask& t, int64_t batch, int64_t head) {
    const int64_t d = t.head_dim, padded = padded_length(d), width = t.heads * d;
    const int64_t bh = batch * t.heads + head;
    const int64_t start = batch * t.tokens * 3 * width + head * d;  // of this head's first q row in qkv
    float* row = row_scratch(3 * padded);
    float* channel_scale = row + padded;

    for (int part = 0; part < 2; ++part) {
        Codes out = {};
        out.codes = (part == 0 ? t.q : t.k) + bh * t.tokens * d;
        out.scale = (part == 0 ? t.q_scale : t.k_scale) + bh * t.tokens;
        out.symmetric = true;
        for (int64_t s = 0; s < t.tokens; ++s) {
            const int64_t offset = start + s * 3 * width + part * width;
            quantize_row<V>(row, load_row<V>(t.qkv, t.dtype, offset, d, nullptr, row), d, out, s);
        }
    }

    int32_t* largest = reinterpret_cast<int32_t*>(row + 2 * padded);
    std::memset(largest, 0, static_cast<size_t>(padded) * sizeof(int32_t));
    const int64_t v_start = start + 2 * width, size = dtype_size(t.dtype);
    const char* v = static_cast<const char*>(t.qkv) + v_start * size;
    for (int64_t s = 0; s < t.tokens; ++s) {
        for (int64_t i = 0; i < d; i += V::lanes) {
            const typename V::F x = load_padded<V>(v + s * 3 * width * size, t.dtype, i, d);
            V::store_i(largest + i, V::max_i(V::load_i(largest + i), magnitude_bits<V>(x)));
        }
    }
    for (int64_t i = 0; i < padded; ++i) {
        channel_scale[i] = largest[i] < kInfinityBits ? symmetric_scale(from_bits(largest[i])) : NAN;
    }
    std::memcpy(t.v_scale + bh * d, channel_scale, static_cast<size_t>(d) * sizeof(float));
    for (int64_t s = 0; s < t.tokens; ++s) {
        for (int64_t i = 0; i < d; i += V::lanes) {
            const typename V::F x = load_padded<V>(v + s * 3 * width * size, t.dtype, i, d);
            const typename V::I codes = to_codes<V>(x, V::load(channel_scale + i));
            store_codes<V>(t.v + (bh * t.tokens + s) * d, i, d, codes);
        }
    }
}

}  // namespace
}  // namespace vqvit
