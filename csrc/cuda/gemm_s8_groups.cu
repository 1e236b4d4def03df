// INT8 GEMM on mma.sync: codes by group.
#include "gemm_s8_tiles.h"

namespace vqvit {

template int run_tiles<Store::kGroupCodes, VQVIT_GELU>(const GemmTask&, void*);
template int run_tiles<Store::kGroupCodes, kAnyActivation>(const GemmTask&, void*);

}  // namespace vqvit
