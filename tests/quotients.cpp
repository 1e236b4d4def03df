// Counts the codes that Quotient (vmath.h) gets wrong: every mantissa of a scale, at every tie between codes and the
// floats around it. Exponents change nothing. Built and run by test_native.py.
#include <immintrin.h>

#include <cstdio>

#pragma GCC target("avx2,fma,f16c")

#include "vector_avx2.h"
#include "vmath.h"

int main() {
    using V = vqvit::Avx2;
    constexpr int kCodes = 128, kMantissas = 1 << 23, kNeighbours = 2;
    long wrong = 0;
    for (int mantissa = 0; mantissa < kMantissas; ++mantissa) {
        const float scale = vqvit::from_bits(0x3f800000 | mantissa);
        const vqvit::Quotient<V> quotient(scale);
        const V::F divisor = V::set(scale);
        V::F tie = _mm256_setr_ps(0.5f, 1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f);
        for (int code = 0; code < kCodes; code += V::lanes, tie = V::add(tie, V::set(V::lanes))) {
            const V::I nearest = V::bits(V::mul(tie, divisor));
            for (int step = -kNeighbours; step <= kNeighbours; ++step) {
                const V::F x = V::from_bits(V::add_i(nearest, V::set_i(step)));
                const V::I same = _mm256_cmpeq_epi32(quotient(x), V::to_int(V::div(x, divisor)));
                wrong += 8 - __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(V::from_bits(same))));
            }
        }
    }
    std::printf("%ld\n", wrong);
    return 0;
}
