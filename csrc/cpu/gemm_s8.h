// One task of a GEMM: a block of rows times one 64-column panel, tile by tile, each tile finished while it is in L1.
//
//   acc = Σ_k (a - z_a)(b - z_b)          int32
//   acc = Σ_g fma(acc_g, α_a[g], acc)     fp32, where each kGroup columns g of a have a scale; then α_a below is 1
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
    copy_columns(c.bias, static_cast<const float*>(g.bias), c);  // a missing bias is zero: fma(acc, scale, 0) = acc · scale
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

// The largest magnitudes, as bits, of vectors.
template <class V, int N>
inline typename V::I largest_magnitudes(const typename V::F (&y)[N]) {
    typename V::I largest = magnitude_bits<V>(y[0]);
    for (int v = 1; v < N; ++v) largest = V::max_i(largest, magnitude_bits<V>(y[v]));
    return largest;
}

// Codes of row m with a scale of its own, where the panel is all of it: a head of q or k.
template <class V, int N>
inline void store_row_codes(const typename V::F (&y)[N], const GemmTask& t, int64_t m) {
    const int32_t largest = V::reduce_max_i(largest_magnitudes<V>(y));
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

// `finish_tile` of products or sums to floating-point outputs where `is_whole`: the short code gains 3 to 4 % of the whole GEMM on Zen 4.
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
    const int8_t* panel, int64_t groups, const int8_t* ahead) {
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
        Dot::finish_tile(rows, a, a_stride, panel, groups, column_sums(panel, groups), ahead, finish);
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

// Σ_k b of each column of a panel and each kGroup rows of b: (⌈k / kGroup⌉, 64), in this thread's scratch.
template <class Dot>
const int32_t* group_column_sums(const int8_t* panel, int64_t k) {
    if (!Dot::kReadsU8) return nullptr;  // tiles read no sums
    alignas(64) uint8_t ones[kGroup];
    std::memset(ones, 1, sizeof ones);
    const int64_t bytes = ceil_div(k, kGroup) * kPanel * int64_t{sizeof(int32_t)};
    int32_t* sums = static_cast<int32_t*>(scratch(Slot::kGroupSums, bytes));
    int32_t* target = sums;
    for (int64_t i = 0; i < k; i += kGroup, panel += kGroup / kKGroup * kGroupBytes, target += kPanel) {
        const int64_t groups = ceil_div(smaller(k - i, kGroup), kKGroup);
        Dot::tile(1, kTileVectors, ones, kGroup, panel, groups, nullptr, target, kPanel);
    }
    return sums;
}

// One tile of Σ_g fma(acc_g, α_a[m, g], s) over the kGroup columns g of a, in their order. `a`: prepared rows from m on;
// `out` (rows, 64): fp32; `ahead`: as of a tile of all columns.
template <class V, class Dot>
void add_groups(
    const vqvit_gemm& g, int64_t m, int rows, const uint8_t* a, int64_t a_stride, const int8_t* panel,
    const int32_t* sums, float* out, const int8_t* ahead) {
    constexpr int64_t kRowBytes = kGroup / kKGroup * Dot::kGroupBytes, kPanelBytes = kGroup / kKGroup * kGroupBytes;
    const int64_t scales = ceil_div(g.k, kGroup);
    alignas(64) int32_t acc[Dot::kRows * kPanel];
    std::memset(out, 0, static_cast<size_t>(rows) * kPanel * sizeof(float));
    for (int64_t i = 0; i < scales; ++i, a += kRowBytes, panel += kPanelBytes) {
        const int64_t groups = ceil_div(smaller(g.k - i * kGroup, kGroup), kKGroup);
        const int32_t* group_sums = sums == nullptr ? nullptr : sums + i * kPanel;
        const float* scale_of_rows = g.a_scale + m * scales + i;
        if constexpr (Dot::kFinishesTiles) {
            const int8_t* lines = ahead == nullptr ? nullptr : ahead + i * (kGroup / kKGroup) * kLineBytes;
            const auto add = [=](int r, const typename V::I(&sums)[kPanel / V::lanes]) __attribute__((always_inline)) {
                const typename V::F scale = V::set(scale_of_rows[r * scales]);
                float* row = out + r * kPanel;
                for (int v = 0; v < kPanel / V::lanes; ++v, row += V::lanes) {
                    V::store(row, V::fma(V::to_float(sums[v]), scale, V::load(row)));
                }
            };
            Dot::finish_tile(rows, a, a_stride, panel, groups, group_sums, lines, add);
            continue;
        }
        Dot::tile(rows, kTileVectors, a, a_stride, panel, groups, group_sums, acc, kPanel);
        for (int r = 0; r < rows; ++r) {
            const typename V::F scale = V::set(scale_of_rows[r * scales]);
#pragma GCC unroll 8
            for (int64_t n = r * kPanel; n < (r + 1) * kPanel; n += V::lanes) {
                V::store(out + n, V::fma(V::to_float(V::load_i(acc + n)), scale, V::load(out + n)));
            }
        }
    }
}

template <class V, class Dot>
void gemm_panel(const GemmTask& t, int64_t first, int64_t last, int64_t panel, const TileRows& rows) {
    const int64_t groups = ceil_div(t.gemm.k, kKGroup), offset = panel * panel_bytes(t.gemm.k);
    constexpr int64_t kTile = int64_t{Dot::kRows} * kPanel;
    PanelColumns columns;
    load_columns(t.gemm, panel, columns);

    // Products in the order a b, R_a b, a R_b, R_a R_b: the first always, the others as `terms` says.
    const int8_t* right[4] = {t.panels, t.panels, t.residual_panels, t.residual_panels};
    const int wanted = 1 | t.terms << 1;
    alignas(64) int32_t products[4 * kTile];
    alignas(64) float sums[kTile];
    if (t.terms != 0) std::memset(products, 0, sizeof products);
    const bool grouped = t.gemm.a_groups != 0, whole = is_whole(t, columns);
    const bool plain = whole && t.store == Store::kFloat, direct = whole && finishes_in_registers(t);
    const int32_t* group_sums = grouped ? group_column_sums<Dot>(t.panels + offset, t.gemm.k) : nullptr;

    // The next panel of b goes to L2, a part with each tile: at batch 1 it comes from memory.
    constexpr int64_t kParts = kGroupBytes / kLineBytes;
    const bool more = panel + 1 < ceil_div(t.gemm.n, kPanel);
    const auto next_panel = [&](const int8_t* b, int64_t tile) {
        return more ? b + panel_bytes(t.gemm.k) + tile % kParts * groups * kLineBytes : nullptr;
    };

    TileRows at = rows;
    for (int64_t m = first; m < last; m += Dot::kRows, at.a += Dot::kRows * at.stride) {
        const int count = static_cast<int>(smaller(last - m, Dot::kRows));
        const int64_t tile = (m - first) / Dot::kRows;
        if (grouped) {
            const int8_t* b = t.panels + offset;
            add_groups<V, Dot>(t.gemm, m, count, at.a, at.stride, b, group_sums, sums, next_panel(b, tile));
            if (plain) {
                finish_plain_tile<V>(t, columns, m, count, sums);
            } else {
                finish_tile<V>(t, columns, m, count, products, kTile, sums);
            }
            continue;
        }
        if constexpr (Dot::kFinishesTiles) {
            if (direct) {
                const int8_t* b = t.panels + offset;
                finish_in_registers<V, Dot>(t, columns, m, count, at.a, at.stride, b, groups, next_panel(b, tile));
                continue;
            }
        }
        const uint8_t* a_residual = rows.a_residual == nullptr ? nullptr : rows.a_residual + (m - first) * at.stride;
        const uint8_t* left[4] = {at.a, a_residual, at.a, a_residual};
        for (int i = 0; wanted >> i != 0; ++i) {
            if ((wanted >> i & 1) == 0) continue;
            const int8_t* b = right[i] + offset;
            Dot::tile(
                count, kTileVectors, left[i], at.stride, b, groups, column_sums(b, groups), products + i * kTile, kPanel,
                next_panel(b, tile));
        }
        if (t.store == Store::kInt32) {
            store_products(t, columns, m, count, products);
        } else if (plain) {
            finish_plain_tile<V>(t, columns, m, count, products);
        } else {
            finish_tile<V>(t, columns, m, count, products, kTile, sums);
        }
    }
}

template <class Dot>
void prepare_a(const int8_t* a, int64_t a_stride, int64_t k, int64_t first, int64_t last, void* prepared) {
    const int64_t stride = ceil_div(k, kKGroup) * Dot::kGroupBytes;
    for (int64_t m = first; m < last; ++m) {
        Dot::prepare(a + m * a_stride, k, static_cast<uint8_t*>(prepared) + (m - first) * stride);
    }
}

}  // namespace
}  // namespace vqvit
