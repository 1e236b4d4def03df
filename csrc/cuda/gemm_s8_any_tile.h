// Finishing the tiles of an INT8 GEMM that may be cut by n, unaligned, with zero points or any activation.
#pragma once

#include <type_traits>

#include "gemm_s8_staging.h"

namespace vqvit {

// A row is walked by 32 columns, which keeps the code short. What waits for the row's maximum waits in the place of the
// accumulators.
template <int Columns, int StoreKind, int Activation>
class AnyTile : public Staging<Columns, StoreKind> {
public:
    using Staging<Columns, StoreKind>::Staging;

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
                        if (m < g_.m) store_four<int32_t>(t_.out, m * n_, i, this->template staged<int32_t>(row, i).at);
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
                            this->template staged<float>(row, i) = y;
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

protected:
    using Base = Staging<Columns, StoreKind>;
    using Base::a_scale_, Base::b_scale_, Base::bias_, Base::first_column_, Base::g_, Base::layer_scale_, Base::n_,
        Base::t_;
    using Base::four, Base::kBlocks, Base::lane_column, Base::lane_row, Base::largest_of_row, Base::segment_at,
        Base::segment_codes, Base::segment_row, Base::store_word;

private:
    VQVIT_DEVICE int column(int i, int e) const { return first_column_ + 32 * i + lane_column() + e; }

    // y of block i of row `row`, which is row m of the result and may be beyond it.
    template <bool RowScales, class Acc>
    VQVIT_DEVICE void any_four(int row, int64_t m, int i, float (&y)[4]) const {
        Pack<Acc, 4> sums = this->template staged<Acc>(row, i);
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
            const uint32_t word = encode_4(encode, this->template staged<float>(row, i).at);
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
                store_four(t_.v, m * (values / 2) - values, i, this->template staged<float>(row, i).at);
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
            store_codes(to + 32 * i, first + i, encode_4(encode, this->template staged<float>(row, first + i).at) & mask);
        }
        if (lane_id() % 8 == 0) t_.scale[at] = scale;
    }
};

}  // namespace vqvit
