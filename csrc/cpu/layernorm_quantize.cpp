// layer_norm, layernorm_quantize and add_layernorm_quantize: rows shared out to threads. See layernorm_quantize.h.
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

using namespace vqvit;

extern "C" int vqvit_cpu_layernorm_quantize(
    const void* x, int dtype, const void* residual, int residual_dtype, const float* layer_scale, const float* weight,
    const float* bias, int64_t rows, int64_t k, float eps, int paper, float delta, const float* static_scale,
    int8_t* codes, float* scale, int32_t* row_sum, void* stream, int threads) try {
    if (!known_dtype(dtype) || !known_dtype(residual_dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Kernels& isa = kernels();
    const Codes out = {codes, scale, nullptr, row_sum, static_scale, delta, true};
    const LayerNormRows task = {
        x, dtype, residual, residual_dtype, layer_scale, weight, bias, k, eps, paper != 0, out, stream, nullptr,
    };
    parallel_rows(rows, k, threads, [&](int64_t first, int64_t last) { isa.layernorm_rows(task, first, last); });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY

extern "C" int vqvit_cpu_layer_norm(
    const void* x, int dtype, const float* weight, const float* bias, int64_t rows, int64_t k, float eps, int paper,
    void* y, int threads) try {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Kernels& isa = kernels();
    const LayerNormRows task = {
        x, dtype, nullptr, VQVIT_F32, nullptr, weight, bias, k, eps, paper != 0, {}, nullptr, y,
    };
    parallel_rows(rows, k, threads, [&](int64_t first, int64_t last) { isa.layernorm_rows(task, first, last); });
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY
