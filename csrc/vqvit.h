/* vqvit native kernels: the C ABI of every exported function.
 *
 * Each function computes, bit for bit, what the op of the same name in vqvit/reference.py computes; vqvit/numerics.py
 * holds the formulas. The caller validates shapes (vqvit/validation.py): these functions trust them.
 *
 * Conventions
 *   Sizes and strides are int64_t and count elements. Matrices are row-major and contiguous unless a stride is named.
 *   Codes are int8 in [-127, 127], scales fp32, zero points and sums int32. A pointer marked "or NULL" is optional.
 *   `threads` is the number of OpenMP threads to use at most; small problems run on the calling thread.
 *   Outputs never overlap inputs.
 *   Return value: VQVIT_OK, or one of the error codes below (then nothing was written).
 *   The library is compiled with OpenMP but links no libgomp: it shares the one that is loaded already (torch's).
 */
#ifndef VQVIT_H
#define VQVIT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VQVIT_EXPORT __attribute__((visibility("default")))

enum vqvit_status {
    VQVIT_OK = 0,
    VQVIT_UNKNOWN_DTYPE = 1,
    VQVIT_UNKNOWN_ACTIVATION = 2,
    VQVIT_UNKNOWN_ISA = 3,
    VQVIT_UNSUPPORTED_ISA = 4, /* known, but this machine cannot run it */
    VQVIT_UNKNOWN_MODE = 5,
};

enum vqvit_dtype { VQVIT_F32 = 0, VQVIT_F16 = 1, VQVIT_BF16 = 2 };

/* The order of vqvit.numerics.ACTIVATIONS. */
enum vqvit_activation {
    VQVIT_NONE = 0,
    VQVIT_GELU = 1,
    VQVIT_GELU_TANH = 2,
    VQVIT_QUICK_GELU = 3,
    VQVIT_SILU = 4,
    VQVIT_RELU = 5,
};

/* Library ------------------------------------------------------------------------------------------------------- */

/* Hash of the sources and flags this library was built from (vqvit/_build.py), to recognise a stale binary. */
VQVIT_EXPORT const char* vqvit_cpu_source_hash(void);

/* Comma separated names of the instruction sets this machine can run, best last: "scalar,avx2,avx512_vnni". */
VQVIT_EXPORT const char* vqvit_cpu_isa_available(void);

/* Instruction set that kernels use now. */
VQVIT_EXPORT const char* vqvit_cpu_isa(void);

/* Force an instruction set for the whole process, or return to the best available one with NULL. */
VQVIT_EXPORT int vqvit_cpu_set_isa(const char* name);

/* Row-wise ops -------------------------------------------------------------------------------------------------- */

/* quantize_per_token (static_scale NULL) and quantize_static.
 *   x (rows, k) of dtype; equalizer (k) or NULL; static_scale (1) or NULL.
 *   delta: weight of the standard deviation in the range; symmetric: 0 or 1, both per token only.
 *   codes (rows, k); scale (rows); zero_point (rows), written if asymmetric; row_sum (rows) or NULL. */
VQVIT_EXPORT int vqvit_cpu_quantize(
    const void* x, int dtype, int64_t rows, int64_t k, const float* equalizer, const float* static_scale, float delta,
    int symmetric, int8_t* codes, float* scale, int32_t* zero_point, int32_t* row_sum, int threads);

/* quantize_residual: x (rows, k) of dtype, codes (rows, k), scale (rows); residual_codes (rows, k). */
VQVIT_EXPORT int vqvit_cpu_quantize_residual(
    const void* x, int dtype, const int8_t* codes, const float* scale, int64_t rows, int64_t k, int8_t* residual_codes,
    int threads);

/* layernorm_quantize (residual and stream NULL) and add_layernorm_quantize.
 *   x (rows, k) of dtype; residual (rows, k) of residual_dtype; layer_scale (k) or NULL; weight, bias (k) fp32.
 *   paper: 1 for 1 / (sd + eps). static_scale (1) or NULL: per token with `delta`.
 *   codes (rows, k); scale (rows); row_sum (rows) or NULL; stream (rows, k) of residual_dtype. */
VQVIT_EXPORT int vqvit_cpu_layernorm_quantize(
    const void* x, int dtype, const void* residual, int residual_dtype, const float* layer_scale, const float* weight,
    const float* bias, int64_t rows, int64_t k, float eps, int paper, float delta, const float* static_scale,
    int8_t* codes, float* scale, int32_t* row_sum, void* stream, int threads);

/* patchify_quantize: pixels (batch, channels, height, width) of dtype; equalizer (channels · ph · pw) or NULL.
 *   codes (batch · height/ph · width/pw, channels · ph · pw); scale (batch · height/ph · width/pw). */
VQVIT_EXPORT int vqvit_cpu_patchify_quantize(
    const void* pixels, int dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
    int64_t patch_height, int64_t patch_width, const float* equalizer, int8_t* codes, float* scale, int threads);

/* GEMM ---------------------------------------------------------------------------------------------------------- */

/* Panels of a weight b (n, k): packed (ceil(n/64), ceil(k/4) + 1, 64, 4), [p, g, j, i] = b[64 p + j, 4 g + i], zero
 * padded; the last group of a panel holds the int32 column sums. */
VQVIT_EXPORT int vqvit_cpu_pack_weight(const int8_t* b, int64_t n, int64_t k, int8_t* packed, int threads);

/* Inverse of vqvit_cpu_pack_weight. */
VQVIT_EXPORT int vqvit_cpu_unpack_weight(const int8_t* packed, int64_t n, int64_t k, int8_t* b, int threads);

/* Operands and epilogue of y = act(a_scale b_scaleᵀ ∘ Σ_k (a - a_zero)(b - b_zero) + bias) · layer_scale + residual. */
typedef struct vqvit_gemm {
    const int8_t* a;          /* (m, k), rows a_stride apart */
    const int8_t* b;          /* (n, k), or the panels of vqvit_cpu_pack_weight */
    const float* a_scale;     /* (m) */
    const float* b_scale;     /* (n) */
    const float* bias;        /* (n) or NULL */
    const float* layer_scale; /* (n) or NULL */
    const void* residual;     /* (m, n) of residual_dtype, or NULL */
    const int32_t* a_zero;    /* (m) or NULL; needs b_sum (n) */
    const int32_t* a_sum;     /* (m) */
    const int32_t* b_zero;    /* (n) or NULL; needs a_sum (m) */
    const int32_t* b_sum;     /* (n) */
    int64_t m, n, k, a_stride;
    int32_t b_packed;         /* 0 or 1 */
    int32_t activation;       /* enum vqvit_activation */
    int32_t residual_dtype;   /* enum vqvit_dtype */
} vqvit_gemm;

/* int8_mm: acc (m, n) int32; reads a, b, b_packed and the sizes of `gemm`. */
VQVIT_EXPORT int vqvit_cpu_int8_mm(const vqvit_gemm* gemm, int32_t* acc, int threads);

/* int8_linear: y (m, n) of dtype. */
VQVIT_EXPORT int vqvit_cpu_int8_linear(const vqvit_gemm* gemm, void* y, int dtype, int threads);

/* int8_linear_quantize: the fp32 y, quantized per token (out_scale NULL) or with the static out_scale (1).
 *   codes (m, n); scale (m); zero_point (m), written if not symmetric; row_sum (m) or NULL. */
VQVIT_EXPORT int vqvit_cpu_int8_linear_quantize(
    const vqvit_gemm* gemm, const float* out_scale, int symmetric, int8_t* codes, float* scale, int32_t* zero_point,
    int32_t* row_sum, int threads);

/* int8_linear_compensated: acc + first_order · [a_residual bᵀ + a b_residualᵀ] + second_order · a_residual b_residualᵀ,
 * dequantized. `terms` is a bit set: 1 for a_residual bᵀ, 2 for a b_residualᵀ, 4 for a_residual b_residualᵀ.
 * a_residual (m, k) with a's stride, b_residual (n, k) plain; either may be NULL if no term reads it. */
VQVIT_EXPORT int vqvit_cpu_int8_linear_compensated(
    const vqvit_gemm* gemm, const int8_t* a_residual, const int8_t* b_residual, int terms, float first_order,
    float second_order, void* y, int dtype, int threads);

/* Attention ----------------------------------------------------------------------------------------------------- */

/* quantize_qkv: qkv (batch, tokens, 3 · heads · head_dim) of dtype, contiguous.
 *   q, k, v (batch, heads, tokens, head_dim); q_scale, k_scale (batch, heads, tokens);
 *   v_scale (batch, heads, head_dim). */
VQVIT_EXPORT int vqvit_cpu_quantize_qkv(
    const void* qkv, int dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int8_t* q, int8_t* k,
    int8_t* v, float* q_scale, float* k_scale, float* v_scale, int threads);

/* int8_attention: q (batch, heads, queries, head_dim), k and v (batch, heads, keys, head_dim), scales as above.
 *   logit_scale = sm_scale · log2 e, rounded to fp32. out (batch, queries, heads · head_dim) of dtype. */
VQVIT_EXPORT int vqvit_cpu_int8_attention(
    const int8_t* q, const int8_t* k, const int8_t* v, const float* q_scale, const float* k_scale,
    const float* v_scale, float logit_scale, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
    int64_t head_dim, void* out, int dtype, int threads);

#ifdef __cplusplus
}
#endif

#endif
