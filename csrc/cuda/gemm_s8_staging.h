// The rows that a warp of an INT8 GEMM finishes, in shared memory: accumulators, and what belongs to their columns.
//
// Fragments are those of mma.sync and wgmma alike: a warp holds 16 rows of 8 · NJ columns, acc[j][0..1] of a lane being
// row lane / 4 and columns 8 j + 2 (lane % 4) ..., acc[j][2..3] the row 8 further down. They go through shared memory
// once, so that eight lanes hold a row: a lane then has the 4 columns 32 i + 4 (lane % 8) ... of each block i of 32,
// loads and stores are of whole sectors, and a row's maximum takes three shuffles.
#pragma once

#include "gemm_s8.h"

namespace vqvit {

// Of one warp, with `kStagingBytes` of its own. StoreKind: of Store.
template <int Columns, int StoreKind>
class Staging {
public:
    static constexpr int kPitch = Columns + 8;  // words: the eight rows of a store of fragments fall in different banks
    static constexpr int kBlocks = Columns / 32;
    static constexpr int kStagingBytes = (16 * kPitch + 3 * Columns + 16 + 2 * kBlocks) * 4;

    VQVIT_DEVICE Staging(const GemmTask& task, int first_column, void* staging)
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
            segment_rows_[lane_id()] = t_.projection.first_row((first_column_ >> t_.head_bits) + lane_id());
        }
    }

protected:
    const GemmTask& t_;
    const vqvit_gemm& g_;
    const int n_, first_column_;
    int32_t* const staging_;
    float* const b_scale_;  // of the columns, in shared memory: in registers they would crowd out accumulators
    float* const bias_;
    float* const layer_scale_;
    float* const a_scale_;          // of 16 rows
    int64_t* const segment_rows_;  // of q and k: where each segment's scales begin

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
    VQVIT_DEVICE static void store_word(int8_t* to, uint32_t word) { *reinterpret_cast<uint32_t*>(to) = word; }

    // Of the lanes that hold a row: their largest.
    VQVIT_DEVICE static float largest_of_row(float largest) {
        VQVIT_UNROLL
        for (int mask = 4; mask > 0; mask /= 2) largest = max_magnitude(largest, shuffle_xor(largest, mask));
        return largest;
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
};

}  // namespace vqvit
