// Weights for products whose sums stay in int16 (dot_avx2_int16.h): panels cut into strips of 16 columns, each followed
// by what bounds those sums. The layout, and its portable conversions from panels and back.
//
//   strip   (chunks, 4 groups, 16 columns, 4 channels) of b + 128, zero weights behind the last channel; then for each
//           chunk the largest ‖b‖² over its 32 lanes, fp32, and zeros up to a cache line
//   lane    8 weights of a column in a chunk of 16 channels: those that one int16 sum multiplies, channels 0 and 1 of
//           each group, or 2 and 3
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace vqvit {
namespace {

constexpr int64_t kChunk = 16;  // input channels
constexpr int64_t kChunkGroups = kChunk / kKGroup;
constexpr int kStrip = 16;  // columns
constexpr int kStrips = kPanel / kStrip;
constexpr int64_t kStripGroup = kStrip * kKGroup;  // bytes
constexpr int64_t kStripChunk = kChunkGroups * kStripGroup;
constexpr int64_t kNormLanes = 8;  // norms are compared so many at once

// The strips of a panel lie one after the other.
struct StripLayout {
    int64_t chunks, strip_bytes;

    explicit StripLayout(int64_t k)
        : chunks(ceil_div(k, kChunk)),
          strip_bytes(round_up(chunks * kStripChunk + round_up(chunks, kNormLanes) * kNormBytes, kLineBytes)) {}
    int64_t panel_bytes() const { return kStrips * strip_bytes; }
    int64_t norms_at() const { return chunks * kStripChunk; }

private:
    static constexpr int64_t kNormBytes = sizeof(float);
};

// ‖·‖² from a sum that saturates at the largest u16.
inline float norm_of(uint32_t sum) {
    return sum == 0xffff ? std::numeric_limits<float>::infinity() : static_cast<float>(sum);
}

// The square of a code; that of -128 counts as 128 · 127, as vpmaddubsw has it.
inline uint32_t square_of(int code) {
    const uint32_t magnitude = static_cast<uint32_t>(code < 0 ? -code : code);
    return magnitude * std::min<uint32_t>(magnitude, 127);
}

// The strips of a panel of k input channels.
inline void pack_strips_portable(const int8_t* panel, int64_t k, int8_t* strips) {
    const StripLayout layout(k);
    const int64_t groups = ceil_div(k, kKGroup);
    for (int s = 0; s < kStrips; ++s, strips += layout.strip_bytes) {
        float* norms = reinterpret_cast<float*>(strips + layout.norms_at());
        std::memset(norms, 0, static_cast<size_t>(layout.strip_bytes - layout.norms_at()));
        int8_t* target = strips;
        for (int64_t c = 0; c < layout.chunks; ++c) {
            uint32_t squares[kStrip][2] = {};
            for (int64_t g = c * kChunkGroups; g < (c + 1) * kChunkGroups; ++g, target += kStripGroup) {
                const int8_t* source = panel + g * kGroupBytes + s * kStripGroup;
                for (int64_t i = 0; i < kStripGroup; ++i) {
                    const int code = g < groups ? source[i] : 0;
                    target[i] = static_cast<int8_t>(code ^ 128);
                    squares[i / kKGroup][i % kKGroup / 2] += square_of(code);
                }
            }
            uint32_t largest = 0;
            for (const auto& lanes : squares) largest = std::max({largest, lanes[0], lanes[1]});
            norms[c] = norm_of(std::min<uint32_t>(largest, 0xffff));
        }
    }
}

// The panel of the strips of k input channels.
inline void unpack_strips(const int8_t* strips, int64_t k, int8_t* panel) {
    const StripLayout layout(k);
    const int64_t groups = ceil_div(k, kKGroup);
    int32_t sums[kPanel] = {};
    for (int s = 0; s < kStrips; ++s, strips += layout.strip_bytes) {
        for (int64_t g = 0; g < groups; ++g) {
            int8_t* target = panel + g * kGroupBytes + s * kStripGroup;
            for (int64_t i = 0; i < kStripGroup; ++i) {
                target[i] = static_cast<int8_t>(strips[g * kStripGroup + i] ^ 128);
                sums[s * kStrip + i / kKGroup] += target[i];
            }
        }
    }
    std::memcpy(panel + groups * kGroupBytes, sums, sizeof sums);
}

}  // namespace
}  // namespace vqvit
