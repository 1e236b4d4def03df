// What happens to the accumulators of the INT8 GEMMs: dequantize, activate, add, store.
//
// Whole tiles, whose columns all exist and load and store four at a time, take a loop without a test of a column. All
// others take the loop of gemm_s8_any_tile.h. A warp decides once a tile.
// Instructions for 16 outputs on sm_90a, compiled: 121 of sums by group to bf16 with a residual, 266 to codes of heads
// of 64, 398 with GELU to codes by group.
#pragma once

#include <cstring>

#include "gemm_s8_any_tile.h"

namespace vqvit {

// Finishes and stores 16 rows of `Columns` columns at a time: one warp (Staging).
// StoreKind: of Store. Activation: VQVIT_NONE, VQVIT_GELU or kAnyActivation.
template <int Columns, int StoreKind, int Activation>
class Epilogue : public AnyTile<Columns, StoreKind, Activation> {
    using Any = AnyTile<Columns, StoreKind, Activation>;
    using Base = Staging<Columns, StoreKind>;

public:
    using Any::Any;

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
                if (j == i) this->stage(acc[j]);
            }
            warp_barrier();
            if (kHasWholeTiles && t_.whole && first_column_ + Columns <= n_ && finish_whole<RowScales, Acc>(first)) {
                continue;
            }
            this->template finish_any<RowScales, Acc>(first);
        }
    }

private:
    static constexpr bool kHasWholeTiles = Activation != kAnyActivation;

    using Base::a_scale_, Base::b_scale_, Base::bias_, Base::first_column_, Base::g_, Base::layer_scale_, Base::n_,
        Base::t_;
    using Base::four, Base::kBlocks, Base::lane_column, Base::lane_row, Base::largest_of_row, Base::rows_inside,
        Base::segment_at, Base::segment_codes, Base::segment_row, Base::store_word;

    using Row = float[kBlocks][4];

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
            const Pack<Acc, 4> sums = this->template staged<Acc>(row, i);
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
            for (int i = 0; i < kBlocks; ++i) four(to, i) = this->template staged<int32_t>(row, i);
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
                if (adds_residual) from += 4 * g_.residual_stride;
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
};

}  // namespace vqvit
