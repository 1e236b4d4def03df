// Thread-local buffers that grow and stay: no allocation per call after the first of a size.
#pragma once

#include <cstdint>

namespace vqvit {

enum class Slot {
    kRow,
    kA,
    kAResidual,
    kPanel,
    kPanels,
    kStrips,
    kResidualPanels,
    kResidualStrips,
    kGroupSums,
    kTile,
    kAttention,
    kBlock,
    kCount
};

// At least `bytes` bytes, 64-byte aligned, kept until this thread asks the slot for more. Throws std::bad_alloc.
void* scratch(Slot slot, int64_t bytes);

}  // namespace vqvit
