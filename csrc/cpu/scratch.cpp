#include "scratch.h"

#include <cstdlib>
#include <new>

namespace vqvit {
namespace {

constexpr int64_t kAlignment = 64;  // a cache line and a zmm register

#ifdef __SANITIZE_ADDRESS__
constexpr bool kKeepsLarger = false;  // a sanitizer sees who leaves a buffer that is as small as asked for
#else
constexpr bool kKeepsLarger = true;
#endif

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
    if (buffer.bytes < bytes || (!kKeepsLarger && buffer.bytes != bytes)) {
        std::free(buffer.data);
        buffer = {};
        if (posix_memalign(&buffer.data, kAlignment, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
        buffer.bytes = bytes;
    }
    return buffer.data;
}

}  // namespace vqvit
