// Peak rate of int8 products: the instructions that each instruction set's GEMM rests on, in registers alone.
//
// Loads, stores and epilogues are what separates a GEMM from this rate. The scalar kernels rest on no such instruction.
#include <chrono>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
// GCC 12's own intrinsic headers start "undefined" registers from themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>
#endif

namespace vqvit {
namespace {

struct Peak {
    const char* isa;
    void (*run)(int64_t rounds);
    int64_t operations;  // multiplications and additions of a round
};

#if defined(__x86_64__)

// Independent sums: more than latency times throughput of any x86 core here, and with operands they fit 16 registers.
constexpr int kChains = 12;
constexpr char kA = 85, kB = -86;  // bits that change: zeros would draw less power, and clock higher, than codes

// The empty asm hides each value from the optimiser, which would otherwise compute the sums itself.
__attribute__((target("avx2"))) void run_avx2(int64_t rounds) {
    __m256i acc[kChains], a = _mm256_set1_epi8(kA), b = _mm256_set1_epi8(kB);
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = a;
    asm volatile("" : "+x"(a), "+x"(b));
    for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) {
            acc[i] = _mm256_add_epi16(acc[i], _mm256_maddubs_epi16(a, b));
            asm volatile("" : "+x"(acc[i]));
            asm volatile("" : "+x"(a));  // the product is the same every time: it must not be taken out of the loop
        }
    }
}

__attribute__((target("avx2,avxvnni"))) void run_avx_vnni(int64_t rounds) {
    __m256i acc[kChains], a = _mm256_set1_epi8(kA), b = _mm256_set1_epi8(kB);
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = a;
    asm volatile("" : "+x"(a), "+x"(b));
    for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) {
            acc[i] = _mm256_dpbusd_avx_epi32(acc[i], a, b);
            asm volatile("" : "+x"(acc[i]));
        }
    }
}

__attribute__((target("avx512f,avx512vnni"))) void run_avx512_vnni(int64_t rounds) {
    __m512i acc[kChains], a = _mm512_set1_epi8(kA), b = _mm512_set1_epi8(kB);
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = a;
    asm volatile("" : "+v"(a), "+v"(b));
    for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) {
            acc[i] = _mm512_dpbusd_epi32(acc[i], a, b);
            asm volatile("" : "+v"(acc[i]));
        }
    }
}

const Peak kPeaks[] = {
    {"avx2", run_avx2, int64_t{kChains} * 16 * 4},  // 16 sums of two products
    {"avx_vnni", run_avx_vnni, int64_t{kChains} * 8 * 8},
    {"avx512_vnni", run_avx512_vnni, int64_t{kChains} * 16 * 8},
};

const Peak* peak_of(const char* isa) {
    for (const Peak& peak : kPeaks) {
        if (std::strcmp(peak.isa, isa) == 0) return &peak;
    }
    return nullptr;
}

#else

const Peak* peak_of(const char*) { return nullptr; }

#endif

}  // namespace
}  // namespace vqvit

extern "C" int vqvit_cpu_peak(int64_t rounds, double* gigaops, int threads) {
    const vqvit::Peak* peak = vqvit::peak_of(vqvit::kernels().name);
    if (peak == nullptr) return VQVIT_UNSUPPORTED_ISA;
    using Clock = std::chrono::steady_clock;
    const auto run = [&](int64_t count) {
        const auto start = Clock::now();
#pragma omp parallel num_threads(threads)
        peak->run(count);
        return std::chrono::duration<double>(Clock::now() - start).count();
    };
    run(1);  // wakes the threads
    *gigaops = static_cast<double>(rounds) * static_cast<double>(peak->operations) * threads / run(rounds) * 1e-9;
    return VQVIT_OK;
}
