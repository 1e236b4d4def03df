// int8_mm, int8_linear and its quantizing, compensated and projecting (qkv) forms: blocking and threads around the panel
// kernels. The formulas are in gemm_s8.h.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace vqvit {
namespace {

// A block of prepared rows shares L2 with the weight panel that streams past it: half of the smallest L2 we meet with
// AVX-512 (1 MiB) and then some, so that the panel (196 KiB at K = 3072) stays too.
constexpr int64_t kRowBlockBytes = 256 * 1024;

// fp32 rows of int8_linear_quantize that wait for their maximum, in L2.
constexpr int64_t kWaitingRowBytes = 640 * 1024;

// Between such rows: a cache line that keeps the rows of a tile, of widths that are powers of two, out of each other's way.
constexpr int64_t kRowGap = kLineBytes / int64_t{sizeof(float)};

// fp32 rows of int8_linear_qkv that wait for their heads to be whole, in L1 beside a tile's row of weights.
constexpr int64_t kWaitingTileBytes = 12 * 1024;

// Tasks a thread should find, so that the last one to finish keeps the others waiting for 3 % of the time at most.
constexpr int64_t kTasksPerThread = 16;

int64_t row_bytes(const Kernels& isa, int64_t k) { return ceil_div(k, kKGroup) * isa.a_group_bytes; }

int64_t macs(const vqvit_gemm& g) { return g.m * g.n * g.k; }

// Rows cut into blocks. Whole tiles, but for the last of a share: threads get as many rows each, to the row.
struct RowBlocks {
    int64_t rows, tile_rows, shares = 1, blocks;

    RowBlocks(int64_t rows, int64_t tile_rows, int64_t at_least, int64_t bytes_per_row, int64_t block_bytes)
        : rows(rows), tile_rows(tile_rows) {
        const int64_t fitting = std::max<int64_t>(block_bytes / (bytes_per_row * tile_rows), 1);
        blocks = std::min(std::max(ceil_div(tiles(), fitting), at_least), tiles());
    }
    // As many blocks for each thread, if each gets a few tiles.
    void share_evenly(int threads) {
        constexpr int64_t kTilesPerThread = 4;
        if (tiles() < threads * kTilesPerThread) {
            blocks = std::min(round_up(blocks, threads), tiles());
            return;
        }
        shares = threads;
        blocks = round_up(blocks, threads);
    }

    int64_t tiles() const { return ceil_div(rows, tile_rows); }
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
        rows.stride = as_they_are ? g.a_stride : row_bytes(isa, g.k);
        const auto rows_of = [&](const int8_t* a, Slot slot) -> const uint8_t* {
            if (a == nullptr) return nullptr;
            if (as_they_are) return reinterpret_cast<const uint8_t*>(a + first * g.a_stride);
            void* prepared = scratch(slot, (last - first) * rows.stride);
            isa.prepare_a(a, g.a_stride, g.k, first, last, prepared);
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
    RowBlocks rows(g.m, isa.tile_rows, busy, row_bytes(isa, g.k), kRowBlockBytes);
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
    const int64_t bytes = row_bytes(isa, g.k) + kGroup * int64_t{sizeof(float)};
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

// The fp32 projection of whole heads in this thread's scratch becomes codes there: a few rows at a time for q and k, in
// L1; all tokens of an image for v, whose scales need every token, in L2.
void run_gemm_qkv(const Kernels& isa, const GemmTask& t, const Qkv& out, int threads) {
    const vqvit_gemm& g = t.gemm;
    const int64_t d = out.head_dim, images = g.m / out.tokens, panels = ceil_div(g.n, kPanel);
    const int64_t unit_panels = std::min(d / std::gcd<int64_t>(d, kPanel), panels);  // the fewest that hold whole heads
    const int64_t unit = unit_panels * kPanel, units = ceil_div(panels, unit_panels);
    const int64_t value_units = units - 2 * out.heads * d / unit, other_units = units - value_units;
    const int64_t bytes = row_bytes(isa, g.k) + unit * int64_t{sizeof(float)};
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
        const int64_t begin = image * out.tokens, first = begin + (values ? 0 : rows.first(block));
        const int64_t wanted = queries_alone ? out.queries : out.tokens;
        const int64_t last = begin + std::min(values ? out.tokens : rows.last(block), wanted);
        if (first >= last) return;
        prepared.load(isa, t, image * (rows.blocks + 1) + (values ? 0 : whole), first, last);

        GemmTask part = t;
        if (!values && d == kPanel) {  // a panel is a head: its rows become codes where they are computed
            const int64_t head = u % out.heads;
            const HeadTask codes = out.head(static_cast<int>(u / out.heads), image, head, first - begin, 0, nullptr, 0, 0);
            part.store = Store::kRowCodes;
            part.out = codes.codes - first * d;
            part.out_stride = d;
            part.scale = codes.scale - first;
            isa.gemm_panel(part, first, last, u, prepared.rows);
            return;
        }
        const int64_t at_once = values ? last - first : std::min(step, last - first);
        float* waiting = static_cast<float*>(scratch(Slot::kTile, at_once * unit * int64_t{sizeof(float)}));
        part.out_stride = unit;
        for (int64_t m = first; m < last; m += at_once) {
            const int64_t end = std::min(m + at_once, last);
            TileRows step_rows = prepared.rows;
            step_rows.a += (m - first) * step_rows.stride;
            part.out = waiting - m * unit - u * unit;  // rows and columns are counted from those of the matrix
            for (int64_t p = u * unit_panels; p < std::min((u + 1) * unit_panels, panels); ++p) {
                isa.gemm_panel(part, m, end, p, step_rows);
            }
            for (int64_t column = u * unit; column < std::min((u + 1) * unit, g.n); column += d) {
                const int64_t head = column / d;
                const float* x = waiting + (column - u * unit);
                const int which = static_cast<int>(head / out.heads);
                const int64_t count = which == 0 ? std::min(end, begin + out.queries) - m : end - m;
                if (count <= 0) continue;
                isa.quantize_head(out.head(which, image, head % out.heads, m - begin, count, x, VQVIT_F32, unit));
            }
        }
    };
    parallel_for<PreparedRows>(images * tasks, macs(g), threads, task);
}

// Panels of (n, k) weights: b itself if packed, else packed now into `slot`.
const int8_t* panels_of(const int8_t* b, bool packed, const vqvit_gemm& g, Slot slot, int threads) {
    if (packed || b == nullptr) return b;
    int8_t* panels = static_cast<int8_t*>(scratch(slot, ceil_div(g.n, kPanel) * panel_bytes(g.k)));
    vqvit_cpu_pack_weight(b, g.n, g.k, panels, threads);
    return panels;
}

GemmTask gemm_task(const vqvit_gemm& g, Store store, void* out, int dtype, int threads) {
    GemmTask t = {};
    t.gemm = g;
    t.panels = panels_of(g.b, g.b_packed != 0, g, Slot::kPanels, threads);
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

int vqvit_cpu_pack_weight(const int8_t* b, int64_t n, int64_t k, int8_t* packed, int threads) {
    const Kernels& isa = kernels();
    parallel_for<Stateless>(ceil_div(n, kPanel), n * k, threads, [&](Stateless&, int64_t p) {
        const int64_t columns = std::min<int64_t>(kPanel, n - p * kPanel);
        isa.pack_panel(b + p * kPanel * k, k, columns, k, packed + p * panel_bytes(k));
    });
    return VQVIT_OK;
}

int vqvit_cpu_unpack_weight(const int8_t* packed, int64_t n, int64_t k, int8_t* b, int threads) {
    parallel_for<Stateless>(n, n * k, threads, [&](Stateless&, int64_t row) {
        const int8_t* source = packed + row / kPanel * panel_bytes(k) + row % kPanel * kKGroup;
        for (int64_t i = 0; i < k; ++i) b[row * k + i] = source[i / kKGroup * kGroupBytes + i % kKGroup];
    });
    return VQVIT_OK;
}

int vqvit_cpu_int8_mm(const vqvit_gemm* gemm, int32_t* acc, int threads) {
    run_gemm(kernels(), gemm_task(*gemm, Store::kInt32, acc, VQVIT_F32, threads), threads);
    return VQVIT_OK;
}

int vqvit_cpu_int8_linear(const vqvit_gemm* gemm, void* y, int dtype, int threads) {
    if (!known_dtype(dtype) || !known_dtype(gemm->residual_dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (!known_activation(gemm->activation)) return VQVIT_UNKNOWN_ACTIVATION;
    run_gemm(kernels(), gemm_task(*gemm, Store::kFloat, y, dtype, threads), threads);
    return VQVIT_OK;
}

int vqvit_cpu_int8_linear_quantize(
    const vqvit_gemm* gemm, const float* out_scale, int symmetric, int per_group, int8_t* codes, float* scale,
    int32_t* zero_point, int32_t* row_sum, int threads) {
    const vqvit_gemm& g = *gemm;
    if (!known_activation(g.activation)) return VQVIT_UNKNOWN_ACTIVATION;
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
    RowBlocks rows(g.m, isa.tile_rows, threads, g.n * int64_t{sizeof(float)}, kWaitingRowBytes);
    rows.share_evenly(threads);
    if (rows.tiles() >= 4 * int64_t{threads}) {  // else whole rows would leave threads idle
        run_gemm_per_token(isa, t, g.activation, out, rows, threads);
        return VQVIT_OK;
    }
    t.out = scratch(Slot::kTile, g.m * g.n * int64_t{sizeof(float)});
    run_gemm(isa, t, threads);
    const QuantizeRows quantize = {t.out, VQVIT_F32, g.n, g.n, nullptr, g.activation, out};
    parallel_rows(g.m, g.n, threads, [&](int64_t first, int64_t last) { isa.quantize_rows(quantize, first, last); });
    return VQVIT_OK;
}

int vqvit_cpu_int8_linear_qkv(
    const vqvit_gemm* gemm, int64_t tokens, int64_t heads, int8_t* q, int8_t* k, int8_t* v, float* q_scale,
    float* k_scale, float* v_scale, int threads) {
    project_qkv(*gemm, {tokens, tokens, heads, gemm->n / (3 * heads), {q, k, v}, {q_scale, k_scale, v_scale}}, threads);
    return VQVIT_OK;
}

int vqvit_cpu_int8_linear_compensated(
    const vqvit_gemm* gemm, const int8_t* a_residual, const int8_t* b_residual, int terms, float first_order,
    float second_order, void* y, int dtype, int threads) {
    if (!known_dtype(dtype) || !known_dtype(gemm->residual_dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (!known_activation(gemm->activation)) return VQVIT_UNKNOWN_ACTIVATION;
    if (terms < 0 || terms > 7) return VQVIT_UNKNOWN_MODE;
    GemmTask t = gemm_task(*gemm, Store::kFloat, y, dtype, threads);
    t.terms = terms;
    t.first_order = first_order;
    t.second_order = second_order;
    if ((terms & (1 | 4)) != 0) t.a_residual = a_residual;
    if ((terms & (2 | 4)) != 0) t.residual_panels = panels_of(b_residual, false, *gemm, Slot::kResidualPanels, threads);
    run_gemm(kernels(), t, threads);
    return VQVIT_OK;
}

}  // extern "C"
