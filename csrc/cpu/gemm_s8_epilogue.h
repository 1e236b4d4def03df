// What becomes of a tile's sums of products, row by row while they are in registers or L1.
//
//   y   = act(fma(acc, α_a α_b, bias))    fp32
//   y   = fma(y, layer_scale, residual)
//   out = y as int32 / float / int8 codes, static or of each row of the panel
#pragma once

#include <algorithm>

#include "rows.h"

namespace vqvit {
namespace {

// The per-column operands of a panel, padded to 64 columns: no epilogue loop has a tail.
struct PanelColumns {
    alignas(64) float b_scale[kPanel] = {};
    alignas(64) float bias[kPanel] = {};
    alignas(64) float layer_scale[kPanel] = {};
    alignas(64) int32_t b_zero[kPanel] = {};
    alignas(64) int32_t b_sum[kPanel] = {};
    int64_t first;  // column of the matrix
    int64_t count;  // columns of the matrix in this panel
};

template <class T>
inline void copy_columns(T (&target)[kPanel], const T* source, const PanelColumns& c) {
    if (source != nullptr) std::memcpy(target, source + c.first, static_cast<size_t>(c.count) * sizeof(T));
}

inline void load_columns(const vqvit_gemm& g, int64_t panel, PanelColumns& c) {
    c.first = panel * kPanel;
    c.count = smaller(g.n - c.first, kPanel);
    copy_columns(c.b_scale, g.b_scale, c);
    copy_columns(c.bias, static_cast<const float*>(g.bias), c);  // missing: fma(acc, scale, 0) = acc · scale
    if (g.layer_scale == nullptr) std::fill_n(c.layer_scale, kPanel, 1.0f);  // fma(y, 1, residual) = residual + y
    copy_columns(c.layer_scale, static_cast<const float*>(g.layer_scale), c);
    copy_columns(c.b_zero, g.b_zero, c);
    copy_columns(c.b_sum, g.b_sum, c);
}

// Σ (a - z_a)(b - z_b) = Σ a b - z_a Σ b - z_b Σ a + k z_a z_b, modulo 2^32.
template <class V, int N>
inline void subtract_zero_points(typename V::I (&acc)[N], const vqvit_gemm& g, const PanelColumns& c, int64_t m) {
    if (g.a_zero != nullptr) {
        const typename V::I zero = V::set_i(g.a_zero[m]);
        for (int v = 0; v < N; ++v) acc[v] = V::sub_i(acc[v], V::mul_i(zero, V::load_i(c.b_sum + v * V::lanes)));
    }
    if (g.b_zero != nullptr) {
        typename V::I sum = V::set_i(g.a_sum[m]);
        if (g.a_zero != nullptr) {
            sum = V::sub_i(sum, V::mul_i(V::set_i(static_cast<int32_t>(g.k)), V::set_i(g.a_zero[m])));
        }
        for (int v = 0; v < N; ++v) acc[v] = V::sub_i(acc[v], V::mul_i(sum, V::load_i(c.b_zero + v * V::lanes)));
    }
}

// body(v, extent) for each of a row's vectors that holds columns of the matrix; Full: all do.
template <class V, bool Full, class Body>
inline void for_columns(const PanelColumns& c, const Body& body) {
    constexpr int kVectors = kPanel / V::lanes;
    if (Full || c.count == kPanel) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) body(v, Whole{});
        return;
    }
    for (int v = 0; v * V::lanes < c.count; ++v) {
        const int64_t left = c.count - v * V::lanes;
        if (left >= V::lanes) {
            body(v, Whole{});
        } else {
            body(v, Part{static_cast<int>(left)});
        }
    }
}

template <class V, bool Full, int N>
inline void add_residual(typename V::F (&y)[N], const vqvit_gemm& g, const PanelColumns& c, int64_t m) {
    if (g.residual == nullptr) {
        if (g.layer_scale == nullptr) return;
        for (int v = 0; v < N; ++v) y[v] = V::mul(y[v], V::load(c.layer_scale + v * V::lanes));
        return;
    }
    with_dtype(g.residual_dtype, [&](auto dtype) {
        const char* residual = static_cast<const char*>(g.residual) + (m * g.n + c.first) * dtype.size;
        for_columns<V, Full>(c, [&](int v, auto extent) {
            const typename V::F base = load_as<V>(residual, v * V::lanes, dtype, extent);
            y[v] = g.layer_scale == nullptr ? V::add(base, y[v])
                                            : V::fma(y[v], V::load(c.layer_scale + v * V::lanes), base);
        });
    });
}

// Static codes of a row's columns. Several panels share a row's scale and sum: NaN is written by whoever meets it, sums
// are added atomically.
template <class V, int N>
inline void store_static_codes(typename V::F (&y)[N], const GemmTask& t, const PanelColumns& c, int64_t m) {
    int8_t* codes = static_cast<int8_t*>(t.out) + m * t.out_stride + c.first;
    const typename V::F scale = V::set(*t.static_scale);
    typename V::I largest = V::set_i(0);
    for_columns<V, false>(c, [&](int v, auto extent) {
        store_codes<V>(codes + v * V::lanes, to_codes<V>(y[v], scale), extent);
        largest = V::max_i(largest, magnitude_bits<V>(keep<V>(y[v], extent)));
    });
    if (V::reduce_max_i(largest) >= kInfinityBits) {
        const float poison = NAN;
        __atomic_store(t.scale + m, &poison, __ATOMIC_RELAXED);
    }
    if (t.row_sum != nullptr) __atomic_fetch_add(t.row_sum + m, sum_codes(codes, c.count), __ATOMIC_RELAXED);
}

// Codes of row m with a scale of its own, where the panel is all of it: a head of q or k.
template <class V, int N>
inline void store_row_codes(const typename V::F (&y)[N], const GemmTask& t, int64_t m) {
    typename V::I magnitudes = magnitude_bits<V>(y[0]);
    for (int v = 1; v < N; ++v) magnitudes = V::max_i(magnitudes, magnitude_bits<V>(y[v]));
    const int32_t largest = V::reduce_max_i(magnitudes);
    t.scale[m] = largest < kInfinityBits ? symmetric_scale(from_bits(largest)) : NAN;
    int8_t* codes = static_cast<int8_t*>(t.out) + m * t.out_stride;
    const typename V::F scale = V::set(t.scale[m]);
    for (int v = 0; v < N; ++v) V::store_low_byte(codes + v * V::lanes, to_codes<V>(y[v], scale));
}

// The accumulators of row m as fp32, zero points and compensation included. A compensated tile holds the products a b,
// R_a b, a R_b and R_a R_b one after the other.
template <class V, int N>
inline void load_accumulators(
    typename V::F (&y)[N], const GemmTask& t, const PanelColumns& c, int64_t m, const int32_t* products, int64_t tile) {
    typename V::I acc[N];
    for (int v = 0; v < N; ++v) acc[v] = V::load_i(products + v * V::lanes);
    subtract_zero_points<V>(acc, t.gemm, c, m);
    for (int v = 0; v < N; ++v) y[v] = V::to_float(acc[v]);
    if ((t.terms & 3) != 0) {
        for (int v = 0; v < N; ++v) {
            const int32_t* p = products + v * V::lanes;
            const typename V::I sum = V::add_i(V::load_i(p + tile), V::load_i(p + 2 * tile));
            y[v] = V::fma(V::to_float(sum), V::set(t.first_order), y[v]);
        }
    }
    if ((t.terms & 4) != 0) {
        for (int v = 0; v < N; ++v) {
            const typename V::I product = V::load_i(products + v * V::lanes + 3 * tile);
            y[v] = V::fma(V::to_float(product), V::set(t.second_order), y[v]);
        }
    }
}

// act(fma(y, α_a α_b, bias)) of a row's sums y.
template <class V, int Kind>
inline void dequantize_row(const PanelColumns& c, float a_scale, typename V::F (&y)[kPanel / V::lanes]) {
    const typename V::F row_scale = V::set(a_scale);
    for (int v = 0; v < kPanel / V::lanes; ++v) {
        const typename V::F scale = V::mul(row_scale, V::load(c.b_scale + v * V::lanes));
        y[v] = activation<V, Kind>(V::fma(y[v], scale, V::load(c.bias + v * V::lanes)));
    }
}

// Row m of the output from its sums y: dequantization, activation, residual and store. Plain: floating-point outputs in
// all columns of the panel.
template <class V, int Kind, bool Plain>
inline void finish_row(
    const GemmTask& t, const PanelColumns& c, int64_t m, float a_scale, typename V::F (&y)[kPanel / V::lanes]) {
    dequantize_row<V, Kind>(c, a_scale, y);
    add_residual<V, Plain>(y, t.gemm, c, m);
    if (!Plain && t.store == Store::kStaticCodes) return store_static_codes<V>(y, t, c, m);
    if (!Plain && t.store == Store::kRowCodes) return store_row_codes<V>(y, t, m);
    with_dtype(t.dtype, [&](auto dtype) {
        char* out = static_cast<char*>(t.out) + (m * t.out_stride + c.first) * dtype.size;
        for_columns<V, Plain>(c, [&](int v, auto extent) { store_as<V>(out, v * V::lanes, y[v], dtype, extent); });
    });
}

// A tile of int32 products, or with a_groups of the fp32 sums of `add_groups`, to `out`.
template <class V>
void finish_tile(
    const GemmTask& t, const PanelColumns& c, int64_t first, int rows, const int32_t* products, int64_t tile,
    const float* sums) {
    constexpr int kVectors = kPanel / V::lanes;
    const vqvit_gemm& g = t.gemm;
    with_activation(g.activation, [&](auto activation_kind) {
        for (int64_t m = first; m < first + rows; ++m, products += kPanel, sums += kPanel) {
            typename V::F y[kVectors];
            float a_scale = 1.0f;  // 1 · α_b is exact
            if (g.a_groups != 0) {
                for (int v = 0; v < kVectors; ++v) y[v] = V::load(sums + v * V::lanes);
            } else {
                load_accumulators<V>(y, t, c, m, products, tile);
                a_scale = g.a_scale[m];
            }
            finish_row<V, activation_kind.kind, false>(t, c, m, a_scale, y);
        }
    });
}

// Whether the products of a and b alone make the outputs, in all columns of the panel.
inline bool is_whole(const GemmTask& t, const PanelColumns& c) {
    const vqvit_gemm& g = t.gemm;
    return t.terms == 0 && g.a_zero == nullptr && g.b_zero == nullptr && c.count == kPanel;
}

template <class V>
inline typename V::F load_plain(const int32_t* products) {
    return V::to_float(V::load_i(products));
}
template <class V>
inline typename V::F load_plain(const float* sums) {
    return V::load(sums);
}

// `finish_tile` of products or sums to floating-point outputs where `is_whole`: the short code gains 3 to 4 % of the
// whole GEMM on Zen 4.
template <class V, class T>
void finish_plain_tile(const GemmTask& t, const PanelColumns& c, int64_t first, int rows, const T* tile) {
    with_activation(t.gemm.activation, [&](auto activation_kind) {
        for (int64_t m = first; m < first + rows; ++m, tile += kPanel) {
            typename V::F y[kPanel / V::lanes];
            for (int v = 0; v < kPanel / V::lanes; ++v) y[v] = load_plain<V>(tile + v * V::lanes);
            const float a_scale = t.gemm.a_groups != 0 ? 1.0f : t.gemm.a_scale[m];
            finish_row<V, activation_kind.kind, true>(t, c, m, a_scale, y);
        }
    });
}

// Whether `finish_in_registers` knows what becomes of a panel that `is_whole`.
inline bool finishes_in_registers(const GemmTask& t) {
    const vqvit_gemm& g = t.gemm;
    if (g.a_groups != 0) return false;
    if (t.store == Store::kRowCodes) return true;
    if (t.store != Store::kFloat || t.dtype != VQVIT_F32) return false;
    if (g.residual == nullptr) return g.layer_scale == nullptr;
    return g.residual_dtype == VQVIT_F32 && g.activation == VQVIT_NONE;
}

// A tile that goes from the registers of its sums to its place. By way of a buffer it takes 60 cycles more on Zen 5.
template <class V, class Dot>
void finish_in_registers(
    const GemmTask& t, const PanelColumns& c, int64_t m, int rows, const uint8_t* a, int64_t a_stride,
    const PanelGroups& b) {
    constexpr int kVectors = kPanel / V::lanes;
    using Sums = const typename V::I (&)[kVectors];
    const vqvit_gemm& g = t.gemm;
    const float* a_scale = g.a_scale + m;
    const auto outputs = [=, &c](int r, Sums sums, typename V::F(&y)[kVectors], auto kind)
                             __attribute__((always_inline)) {
        for (int v = 0; v < kVectors; ++v) y[v] = V::to_float(sums[v]);
        dequantize_row<V, kind.kind>(c, a_scale[r], y);
    };
    const auto run = [&](const auto& finish) {
        Dot::finish_tile(rows, a, a_stride, b.codes(), b.count, b.sums, b.ahead, finish);
    };
    using None = Activation<VQVIT_NONE>;
    if (t.store == Store::kRowCodes) {
        return run([=, &t](int r, Sums sums) __attribute__((always_inline)) {
            typename V::F y[kVectors];
            outputs(r, sums, y, None{});
            store_row_codes<V>(y, t, m + r);
        });
    }
    const int64_t stride = t.out_stride, residual_stride = g.n;
    float* out = static_cast<float*>(t.out) + m * stride + c.first;
    if (g.residual != nullptr) {
        const float* residual = static_cast<const float*>(g.residual) + m * residual_stride + c.first;
        for (int r = 0; r < rows; ++r) {  // both come from memory when batches are large: 4 to 8 % of such layers
            for (int64_t n = 0; n < kPanel; n += kLineBytes / int64_t{sizeof(float)}) {
                __builtin_prefetch(residual + r * residual_stride + n);
                __builtin_prefetch(out + r * stride + n, 1);
            }
        }
        return run([=, &c](int r, Sums sums) __attribute__((always_inline)) {
            typename V::F y[kVectors];
            outputs(r, sums, y, None{});
            for (int v = 0; v < kVectors; ++v) {
                const typename V::F base = V::load(residual + r * residual_stride + v * V::lanes);
                y[v] = V::fma(y[v], V::load(c.layer_scale + v * V::lanes), base);
                V::store(out + r * stride + v * V::lanes, y[v]);
            }
        });
    }
    with_activation(g.activation, [&](auto kind) {
        run([=](int r, Sums sums) __attribute__((always_inline)) {
            typename V::F y[kVectors];
            outputs(r, sums, y, kind);
            for (int v = 0; v < kVectors; ++v) V::store(out + r * stride + v * V::lanes, y[v]);
        });
    });
}

inline void store_products(const GemmTask& t, const PanelColumns& c, int64_t first, int rows, const int32_t* tile) {
    for (int64_t m = first; m < first + rows; ++m, tile += kPanel) {
        int32_t* out = static_cast<int32_t*>(t.out) + m * t.out_stride + c.first;
        std::memcpy(out, tile, static_cast<size_t>(c.count) * sizeof(int32_t));
    }
}

}  // namespace
}  // namespace vqvit
