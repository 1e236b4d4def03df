// Facts of the current device, and checks that every function makes.
#pragma once

#include "vqvit.h"

namespace vqvit {

// Of the twin: $VQVIT_TWIN_MULTIPROCESSORS, or 4.
int multiprocessors();

// Major version times ten and minor version; of the twin $VQVIT_TWIN_ARCH, or 80.
int compute_capability();

inline bool known_dtype(int dtype) { return dtype >= VQVIT_F32 && dtype <= VQVIT_BF16; }
inline int64_t bytes_of(int dtype) { return dtype == VQVIT_F32 ? 4 : 2; }
inline bool aligned(const void* p, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// The status of a GEMM's types and activation.
inline int checked(const vqvit_gemm& g) {
    if (!known_dtype(g.bias_dtype) || !known_dtype(g.layer_scale_dtype) || !known_dtype(g.residual_dtype)) {
        return VQVIT_UNKNOWN_DTYPE;
    }
    return g.activation >= VQVIT_NONE && g.activation <= VQVIT_RELU ? VQVIT_OK : VQVIT_UNKNOWN_ACTIVATION;
}

}  // namespace vqvit
