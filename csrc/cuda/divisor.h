// Division of indices by sizes that only the host knows, as one multiplication.
#pragma once

#include "device.h"

namespace vqvit {

// n / divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31 (Granlund & Montgomery 1994). A divisor of 0 counts as 1: sizes
// of nothing divide nothing.
struct Divisor {
    uint32_t divisor = 1, multiplier = 0x80000000u;
    int shift = 31;

    Divisor() = default;
    explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d > 0 ? d : 1)) {
        for (int64_t power = 1; power < d; power *= 2) ++shift;
        multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
    }
    VQVIT_DEVICE uint32_t quotient(uint32_t n) const {
        return static_cast<uint32_t>((uint64_t{n} * multiplier) >> shift);
    }
    VQVIT_DEVICE uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

}  // namespace vqvit
