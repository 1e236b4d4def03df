// What happens to the accumulators of the INT8 GEMMs: dequantize, activate, add, store.
//
// Fragments are those of mma.sync and wgmma alike: a warp holds 16 rows of 8 · NJ columns, acc[j][0..1] of a lane being
// row lane / 4 and columns 8 j + 2 (lane % 4) ..., acc[j][2..3] the row 8 further down. They go through shared memory
// once, so that eight lanes hold a row: a lane then has the 4 columns 32 i + 4 (lane % 8) ... of each 32, loads and
// stores are of whole sectors, and a row's maximum takes three shuffles.
// Whole tiles, whose columns all exist and load and store four at a time, take a loop without a test of a column; its
// instructions an output are in benchmarks/results/cuda_gate.csv. All others take a loop that walks a row by 32 columns
// and keeps what a row's maximum has to wait for in shared memory, which is short in code.
#pragma once

#include <cstring>
#include <type_traits>

#include "gemm_s8.h"

namespace vqvit {

// Finishes and stores 16 rows of `Columns` columns at a time. One warp, with `kStagingBytes` of its own.
// StoreKind: of Store. Activation: VQVIT_NONE, VQVIT_GELU or kAnyActivation.
template <int Columns, int StoreKind, int Activation>
class Epilogue {
public:
    static constexpr int kPitch = Columns + 8;  // words: the eight rows of a store of fragments fall in different banks
    static constexpr int kBlocks = Columns / 32;
    static constexpr int kStagingBytes = (16 * kPitch + 3 * Columns + 16 + 2 * kBlocks) * 4;

    VQVIT_DEVICE Epilogue(const GemmTask& task, int first_column, void* staging)
        : t_(task), g_(task.g), n_(static_cast<int>(task.g.n)), first_column_(first_column),
          staging_(static_cast<int32_t*>(staging)), b_scale_(reinterpret_cast<float*>(staging_ + 16 * kPitch)),
          bias_(b_scale_ + Columns), layer_scale_(bias_ + Columns), a_scale_(layer_scale_ + Columns),
          segment_rows_(reinterpret_cast<int64_t*>(a_scale_ + 16)) {
        if (StoreKind == Store::kInt32) return;
        warp_barrier();  // the columns before these have been read
        for (int i = lane_id(); i < Columns; i += kWarp) {
            const int n = first_column_ + i;
            const bool inside = n < n_;
            b_scale_[i] = inside ? g_.b_scale[n] : 0.0f;
            bias_[i] = inside && g_.bias != nullptr ? load_float(g_.bias, g_.bias_dtype, n) : 0.0f;
            const bool scaled = inside && g_.layer_scale != nullptr;
            layer_scale_[i] = scaled ? load_float(g_.layer_scale, g_.layer_scale_dtype, n) : 1.0f;
        }
        if (StoreKind == Store::kProjection && lane_id() < kBlocks) {
            segment_rows_[lane_id()] = t_.projection.first_row(first_column_ / t_.head_dim + lane_id());
        }
    }

    // acc: int32 or fp32 sums of MI times 16 rows, the first of them `row_step` apart from first_row on.
    // RowScales: they still want the scale of their row of a.
    template <bool RowScales, int MI, class Acc>
    VQVIT_DEVICE void finish(const Acc (&acc)[MI][Columns / 8][4], int64_t first_row, int row_step) {
        constexpr bool kScales = RowScales && StoreKind != Store::kInt32;
        VQVIT_NO_UNROLL  // the code that follows is long
        for (int i = 0; i < MI; ++i) {
            const int64_t first = first_row + i * row_step;
            float a_scale = 0.0f;
            if (kScales && lane_id() < 16 && first + lane_id() < g_.m) a_scale = g_.a_scale[first + lane_id()];
            warp_barrier();  // the rows before these have been read
            if (kScales && lane_id() < 16) a_scale_[lane_id()] = a_scale;
            VQVIT_UNROLL
            for (int j = 0; j < MI; ++j) {  // constant indices keep accumulators in registers
                if (j == i) stage(acc[j]);
            }
            warp_barrier();
            if (kHasWholeTiles && t_.whole && first_column_ + Columns <= n_ && finish_whole<RowScales, Acc>(first)) {
                continue;
            }
            finish_any<RowScales, Acc>(first);
        }
    }

private:
    static constexpr bool kHasWholeTiles = Activation != kAnyActivation;

    const GemmTask& t_;
    const vqvit_gemm& g_;
    const int n_, first_column_;
    int32_t* const staging_;
    float* const b_scale_;  // of the columns, in shared memory: in registers they would crowd out accumulators
    float* const bias_;
    float* const layer_scale_;
    float* const a_scale_;  // of 16 rows
    int64_t* const segment_rows_;

    using Row = float[kBlocks][4];

    VQVIT_DEVICE static int lane_column() { return 4 * (lane_id() % 8); }
    VQVIT_DEVICE static int lane_row() { return lane_id() / 8; }
    template <class T>
    VQVIT_DEVICE static Pack<T, 4>& four(T* columns, int i) {
        return *reinterpret_cast<Pack<T, 4>*>(columns + 32 * i + lane_column());
    }
    VQVIT_DEVICE int rows_inside(int64_t first_row) const {
        return g_.m - first_row < 16 ? static_cast<int>(g_.m - first_row) : 16;
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
    template <class Acc>
    VQVIT_DEVICE Pack<Acc, 4>& staged(int row, int i) const {
        return four(reinterpret_cast<Acc*>(staging_ + row * kPitch), i);
    }

    // ---- whole tiles ------------------------------------------------------------------------------------------------

    // Whether this kind of tile has a loop of its own, and then its 16 rows.
    template <bool RowScales, class Acc>
    VQVIT_DEVICE bool finish_whole(int64_t first_row) const {
        const int64_t column = first_column_ + lane_column();
        if constexpr (StoreKind == Store::kInt32) {
            whole_accumulators(first_row);
        } else if constexpr (StoreKind == Store::kFloat) {
            if (t_.dtype == VQVIT_F32) {
                whole_floats<RowScales, Acc, float>(first_row, t_.out, n_, column);
            } else if (t_.dtype == VQVIT_F16) {
                whole_floats<RowScales, Acc, Half>(first_row, t_.out, n_, column);
            } else {
                whole_floats<RowScales, Acc, BFloat16>(first_row, t_.out, n_, column);
            }
        } else if constexpr (StoreKind == Store::kStaticCodes) {
            const StaticEncoder encode(*t_.out_scale);
            if (encode.divides) return false;
            whole_static_codes<RowScales, Acc>(first_row, encode);
        } else if constexpr (StoreKind == Store::kGroupCodes) {
            static_assert(Columns == kGroup, "a warp holds whole groups");
            whole_codes<kGroup, RowScales, Acc>(first_row);
        } else {
            const int values = 2 * t_.heads * t_.head_dim;  // first column of v
            if (first_column_ >= values) {
                whole_floats<RowScales, Acc, float>(first_row, t_.v, values / 2, column - values);
            } else if (first_column_ + Columns > values) {
                return false;
            } else if (t_.head_dim == 32) {
                whole_codes<32, RowScales, Acc>(first_row);
            } else if (t_.head_dim == 64) {
                whole_codes<64, RowScales, Acc>(first_row);
            } else {
                whole_codes<Columns, RowScales, Acc>(first_row);
            }
        }
        return true;
    }

    // y of one row, without layer scale and residual.
    template <bool RowScales, class Acc>
    VQVIT_DEVICE void whole_row(int row, Row& y) const {
        const float a_scale = RowScales ? a_scale_[row] : 1.0f;
        VQVIT_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
            const Pack<Acc, 4> sums = staged<Acc>(row, i);
            const Pack<float, 4> b_scale = four(b_scale_, i), bias = four(bias_, i);
            VQVIT_UNROLL
            for (int e = 0; e < 4; ++e) {
                const float scale = RowScales ? a_scale * b_scale.at[e] : b_scale.at[e];
                y[i][e] = activation<Activation>(fmaf(static_cast<float>(sums.at[e]), scale, bias.at[e]));
            }
        }
    }

    VQVIT_DEVICE void whole_accumulators(int64_t first_row) const {
        int32_t* to = static_cast<int32_t*>(t_.out) + (first_row + lane_row()) * n_ + first_column_;
        const int rows = rows_inside(first_row);
        VQVIT_NO_UNROLL
        for (int row = lane_row(); row < rows; row += 4, to += 4 * int64_t{n_}) {
            VQVIT_UNROLL
            for (int i = 0; i < kBlocks; ++i) four(to, i) = staged<int32_t>(row, i);
        }
    }

    // `column`: of out, which has rows of `pitch` elements, and of the residual.
    template <bool RowScales, class Acc, class T>
    VQVIT_DEVICE void whole_floats(int64_t first_row, void* out, int pitch, int64_t column) const {
        constexpr bool kAdds = StoreKind == Store::kFloat;
        constexpr uint32_t kNegativeZeros = sizeof(T) == 4 ? 0x80000000u : 0x80008000u;  // which add nothing
        using Words = Pack<uint32_t, sizeof(T)>;                                         // of four elements
        T* to = static_cast<T*>(out) + (first_row + lane_row()) * pitch + column;
        const T* from = nullptr;
        if (kAdds && g_.residual != nullptr) {
            from = static_cast<const T*>(g_.residual) + (first_row + lane_row()) * g_.residual_stride + column;
        }
        const bool adds_residual = from != nullptr;
        const int rows = rows_inside(first_row);
        VQVIT_NO_UNROLL
        for (int row = lane_row(); row < rows; row += 4, to += 4 * int64_t{pitch}) {
            Words words[kBlocks];
            Pack<T, 4> base[kBlocks];
            if (kAdds) {
                VQVIT_UNROLL
                for (int i = 0; i < kBlocks; ++i) {
                    VQVIT_UNROLL
                    for (int w = 0; w < static_cast<int>(sizeof(T)); ++w) words[i].at[w] = kNegativeZeros;
                    if (adds_residual) words[i] = *reinterpret_cast<const Words*>(from + 32 * i);
                    std::memcpy(base + i, words + i, sizeof(Words));
                }
                from += 4 * g_.residual_stride;
            }
            Row y;
            whole_row<RowScales, Acc>(row, y);
            VQVIT_UNROLL
            for (int i = 0; i < kBlocks; ++i) {
                Pack<float, 4> layer_scale;
                if (kAdds) layer_scale = four(layer_scale_, i);
                Pack<T, 4> pack;
                VQVIT_UNROLL
                for (int e = 0; e < 4; ++e) {
                    const float x = kAdds ? fmaf(y[i][e], layer_scale.at[e], to_fp32(base[i].at[e])) : y[i][e];
                    pack.at[e] = from_fp32<T>(x);
                }
                *reinterpret_cast<Pack<T, 4>*>(to + 32 * i) = pack;
            }
        }
    }

    // Largest magnitude of a row's `Count` blocks from block First on, NaN if one is NaN.
    template <int First, int Count>
    VQVIT_DEVICE static float largest_of(const Row& y) {
        return largest_of_row(largest_of_columns<4 * First, 4 * Count>(y));
    }
    template <int First, int Count>  // as a tree: in a chain each maximum would wait for the one before
    VQVIT_DEVICE static float largest_of_columns(const Row& y) {
        if constexpr (Count == 1) {
            return y[First / 4][First % 4];
        } else {
            constexpr int kHalf = Count / 2;
            return max_magnitude(largest_of_columns<First, kHalf>(y), largest_of_columns<First + kHalf, kHalf>(y));
        }
    }
    VQVIT_DEVICE static float largest_of_row(float largest) {
        VQVIT_UNROLL
        for (int mask = 4; mask > 0; mask /= 2) largest = max_magnitude(largest, shuffle_xor(largest, mask));
        return largest;
    }

    template <bool RowScales, class Acc>
    VQVIT_DEVICE void whole_static_codes(int64_t first_row, const StaticEncoder& encode) const {
        int8_t* out = static_cast<int8_t*>(t_.out) + first_row * n_ + first_column_;
        const int rows = rows_inside(first_row);
        VQVIT_NO_UNROLL
        for (int row = lane_row(); row < 16; row += 4) {  // all lanes shuffle
            Row y;
            whole_row<RowScales, Acc>(row, y);
            const bool poisoned = bits_of(largest_of<0, kBlocks>(y)) >= kInfinityBits;
            uint32_t words[kBlocks];
            int32_t sum = 0;
            VQVIT_UNROLL
            for (int i = 0; i < kBlocks; ++i) {
                words[i] = encode_4(encode, y[i]);
                sum += sum_codes(words[i]);
            }
            if (t_.row_sum != nullptr) sum = group_sum<8>(sum);
            if (row >= rows) continue;
            VQVIT_UNROLL
            for (int i = 0; i < kBlocks; ++i) store_word(out + int64_t{row} * n_ + 32 * i + lane_column(), words[i]);
            if (lane_id() % 8 != 0) continue;
            if (poisoned) t_.scale[first_row + row] = not_a_number();
            if (t_.row_sum != nullptr) atomic_add(t_.row_sum + first_row + row, sum);
        }
    }

    VQVIT_DEVICE static void store_word(int8_t* to, uint32_t word) { *reinterpret_cast<uint32_t*>(to) = word; }

    // Segments of Count blocks, from block First on.
    template <int First, int Count>
    VQVIT_DEVICE static void encode_segments(
        const Row& y, float (&scale)[kBlocks / Count], uint32_t (&words)[kBlocks]) {
        const float of_segment = symmetric_scale(bits_of(largest_of<First, Count>(y)));
        const uint32_t mask = of_segment == of_segment ? ~0u : 0u;
        const Encoder encode = Encoder::in_range(of_segment);
        scale[First / Count] = of_segment;
        VQVIT_UNROLL
        for (int i = First; i < First + Count; ++i) words[i] = encode_4(encode, y[i]) & mask;
        if constexpr (First + Count < kBlocks) encode_segments<First + Count, Count>(y, scale, words);
    }

    // Codes with a scale for each row and `Width` columns: a group of the next GEMM's input, or a head of q or k.
    template <int Width, bool RowScales, class Acc>
    VQVIT_DEVICE void whole_codes(int64_t first_row) const {
        constexpr int kCount = Width / 32;
        const int rows = rows_inside(first_row);
        VQVIT_NO_UNROLL
        for (int row = lane_row(); row < 16; row += 4) {  // all lanes shuffle
            Row y;
            whole_row<RowScales, Acc>(row, y);
            float scale[kBlocks / kCount];
            uint32_t words[kBlocks];
            encode_segments<0, kCount>(y, scale, words);
            if (row >= rows) continue;
            const int64_t m = first_row + row, row_part = segment_row(m);
            VQVIT_UNROLL
            for (int s = 0; s < kBlocks / kCount; ++s) {
                const int64_t at = segment_at(s, row_part);
                int8_t* to = segment_codes(m, at, Width);
                VQVIT_UNROLL
                for (int i = 0; i < kCount; ++i) store_word(to + 32 * i, words[s * kCount + i]);
                if (lane_id() % 8 == 0) t_.scale[at] = scale[s];
            }
        }
    }

    // ---- segments: columns of a row that share a scale --------------------------------------------------------------

    // The scale of row m's segment s is number segment_at(s, segment_row(m)).
    VQVIT_DEVICE int64_t segment_row(int64_t m) const {
        if (StoreKind == Store::kProjection) return t_.projection.row(m);
        return m * ((n_ + kGroup - 1) / kGroup);
    }
    VQVIT_DEVICE int64_t segment_at(int s, int64_t row_part) const {
        if (StoreKind == Store::kProjection) return row_part + segment_rows_[s];
        return row_part + first_column_ / kGroup;
    }
    // Where this lane's first codes of it go.
    VQVIT_DEVICE int8_t* segment_codes(int64_t m, int64_t at, int width) const {
        const int64_t first = StoreKind == Store::kProjection ? at * width : m * n_ + first_column_;
        return static_cast<int8_t*>(t_.out) + first + lane_column();
    }

    // ---- all other tiles --------------------------------------------------------------------------------------------

    // 32 columns at a time. What waits for the row's maximum waits in the place of the accumulators.
    template <bool RowScales, class Acc>
    VQVIT_DEVICE void finish_any(int64_t first_row) const {
        int segment_blocks = kBlocks;
        if (StoreKind == Store::kProjection) segment_blocks = t_.head_dim / 32;
        VQVIT_NO_UNROLL
        for (int row = lane_row(); row < 16; row += 4) {  // all lanes shuffle
            const int64_t m = first_row + row;
            VQVIT_NO_UNROLL
            for (int first = 0, segment = 0; first < kBlocks; first += segment_blocks, ++segment) {
                float largest = 0.0f;
                VQVIT_NO_UNROLL
                for (int i = first; i < first + segment_blocks; ++i) {
                    if constexpr (StoreKind == Store::kInt32) {
                        if (m < g_.m) store_four<int32_t>(t_.out, m * n_, i, staged<int32_t>(row, i).at);
                    } else {
                        Pack<float, 4> y;
                        any_four<RowScales, Acc>(row, m, i, y.at);
                        if (StoreKind == Store::kFloat) {
                            store_floats(m, i, y.at);
                        } else {
                            VQVIT_UNROLL
                            for (int e = 0; e < 4; ++e) {
                                largest = max_magnitude(largest, column(i, e) < n_ ? y.at[e] : 0.0f);
                            }
                            staged<float>(row, i) = y;
                        }
                    }
                }
                if constexpr (StoreKind == Store::kStaticCodes) {
                    any_static_codes(row, m, largest_of_row(largest));
                } else if constexpr (StoreKind == Store::kGroupCodes || StoreKind == Store::kProjection) {
                    any_segment(row, m, segment, first, segment_blocks, largest_of_row(largest));
                }
            }
        }
    }

    VQVIT_DEVICE int column(int i, int e) const { return first_column_ + 32 * i + lane_column() + e; }

    // y of block i of row `row`, which is row m of the result and may be beyond it.
    template <bool RowScales, class Acc>
    VQVIT_DEVICE void any_four(int row, int64_t m, int i, float (&y)[4]) const {
        Pack<Acc, 4> sums = staged<Acc>(row, i);
        const bool inside = m < g_.m;
        if constexpr (std::is_same<Acc, int32_t>::value) {
            if (g_.a_zero != nullptr) add_product(sums.at, inside ? -g_.a_zero[m] : 0, g_.b_sum, i);
            if (g_.b_zero != nullptr) {
                int32_t sum = inside ? g_.a_sum[m] : 0;
                if (g_.a_zero != nullptr && inside) sum -= static_cast<int32_t>(g_.k) * g_.a_zero[m];
                add_product(sums.at, -sum, g_.b_zero, i);
            }
        }
        const Pack<float, 4> b_scale = four(b_scale_, i), bias = four(bias_, i), layer_scale = four(layer_scale_, i);
        const float a_scale = RowScales ? a_scale_[row] : 1.0f;
        float base[4] = {-0.0f, -0.0f, -0.0f, -0.0f};  // adds nothing
        if (g_.residual != nullptr && inside) load_residual(base, m, i);
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) y[e] = fmaf(static_cast<float>(sums.at[e]), a_scale * b_scale.at[e], bias.at[e]);
        activate(y);
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) y[e] = fmaf(y[e], layer_scale.at[e], base[e]);
    }

    VQVIT_DEVICE void add_product(int32_t (&sums)[4], int32_t factor, const int32_t* of_columns, int i) const {
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
            if (column(i, e) < n_) sums[e] += factor * of_columns[column(i, e)];
        }
    }

    VQVIT_DEVICE void activate(float (&y)[4]) const {
        if (Activation != kAnyActivation) return activate_as<Activation>(y);
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
    template <int Kind>
    VQVIT_DEVICE static void activate_as(float (&y)[4]) {
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) y[e] = activation<Kind>(y[e]);
    }

    // Elements 4 columns at a time where n and the address allow, else one by one.
    template <class T>
    VQVIT_DEVICE bool as_pack(const T* p, int i) const {
        return column(i, 4) <= n_ && reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, 4>) == 0;
    }

    VQVIT_DEVICE void load_residual(float (&base)[4], int64_t m, int i) const {
        if (g_.residual_dtype == VQVIT_F16) return load_residual_as<Half>(base, m, i);
        if (g_.residual_dtype == VQVIT_BF16) return load_residual_as<BFloat16>(base, m, i);
        load_residual_as<float>(base, m, i);
    }
    template <class T>
    VQVIT_DEVICE void load_residual_as(float (&base)[4], int64_t m, int i) const {
        const T* from = static_cast<const T*>(g_.residual) + m * g_.residual_stride + column(i, 0);
        Pack<T, 4> pack = {};
        if (as_pack(from, i)) {
            pack = *reinterpret_cast<const Pack<T, 4>*>(from);
        } else {
            VQVIT_UNROLL
            for (int e = 0; e < 4; ++e) {
                if (column(i, e) < n_) pack.at[e] = from[e];
            }
        }
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) base[e] = to_fp32(pack.at[e]);
    }

    // Block i of the row that begins at element `start`.
    template <class T>
    VQVIT_DEVICE void store_four(void* out, int64_t start, int i, const T (&x)[4]) const {
        T* to = static_cast<T*>(out) + start + column(i, 0);
        if (as_pack(to, i)) {
            *reinterpret_cast<Pack<T, 4>*>(to) = {{x[0], x[1], x[2], x[3]}};
            return;
        }
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
            if (column(i, e) < n_) to[e] = x[e];
        }
    }
    template <class T>
    VQVIT_DEVICE void store_floats_as(int64_t m, int i, const float (&y)[4]) const {
        const T x[4] = {from_fp32<T>(y[0]), from_fp32<T>(y[1]), from_fp32<T>(y[2]), from_fp32<T>(y[3])};
        store_four(t_.out, m * n_, i, x);
    }
    VQVIT_DEVICE void store_floats(int64_t m, int i, const float (&y)[4]) const {
        if (m >= g_.m) return;
        if (t_.dtype == VQVIT_F16) return store_floats_as<Half>(m, i, y);
        if (t_.dtype == VQVIT_BF16) return store_floats_as<BFloat16>(m, i, y);
        store_floats_as<float>(m, i, y);
    }

    // Codes of block i, of which `to` is the first.
    VQVIT_DEVICE void store_codes(int8_t* to, int i, uint32_t word) const {
        if (as_pack(to, i)) return store_word(to, word);
        VQVIT_UNROLL
        for (int e = 0; e < 4; ++e) {
            if (column(i, e) < n_) to[e] = static_cast<int8_t>(word >> 8 * e);
        }
    }

    VQVIT_DEVICE void any_static_codes(int row, int64_t m, float largest) const {
        const StaticEncoder encode(*t_.out_scale);
        int32_t sum = 0;
        VQVIT_NO_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
            const uint32_t word = encode_4(encode, staged<float>(row, i).at);
            VQVIT_UNROLL
            for (int e = 0; e < 4; ++e) sum += column(i, e) < n_ ? static_cast<int8_t>(word >> 8 * e) : 0;
            if (m < g_.m) store_codes(static_cast<int8_t*>(t_.out) + m * n_ + column(i, 0), i, word);
        }
        if (t_.row_sum != nullptr) sum = group_sum<8>(sum);
        if (m >= g_.m || lane_id() % 8 != 0) return;
        if (bits_of(largest) >= kInfinityBits) t_.scale[m] = not_a_number();
        if (t_.row_sum != nullptr) atomic_add(t_.row_sum + m, sum);
    }

    // Blocks first ... first + blocks: a group, or a head of q, k or v.
    VQVIT_DEVICE void any_segment(int row, int64_t m, int segment, int first, int blocks, float largest) const {
        const int start = first_column_ + 32 * first;
        if (m >= g_.m || start >= n_) return;
        const int values = 2 * t_.heads * t_.head_dim;  // first column of v
        if (StoreKind == Store::kProjection && start >= values) {
            VQVIT_NO_UNROLL
            for (int i = first; i < first + blocks; ++i) {
                store_four(t_.v, m * (values / 2) - values, i, staged<float>(row, i).at);
            }
            return;
        }
        const float scale = symmetric_scale(bits_of(largest));
        const uint32_t mask = scale == scale ? ~0u : 0u;
        const Encoder encode = Encoder::in_range(scale);
        const int64_t at = segment_at(segment, segment_row(m));
        int8_t* to = segment_codes(m, at, t_.head_dim);
        VQVIT_NO_UNROLL
        for (int i = 0; i < blocks; ++i) {
            store_codes(to + 32 * i, first + i, encode_4(encode, staged<float>(row, first + i).at) & mask);
        }
        if (lane_id() % 8 == 0) t_.scale[at] = scale;
    }
};

}  // namespace vqvit
