// int8_mm, int8_linear and its quantizing, compensated and projecting (qkv) forms: blocking and threads around the
// panel kernels. The formulas are in gemm_s8.h and gemm_s8_epilogue.h.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "dot.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace vqvit {
namespace {

// A block of prepared rows shares L2 with the weight panel that streams past it: half of the smallest L2 we meet with
// AVX-512 (1 MiB) and then some, so that the panel (196 KiB at K = 3072) stays too.
constexpr int64_t kRowBlockBytes = 256 * 1024;

// fp32 rows of int8_linear_quantize that wait for their maximum take 5/8 of L2, and leave the rest to weights and
// codes: on Zen 5, with 1 MiB, 640 KiB beat 384 by 2 % of fc1, and 192 lost 8 %, because weights then come from L3 more
// often.
int64_t waiting_row_bytes() {
    static const int64_t bytes = [] {
        int64_t l2 = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
        l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where nobody knows
#endif
        return (l2 > 0 ? l2 : int64_t{512} * 1024) * 5 / 8;
    }();
    return bytes;
}

// Panels become strips for so many tiles of rows or more: a pass over the weights, which fewer rows do not repay.
constexpr int64_t kTilesForStrips = 4;

// Between such rows: a cache line that keeps rows of widths that are powers of two out of each other's way.
constexpr int64_t kRowGap = kLineBytes / int64_t{sizeof(float)};

// fp32 rows of int8_linear_qkv that wait for their heads to be whole, in L1 beside a tile's row of weights.
constexpr int64_t kWaitingTileBytes = 12 * 1024;

int64_t macs(const vqvit_gemm& g) { return g.m * g.n * g.k; }

// Rows cut into blocks. Whole tiles, but for the last of a share: threads get as many rows each, to the row.
struct RowBlocks {
    int64_t rows, tile_rows, shares = 1, blocks;

    RowBlocks(int64_t rows, int64_t tile_rows, int64_t at_least, int64_t bytes_per_row, int64_t block_bytes)
        : rows(rows), tile_rows(tile_rows) {
        const int64_t fitting = std::max<int64_t>(block_bytes / (bytes_per_row * tile_rows), 1);
        blocks = std::min(std::max(ceil_div(tiles(), fitting), at_least), tiles());
    }
    // As many blocks for each thread, and as many rows if `keep_busy`.
    void share_evenly(int threads) {
        if (!keep_busy(threads)) {
            blocks = std::min(round_up(blocks, threads), tiles());
            return;
        }
        shares = threads;
        blocks = round_up(blocks, threads);
    }

    int64_t tiles() const { return ceil_div(rows, tile_rows); }
    // Whether there are a few tiles for each thread.
    bool keep_busy(int threads) const { return tiles() >= 4 * int64_t{threads}; }
    int64_t first(int64_t i) const {
        const int64_t per_share = blocks / shares, share = i / per_share;
        const int64_t begin = block_start(share, shares, rows), end = block_start(share + 1, shares, rows);
        return begin + block_start(i % per_share, per_share, ceil_div(end - begin, tile_rows)) * tile_rows;
    }
    int64_t last(int64_t i) const { return i + 1 == blocks ? rows : first(i + 1); }
};

// The row block that this thread reads: codes as they are where the tiles take them, else prepared in its scratch.
struct PreparedRows {
    int64_t block = -1;
    TileRows rows = {};

    void load(const Kernels& isa, const GemmTask& t, int64_t index, int64_t first, int64_t last) {
        if (block == index) return;
        block = index;
        const vqvit_gemm& g = t.gemm;
        const bool as_they_are = isa.reads_s8 && g.k % kKGroup == 0;
        rows.stride = as_they_are ? g.a_stride : isa.row_bytes(g.k);
        const auto rows_of = [&](const int8_t* a, Slot slot) -> const uint8_t* {
            if (a == nullptr) return nullptr;
            if (as_they_are) return reinterpret_cast<const uint8_t*>(a + first * g.a_stride);
            void* prepared = scratch(slot, round_up(last - first, isa.tile_rows) * rows.stride);
            isa.prepare_a(a, g.a_stride, g.k, first, last, t.weight.strips != nullptr, prepared);
            return static_cast<const uint8_t*>(prepared);
        };
        rows.a = rows_of(g.a, Slot::kA);
        rows.a_residual = rows_of(t.a_residual, Slot::kAResidual);
    }
};

// Tasks are (row block, panel), row blocks outermost: a thread prepares a block and streams panels past it.
void run_gemm(const Kernels& isa, const GemmTask& t, int threads) {
    const vqvit_gemm& g = t.gemm;
    if (g.m == 0 || g.n == 0) return;
    const int64_t panels = ceil_div(g.n, kPanel), busy = ceil_div(threads * kTasksPerThread, panels);
    RowBlocks rows(g.m, isa.tile_rows, busy, isa.row_bytes(g.k), kRowBlockBytes);
    rows.share_evenly(threads);
    const auto task = [&](PreparedRows& prepared, int64_t i) {
        const int64_t block = i / panels, first = rows.first(block), last = rows.last(block);
        prepared.load(isa, t, block, first, last);
        isa.gemm_panel(t, first, last, i % panels, prepared.rows);
    };
    parallel_for<PreparedRows>(rows.blocks * panels, macs(g), threads, task);
}

// Each task computes whole fp32 rows into this thread's scratch, applies the activation and quantizes them there.
void run_gemm_per_token(
    const Kernels& isa, const GemmTask& t, int activation, const Codes& codes, const RowBlocks& rows, int threads) {
    const vqvit_gemm& g = t.gemm;
    const int64_t panels = ceil_div(g.n, kPanel);
    const auto task = [&](PreparedRows& prepared, int64_t i) {
        const int64_t first = rows.first(i), last = rows.last(i);
        prepared.load(isa, t, i, first, last);
        GemmTask block = t;
        const int64_t stride = g.n + kRowGap;
        float* waiting = static_cast<float*>(scratch(Slot::kTile, (last - first) * stride * int64_t{sizeof(float)}));
        block.out = waiting - first * stride;  // row `first` lands at the start
        block.out_stride = stride;
        for (int64_t p = 0; p < panels; ++p) isa.gemm_panel(block, first, last, p, prepared.rows);
        const QuantizeRows quantize = {
            waiting - first * stride, VQVIT_F32, stride, g.n, nullptr, activation, codes,
        };
        isa.quantize_rows(quantize, first, last);
    };
    parallel_for<PreparedRows>(rows.blocks, macs(g), threads, task);
}

// Each task computes the fp32 columns of one group into this thread's scratch and quantizes them there.
void run_gemm_per_group(const Kernels& isa, const GemmTask& t, int8_t* codes, float* scale, int threads) {
    const vqvit_gemm& g = t.gemm;
    constexpr int64_t kPanels = kGroup / kPanel;
    const int64_t groups = ceil_div(g.n, kGroup), panels = ceil_div(g.n, kPanel);
    const int64_t bytes = isa.row_bytes(g.k) + kGroup * int64_t{sizeof(float)};
    const RowBlocks rows(g.m, isa.tile_rows, ceil_div(threads * kTasksPerThread, groups), bytes, kRowBlockBytes);
    const auto task = [&](PreparedRows& prepared, int64_t i) {
        const int64_t group = i % groups, first = rows.first(i / groups), last = rows.last(i / groups);
        prepared.load(isa, t, i / groups, first, last);
        GemmTask block = t;
        void* waiting = scratch(Slot::kTile, (last - first) * kGroup * int64_t{sizeof(float)});
        float* tile = static_cast<float*>(waiting) - first * kGroup;
        block.out = tile - group * kGroup;  // its column is counted from the first of the matrix
        block.out_stride = kGroup;
        for (int64_t p = group * kPanels; p < std::min((group + 1) * kPanels, panels); ++p) {
            isa.gemm_panel(block, first, last, p, prepared.rows);
        }
        const int64_t columns = std::min<int64_t>(g.n - group * kGroup, kGroup);
        const QuantizeGroups quantize = {
            tile, VQVIT_F32, kGroup, columns, nullptr, codes + group * kGroup, scale + group, g.n, groups,
        };
        isa.quantize_groups(quantize, first, last);
    };
    parallel_for<PreparedRows>(rows.blocks * groups, macs(g), threads, task);
}

// Rows [first, last) of one image and some panels of qkv's weights.
struct QkvRows {
    int64_t image, begin;  // `begin`: the image's first row
    int64_t first, last;
    int64_t column, columns;  // of whole heads
};

// A head of q or k that is one panel: its rows become codes in the registers that they are computed in.
void project_head(const Kernels& isa, const GemmTask& t, const Qkv& out, const QkvRows& r, const TileRows& rows) {
    const int64_t d = out.head_dim, head = r.column / d;
    const int part = static_cast<int>(head / out.heads);
    const HeadTask codes = out.head(part, r.image, head % out.heads, r.first - r.begin, 0, nullptr, VQVIT_F32, d);
    GemmTask task = t;
    task.store = Store::kRowCodes;
    task.out = codes.codes - r.first * d;  // rows are counted from those of the matrix
    task.out_stride = d;
    task.scale = codes.scale - r.first;
    isa.gemm_panel(task, r.first, r.last, r.column / kPanel, rows);
}

// Whole heads by way of fp32 in this thread's scratch: `step` rows at a time for q and k, in L1; all tokens of an image
// for v, whose scales need every token, in L2.
void project_heads(
    const Kernels& isa, const GemmTask& t, const Qkv& out, const QkvRows& r, int64_t step, const TileRows& rows) {
    const vqvit_gemm& g = t.gemm;
    const int64_t d = out.head_dim, end_column = std::min(r.column + r.columns, g.n);
    float* waiting = static_cast<float*>(scratch(Slot::kTile, step * r.columns * int64_t{sizeof(float)}));
    GemmTask task = t;
    task.out_stride = r.columns;
    for (int64_t m = r.first; m < r.last; m += step) {
        const int64_t end = std::min(m + step, r.last);
        TileRows step_rows = rows;
        step_rows.a += (m - r.first) * step_rows.stride;
        task.out = waiting - m * r.columns - r.column;  // rows and columns are counted from those of the matrix
        for (int64_t p = r.column / kPanel; p * kPanel < end_column; ++p) isa.gemm_panel(task, m, end, p, step_rows);
        for (int64_t column = r.column; column < end_column; column += d) {
            const int64_t head = column / d;
            const int part = static_cast<int>(head / out.heads);
            const int64_t count = (part == 0 ? std::min(end, r.begin + out.queries) : end) - m;
            if (count <= 0) continue;
            const float* x = waiting + (column - r.column);
            const HeadTask codes =
                out.head(part, r.image, head % out.heads, m - r.begin, count, x, VQVIT_F32, r.columns);
            isa.quantize_head(codes);
        }
    }
}

// Codes of q, k and v. A task is a unit, the fewest panels that hold whole heads, of some rows: of a block of them for
// q and k, of an image for v.
void run_gemm_qkv(const Kernels& isa, const GemmTask& t, const Qkv& out, int threads) {
    const vqvit_gemm& g = t.gemm;
    const int64_t d = out.head_dim, images = g.m / out.tokens, panels = ceil_div(g.n, kPanel);
    const int64_t unit_panels = std::min(d / std::gcd<int64_t>(d, kPanel), panels);
    const int64_t unit = unit_panels * kPanel, units = ceil_div(panels, unit_panels);
    const int64_t value_units = units - 2 * out.heads * d / unit, other_units = units - value_units;
    const int64_t bytes = isa.row_bytes(g.k) + unit * int64_t{sizeof(float)};
    const int64_t busy = ceil_div(threads * kTasksPerThread, images * units);
    const RowBlocks rows(out.tokens, isa.tile_rows, busy, bytes, kRowBlockBytes);
    const int64_t tiles_in_l1 = kWaitingTileBytes / (unit * isa.tile_rows * int64_t{sizeof(float)});
    const int64_t step = std::max<int64_t>(tiles_in_l1, 1) * isa.tile_rows;

    // Tasks of an image: all of one size, a head's together, as int8_attention shares them out; else the longest first.
    const int64_t tasks = value_units + other_units * rows.blocks;
    const bool by_head = rows.blocks == 1 && units == 3 * value_units;
    const auto task = [&](PreparedRows& prepared, int64_t i) {
        const int64_t image = i / tasks, within = i % tasks, other = within - value_units;
        const int64_t longest_first = other < 0 ? units + other : other % other_units;
        const int64_t u = by_head ? within % 3 * value_units + within / 3 : longest_first;
        const bool values = u >= other_units, queries_alone = (u + 1) * unit <= out.heads * d;
        const int64_t block = by_head || values ? 0 : other / other_units, whole = rows.blocks == 1 ? 0 : 1 + block;

        QkvRows r = {image, image * out.tokens, 0, 0, u * unit, unit};
        r.first = r.begin + (values ? 0 : rows.first(block));
        const int64_t end_of_block = r.begin + (values ? out.tokens : rows.last(block));
        r.last = queries_alone ? std::min(end_of_block, r.begin + out.queries) : end_of_block;
        if (r.first >= r.last) return;
        prepared.load(isa, t, image * (rows.blocks + 1) + (values ? 0 : whole), r.first, end_of_block);
        if (!values && d == kPanel) {
            project_head(isa, t, out, r, prepared.rows);
        } else {
            const int64_t at_once = values ? r.last - r.first : std::min(step, r.last - r.first);
            project_heads(isa, t, out, r, at_once, prepared.rows);
        }
    };
    parallel_for<PreparedRows>(images * tasks, macs(g), threads, task);
}

// Weights (n, k) in `layout` as panels or strips: themselves if tiles read them as they are, else packed now, panels into
// `slot`, strips into `strips_slot`.
PackedWeight packed_weight(
    const int8_t* b, int layout, const vqvit_gemm& g, Slot slot, Slot strips_slot, int threads) {
    const Kernels& isa = kernels();
    const bool reads_strips = isa.pack_strips != nullptr;
    if (layout == VQVIT_STRIPS && reads_strips) return {nullptr, b};
    const int64_t count = ceil_div(g.n, kPanel);
    const int8_t* panels = b;
    if (layout != VQVIT_PANELS) {
        int8_t* packed = static_cast<int8_t*>(scratch(slot, count * panel_bytes(g.k)));
        vqvit_cpu_reorder_weight(b, layout, g.n, g.k, packed, VQVIT_PANELS, threads);
        panels = packed;
    }
    if (!reads_strips || g.m < kTilesForStrips * isa.tile_rows) return {panels, nullptr};
    int8_t* strips = static_cast<int8_t*>(scratch(strips_slot, count * StripLayout(g.k).panel_bytes()));
    vqvit_cpu_reorder_weight(panels, VQVIT_PANELS, g.n, g.k, strips, VQVIT_STRIPS, threads);
    return {nullptr, strips};
}

GemmTask gemm_task(const vqvit_gemm& g, Store store, void* out, int dtype, int threads, int terms = 0) {
    GemmTask t = {};
    t.gemm = g;
    t.weight = packed_weight(g.b, g.b_layout, g, Slot::kPanels, Slot::kStrips, threads);
    t.terms = terms;
    t.store = store;
    t.out = out;
    t.dtype = dtype;
    t.out_stride = g.n;
    return t;
}

}  // namespace

void project_qkv(const vqvit_gemm& gemm, const Qkv& out, int threads) {
    if (gemm.m == 0) return;
    run_gemm_qkv(kernels(), gemm_task(gemm, Store::kFloat, nullptr, VQVIT_F32, threads), out, threads);
}

}  // namespace vqvit

using namespace vqvit;

extern "C" {

int vqvit_cpu_weight_layout(void) { return kernels().pack_strips != nullptr ? VQVIT_STRIPS : VQVIT_PANELS; }

int vqvit_cpu_reorder_weight(
    const int8_t* b, int layout, int64_t n, int64_t k, int8_t* target, int target_layout, int threads) try {
    if (!known_layout(layout) || !known_layout(target_layout)) return VQVIT_UNKNOWN_LAYOUT;
    const Kernels& isa = kernels();
    const int64_t bytes[] = {kPanel * k, panel_bytes(k), StripLayout(k).panel_bytes()};  // of 64 rows of b
    parallel_for<Stateless>(ceil_div(n, kPanel), n * k, threads, [&](Stateless&, int64_t p) {
        const int64_t columns = std::min<int64_t>(kPanel, n - p * kPanel);
        const int8_t* source = b + p * bytes[layout];
        int8_t* result = target + p * bytes[target_layout];
        if (layout == target_layout) {
            std::memcpy(result, source, static_cast<size_t>(layout == VQVIT_ROWS ? columns * k : bytes[layout]));
            return;
        }
        // By way of a panel
        const auto between = [&] { return static_cast<int8_t*>(scratch(Slot::kPanel, panel_bytes(k))); };
        const int8_t* panel = source;
        if (layout != VQVIT_PANELS) {
            int8_t* packed = target_layout == VQVIT_PANELS ? result : between();
            if (layout == VQVIT_ROWS) {
                isa.pack_panel(source, k, columns, k, packed);
            } else {
                unpack_strips(source, k, packed);
            }
            panel = packed;
        }
        if (target_layout == VQVIT_ROWS) unpack_panel(panel, columns, k, result);
        if (target_layout == VQVIT_STRIPS) {
            (isa.pack_strips != nullptr ? isa.pack_strips : pack_strips_portable)(panel, k, result);
        }
    });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_int8_mm(const vqvit_gemm* gemm, int32_t* acc, int threads) try {
    if (!known_layout(gemm->b_layout)) return VQVIT_UNKNOWN_LAYOUT;
    run_gemm(kernels(), gemm_task(*gemm, Store::kInt32, acc, VQVIT_F32, threads), threads);
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_int8_linear(const vqvit_gemm* gemm, void* y, int dtype, int threads) try {
    if (!known_dtype(dtype) || !known_dtype(gemm->residual_dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (!known_activation(gemm->activation)) return VQVIT_UNKNOWN_ACTIVATION;
    if (!known_layout(gemm->b_layout)) return VQVIT_UNKNOWN_LAYOUT;
    run_gemm(kernels(), gemm_task(*gemm, Store::kFloat, y, dtype, threads), threads);
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_int8_linear_quantize(
    const vqvit_gemm* gemm, const float* out_scale, int symmetric, int per_group, int8_t* codes, float* scale,
    int32_t* zero_point, int32_t* row_sum, int threads) try {
    const vqvit_gemm& g = *gemm;
    if (!known_activation(g.activation)) return VQVIT_UNKNOWN_ACTIVATION;
    if (!known_layout(g.b_layout)) return VQVIT_UNKNOWN_LAYOUT;
    if (g.m == 0) return VQVIT_OK;
    const Kernels& isa = kernels();
    if (per_group != 0) {
        run_gemm_per_group(isa, gemm_task(g, Store::kFloat, nullptr, VQVIT_F32, threads), codes, scale, threads);
        return VQVIT_OK;
    }
    if (out_scale != nullptr) {
        GemmTask t = gemm_task(g, Store::kStaticCodes, codes, VQVIT_F32, threads);
        t.static_scale = out_scale;
        t.scale = scale;
        t.row_sum = row_sum;
        std::fill_n(scale, g.m, *out_scale);
        if (row_sum != nullptr) std::fill_n(row_sum, g.m, 0);
        run_gemm(isa, t, threads);
        return VQVIT_OK;
    }
    const Codes out = {codes, scale, zero_point, row_sum, nullptr, 0.0f, symmetric != 0};
    GemmTask t = gemm_task(g, Store::kFloat, nullptr, VQVIT_F32, threads);
    t.gemm.activation = VQVIT_NONE;  // the quantizer applies it, to whole rows in L1
    RowBlocks rows(g.m, isa.tile_rows, threads, g.n * int64_t{sizeof(float)}, waiting_row_bytes());
    rows.share_evenly(threads);
    if (rows.keep_busy(threads)) {  // else whole rows would leave threads idle
        run_gemm_per_token(isa, t, g.activation, out, rows, threads);
        return VQVIT_OK;
    }
    t.out = scratch(Slot::kTile, g.m * g.n * int64_t{sizeof(float)});
    run_gemm(isa, t, threads);
    const QuantizeRows quantize = {t.out, VQVIT_F32, g.n, g.n, nullptr, g.activation, out};
    parallel_rows(g.m, g.n, threads, [&](int64_t first, int64_t last) { isa.quantize_rows(quantize, first, last); });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_int8_linear_qkv(
    const vqvit_gemm* gemm, int64_t tokens, int64_t heads, int8_t* q, int8_t* k, int8_t* v, float* q_scale,
    float* k_scale, float* v_scale, int threads) try {
    if (!known_layout(gemm->b_layout)) return VQVIT_UNKNOWN_LAYOUT;
    project_qkv(*gemm, {tokens, tokens, heads, gemm->n / (3 * heads), {q, k, v}, {q_scale, k_scale, v_scale}}, threads);
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_int8_linear_compensated(
    const vqvit_gemm* gemm, const int8_t* a_residual, const int8_t* b_residual, int terms, float first_order,
    float second_order, void* y, int dtype, int threads) try {
    if (!known_dtype(dtype) || !known_dtype(gemm->residual_dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (!known_activation(gemm->activation)) return VQVIT_UNKNOWN_ACTIVATION;
    if (!known_layout(gemm->b_layout)) return VQVIT_UNKNOWN_LAYOUT;
    if (terms < 0 || terms > 7) return VQVIT_UNKNOWN_MODE;
    GemmTask t = gemm_task(*gemm, Store::kFloat, y, dtype, threads, terms);
    t.first_order = first_order;
    t.second_order = second_order;
    if ((terms & (1 | 4)) != 0) t.a_residual = a_residual;
    if ((terms & (2 | 4)) != 0) {
        t.weight_residual = packed_weight(
            b_residual, gemm->b_layout, *gemm, Slot::kResidualPanels, Slot::kResidualStrips, threads);
    }
    run_gemm(kernels(), t, threads);
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

}  // extern "C"
