// What a row-wise op does with one row: load as fp32, exact statistics, codes.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"
#include "scratch.h"
#include "vmath.h"

namespace vqvit {
namespace {

// Loops over a row run body(i, Whole{}) for whole vectors, and once body(i, Part{n}) for the n elements left.
struct Whole {};
struct Part {
    int count;
};

template <class V, class Body>
inline void for_vectors(int64_t k, const Body& body) {
    int64_t i = 0;
#pragma GCC unroll 2
    for (; i + V::lanes <= k; i += V::lanes) body(i, Whole{});
    if (i < k) body(i, Part{static_cast<int>(k - i)});
}

template <int D>
struct Dtype {
    static constexpr int value = D;
    static constexpr int size = D == VQVIT_F32 ? 4 : 2;
};

// body(Dtype<D>{}) for the D that `dtype` names.
template <class Body>
inline void with_dtype(int dtype, const Body& body) {
    switch (dtype) {
        case VQVIT_F16:
            return body(Dtype<VQVIT_F16>{});
        case VQVIT_BF16:
            return body(Dtype<VQVIT_BF16>{});
        default:
            return body(Dtype<VQVIT_F32>{});
    }
}

// Element i and on of p as fp32; zeros beyond a part.
template <class V, int D>
inline typename V::F load_as(const void* p, int64_t i, Dtype<D>, Whole) {
    return load_as_float<V>(p, D, i);
}
template <class V, int D>
inline typename V::F load_as(const void* p, int64_t i, Dtype<D> dtype, Part part) {
    alignas(64) char buffer[V::lanes * sizeof(float)] = {};
    std::memcpy(buffer, static_cast<const char*>(p) + i * dtype.size, static_cast<size_t>(part.count) * dtype.size);
    return load_as_float<V>(buffer, D, 0);
}
template <class V, class Extent>
inline typename V::F load_row(const float* p, int64_t i, Extent extent) {
    return load_as<V>(p, i, Dtype<VQVIT_F32>{}, extent);
}

template <class V, int D>
inline void store_as(void* p, int64_t i, typename V::F v, Dtype<D>, Whole) {
    store_float_as<V>(p, D, i, v);
}
template <class V, int D>
inline void store_as(void* p, int64_t i, typename V::F v, Dtype<D> dtype, Part part) {
    alignas(64) char buffer[V::lanes * sizeof(float)];
    store_float_as<V>(buffer, D, 0, v);
    std::memcpy(static_cast<char*>(p) + i * dtype.size, buffer, static_cast<size_t>(part.count) * dtype.size);
}

template <class V>
inline void store_codes(int8_t* p, typename V::I codes, Whole) {
    V::store_low_byte(p, codes);
}
template <class V>
inline void store_codes(int8_t* p, typename V::I codes, Part part) {
    int8_t buffer[V::lanes];
    V::store_low_byte(buffer, codes);
    std::memcpy(p, buffer, static_cast<size_t>(part.count));
}

template <class V>
inline typename V::I load_codes(const int8_t* p, Whole) {
    return V::load_s8(p);
}
template <class V>
inline typename V::I load_codes(const int8_t* p, Part part) {
    alignas(16) int8_t buffer[V::lanes] = {};
    std::memcpy(buffer, p, static_cast<size_t>(part.count));
    return V::load_s8(buffer);
}

// v, with `other` beyond a part.
template <class V>
inline typename V::F keep_or(typename V::F v, Whole, typename V::F) {
    return v;
}
template <class V>
inline typename V::F keep_or(typename V::F v, Part part, typename V::F other) {
    return V::first_or(v, part.count, other);
}
template <class V, class Extent>
inline typename V::F keep(typename V::F v, Extent extent) {
    return keep_or<V>(v, extent, V::set(0.0f));
}

// Rows that go through an op step by step together: one row's sums and divisions pass behind work on the others.
constexpr int kRowsAtOnce = 4;

// Length of a buffer for rows of k elements: its last vector may be stored whole.
inline int64_t padded_length(int64_t k) { return round_up(k, kPanel); }

// This thread's buffer for `rows` fp32 rows.
inline float* row_scratch(int64_t k, int64_t rows = 1) {
    return static_cast<float*>(scratch(Slot::kRow, rows * padded_length(k) * int64_t{sizeof(float)}));
}

// One row as fp32 and the bits of its largest magnitude.
struct Row {
    const float* x;
    int32_t absmax_bits;

    bool finite() const { return absmax_bits < kInfinityBits; }
};

// x[0..k) · equalizer as fp32: in place if that is what x holds, else in `buffer`.
template <class V, int D>
Row read_row(const void* x, Dtype<D> dtype, int64_t k, const float* equalizer, float* buffer) {
    const bool in_place = D == VQVIT_F32 && equalizer == nullptr;
    typename V::I largest = V::set_i(0);
    for_vectors<V>(k, [&](int64_t i, auto extent) {
        typename V::F v = load_as<V>(x, i, dtype, extent);
        if (equalizer != nullptr) v = V::mul(v, load_row<V>(equalizer, i, extent));
        if (!in_place) V::store(buffer + i, v);
        largest = V::max_i(largest, magnitude_bits<V>(v));
    });
    return {in_place ? static_cast<const float*>(x) : buffer, V::reduce_max_i(largest)};
}

// fl32 of the mean of x^power in units 2^(e - 21): Σ / k · unit^power, in fp64.
inline float grid_mean(int64_t sum, int64_t k, int exponent, int power) {
    const double unit = pow2(exponent - kMeanGridBits);
    const double mean = static_cast<double>(sum) / static_cast<double>(k);
    return static_cast<float>(mean * (power == 1 ? unit : unit * unit));
}

template <class V>
float row_mean(const float* row, int64_t k, int exponent) {
    // A lane sums at most 2^9 steps of at most 2^21 in int32.
    constexpr int64_t kBlock = 512 * V::lanes;
    const typename V::F per_unit = V::set(pow2(kMeanGridBits - exponent));
    int64_t total = 0;
    for (int64_t start = 0; start < k; start += kBlock) {
        typename V::I sum = V::set_i(0);
        for_vectors<V>(k - start < kBlock ? k - start : kBlock, [&](int64_t i, auto extent) {
            sum = V::add_i(sum, V::to_int(V::mul(load_row<V>(row + start, i, extent), per_unit)));
        });
        total += V::reduce_add_l(V::add_products(V::zero_l(), sum, V::set_i(1)));
    }
    return grid_mean(total, k, exponent, 1);
}

// Population variance of row around `mean`.
template <class V>
float row_variance(const float* row, int64_t k, float mean, int exponent) {
    const typename V::F per_unit = V::set(pow2(kMeanGridBits - exponent)), center = V::set(mean);
    typename V::L sum = V::zero_l();
    for_vectors<V>(k, [&](int64_t i, auto extent) {
        const typename V::F deviation = keep<V>(V::sub(load_row<V>(row, i, extent), center), extent);
        const typename V::I steps = V::to_int(V::mul(deviation, per_unit));
        sum = V::add_products(sum, steps, steps);
    });
    return grid_mean(V::reduce_add_l(sum), k, exponent, 2);
}

// codes[i] = code(row[i]).
template <class V, class Code>
void encode_row(const float* row, int64_t k, int8_t* codes, const Code& code) {
    for_vectors<V>(k, [&](int64_t i, auto extent) {
        store_codes<V>(codes + i, code(load_row<V>(row, i, extent)), extent);
    });
}

// α = (hi - lo) / 254, z = -127 - rne(lo / α), codes clamp(rne(x / α) + z) of a finite row; hi and lo include 0.
template <class V>
void encode_row_asymmetric(const float* row, int64_t k, int8_t* codes, float* scale, int32_t* zero_point) {
    typename V::F low = V::set(0.0f), high = V::set(0.0f);
    for_vectors<V>(k, [&](int64_t i, auto extent) {
        const typename V::F x = load_row<V>(row, i, extent);
        low = V::min(low, x);
        high = V::max(high, x);
    });
    const float lowest = V::reduce_min(low), step = (V::reduce_max(high) - lowest) / kAsymSteps;
    *scale = step < kScaleMin ? kScaleMin : step;
    *zero_point = -static_cast<int32_t>(kQMax) - static_cast<int32_t>(std::lrintf(lowest / *scale));
    const typename V::F divisor = V::set(*scale);
    const typename V::I shift = V::set_i(*zero_point);
    encode_row<V>(row, k, codes, [=](typename V::F x) {
        return clamp_codes<V>(V::add_i(V::to_int(V::div(x, divisor)), shift));
    });
}

inline int32_t sum_codes(const int8_t* codes, int64_t k) {
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += codes[i];
    return sum;
}

// Row m of `out` from a row of k elements.
template <class V>
void quantize_row(const Row& row, int64_t k, const Codes& out, int64_t m) {
    int8_t* codes = out.codes + m * k;
    if (out.static_scale != nullptr) {
        encode_row<V>(row.x, k, codes, ClampedQuotient<V>(*out.static_scale));
        out.scale[m] = row.finite() ? *out.static_scale : NAN;
    } else if (!row.finite()) {  // poison shows in the scale
        std::memset(codes, 0, static_cast<size_t>(k));
        out.scale[m] = NAN;
        if (!out.symmetric) out.zero_point[m] = 0;
    } else if (out.symmetric) {
        float span = from_bits(row.absmax_bits);
        if (out.delta != 0.0f) {
            const int exponent = grid_exponent(row.absmax_bits);
            const float variance = row_variance<V>(row.x, k, row_mean<V>(row.x, k, exponent), exponent);
            span = std::fma(std::sqrt(variance), out.delta, span);
        }
        out.scale[m] = symmetric_scale(span);
        if (out.delta < 0.0f) {
            encode_row<V>(row.x, k, codes, ClampedQuotient<V>(out.scale[m]));
        } else {
            encode_row<V>(row.x, k, codes, Quotient<V>(out.scale[m]));
        }
    } else {
        encode_row_asymmetric<V>(row.x, k, codes, out.scale + m, out.zero_point + m);
    }
    if (out.row_sum != nullptr) out.row_sum[m] = sum_codes(codes, k);
}

}  // namespace
}  // namespace vqvit
