// quantize, quantize_residual, patchify_quantize, quantize_qkv: rows and heads shared out to threads. See quantize.h.
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

using namespace vqvit;

extern "C" {

int vqvit_cpu_quantize(
    const void* x, int dtype, int64_t rows, int64_t k, const float* equalizer, const float* static_scale, float delta,
    int symmetric, int8_t* codes, float* scale, int32_t* zero_point, int32_t* row_sum, int threads) try {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Kernels& isa = kernels();
    const Codes out = {codes, scale, zero_point, row_sum, static_scale, delta, symmetric != 0};
    const QuantizeRows task = {x, dtype, k, k, equalizer, VQVIT_NONE, out};
    parallel_rows(rows, k, threads, [&](int64_t first, int64_t last) { isa.quantize_rows(task, first, last); });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_quantize_per_group(
    const void* x, int dtype, int64_t rows, int64_t k, const float* equalizer, int8_t* codes, float* scale,
    int threads) try {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Kernels& isa = kernels();
    const QuantizeGroups task = {x, dtype, k, k, equalizer, codes, scale, k, ceil_div(k, kGroup)};
    parallel_rows(rows, k, threads, [&](int64_t first, int64_t last) { isa.quantize_groups(task, first, last); });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_quantize_residual(
    const void* x, int dtype, const int8_t* codes, const float* scale, int64_t rows, int64_t k, int8_t* residual_codes,
    int threads) try {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Kernels& isa = kernels();
    const QuantizeResidual task = {x, dtype, k, codes, scale, residual_codes};
    parallel_rows(rows, k, threads, [&](int64_t first, int64_t last) { isa.quantize_residual(task, first, last); });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_patchify_quantize(
    const void* pixels, int dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
    int64_t patch_height, int64_t patch_width, const float* equalizer, int8_t* codes, float* scale, int threads) try {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Kernels& isa = kernels();
    const Codes out = {codes, scale, nullptr, nullptr, nullptr, 0.0f, true};
    const Patchify task = {pixels, dtype, channels, height, width, patch_height, patch_width, equalizer, out};
    const int64_t rows = batch * (height / patch_height) * (width / patch_width);
    const int64_t k = channels * patch_height * patch_width;
    parallel_rows(rows, k, threads, [&](int64_t first, int64_t last) { isa.patchify_rows(task, first, last); });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

int vqvit_cpu_quantize_qkv(
    const void* qkv, int dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int8_t* q, int8_t* k,
    int8_t* v, float* q_scale, float* k_scale, float* v_scale, int threads) try {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Kernels& isa = kernels();
    const Qkv out = {tokens, tokens, heads, head_dim, {q, k, v}, {q_scale, k_scale, v_scale}};
    const int64_t width = 3 * heads * head_dim, size = dtype == VQVIT_F32 ? 4 : 2;
    const int64_t work = batch * tokens * width * kRowOperations;
    parallel_for<Stateless>(batch * heads, work, threads, [&](Stateless&, int64_t i) {
        const int64_t image = i / heads, head = i % heads;
        for (int part = 0; part < 3; ++part) {
            const int64_t offset = image * tokens * width + (part * heads + head) * head_dim;
            const char* x = static_cast<const char*>(qkv) + offset * size;
            isa.quantize_head(out.head(part, image, head, 0, tokens, x, dtype, width));
        }
    });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

}  // extern "C"
