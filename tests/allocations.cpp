// Calls to the heap, in any thread, of an encoder block: prints those of its first run, and those of the last of some
// rounds of runs. Built with the library under test and run by test_native.py.
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "vqvit.h"

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {
std::atomic<long> calls{0};
}

extern "C" {
void* malloc(size_t bytes) { return ++calls, __libc_malloc(bytes); }
void* calloc(size_t count, size_t bytes) { return ++calls, __libc_calloc(count, bytes); }
void* realloc(void* p, size_t bytes) { return ++calls, __libc_realloc(p, bytes); }
void* memalign(size_t alignment, size_t bytes) { return ++calls, __libc_memalign(alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return ++calls, __libc_memalign(alignment, bytes); }
int posix_memalign(void** p, size_t alignment, size_t bytes) {
    ++calls;
    *p = __libc_memalign(alignment, bytes);
    return *p == nullptr ? ENOMEM : 0;
}
}

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
    const int32_t groups = argc > 2 ? std::atoi(argv[2]) : 0;
    constexpr int64_t kBatch = 2, kTokens = 197, kWidth = 192, kHeads = 3, kHidden = 768;
    const std::vector<float> vector(kHidden, 0.01f);
    const std::vector<int8_t> weight(kHidden * kWidth, 3);
    const int layout = vqvit_cpu_weight_layout();
    const auto packed = [&](int64_t n, int64_t k) {
        std::vector<int8_t> codes((n + 63) / 64 * 64 * (k + 64));  // enough for either layout
        vqvit_cpu_reorder_weight(weight.data(), VQVIT_ROWS, n, k, codes.data(), layout, threads);
        return codes;
    };
    const auto qkv = packed(3 * kWidth, kWidth), attn_out = packed(kWidth, kWidth);
    const auto fc1 = packed(kHidden, kWidth), fc2 = packed(kWidth, kHidden);

    vqvit_encoder_block block = {};
    for (const float** field : {
             &block.norm1_weight, &block.norm1_bias, &block.norm2_weight, &block.norm2_bias, &block.qkv_scale,
             &block.attn_out_scale, &block.fc1_scale, &block.fc2_scale,
         }) {
        *field = vector.data();
    }
    block.qkv = qkv.data();
    block.attn_out = attn_out.data();
    block.fc1 = fc1.data();
    block.fc2 = fc2.data();
    block.qkv_layout = block.attn_out_layout = block.fc1_layout = block.fc2_layout = layout;
    block.width = kWidth;
    block.heads = kHeads;
    block.head_dim = kWidth / kHeads;
    block.hidden = kHidden;
    block.eps1 = block.eps2 = 1e-6f;
    block.logit_scale = 0.18f;
    block.activation = VQVIT_GELU;
    block.attn_out_groups = block.fc2_groups = groups;

    std::vector<float> x(kBatch * kTokens * kWidth), out(x.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 31) - 15.0f;
    const auto run = [&] {
        const int status =
            vqvit_cpu_int8_encoder_block(&block, x.data(), VQVIT_F32, kBatch, kTokens, kTokens, out.data(), threads);
        if (status != VQVIT_OK) std::exit(status);
    };
    const auto calls_of = [&](int runs) {
        const long before = calls;
        for (int i = 0; i < runs; ++i) run();
        return calls - before;
    };
    const long first = calls_of(1);
    // Which thread gets which part differs from run to run: a thread's buffers may grow later, but not for ever.
    long last = calls_of(10);
    for (int round = 0; last != 0 && round < 50; ++round) last = calls_of(10);
    std::printf("%ld %ld\n", first, last);
    return 0;
}
