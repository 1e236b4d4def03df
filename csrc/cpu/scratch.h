// Thread-local buffers that grow and stay: no allocation per call after the first of a size.
#pragma once

#include <cstdint>
#include <new>

// Ends an exported function that begins with `try`: an exception that left it would end the process.
#define VQVIT_CATCH_OUT_OF_MEMORY \
    catch (const std::bad_alloc&) { return VQVIT_OUT_OF_MEMORY; }

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
