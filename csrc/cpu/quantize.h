// The quantizing tasks of `Kernels`: rows, residual codes, patches of images, heads of q, k and v. Formulas: rows.h.
#pragma once

#include "rows.h"

namespace vqvit {
namespace {

// The activation of an fp32 row, in `buffer`.
template <class V, int Kind>
Row activate_row(const float* x, int64_t k, float* buffer) {
    typename V::I largest = V::set_i(0);
    for_vectors<V>(k, [&](int64_t i, auto extent) {
        const typename V::F y = keep<V>(activation<V, Kind>(load_row<V>(x, i, extent)), extent);
        V::store(buffer + i, y);
        largest = V::max_i(largest, magnitude_bits<V>(y));
    });
    return {buffer, V::reduce_max_i(largest)};
}

template <class V>
void quantize_activated_rows(const QuantizeRows& t, int64_t first, int64_t last) {
    float* buffer = row_scratch(t.k);
    const float* x = static_cast<const float*>(t.x);
    with_activation(t.activation, [&](auto kind) {
        for (int64_t m = first; m < last; ++m) {
            quantize_row<V>(activate_row<V, kind.kind>(x + m * t.x_stride, t.k, buffer), t.k, t.out, m);
        }
    });
}

template <class V>
void quantize_rows(const QuantizeRows& t, int64_t first, int64_t last) {
    if (t.activation != VQVIT_NONE) return quantize_activated_rows<V>(t, first, last);
    float* buffer = row_scratch(t.k, kRowsAtOnce);
    const int64_t stride = padded_length(t.k);
    with_dtype(t.dtype, [&](auto dtype) {
        const char* x = static_cast<const char*>(t.x);
        for (int64_t m = first; m < last; m += kRowsAtOnce) {
            const int rows = static_cast<int>(smaller(last - m, kRowsAtOnce));
            Row row[kRowsAtOnce];
            for (int r = 0; r < rows; ++r) {
                const char* source = x + (m + r) * t.x_stride * dtype.size;
                row[r] = read_row<V>(source, dtype, t.k, t.equalizer, buffer + r * stride);
            }
            for (int r = 0; r < rows; ++r) quantize_row<V>(row[r], t.k, t.out, m + r);
        }
    });
}

template <class V>
void quantize_groups(const QuantizeGroups& t, int64_t first, int64_t last) {
    float* buffer = row_scratch(kGroup);
    Codes out = {};
    out.symmetric = true;
    with_dtype(t.dtype, [&](auto dtype) {
        for (int64_t m = first; m < last; ++m) {
            const char* x = static_cast<const char*>(t.x) + m * t.x_stride * dtype.size;
            out.scale = t.scale + m * t.scale_stride;
            for (int64_t i = 0; i < t.k; i += kGroup, x += kGroup * dtype.size, ++out.scale) {
                const int64_t columns = smaller(t.k - i, kGroup);
                const float* equalizer = t.equalizer == nullptr ? nullptr : t.equalizer + i;
                out.codes = t.codes + m * t.codes_stride + i;
                quantize_row<V>(read_row<V>(x, dtype, columns, equalizer, buffer), columns, out, 0);
            }
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

template <class V, int D>
void quantize_head_tokens(const HeadTask& t, Dtype<D> dtype) {
    float* buffer = row_scratch(t.head_dim);
    Codes out = {};
    out.codes = t.codes;
    out.scale = t.scale;
    out.symmetric = true;
    const char* x = static_cast<const char*>(t.x);
    for (int64_t s = 0; s < t.tokens; ++s, x += t.x_stride * dtype.size) {
        quantize_row<V>(read_row<V>(x, dtype, t.head_dim, nullptr, buffer), t.head_dim, out, s);
    }
}

template <class V, int D>
void quantize_head_channels(const HeadTask& t, Dtype<D> dtype) {
    const int64_t d = t.head_dim, stride = t.x_stride * dtype.size;
    const char* x = static_cast<const char*>(t.x);
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
        t.scale[i] = scales[i] = largest[i] < kInfinityBits ? symmetric_scale(from_bits(largest[i])) : NAN;
    }
    for (int64_t s = 0; s < t.tokens; ++s) {
        for_vectors<V>(d, [&](int64_t i, auto extent) {
            const typename V::F v = load_as<V>(x + s * stride, i, dtype, extent);
            store_codes<V>(t.codes + s * d + i, to_codes<V>(v, V::load(scales + i)), extent);
        });
    }
}

template <class V>
void quantize_head(const HeadTask& t) {
    with_dtype(t.dtype, [&](auto dtype) {
        if (t.by_channel) {
            quantize_head_channels<V>(t, dtype);
        } else {
            quantize_head_tokens<V>(t, dtype);
        }
    });
}

}  // namespace
}  // namespace vqvit
