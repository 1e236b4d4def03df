/* vqvit native kernels: the C ABI of every exported function, of the CPU library and of the CUDA library.
 *
 * Each function computes, bit for bit, what the op of the same name in vqvit/reference.py computes; vqvit/numerics.py
 * holds the formulas. The caller validates shapes (vqvit/validation.py): these functions trust them.
 *
 * Conventions
 *   Sizes and strides are int64_t and count elements. Matrices are row-major and contiguous unless a stride is named.
 *   Codes are int8 in [-127, 127], scales fp32, zero points and sums int32. A pointer marked "or NULL" is optional.
 *   Outputs never overlap inputs.
 *   Return value: VQVIT_OK, or one of the error codes below (then nothing was written).
 *   CPU: `threads` is the number of OpenMP threads to use at most; small problems run on the calling thread. The
 *   library is compiled with OpenMP but links no libgomp: it shares the one that is loaded already (torch's).
 *   CUDA: pointers are of the current device; work is queued on `stream` (a cudaStream_t) and not waited for. No
 *   function allocates, synchronises or reads the device, so that every one can be captured in a CUDA graph.
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
    VQVIT_CUDA_ERROR = 6, /* vqvit_cuda_last_error says which */
    VQVIT_UNKNOWN_LAYOUT = 7,
    VQVIT_OUT_OF_MEMORY = 8, /* no room for scratch; outputs may be written in part */
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

/* Of a weight b (n, k). CPU kernels take each; those of an instruction set are fastest with one of the packed ones.
 *   VQVIT_ROWS    (n, k)
 *   VQVIT_PANELS  (ceil(n/64), ceil(k/4) + 1, 64, 4), [p, g, j, i] = b[64 p + j, 4 g + i], zero padded; the last group of
 *                 a panel holds the int32 column sums
 *   VQVIT_STRIPS  (ceil(n/64), 4, bytes): 16 columns each, as csrc/cpu/strips.h says */
enum vqvit_layout { VQVIT_ROWS = 0, VQVIT_PANELS = 1, VQVIT_STRIPS = 2 };

/* CPU: library -------------------------------------------------------------------------------------------------- */

/* Hash of the sources and flags this library was built from (vqvit/_build.py), to recognise a stale binary. */
VQVIT_EXPORT const char* vqvit_cpu_source_hash(void);

/* Comma separated names of the instruction sets this machine can run, best last: "scalar,avx2,avx512_vnni". */
VQVIT_EXPORT const char* vqvit_cpu_isa_available(void);

/* Instruction set that kernels use now. */
VQVIT_EXPORT const char* vqvit_cpu_isa(void);

/* Force an instruction set for the whole process, or return to the best available one with NULL. */
VQVIT_EXPORT int vqvit_cpu_set_isa(const char* name);

/* Rate of the instructions that this instruction set's int8 GEMM rests on, run in registers alone, in 10^9 operations a
 * second of exactly `threads` threads: the peak to measure a GEMM against. `rounds` of some ten instructions each.
 * VQVIT_UNSUPPORTED_ISA where the kernels rest on no such instruction (scalar). */
VQVIT_EXPORT int vqvit_cpu_peak(int64_t rounds, double* gigaops, int threads);

/* CPU: row-wise ops --------------------------------------------------------------------------------------------- */

/* quantize_per_token (static_scale NULL) and quantize_static.
 *   x (rows, k) of dtype; equalizer (k) or NULL; static_scale (1) or NULL.
 *   delta: weight of the standard deviation in the range; symmetric: 0 or 1, both per token only.
 *   codes (rows, k); scale (rows); zero_point (rows), written if asymmetric; row_sum (rows) or NULL. */
VQVIT_EXPORT int vqvit_cpu_quantize(
    const void* x, int dtype, int64_t rows, int64_t k, const float* equalizer, const float* static_scale, float delta,
    int symmetric, int8_t* codes, float* scale, int32_t* zero_point, int32_t* row_sum, int threads);

/* quantize_per_group: equalizer (k) or NULL; codes (rows, k), scale (rows, ceil(k/128)). */
VQVIT_EXPORT int vqvit_cpu_quantize_per_group(
    const void* x, int dtype, int64_t rows, int64_t k, const float* equalizer, int8_t* codes, float* scale,
    int threads);

/* quantize_residual: x (rows, k) of dtype, codes (rows, k), scale (rows); residual_codes (rows, k). */
VQVIT_EXPORT int vqvit_cpu_quantize_residual(
    const void* x, int dtype, const int8_t* codes, const float* scale, int64_t rows, int64_t k, int8_t* residual_codes,
    int threads);

/* layer_norm: x and y (rows, k) of dtype; weight, bias (k) fp32; paper: 1 for 1 / (sd + eps). */
VQVIT_EXPORT int vqvit_cpu_layer_norm(
    const void* x, int dtype, const float* weight, const float* bias, int64_t rows, int64_t k, float eps, int paper,
    void* y, int threads);

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

/* CPU: GEMM ----------------------------------------------------------------------------------------------------- */

/* The packed layout that the instruction set in use is fastest with. */
VQVIT_EXPORT int vqvit_cpu_weight_layout(void);

/* b in another layout. */
VQVIT_EXPORT int vqvit_cpu_reorder_weight(
    const int8_t* b, int layout, int64_t n, int64_t k, int8_t* target, int target_layout, int threads);

/* Operands and epilogue of y = act(a_scale b_scaleᵀ ∘ Σ_k (a - a_zero)(b - b_zero) + bias) · layer_scale + residual. */
typedef struct vqvit_gemm {
    const int8_t* a;          /* (m, k), rows a_stride apart */
    const int8_t* b;          /* (n, k), in b_layout */
    const float* a_scale;     /* (m), or with a_groups (m, ceil(k/128)) */
    const float* b_scale;     /* (n) */
    const void* bias;         /* (n) of bias_dtype, or NULL */
    const void* layer_scale;  /* (n) of layer_scale_dtype, or NULL */
    const void* residual;     /* (m, n) of residual_dtype, rows residual_stride apart, or NULL */
    const int32_t* a_zero;    /* (m) or NULL; needs b_sum (n) */
    const int32_t* a_sum;     /* (m) */
    const int32_t* b_zero;    /* (n) or NULL; needs a_sum (m) */
    const int32_t* b_sum;     /* (n) */
    int64_t m, n, k, a_stride, residual_stride;
    int32_t b_layout;   /* enum vqvit_layout; CUDA: VQVIT_ROWS */
    int32_t a_groups;   /* 0 or 1: a scale for each 128 columns of a; then without zero points */
    int32_t activation; /* enum vqvit_activation */
    int32_t bias_dtype, layer_scale_dtype, residual_dtype; /* enum vqvit_dtype; CPU: the first two are fp32, and
                                                              residual_stride is n */
} vqvit_gemm;

/* int8_mm: acc (m, n) int32; reads a, b, b_layout and the sizes of `gemm`. */
VQVIT_EXPORT int vqvit_cpu_int8_mm(const vqvit_gemm* gemm, int32_t* acc, int threads);

/* int8_linear: y (m, n) of dtype; it may be the residual, if that is of the same dtype. */
VQVIT_EXPORT int vqvit_cpu_int8_linear(const vqvit_gemm* gemm, void* y, int dtype, int threads);

/* int8_linear_quantize: the fp32 y, quantized per token (out_scale NULL) or with the static out_scale (1).
 *   codes (m, n); scale (m); zero_point (m), written if not symmetric; row_sum (m) or NULL.
 *   per_group: 1 for scale (m, ceil(n/128)), and then neither out_scale, zero_point nor row_sum. */
VQVIT_EXPORT int vqvit_cpu_int8_linear_quantize(
    const vqvit_gemm* gemm, const float* out_scale, int symmetric, int per_group, int8_t* codes, float* scale,
    int32_t* zero_point, int32_t* row_sum, int threads);

/* int8_linear_qkv: the fp32 y of m = images · tokens rows, quantized as by quantize_qkv; n = 3 · heads · head_dim. */
VQVIT_EXPORT int vqvit_cpu_int8_linear_qkv(
    const vqvit_gemm* gemm, int64_t tokens, int64_t heads, int8_t* q, int8_t* k, int8_t* v, float* q_scale,
    float* k_scale, float* v_scale, int threads);

/* int8_linear_compensated: acc + first_order · [a_residual bᵀ + a b_residualᵀ] + second_order · a_residual b_residualᵀ,
 * dequantized. `terms` is a bit set: 1 for a_residual bᵀ, 2 for a b_residualᵀ, 4 for a_residual b_residualᵀ.
 * a_residual (m, k) with a's stride, b_residual in b's layout; either may be NULL if no term reads it. */
VQVIT_EXPORT int vqvit_cpu_int8_linear_compensated(
    const vqvit_gemm* gemm, const int8_t* a_residual, const int8_t* b_residual, int terms, float first_order,
    float second_order, void* y, int dtype, int threads);

/* CPU: attention ------------------------------------------------------------------------------------------------ */

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

/* CPU: encoder block -------------------------------------------------------------------------------------------- */

/* Weights and sizes of h += layer_scale1 · attention(LN1(h)) · attn_outᵀ; h += layer_scale2 · act(LN2(h) fc1ᵀ) fc2ᵀ.
 * Weights are int8_t, each in a layout of its own; what is not marked is fp32. */
typedef struct vqvit_encoder_block {
    const float* norm1_weight; /* (width) */
    const float* norm1_bias;
    const float* norm2_weight;
    const float* norm2_bias;
    const int8_t* qkv; /* (3 · heads · head_dim, width) */
    const float* qkv_scale;
    const float* qkv_bias;  /* biases and layer scales: or NULL */
    const int8_t* attn_out; /* (width, heads · head_dim) */
    const float* attn_out_scale;
    const float* attn_out_bias;
    const float* layer_scale1; /* (width) */
    const int8_t* fc1;         /* (hidden, width) */
    const float* fc1_scale;
    const float* fc1_bias;
    const int8_t* fc2; /* (width, hidden) */
    const float* fc2_scale;
    const float* fc2_bias;
    const float* layer_scale2; /* (width) */
    int64_t width, heads, head_dim, hidden;
    float eps1, eps2, logit_scale;
    float qkv_delta, attn_out_delta, fc1_delta; /* of the layer's input */
    int32_t activation;                         /* enum vqvit_activation */
    int32_t qkv_layout, attn_out_layout, fc1_layout, fc2_layout; /* enum vqvit_layout */
    int32_t attn_out_groups, fc2_groups; /* 0 or 1: a scale for each 128 columns of the layer's input; no delta then */
} vqvit_encoder_block;

/* int8_encoder_block: x (batch, tokens, width) and out (batch, leading_tokens, width) of dtype; out may be x if all tokens
 * lead. */
VQVIT_EXPORT int vqvit_cpu_int8_encoder_block(
    const vqvit_encoder_block* block, const void* x, int dtype, int64_t batch, int64_t tokens, int64_t leading_tokens,
    void* out, int threads);

/* CUDA: library ------------------------------------------------------------------------------------------------- */

VQVIT_EXPORT const char* vqvit_cuda_source_hash(void);

/* What the calling thread's last VQVIT_CUDA_ERROR was. */
VQVIT_EXPORT const char* vqvit_cuda_last_error(void);

/* CUDA: row-wise ops; results as of their CPU namesakes ---------------------------------------------------------- */

/* x (rows, k) of dtype, rows x_stride apart; the others as in vqvit_cpu_quantize. */
VQVIT_EXPORT int vqvit_cuda_quantize(
    const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const float* equalizer,
    const float* static_scale, float delta, int symmetric, int8_t* codes, float* scale, int32_t* zero_point,
    int32_t* row_sum, void* stream);

/* quantize_per_group: codes (rows, k), scale (rows, ceil(k/128)). */
VQVIT_EXPORT int vqvit_cuda_quantize_per_group(
    const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const float* equalizer, int8_t* codes,
    float* scale, void* stream);

VQVIT_EXPORT int vqvit_cuda_quantize_residual(
    const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const int8_t* codes, const float* scale,
    int8_t* residual_codes, void* stream);

/* layer_norm: y (rows, k) of dtype; weight and bias (k) of their own dtypes. */
VQVIT_EXPORT int vqvit_cuda_layer_norm(
    const void* x, int dtype, int64_t x_stride, const void* weight, int weight_dtype, const void* bias, int bias_dtype,
    int64_t rows, int64_t k, float eps, int paper, void* y, void* stream);

/* layernorm_quantize (residual and residual_stream NULL) and add_layernorm_quantize. weight, bias and layer_scale (k) of
 * their own dtypes; residual rows residual_stride apart. */
VQVIT_EXPORT int vqvit_cuda_layernorm_quantize(
    const void* x, int dtype, int64_t x_stride, const void* residual, int residual_dtype, int64_t residual_stride,
    const void* layer_scale, int layer_scale_dtype, const void* weight, int weight_dtype, const void* bias,
    int bias_dtype, int64_t rows, int64_t k, float eps, int paper, float delta, const float* static_scale,
    int8_t* codes, float* scale, int32_t* row_sum, void* residual_stream, void* stream);

/* strides: of the four dimensions of pixels, in elements. */
VQVIT_EXPORT int vqvit_cuda_patchify_quantize(
    const void* pixels, int dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
    const int64_t* strides, int64_t patch_height, int64_t patch_width, const float* equalizer, int8_t* codes,
    float* scale, void* stream);

/* qkv (batch, tokens, 3 · heads · head_dim) of dtype with strides batch_stride, token_stride, 1. */
VQVIT_EXPORT int vqvit_cuda_quantize_qkv(
    const void* qkv, int dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int64_t batch_stride,
    int64_t token_stride, int8_t* q, int8_t* k, int8_t* v, float* q_scale, float* k_scale, float* v_scale,
    void* stream);

/* The v part alone: v (batch, tokens, heads, head_dim) fp32, contiguous. */
VQVIT_EXPORT int vqvit_cuda_quantize_values(
    const float* v, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int8_t* codes, float* scale,
    void* stream);

/* CUDA: GEMM ---------------------------------------------------------------------------------------------------- */

VQVIT_EXPORT int vqvit_cuda_int8_mm(const vqvit_gemm* gemm, int32_t* acc, void* stream);

VQVIT_EXPORT int vqvit_cuda_int8_linear(const vqvit_gemm* gemm, void* y, int dtype, void* stream);

/* Static codes with out_scale (1): scale (m), row_sum (m) or NULL. Codes by group without it: scale (m, ceil(n/128)),
 * row_sum NULL. */
VQVIT_EXPORT int vqvit_cuda_int8_linear_quantize(
    const vqvit_gemm* gemm, const float* out_scale, int8_t* codes, float* scale, int32_t* row_sum, void* stream);

/* The projection's q and k as codes (2, images, heads, tokens, head_dim) with scale (2, images, heads, tokens), its v as
 * fp32 (images, tokens, heads, head_dim); m = images · tokens, n = 3 · heads · head_dim, head_dim 32, 64 or 128. */
VQVIT_EXPORT int vqvit_cuda_int8_linear_qkv(
    const vqvit_gemm* gemm, int64_t tokens, int64_t heads, int8_t* codes, float* scale, float* v, void* stream);

VQVIT_EXPORT int vqvit_cuda_int8_linear_compensated(
    const vqvit_gemm* gemm, const int8_t* a_residual, const int8_t* b_residual, int terms, float first_order,
    float second_order, void* y, int dtype, void* stream);

/* CUDA: attention; operands as of vqvit_cpu_int8_attention ------------------------------------------------------- */

VQVIT_EXPORT int vqvit_cuda_int8_attention(
    const int8_t* q, const int8_t* k, const int8_t* v, const float* q_scale, const float* k_scale,
    const float* v_scale, float logit_scale, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
    int64_t head_dim, void* out, int dtype, void* stream);

/* int8_attention_quantize: codes (batch · queries, heads · head_dim), scale (batch · queries,
 * ceil(heads · head_dim / 128)); head_dim 64, or 128 and at most 208 keys. */
VQVIT_EXPORT int vqvit_cuda_int8_attention_quantize(
    const int8_t* q, const int8_t* k, const int8_t* v, const float* q_scale, const float* k_scale,
    const float* v_scale, float logit_scale, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
    int64_t head_dim, int8_t* codes, float* scale, void* stream);

#ifdef __cplusplus
}
#endif

#endif
