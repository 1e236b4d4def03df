// INT8 GEMM on mma.sync: accumulators and floats.
#include "gemm_s8_tiles.h"

namespace vqvit {

template int run_tiles<Store::kInt32, VQVIT_NONE>(const GemmTask&, void*);
template int run_tiles<Store::kFloat, VQVIT_NONE>(const GemmTask&, void*);
template int run_tiles<Store::kFloat, VQVIT_GELU>(const GemmTask&, void*);
template int run_tiles<Store::kFloat, kAnyActivation>(const GemmTask&, void*);

}  // namespace vqvit
