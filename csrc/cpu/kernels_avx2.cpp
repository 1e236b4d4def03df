// Kernels for AVX2 + FMA + F16C (Intel Haswell, AMD Zen, and later).
#if defined(__x86_64__)

// What other files share comes before the pragma: none of it may be compiled for AVX2.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "scratch.h"

namespace {
bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

#pragma GCC target("avx2,fma,f16c")

#include "dot_avx2.h"
#include "kernel_table.h"
#include "vector_avx2.h"

namespace vqvit {

const Kernels kAvx2Kernels = kernel_table<Avx2, DotAvx2>("avx2", supported);

}  // namespace vqvit

#endif
