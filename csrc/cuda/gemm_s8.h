// What the INT8 GEMMs of this folder share: the task, and what happens to accumulators.
//
// Fragments are those of mma.sync and wgmma alike: a warp holds 16 rows of 8 · NJ columns, acc[j][0..1] of a lane being
// row lane / 4 and columns 8 j + 2 (lane % 4) ..., acc[j][2..3] the row 8 further down. They go through shared memory
// once, so that eight lanes hold a row: a lane then has the 4 columns 32 i + 4 (lane % 8) ... of each 32, loads and
// stores are of whole sectors, and a row's maximum takes three shuffles.
// Operations for each output: 1.5 through shared memory, 3 to dequantize, 13 for GELU, 8 for codes.
#pragma once

#include "numerics.h"

namespace vqvit {

enum class Store {
    kInt32,        // raw accumulators
    kFloat,        // y in `dtype`
    kStaticCodes,  // int8 with out_scale; scale holds it already, row_sum holds zeros
    kGroupCodes,   // int8 with a scale for each row and 128 columns
    kProjection,   // q and k as codes by head, v as fp32
};

struct GemmTask {
    vqvit_gemm g;
    Store store;
    void* out;  // (m, n), or the codes (2, images, heads, tokens, head_dim)
    int dtype;
    const float* out_scale;
    float* scale;  // (m), (m, ceil(n / 128)) or (2, images, heads, tokens)
    int32_t* row_sum;
    float* v;  // (m, heads · head_dim)
    int tokens, heads, head_dim;
};

VQVIT_DEVICE float load_float(const void* p, int dtype, int64_t i) {
    if (dtype == VQVIT_F16) return to_fp32(static_cast<const Half*>(p)[i]);
    if (dtype == VQVIT_BF16) return to_fp32(static_cast<const BFloat16*>(p)[i]);
    return static_cast<const float*>(p)[i];
}

// Finishes and stores 16 rows of `Columns` columns at a time. One warp, with `kStagingBytes` of its own.
template <int Columns>
class Epilogue {
public:
    static constexpr int kPitch = Columns + 8;  // words: the eight rows of a store of fragments fall in different banks
    static constexpr int kStagingBytes = (16 * kPitch + 2 * Columns) * 4;

    VQVIT_DEVICE Epilogue(const GemmTask& task, int64_t first_column, void* staging)
        : t_(task), g_(task.g), n_(static_cast<int>(task.g.n)), first_column_(static_cast<int>(first_column)),
          staging_(static_cast<int32_t*>(staging)),
          b_scale_(reinterpret_cast<float*>(staging_ + 16 * kPitch)), bias_(b_scale_ + Columns) {
        warp_barrier();  // the columns before these have been read
        for (int i = lane_id(); i < Columns; i += kWarp) {
            const int n = first_column_ + i;
            const bool inside = n < n_;
            b_scale_[i] = inside && g_.b_scale != nullptr ? g_.b_scale[n] : 0.0f;
            bias_[i] = inside && g_.bias != nullptr ? load_float(g_.bias, g_.bias_dtype, n) : 0.0f;
        }
    }

    // acc: int32 or fp32 sums of 16 · MI rows from first_row on.
    template <int MI, class Acc>
    VQVIT_DEVICE void operator()(const Acc (&acc)[MI][Columns / 8][4], int64_t first_row) {
        VQVIT_UNROLL  // or all accumulators stay in registers until the end
        for (int i = 0; i < MI; ++i) {
            warp_barrier();  // the rows before these have been read
            stage(acc[i]);
            warp_barrier();
            VQVIT_NO_UNROLL
            for (int first = 0; first < 16; first += 4) {
                const int row = first + lane_id() / 8;
                lane_column_ = opaque(4 * (lane_id() % 8));  // or some hundred addresses are kept over the loop
                finish_row<Acc>(row, first_row + 16 * i + row);
            }
        }
    }

private:
    static constexpr int kBlocks = Columns / 32;

    const GemmTask& t_;
    const vqvit_gemm& g_;
    const int n_, first_column_;
    int32_t* const staging_;
    float* const b_scale_;  // of the columns, in shared memory: in registers they would crowd out accumulators
    float* const bias_;
    int lane_column_ = 0;

    VQVIT_DEVICE int column(int i, int e) const { return first_column_ + 32 * i + lane_column_ + e; }

    template <class Body>
    VQVIT_DEVICE static void for_each(const Body& body) {
        VQVIT_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
            VQVIT_UNROLL
            for (int e = 0; e < 4; ++e) body(i, e);
        }
    }

    template <class Acc>
    VQVIT_DEVICE void stage(const Acc (&acc)[Columns / 8][4]) const {
        VQVIT_UNROLL
        for (int j = 0; j < Columns / 8; ++j) {
            VQVIT_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int word = (lane_id() / 4 + 8 * half) * kPitch + 8 * j + 2 * (lane_id() % 4);
                *reinterpret_cast<Pack<Acc, 2>*>(staging_ + word) = {{acc[j][2 * half], acc[j][2 * half + 1]}};
            }
        }
    }

    // Row `staged` of the staging, which is row m of the result. All lanes come here, also for rows beyond m, since
    // they shuffle together.
    template <class Acc>
    VQVIT_DEVICE void finish_row(int staged, int64_t m) const {
        Acc sums[kBlocks][4];
        VQVIT_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
            const int32_t* from = staging_ + staged * kPitch + 32 * i + lane_column_;
            const Pack<Acc, 4> pack = *reinterpret_cast<const Pack<Acc, 4>*>(from);
            VQVIT_UNROLL
            for (int e = 0; e < 4; ++e) sums[i][e] = pack.at[e];
        }
        if (t_.store == Store::kInt32) {
            return store_floats<int32_t>(m, [&](int i, int e) { return static_cast<int32_t>(sums[i][e]); });
        }
        float y[kBlocks][4];
        dequantize(sums, y, m);
        activate(y);
        add_residual(y, m);
        switch (t_.store) {
            case Store::kStaticCodes:
                return store_static_codes(y, m);
            case Store::kGroupCodes:
                return store_segments<(kGroup < Columns ? kGroup : Columns)>(y, m);
            case Store::kProjection:
                if (t_.head_dim == 32) return store_segments<32>(y, m);
                if (t_.head_dim == 64) return store_segments<64>(y, m);
                return store_segments<Columns>(y, m);
            default:
                if (t_.dtype == VQVIT_F16) return store_as<Half>(y, m);
                if (t_.dtype == VQVIT_BF16) return store_as<BFloat16>(y, m);
                return store_as<float>(y, m);
        }
    }

    // fma(acc - zero points, a_scale · b_scale, bias).
    VQVIT_DEVICE void dequantize(int32_t (&acc)[kBlocks][4], float (&y)[kBlocks][4], int64_t m) const {
        const bool inside = m < g_.m;
        if (g_.a_zero != nullptr) {
            const int32_t zero = inside ? g_.a_zero[m] : 0;
            for_each([&](int i, int e) { acc[i][e] -= column(i, e) < n_ ? zero * g_.b_sum[column(i, e)] : 0; });
        }
        if (g_.b_zero != nullptr) {
            int32_t sum = inside ? g_.a_sum[m] : 0;
            if (g_.a_zero != nullptr && inside) sum -= static_cast<int32_t>(g_.k) * g_.a_zero[m];
            for_each([&](int i, int e) { acc[i][e] -= column(i, e) < n_ ? sum * g_.b_zero[column(i, e)] : 0; });
        }
        float sums[kBlocks][4];
        for_each([&](int i, int e) { sums[i][e] = static_cast<float>(acc[i][e]); });
        dequantize(sums, y, m);
    }
    VQVIT_DEVICE void dequantize(float (&sums)[kBlocks][4], float (&y)[kBlocks][4], int64_t m) const {
        float a_scale = 1.0f;  // scales by group are in the sums already
        if (g_.a_groups == 0) a_scale = m < g_.m ? g_.a_scale[m] : 0.0f;
        for_each([&](int i, int e) { y[i][e] = fmaf(sums[i][e], a_scale * b_scale(i, e), bias(i, e)); });
    }
    VQVIT_DEVICE float b_scale(int i, int e) const { return four(b_scale_, i).at[e]; }
    VQVIT_DEVICE float bias(int i, int e) const { return four(bias_, i).at[e]; }
    VQVIT_DEVICE Pack<float, 4> four(const float* columns, int i) const {
        return *reinterpret_cast<const Pack<float, 4>*>(columns + 32 * i + lane_column_);
    }

    template <int Kind>
    VQVIT_DEVICE static void activate_as(float (&y)[kBlocks][4]) {
        for_each([&](int i, int e) { y[i][e] = activation<Kind>(y[i][e]); });
    }
    VQVIT_DEVICE void activate(float (&y)[kBlocks][4]) const {
        switch (g_.activation) {
            case VQVIT_GELU:
                return activate_as<VQVIT_GELU>(y);
            case VQVIT_GELU_TANH:
                return activate_as<VQVIT_GELU_TANH>(y);
            case VQVIT_QUICK_GELU:
                return activate_as<VQVIT_QUICK_GELU>(y);
            case VQVIT_SILU:
                return activate_as<VQVIT_SILU>(y);
            case VQVIT_RELU:
                return activate_as<VQVIT_RELU>(y);
            default:
                return;
        }
    }

    // Elements 4 columns at a time where n and the address allow, else one by one.
    template <class T>
    VQVIT_DEVICE bool whole(const T* p, int i) const {
        return column(i, 4) <= n_ && reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, 4>) == 0;
    }

    template <class T>
    VQVIT_DEVICE void add_residual_as(float (&y)[kBlocks][4], int64_t m) const {
        const bool scaled = g_.layer_scale != nullptr;
        VQVIT_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
            const T* from = static_cast<const T*>(g_.residual) + m * g_.residual_stride + column(i, 0);
            Pack<T, 4> residual = {};
            if (m < g_.m && whole(from, i)) {
                residual = *reinterpret_cast<const Pack<T, 4>*>(from);
            } else if (m < g_.m) {
                VQVIT_UNROLL
                for (int e = 0; e < 4; ++e) {
                    if (column(i, e) < n_) residual.at[e] = from[e];
                }
            }
            VQVIT_UNROLL
            for (int e = 0; e < 4; ++e) {
                const float base = to_fp32(residual.at[e]);
                y[i][e] = scaled ? fmaf(y[i][e], layer_scale(i, e), base) : base + y[i][e];
            }
        }
    }
    VQVIT_DEVICE float layer_scale(int i, int e) const {
        return column(i, e) < n_ ? load_float(g_.layer_scale, g_.layer_scale_dtype, column(i, e)) : 0.0f;
    }
    VQVIT_DEVICE void add_residual(float (&y)[kBlocks][4], int64_t m) const {
        if (g_.residual == nullptr) {
            if (g_.layer_scale == nullptr) return;
            return for_each([&](int i, int e) { y[i][e] *= layer_scale(i, e); });
        }
        if (g_.residual_dtype == VQVIT_F16) return add_residual_as<Half>(y, m);
        if (g_.residual_dtype == VQVIT_BF16) return add_residual_as<BFloat16>(y, m);
        add_residual_as<float>(y, m);
    }

    template <class T, class Value>
    VQVIT_DEVICE void store_pack(T* to, int i, const Value& value) const {
        Pack<T, 4> pack;
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) pack.at[e] = value(i, e);
        if (whole(to, i)) {
            *reinterpret_cast<Pack<T, 4>*>(to) = pack;
            return;
        }
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
            if (column(i, e) < n_) to[e] = pack.at[e];
        }
    }
    template <class T, class Value>
    VQVIT_DEVICE void store_floats(int64_t m, const Value& value) const {
        if (m >= g_.m) return;
        VQVIT_UNROLL
        for (int i = 0; i < kBlocks; ++i) store_pack(static_cast<T*>(t_.out) + m * n_ + column(i, 0), i, value);
    }
    template <class T>
    VQVIT_DEVICE void store_as(const float (&y)[kBlocks][4], int64_t m) const {
        store_floats<T>(m, [&](int i, int e) { return from_fp32<T>(y[i][e]); });
    }

    // Bits of the largest magnitude of a row's columns of blocks First ... First + Count, beyond n excepted.
    template <int Count>
    VQVIT_DEVICE int32_t largest_bits(const float (&y)[kBlocks][4], int first) const {
        int32_t largest = 0;
        VQVIT_UNROLL
        for (int i = first; i < first + Count; ++i) {
            VQVIT_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int32_t bits = column(i, e) < n_ ? magnitude_bits(y[i][e]) : 0;
                largest = bits > largest ? bits : largest;
            }
        }
        return group_max<8>(largest);
    }

    VQVIT_DEVICE void store_static_codes(const float (&y)[kBlocks][4], int64_t m) const {
        const StaticEncoder encode(*t_.out_scale);
        const bool writes = lane_id() % 8 == 0 && m < g_.m;
        const bool poisoned = largest_bits<kBlocks>(y, 0) >= kInfinityBits;
        if (writes && poisoned) t_.scale[m] = not_a_number();
        int8_t codes[kBlocks][4];
        for_each([&](int i, int e) { codes[i][e] = encode(y[i][e]); });
        if (t_.row_sum != nullptr) {
            int32_t sum = 0;
            for_each([&](int i, int e) { sum += column(i, e) < n_ ? codes[i][e] : 0; });
            sum = group_sum<8>(sum);
            if (writes) atomic_add(t_.row_sum + m, sum);
        }
        store_floats<int8_t>(m, [&](int i, int e) { return codes[i][e]; });
    }

    // Codes with a scale for each row and `Width` columns: a group of the next GEMM's input, or a head of q or k.
    template <int Width>
    VQVIT_DEVICE void store_segments(const float (&y)[kBlocks][4], int64_t m) const {
        constexpr int kCount = Width / 32;
        VQVIT_UNROLL
        for (int first = 0; first < kBlocks; first += kCount) {
            const float scale = symmetric_scale(largest_bits<kCount>(y, first));
            const int segment = (first_column_ + 32 * first) / Width;
            if (m >= g_.m || first_column_ + 32 * first >= n_) continue;
            int8_t* to = static_cast<int8_t*>(t_.out);
            if (t_.store == Store::kGroupCodes) {
                to += m * n_ + first_column_ + 32 * first;
                if (lane_id() % 8 == 0) t_.scale[m * ((n_ + kGroup - 1) / kGroup) + segment] = scale;
            } else if (segment < 2 * t_.heads) {
                const int64_t image = segment / t_.heads * (g_.m / t_.tokens) + m / t_.tokens;
                const int64_t row = (image * t_.heads + segment % t_.heads) * t_.tokens + m % t_.tokens;
                to += row * Width;
                if (lane_id() % 8 == 0) t_.scale[row] = scale;
            } else {
                float* v = t_.v + (m * t_.heads + segment - 2 * t_.heads) * Width + lane_column_;
                VQVIT_UNROLL
                for (int i = 0; i < kCount; ++i) {
                    store_pack(v + 32 * i, first + i, [&](int b, int e) { return y[b][e]; });
                }
                continue;
            }
            const Encoder encode = Encoder::in_range(scale);
            VQVIT_UNROLL
            for (int i = 0; i < kCount; ++i) {
                store_pack(to + 32 * i + lane_column_, first + i, [&](int b, int e) {
                    return encode(scale == scale ? y[b][e] : 0.0f);
                });
            }
        }
    }
};

// gemm_s8_wgmma.cu: whether the current device and the operands suit it, and the GEMM.
bool takes_wgmma(const GemmTask& task);
int run_gemm_wgmma(const GemmTask& task, void* stream);

// Tile (row, column) number of a block: `kTileRows` rows of tiles are walked column by column, to share operands in L2.
constexpr int64_t kTileRows = 8;

struct TileIndex {
    int64_t row, column;
};

VQVIT_HOST_DEVICE TileIndex tile_index(int64_t tile, int64_t tiles_m, int64_t tiles_n) {
    const int64_t in_group = kTileRows * tiles_n;
    const int64_t first = tile / in_group * kTileRows;
    const int64_t rows = tiles_m - first < kTileRows ? tiles_m - first : kTileRows;
    return {first + tile % in_group % rows, tile % in_group / rows};
}

}  // namespace vqvit
