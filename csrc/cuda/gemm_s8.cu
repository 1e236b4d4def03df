// INT8 GEMM with fused epilogues: which kernel runs a task, and the functions of the C ABI.
#include "gemm_s8.h"
#include "library.h"

namespace vqvit {
namespace {

// Every row's scale is out_scale until a value of its row is not finite, and its sum of codes starts at 0.
VQVIT_KERNEL(256, 1, start_rows_kernel, const float* out_scale, float* scale, int32_t* row_sum, int64_t rows) {
    const int64_t row = block_x() * 256 + thread_id();
    if (row >= rows) return;
    scale[row] = *out_scale;
    if (row_sum != nullptr) row_sum[row] = 0;
}

// Whether Hopper's kernels suit the current device and the operands.
bool takes_wgmma(const vqvit_gemm& g) {
    const bool rows = g.k > 0 && g.k % 16 == 0 && g.a_stride >= g.k && g.a_stride % 16 == 0;  // a row may be repeated
    const bool boxes = rows && aligned(g.a, 16) && aligned(g.b, 16);
    // Fewer tiles than that leave multiprocessors idle, which the small tiles of mma.sync fill.
    return compute_capability() == 90 && boxes && ceil_div(g.m, 64) * ceil_div(g.n, 128) >= multiprocessors() / 2;
}

// GemmTask::whole for outputs of so many bytes.
bool is_whole(const GemmTask& task, int64_t bytes) {
    const vqvit_gemm& g = task.g;
    return g.a_zero == nullptr && g.b_zero == nullptr && g.n % 4 == 0 && aligned(task.out, 4 * bytes);
}
// Of codes, to which nothing is added.
bool is_whole_of_codes(const GemmTask& task) {
    return is_whole(task, 1) && task.g.residual == nullptr && task.g.layer_scale == nullptr;
}

template <int StoreKind, int Activation>
int run(const GemmTask& task, void* stream) {
    if (task.g.m == 0 || task.g.n == 0) return VQVIT_OK;
    if (takes_wgmma(task.g)) return run_wgmma<StoreKind, Activation>(task, stream);
    return run_tiles<StoreKind, Activation>(task, stream);
}

GemmTask task_of(const vqvit_gemm& g, void* out) {
    GemmTask task = {};
    task.g = g;
    task.out = out;
    return task;
}

}  // namespace

GemmTask float_task(const vqvit_gemm& g, void* y, int dtype) {
    GemmTask task = task_of(g, y);
    task.dtype = dtype;
    const int64_t bytes = bytes_of(dtype);
    const bool adds_whole = g.residual == nullptr ||
                            (g.residual_dtype == dtype && aligned(g.residual, 4 * bytes) &&
                             g.residual_stride % 4 == 0 && g.residual_stride >= 0 && g.residual_stride <= INT32_MAX);
    task.whole = is_whole(task, bytes) && adds_whole;
    return task;
}

}  // namespace vqvit

using namespace vqvit;

extern "C" {

int vqvit_cuda_int8_mm(const vqvit_gemm* gemm, int32_t* acc, void* stream) {
    GemmTask task = task_of(*gemm, acc);
    task.whole = is_whole(task, 4);
    return run<Store::kInt32, VQVIT_NONE>(task, stream);
}

int vqvit_cuda_int8_linear(const vqvit_gemm* gemm, void* y, int dtype, void* stream) {
    if (const int status = checked(*gemm)) return status;
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    GemmTask task = float_task(*gemm, y, dtype);
    if (gemm->activation == VQVIT_NONE) return run<Store::kFloat, VQVIT_NONE>(task, stream);
    if (gemm->activation == VQVIT_GELU) return run<Store::kFloat, VQVIT_GELU>(task, stream);
    return run<Store::kFloat, kAnyActivation>(task, stream);
}

int vqvit_cuda_int8_linear_quantize(
    const vqvit_gemm* gemm, const float* out_scale, int8_t* codes, float* scale, int32_t* row_sum, void* stream) {
    if (const int status = checked(*gemm)) return status;
    GemmTask task = task_of(*gemm, codes);
    task.whole = is_whole_of_codes(task);
    const bool gelu = gemm->activation == VQVIT_GELU;
    task.out_scale = out_scale;
    task.scale = scale;
    task.row_sum = row_sum;
    if (out_scale == nullptr) {
        if (gelu) return run<Store::kGroupCodes, VQVIT_GELU>(task, stream);
        return run<Store::kGroupCodes, kAnyActivation>(task, stream);
    }
    const Dim3 blocks(static_cast<unsigned>(ceil_div(gemm->m, 256)));
    if (const int status = launch(start_rows_kernel, blocks, 256, 0, stream, out_scale, scale, row_sum, gemm->m)) {
        return status;
    }
    if (gelu) return run<Store::kStaticCodes, VQVIT_GELU>(task, stream);
    return run<Store::kStaticCodes, kAnyActivation>(task, stream);
}

int vqvit_cuda_int8_linear_qkv(
    const vqvit_gemm* gemm, int64_t tokens, int64_t heads, int8_t* codes, float* scale, float* v, void* stream) {
    if (const int status = checked(*gemm)) return status;
    if (gemm->activation != VQVIT_NONE) return VQVIT_UNKNOWN_ACTIVATION;
    GemmTask task = task_of(*gemm, codes);
    task.scale = scale;
    task.v = v;
    task.whole = is_whole_of_codes(task) && aligned(v, 16);
    task.heads = static_cast<int>(heads);
    task.head_dim = static_cast<int>(gemm->n / (3 * heads));
    if (task.head_dim != 32 && task.head_dim != 64 && task.head_dim != 128) return VQVIT_UNKNOWN_MODE;
    task.head_bits = task.head_dim == 32 ? 5 : task.head_dim == 64 ? 6 : 7;
    task.projection = Projection(gemm->m, tokens, heads);
    return run<Store::kProjection, VQVIT_NONE>(task, stream);
}

}  // extern "C"
