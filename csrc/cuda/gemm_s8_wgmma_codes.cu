// INT8 GEMM for Hopper: codes with a static scale, and projections.
#include "gemm_s8_wgmma.h"

namespace vqvit {

template int run_wgmma<Store::kStaticCodes, VQVIT_GELU>(const GemmTask&, void*);
template int run_wgmma<Store::kStaticCodes, kAnyActivation>(const GemmTask&, void*);
template int run_wgmma<Store::kProjection, VQVIT_NONE>(const GemmTask&, void*);

}  // namespace vqvit
