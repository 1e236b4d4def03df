// Kernels for any machine.
#include "dot.h"
#include "kernel_table.h"
#include "vector_scalar.h"

namespace vqvit {

const Kernels kScalarKernels = kernel_table<Scalar, DotScalar>("scalar", [] { return true; });

}  // namespace vqvit
