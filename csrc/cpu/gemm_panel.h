// One task of a GEMM: a block of rows times one 64-column panel, tile by tile, each tile finished while it is in L1.
//
//   acc = Σ_k (a - z_a)(b - z_b)          int32
//   y   = act(fma(acc, α_a α_b, bias))    fp32
//   y   = fma(y, layer_scale, residual)
//   out = y as int32 / float / static int8 codes
#pragma once

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
    c.count = g.n - c.first < kPanel ? g.n - c.first : kPanel;
    copy_columns(c.b_scale, g.b_scale, c);
    copy_columns(c.bias, g.bias, c);  // a missing bias is zero: fma(acc, scale, 0) = acc · scale
    copy_columns(c.layer_scale, g.layer_scale, c);
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

// body(v, extent) for each of a row's vectors that holds columns of the matrix.
template <class V, class Body>
inline void for_columns(const PanelColumns& c, const Body& body) {
    constexpr int kVectors = kPanel / V::lanes;
    if (c.count == kPanel) {
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

template <class V, int N>
inline void add_residual(typename V::F (&y)[N], const vqvit_gemm& g, const PanelColumns& c, int64_t m) {
    if (g.residual == nullptr) {
        if (g.layer_scale == nullptr) return;
        for (int v = 0; v < N; ++v) y[v] = V::mul(y[v], V::load(c.layer_scale + v * V::lanes));
        return;
    }
    with_dtype(g.residual_dtype, [&](auto dtype) {
        const char* residual = static_cast<const char*>(g.residual) + (m * g.n + c.first) * dtype.size;
        for_columns<V>(c, [&](int v, auto extent) {
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
    for_columns<V>(c, [&](int v, auto extent) {
        store_codes<V>(codes + v * V::lanes, to_codes<V>(y[v], scale), extent);
        largest = V::max_i(largest, magnitude_bits<V>(keep<V>(y[v], extent)));
    });
    if (V::reduce_max_i(largest) >= kInfinityBits) {
        const float poison = NAN;
        __atomic_store(t.scale + m, &poison, __ATOMIC_RELAXED);
    }
    if (t.row_sum != nullptr) __atomic_fetch_add(t.row_sum + m, sum_codes(codes, c.count), __ATOMIC_RELAXED);
}

// acc as fp32 to y, activation, residual and store of one row of a tile.
template <class V, int N>
inline void finish_row(typename V::F (&acc)[N], const GemmTask& t, const PanelColumns& c, int64_t m) {
    const vqvit_gemm& g = t.gemm;
    const typename V::F a_scale = V::set(g.a_scale[m]);
    for (int v = 0; v < N; ++v) {
        const typename V::F scale = V::mul(a_scale, V::load(c.b_scale + v * V::lanes));
        acc[v] = V::fma(acc[v], scale, V::load(c.bias + v * V::lanes));
    }
    activate<V>(acc, g.activation);
    add_residual<V>(acc, g, c, m);
    if (t.store == Store::kStaticCodes) return store_static_codes<V>(acc, t, c, m);
    with_dtype(t.dtype, [&](auto dtype) {
        char* out = static_cast<char*>(t.out) + (m * t.out_stride + c.first) * dtype.size;
        for_columns<V>(c, [&](int v, auto extent) { store_as<V>(out, v * V::lanes, acc[v], dtype, extent); });
    });
}

template <class V>
void finish_tile(const GemmTask& t, const PanelColumns& c, int64_t first, int rows, const int32_t* tile) {
    constexpr int kVectors = kPanel / V::lanes;
    for (int r = 0; r < rows; ++r, tile += kPanel) {
        if (t.store == Store::kInt32) {
            int32_t* out = static_cast<int32_t*>(t.out) + (first + r) * t.out_stride + c.first;
            std::memcpy(out, tile, static_cast<size_t>(c.count) * sizeof(int32_t));
            continue;
        }
        typename V::I acc[kVectors];
        for (int v = 0; v < kVectors; ++v) acc[v] = V::load_i(tile + v * V::lanes);
        subtract_zero_points<V>(acc, t.gemm, c, first + r);
        typename V::F y[kVectors];
        for (int v = 0; v < kVectors; ++v) y[v] = V::to_float(acc[v]);
        finish_row<V>(y, t, c, first + r);
    }
}

// fma(R_a R_b, second_order, fma(R_a b + a R_b, first_order, a b)) with the products that `terms` selects.
template <class V>
void finish_compensated_tile(
    const GemmTask& t, const PanelColumns& c, int64_t first, int rows, const int32_t* products, int64_t tile_size) {
    constexpr int kVectors = kPanel / V::lanes;
    for (int r = 0; r < rows; ++r) {
        typename V::F y[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const int32_t* p = products + r * kPanel + v * V::lanes;
            y[v] = V::to_float(V::load_i(p));
            if ((t.terms & 3) != 0) {
                const typename V::I sum = V::add_i(V::load_i(p + tile_size), V::load_i(p + 2 * tile_size));
                y[v] = V::fma(V::to_float(sum), V::set(t.first_order), y[v]);
            }
            if ((t.terms & 4) != 0) {
                y[v] = V::fma(V::to_float(V::load_i(p + 3 * tile_size)), V::set(t.second_order), y[v]);
            }
        }
        finish_row<V>(y, t, c, first + r);
    }
}

template <class V, class Dot>
void gemm_panel(
    const GemmTask& t, int64_t first, int64_t last, int64_t panel, const void* prepared,
    const void* prepared_residual) {
    const int64_t groups = ceil_div(t.gemm.k, kKGroup), a_stride = groups * Dot::kGroupBytes;
    const int64_t offset = panel * panel_bytes(t.gemm.k);
    const uint8_t* a = static_cast<const uint8_t*>(prepared);
    const uint8_t* a_residual = static_cast<const uint8_t*>(prepared_residual);
    constexpr int64_t kTile = int64_t{Dot::kRows} * kPanel;
    constexpr int kVectors = kPanel / 16;
    PanelColumns columns;
    load_columns(t.gemm, panel, columns);

    for (int64_t m = first; m < last; m += Dot::kRows, a += Dot::kRows * a_stride) {
        const int rows = static_cast<int>(last - m < Dot::kRows ? last - m : Dot::kRows);
        if (t.terms == 0) {
            alignas(64) int32_t tile[kTile];
            Dot::tile(rows, kVectors, a, a_stride, t.panels + offset, groups, false, tile, kPanel);
            finish_tile<V>(t, columns, m, rows, tile);
            continue;
        }
        // Products in the order a b, R_a b, a R_b, R_a R_b.
        alignas(64) int32_t products[4 * kTile] = {};
        const uint8_t* left[4] = {a, a_residual, a, a_residual};
        const int8_t* right[4] = {t.panels, t.panels, t.residual_panels, t.residual_panels};
        for (int i = 0; i < 4; ++i) {
            if (i > 0 && (t.terms >> (i - 1) & 1) == 0) continue;
            Dot::tile(rows, kVectors, left[i], a_stride, right[i] + offset, groups, false, products + i * kTile, kPanel);
        }
        finish_compensated_tile<V>(t, columns, m, rows, products, kTile);
        if (a_residual != nullptr) a_residual += Dot::kRows * a_stride;
    }
}

template <class Dot>
void prepare_a(const int8_t* a, int64_t a_stride, int64_t k, int64_t first, int64_t last, void* prepared) {
    const int64_t stride = ceil_div(k, kKGroup) * Dot::kGroupBytes;
    for (int64_t m = first; m < last; ++m) {
        Dot::prepare(a + m * a_stride, k, false, static_cast<uint8_t*>(prepared) + (m - first) * stride);
    }
}

}  // namespace
}  // namespace vqvit
