// Kernels for AVX-VNNI beside AVX2 (Intel Alder Lake and Sierra Forest, AMD Zen 5, and later).
#if defined(__x86_64__)

// What other files share comes before the pragma: none of it may be compiled for AVX2.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace {
bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("avxvnni");
}
}  // namespace

#pragma GCC target("avx2,fma,f16c,avxvnni")

#include "dot_avx_vnni.h"
#include "kernel_table.h"
#include "vector_avx2.h"

namespace vqvit {

const Kernels kAvxVnniKernels = kernel_table<Avx2, DotAvxVnni>("avx_vnni", supported);

}  // namespace vqvit

#endif
