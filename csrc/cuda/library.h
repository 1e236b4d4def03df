// Facts of the current device.
#pragma once

namespace vqvit {

// Of the twin: $VQVIT_TWIN_MULTIPROCESSORS, or 4.
int multiprocessors();

// Major version times ten and minor version; of the twin $VQVIT_TWIN_ARCH, or 80.
int compute_capability();

}  // namespace vqvit
