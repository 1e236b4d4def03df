// What the drivers (isa-neutral: blocking, threads, C ABI) ask of an instruction set: one table of functions, each
// doing one task of an op on the calling thread. kernels_<isa>.cpp fill the tables from the same templates.
#pragma once

#include <cstdint>

#include "constants.h"
#include "vqvit.h"

namespace vqvit {

constexpr int kPanel = 64;   // output channels of a packed panel
constexpr int kKGroup = 4;   // input channels that one VNNI lane multiplies and sums
constexpr int64_t kGroupBytes = int64_t{kPanel} * kKGroup;
constexpr int64_t kLineBytes = 64;  // of a cache

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Bytes of a panel for k input channels: its groups and the group of column sums.
inline int64_t panel_bytes(int64_t k) { return (ceil_div(k, kKGroup) + 1) * kGroupBytes; }

inline bool known_dtype(int dtype) { return dtype >= VQVIT_F32 && dtype <= VQVIT_BF16; }

inline bool known_activation(int activation) { return activation >= VQVIT_NONE && activation <= VQVIT_RELU; }

inline bool known_layout(int layout) { return layout >= VQVIT_ROWS && layout <= VQVIT_STRIPS; }

// How rows of codes come out of a quantizer.
struct Codes {
    int8_t* codes;              // (rows, k)
    float* scale;               // (rows)
    int32_t* zero_point;        // (rows), if asymmetric
    int32_t* row_sum;           // (rows) or NULL
    const float* static_scale;  // (1), or NULL: per token
    float delta;
    bool symmetric;
};

struct QuantizeRows {
    const void* x;  // (rows, k) of dtype, rows x_stride apart
    int dtype;
    int64_t x_stride, k;
    const float* equalizer;  // (k) or NULL
    int activation;          // of fp32 x without an equalizer, before it is quantized: enum vqvit_activation
    Codes out;
};

// Each kGroup columns of a row with a scale of their own.
struct QuantizeGroups {
    const void* x;  // (rows, k) of dtype
    int dtype;
    int64_t x_stride, k;
    const float* equalizer;  // (k) or NULL
    int8_t* codes;           // (rows, k)
    float* scale;            // (rows, ⌈k / kGroup⌉)
    int64_t codes_stride, scale_stride;
};

struct QuantizeResidual {
    const void* x;
    int dtype;
    int64_t k;
    const int8_t* codes;
    const float* scale;
    int8_t* residual_codes;
};

struct LayerNormRows {
    const void* x;  // (rows, k) of dtype
    int dtype;
    const void* residual;  // (rows, k) of residual_dtype or NULL
    int residual_dtype;
    const float* layer_scale;  // (k) or NULL
    const float* weight;       // (k)
    const float* bias;         // (k)
    int64_t k;
    float eps;
    bool paper;
    Codes out;
    void* stream;      // (rows, k) of residual_dtype, if there is a residual
    void* normalized;  // (rows, k) of dtype in place of codes, or NULL
};

struct Patchify {
    const void* pixels;  // (batch, channels, height, width) of dtype
    int dtype;
    int64_t channels, height, width, patch_height, patch_width;
    const float* equalizer;
    Codes out;
};

enum class Store { kInt32, kFloat, kStaticCodes, kRowCodes };

// A weight as tiles read it: in panels, or where `Kernels::pack_strips` is not NULL in strips; the other is NULL.
struct PackedWeight {
    const int8_t* panels;
    const int8_t* strips;
};

// A GEMM whose weights are packed, and where its tiles go.
struct GemmTask {
    vqvit_gemm gemm;
    PackedWeight weight;       // gemm.b
    const int8_t* a_residual;  // compensated only: second operands, or NULL
    PackedWeight weight_residual;
    int terms;  // bit set of vqvit_cpu_int8_linear_compensated; 0: a plain GEMM
    float first_order, second_order;
    Store store;
    void* out;  // (m, n) int32, dtype or int8
    int dtype;
    int64_t out_stride;
    const float* static_scale;  // kStaticCodes
    float* scale;               // kStaticCodes: holds *static_scale before the tiles run; poisoned rows become NaN
                                // kRowCodes: (m), written
    int32_t* row_sum;           // kStaticCodes: zeroed before the tiles run, or NULL
};

// Codes of one head of q or k (a scale per token) or of v (a scale per channel).
struct HeadTask {
    const void* x;  // (tokens, head_dim) of dtype, rows x_stride apart
    int dtype;
    int64_t x_stride, tokens, head_dim;
    int8_t* codes;  // (tokens, head_dim)
    float* scale;   // (tokens), or (head_dim) by channel
    bool by_channel;
};

// Attention's operands, as vqvit_cpu_quantize_qkv writes them; q for the first `queries` tokens alone.
struct Qkv {
    int64_t tokens, queries, heads, head_dim;
    int8_t* codes[3];  // q, k, v (batch, heads, queries or tokens, head_dim)
    float* scale[3];   // q, k (batch, heads, queries or tokens), v (batch, heads, head_dim)

    // Tokens [first, first + count) of one head, from x; a head of v needs all of its tokens.
    HeadTask head(
        int part, int64_t image, int64_t head, int64_t first, int64_t count, const void* x, int dtype,
        int64_t x_stride) const {
        const int64_t bh = image * heads + head, row = bh * (part == 0 ? queries : tokens) + first;
        const int64_t scales = part == 2 ? bh * head_dim : row;
        int8_t* target = codes[part] + row * head_dim;
        return {x, dtype, x_stride, count, head_dim, target, scale[part] + scales, part == 2};
    }
};

// int8_linear_qkv (gemm_s8.cpp).
void project_qkv(const vqvit_gemm& gemm, const Qkv& out, int threads);

struct AttentionTask {
    const int8_t *q, *k, *v;
    const float *q_scale, *k_scale, *v_scale;
    float logit_scale;
    int64_t heads, queries, keys, head_dim;
    void* out;  // (batch, queries, heads · head_dim) of dtype
    int dtype;
};

// The head whose keys and values lie in this thread's scratch; -1: none of this call's.
struct LoadedHead {
    int64_t index = -1;  // batch · heads + head
    bool finite_keys = false;
    float k_scale_absmax = 0.0f;
};

// Rows of a, and of its residual if compensated, as the tiles of an instruction set read them.
struct TileRows {
    const uint8_t* a;
    const uint8_t* a_residual;
    int64_t stride;
};

struct Kernels {
    const char* name;
    bool (*supported)();
    int64_t tile_rows;  // rows that a GEMM tile computes at once
    bool reads_s8;      // a tile takes rows of codes that are whole groups without preparation

    void (*quantize_rows)(const QuantizeRows&, int64_t first, int64_t last);
    void (*quantize_groups)(const QuantizeGroups&, int64_t first, int64_t last);
    void (*quantize_residual)(const QuantizeResidual&, int64_t first, int64_t last);
    void (*layernorm_rows)(const LayerNormRows&, int64_t first, int64_t last);
    void (*patchify_rows)(const Patchify&, int64_t first, int64_t last);

    void (*pack_panel)(const int8_t* b, int64_t b_stride, int64_t columns, int64_t k, int8_t* panel);
    // Rows [first, last) of a, (·, k) with a_stride, as the tiles read them: row_bytes(k) for each row of whole tiles.
    // `for_strips`: of weights in strips.
    int64_t (*row_bytes)(int64_t k);
    void (*prepare_a)(
        const int8_t* a, int64_t a_stride, int64_t k, int64_t first, int64_t last, bool for_strips, void* prepared);
    // The strips (strips.h) of a panel, if GEMMs are faster with them, else NULL.
    void (*pack_strips)(const int8_t* panel, int64_t k, int8_t* strips);
    // Rows [first, last) of one panel; `rows` starts at the first.
    void (*gemm_panel)(const GemmTask&, int64_t first, int64_t last, int64_t panel, const TileRows& rows);

    void (*quantize_head)(const HeadTask&);
    // Queries [first, last) of one head.
    void (*attention_head)(
        const AttentionTask&, int64_t batch, int64_t head, int64_t first, int64_t last, LoadedHead& loaded);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512VnniKernels;
#endif

// The table that is in use now.
const Kernels& kernels();

}  // namespace vqvit
