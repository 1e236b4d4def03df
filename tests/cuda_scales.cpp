// Counts the scales that symmetric_scale (csrc/cuda/numerics.h) rounds otherwise than a division does: every
// significand at two exponents, then the ends of the range. Built and run by test_cuda_kernels_epilogue.py.
#include <cmath>
#include <cstdio>

#include "numerics.h"

namespace {

bool wrong(float largest) {
    const float quotient = largest / vqvit::kQMax;
    const float scale = quotient < vqvit::kScaleMin ? vqvit::kScaleMin : quotient;
    return vqvit::symmetric_scale(vqvit::bits_of(largest)) != scale;
}

}  // namespace

int main() {
    long count = 0;
    for (int32_t significand = 0; significand < 1 << 23; ++significand) {
        count += wrong(vqvit::from_bits(0x3f800000 | significand));
        count += wrong(vqvit::from_bits(0x7f000000 | significand));  // 2^127 and more
    }
    for (int32_t bits = 0; bits < vqvit::kInfinityBits; bits += 4093) count += wrong(vqvit::from_bits(bits));
    for (const int32_t bits : {vqvit::kInfinityBits, vqvit::kNotANumberBits, vqvit::kAbsMask}) {
        count += !std::isnan(vqvit::symmetric_scale(bits));
    }
    std::printf("%ld\n", count);
    return 0;
}
