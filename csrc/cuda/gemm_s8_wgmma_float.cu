// INT8 GEMM for Hopper: accumulators and floats.
#include "gemm_s8_wgmma.h"

namespace vqvit {

template int run_wgmma<Store::kInt32, VQVIT_NONE>(const GemmTask&, void*);
template int run_wgmma<Store::kFloat, VQVIT_NONE>(const GemmTask&, void*);
template int run_wgmma<Store::kFloat, VQVIT_GELU>(const GemmTask&, void*);
template int run_wgmma<Store::kFloat, kAnyActivation>(const GemmTask&, void*);

}  // namespace vqvit
