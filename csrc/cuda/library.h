// Facts of the current device, and checks that every function makes.
#pragma once

#include "vqvit.h"

namespace vqvit {

// Of the twin: $VQVIT_TWIN_MULTIPROCESSORS, or 4.
int multiprocessors();

// Major version times ten and minor version; of the twin $VQVIT_TWIN_ARCH, or 80.
int compute_capability();

inline bool known_dtype(int dtype) { return dtype >= VQVIT_F32 && dtype <= VQVIT_BF16; }

}  // namespace vqvit
