#include "scratch.h"

#include <cstdlib>
#include <new>

namespace vqvit {
namespace {

constexpr int64_t kAlignment = 64;  // a cache line and a zmm register

struct Buffers {
    struct {
        void* data = nullptr;
        int64_t bytes = 0;
    } slots[static_cast<int>(Slot::kCount)];

    ~Buffers() {
        for (auto& slot : slots) std::free(slot.data);
    }
};

thread_local Buffers buffers;

}  // namespace

void* scratch(Slot slot, int64_t bytes) {
    auto& buffer = buffers.slots[static_cast<int>(slot)];
    if (buffer.bytes < bytes) {
        std::free(buffer.data);
        buffer.bytes = 0;
        const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
        buffer.data = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
        if (buffer.data == nullptr) throw std::bad_alloc();
        buffer.bytes = rounded;
    }
    return buffer.data;
}

}  // namespace vqvit
