// INT8 GEMM on mma.sync: codes with a static scale, and projections.
#include "gemm_s8_tiles.h"

namespace vqvit {

template int run_tiles<Store::kStaticCodes, VQVIT_GELU>(const GemmTask&, void*);
template int run_tiles<Store::kStaticCodes, kAnyActivation>(const GemmTask&, void*);
template int run_tiles<Store::kProjection, VQVIT_NONE>(const GemmTask&, void*);

}  // namespace vqvit
