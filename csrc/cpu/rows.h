// What a row-wise op does with one row: load as fp32, exact statistics, codes.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "vmath.h"

namespace vqvit {
namespace {

// A vector of the first n < lanes floats of p, then zeros.
template <class V>
inline typename V::F load_tail(const void* p, int dtype, int64_t index, int64_t n) {
    alignas(64) char buffer[V::lanes * sizeof(float)] = {};
    const int64_t size = dtype_size(dtype);
    std::memcpy(buffer, static_cast<const char*>(p) + index * size, static_cast<size_t>(n * size));
    return load_as_float<V>(buffer, dtype, 0);
}

// Lanes index .. index + lanes of p, which holds k elements; zeros beyond.
template <class V>
inline typename V::F load_padded(const void* p, int dtype, int64_t index, int64_t k) {
    return index + V::lanes <= k ? load_as_float<V>(p, dtype, index) : load_tail<V>(p, dtype, index, k - index);
}

template <class V>
inline void store_padded(void* p, int dtype, int64_t index, int64_t k, typename V::F v) {
    if (index + V::lanes <= k) return store_float_as<V>(p, dtype, index, v);
    alignas(64) char buffer[V::lanes * sizeof(float)];
    store_float_as<V>(buffer, dtype, 0, v);
    const int64_t size = dtype_size(dtype);
    std::memcpy(static_cast<char*>(p) + index * size, buffer, static_cast<size_t>((k - index) * size));
}

template <class V>
inline void store_codes(int8_t* p, int64_t index, int64_t k, typename V::I codes) {
    if (index + V::lanes <= k) return V::store_low_byte(p + index, codes);
    int8_t buffer[V::lanes];
    V::store_low_byte(buffer, codes);
    std::memcpy(p + index, buffer, static_cast<size_t>(k - index));
}

inline int64_t padded_length(int64_t k) { return round_up(k, kPanel); }

// row[0..k) = x[offset..offset + k) · equalizer as fp32, zeros up to a whole vector. Returns the bits of max|row|.
template <class V>
int32_t load_row(const void* x, int dtype, int64_t offset, int64_t k, const float* equalizer, float* row) {
    const char* start = static_cast<const char*>(x) + offset * dtype_size(dtype);
    typename V::I largest = V::set_i(0);
    for (int64_t i = 0; i < k; i += V::lanes) {
        typename V::F v = load_padded<V>(start, dtype, i, k);
        if (equalizer != nullptr) v = V::mul(v, load_padded<V>(equalizer, VQVIT_F32, i, k));
        V::store(row + i, v);
        largest = V::max_i(largest, magnitude_bits<V>(v));
    }
    return V::reduce_max_i(largest);
}

// fl32 of the mean of x^power in units 2^(e - 21): Σ / k · unit^power, in fp64.
inline float grid_mean(int64_t sum, int64_t k, int exponent, int power) {
    const double unit = pow2(exponent - kMeanGridBits);
    const double mean = static_cast<double>(sum) / static_cast<double>(k);
    return static_cast<float>(mean * (power == 1 ? unit : unit * unit));
}

template <class V>
float row_mean(const float* row, int64_t k, int exponent) {
    const typename V::F per_unit = V::set(pow2(kMeanGridBits - exponent));
    typename V::L sum = V::zero_l();
    for (int64_t i = 0; i < k; i += V::lanes) {  // zeros beyond k add nothing
        sum = V::add_products(sum, V::to_int(V::mul(V::load(row + i), per_unit)), V::set_i(1));
    }
    return grid_mean(V::reduce_add_l(sum), k, exponent, 1);
}

// Population variance of row around `mean`.
template <class V>
float row_variance(const float* row, int64_t k, float mean, int exponent) {
    const typename V::F per_unit = V::set(pow2(kMeanGridBits - exponent)), center = V::set(mean);
    typename V::L sum = V::zero_l();
    for (int64_t i = 0; i < k; i += V::lanes) {
        typename V::F deviation = V::sub(V::load(row + i), center);
        if (i + V::lanes > k) deviation = V::first_or(deviation, static_cast<int>(k - i), V::set(0.0f));
        const typename V::I steps = V::to_int(V::mul(deviation, per_unit));
        sum = V::add_products(sum, steps, steps);
    }
    return grid_mean(V::reduce_add_l(sum), k, exponent, 2);
}

template <class V>
void encode_row(const float* row, int64_t k, float scale, int8_t* codes) {
    const typename V::F divisor = V::set(scale);
    for (int64_t i = 0; i < k; i += V::lanes) {
        store_codes<V>(codes, i, k, to_codes<V>(V::load(row + i), divisor));
    }
}

// α = (hi - lo) / 254, z = -127 - rne(lo / α), codes clamp(rne(x / α) + z) of a finite row.
template <class V>
void encode_row_asymmetric(const float* row, int64_t k, int8_t* codes, float* scale, int32_t* zero_point) {
    typename V::F low = V::set(0.0f), high = V::set(0.0f);
    for (int64_t i = 0; i < k; i += V::lanes) {  // the padding zeros are in the range by definition
        low = V::min(low, V::load(row + i));
        high = V::max(high, V::load(row + i));
    }
    const float lowest = V::reduce_min(low), step = (V::reduce_max(high) - lowest) / kAsymSteps;
    *scale = step < kScaleMin ? kScaleMin : step;
    *zero_point = -static_cast<int32_t>(kQMax) - static_cast<int32_t>(std::lrintf(lowest / *scale));
    const typename V::F divisor = V::set(*scale);
    const typename V::I shift = V::set_i(*zero_point);
    for (int64_t i = 0; i < k; i += V::lanes) {
        const typename V::I shifted = V::add_i(V::to_int(V::div(V::load(row + i), divisor)), shift);
        store_codes<V>(codes, i, k, to_codes<V>(V::to_float(shifted), V::set(1.0f)));
    }
}

inline int32_t sum_codes(const int8_t* codes, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += codes[i];
    return sum;
}

// Row m of `out` from the fp32 row (zero padded) whose largest magnitude has the bits `absmax_bits`.
template <class V>
void quantize_row(const float* row, int32_t absmax_bits, int64_t k, const Codes& out, int64_t m) {
    int8_t* codes = out.codes + m * k;
    const bool finite = absmax_bits < kInfinityBits;
    if (out.static_scale != nullptr) {
        encode_row<V>(row, k, *out.static_scale, codes);
        out.scale[m] = finite ? *out.static_scale : NAN;
    } else if (!finite) {  // poison shows in the scale
        std::memset(codes, 0, static_cast<size_t>(k));
        out.scale[m] = NAN;
        if (!out.symmetric) out.zero_point[m] = 0;
    } else if (out.symmetric) {
        float span = from_bits(absmax_bits);
        if (out.delta != 0.0f) {
            const int exponent = grid_exponent(absmax_bits);
            const float variance = row_variance<V>(row, k, row_mean<V>(row, k, exponent), exponent);
            span = std::fma(std::sqrt(variance), out.delta, span);
        }
        out.scale[m] = symmetric_scale(span);
        encode_row<V>(row, k, out.scale[m], codes);
    } else {
        encode_row_asymmetric<V>(row, k, codes, out.scale + m, out.zero_point + m);
    }
    if (out.row_sum != nullptr) out.row_sum[m] = sum_codes(codes, k);
}

}  // namespace
}  // namespace vqvit
