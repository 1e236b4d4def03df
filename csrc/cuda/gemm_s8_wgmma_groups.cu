// INT8 GEMM for Hopper: codes by group.
#include "gemm_s8_wgmma.h"

namespace vqvit {

template int run_wgmma<Store::kGroupCodes, VQVIT_GELU>(const GemmTask&, void*);
template int run_wgmma<Store::kGroupCodes, kAnyActivation>(const GemmTask&, void*);

}  // namespace vqvit
