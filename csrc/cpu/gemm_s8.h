// One task of a GEMM: a block of rows times one 64-column panel, tile by tile, each tile finished where its sums end.
//
//   acc = Σ_k (a - z_a)(b - z_b)          int32
//   acc = Σ_g fma(acc_g, α_a[g], acc)     fp32, where each kGroup columns g of a have a scale; then α_a is 1
//
// What becomes of them: gemm_s8_epilogue.h.
#pragma once

#include "gemm_s8_epilogue.h"

namespace vqvit {
namespace {

// One tile of Σ_k a b over b's groups. `a`: prepared rows of k input channels.
template <class Dot>
inline void multiply_tile(
    int64_t k, int rows, const uint8_t* a, int64_t a_stride, const PanelGroups& b, int32_t* out) {
    if constexpr (Dot::kReadsStrips) {
        Dot::gemm_tile(rows, a, k, b, out);
    } else {
        Dot::tile(
            rows, kTileVectors, a + b.first * Dot::kGroupBytes, a_stride, b.codes(), b.count, b.sums, out, kPanel,
            b.ahead);
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

// One tile of Σ_g fma(acc_g, α_a[m, g], s) over the kGroup columns g of a, in their order. `a`: prepared rows from m
// on; `b`: all groups of a panel, its sums those of `group_column_sums`; `out` (rows, 64): fp32.
template <class V, class Dot>
void add_groups(
    const GemmTask& t, int64_t m, int rows, const uint8_t* a, int64_t a_stride, const PanelGroups& b, float* out) {
    constexpr int64_t kGroupsOfScale = kGroup / kKGroup;
    const vqvit_gemm& g = t.gemm;
    const int64_t scales = ceil_div(g.k, kGroup);
    alignas(64) int32_t acc[Dot::kRows * kPanel];
    std::memset(out, 0, static_cast<size_t>(rows) * kPanel * sizeof(float));
    for (int64_t i = 0; i < scales; ++i) {
        PanelGroups part = b;
        part.first = i * kGroupsOfScale;
        part.count = ceil_div(smaller(g.k - i * kGroup, kGroup), kKGroup);
        if (b.sums != nullptr) part.sums = b.sums + i * kPanel;
        if (b.ahead != nullptr) part.ahead = b.ahead + part.first * kLineBytes;
        const float* scale_of_rows = g.a_scale + m * scales + i;
        if constexpr (Dot::kFinishesTiles) {
            const auto add = [=](int r, const typename V::I(&sums)[kPanel / V::lanes]) __attribute__((always_inline)) {
                const typename V::F scale = V::set(scale_of_rows[r * scales]);
                float* row = out + r * kPanel;
                for (int v = 0; v < kPanel / V::lanes; ++v, row += V::lanes) {
                    V::store(row, V::fma(V::to_float(sums[v]), scale, V::load(row)));
                }
            };
            Dot::finish_tile(
                rows, a + part.first * Dot::kGroupBytes, a_stride, part.codes(), part.count, part.sums, part.ahead,
                add);
            continue;
        }
        multiply_tile<Dot>(g.k, rows, a, a_stride, part, acc);
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
    const int64_t k = t.gemm.k, groups = ceil_div(k, kKGroup);
    constexpr int64_t kTile = int64_t{Dot::kRows} * kPanel;
    PanelColumns columns;
    load_columns(t.gemm, panel, columns);

    // Products in the order a b, R_a b, a R_b, R_a R_b: the first always, the others as `terms` says.
    const PackedWeight* right[4] = {&t.weight, &t.weight, &t.weight_residual, &t.weight_residual};
    const int wanted = 1 | t.terms << 1;
    alignas(64) int32_t products[4 * kTile];
    alignas(64) float sums[kTile];
    if (t.terms != 0) std::memset(products, 0, sizeof products);
    const bool grouped = t.gemm.a_groups != 0, whole = is_whole(t, columns);
    const bool plain = whole && t.store == Store::kFloat, direct = whole && finishes_in_registers(t);

    // The panel as the i-th of `right` has it, for the tile-th tile. The next panel goes to L2, a part with each tile: at
    // batch 1 it comes from memory.
    constexpr int64_t kParts = kGroupBytes / kLineBytes;
    const bool more = panel + 1 < ceil_div(t.gemm.n, kPanel);
    const auto groups_of = [&](int i, int64_t tile) -> PanelGroups {
        const bool in_strips = Dot::kReadsStrips && right[i]->strips != nullptr;
        const int64_t bytes = in_strips ? StripLayout(k).panel_bytes() : panel_bytes(k);
        const int8_t* b = (in_strips ? right[i]->strips : right[i]->panels) + panel * bytes;
        const int8_t* ahead = more ? b + bytes + tile % kParts * groups * kLineBytes : nullptr;
        return {b, in_strips, 0, groups, in_strips ? nullptr : column_sums(b, groups), ahead};
    };
    const int32_t* group_sums = grouped ? group_column_sums<Dot>(groups_of(0, 0).panel, k) : nullptr;

    TileRows at = rows;
    for (int64_t m = first; m < last; m += Dot::kRows, at.a += Dot::kRows * at.stride) {
        const int count = static_cast<int>(smaller(last - m, Dot::kRows));
        const int64_t tile = (m - first) / Dot::kRows;
        if (grouped) {
            PanelGroups b = groups_of(0, tile);
            b.sums = group_sums;
            add_groups<V, Dot>(t, m, count, at.a, at.stride, b, sums);
            if (plain) {
                finish_plain_tile<V>(t, columns, m, count, sums);
            } else {
                finish_tile<V>(t, columns, m, count, products, kTile, sums);
            }
            continue;
        }
        if constexpr (Dot::kFinishesTiles) {
            if (direct) {
                finish_in_registers<V, Dot>(t, columns, m, count, at.a, at.stride, groups_of(0, tile));
                continue;
            }
        }
        const uint8_t* a_residual = rows.a_residual == nullptr ? nullptr : rows.a_residual + (m - first) * at.stride;
        const uint8_t* left[4] = {at.a, a_residual, at.a, a_residual};
        for (int i = 0; wanted >> i != 0; ++i) {
            if ((wanted >> i & 1) == 0) continue;
            multiply_tile<Dot>(k, count, left[i], at.stride, groups_of(i, tile), products + i * kTile);
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
int64_t row_bytes(int64_t k) {
    if constexpr (Dot::kReadsStrips) {
        return Dot::row_bytes(k);
    } else {
        return ceil_div(k, kKGroup) * Dot::kGroupBytes;
    }
}

template <class Dot>
void prepare_a(
    const int8_t* a, int64_t a_stride, int64_t k, int64_t first, int64_t last, [[maybe_unused]] bool for_strips,
    void* prepared) {
    const int64_t stride = row_bytes<Dot>(k);
    uint8_t* target = static_cast<uint8_t*>(prepared);
    if constexpr (Dot::kReadsStrips) {
        for (int64_t m = first; m < last; m += Dot::kRows, target += Dot::kRows * stride) {
            const int rows = static_cast<int>(smaller(last - m, Dot::kRows));
            Dot::prepare_rows(a + m * a_stride, a_stride, rows, k, for_strips, target);
        }
    } else {
        for (int64_t m = first; m < last; ++m, target += stride) Dot::prepare(a + m * a_stride, k, target);
    }
}

using StripPacking = void (*)(const int8_t* panel, int64_t k, int8_t* strips);

template <class Dot>
constexpr StripPacking strip_packing() {
    if constexpr (Dot::kReadsStrips) {
        return Dot::pack_strips;
    } else {
        return nullptr;
    }
}

}  // namespace
}  // namespace vqvit
