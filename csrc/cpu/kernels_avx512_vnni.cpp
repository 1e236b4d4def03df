// Kernels for AVX-512 F, BW, VL and VNNI (Intel Cascade Lake, AMD Zen 4, and later).
#if defined(__x86_64__)

// GCC 12's own intrinsic headers start "undefined" registers from themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

// What other files share comes before the pragma: none of it may be compiled for AVX-512.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "scratch.h"

namespace {
bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
}  // namespace

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")

#include "dot_avx512_vnni.h"
#include "kernel_table.h"
#include "vector_avx512.h"

namespace vqvit {

const Kernels kAvx512VnniKernels = kernel_table<Avx512, DotAvx512Vnni>("avx512_vnni", supported);

}  // namespace vqvit

#endif
