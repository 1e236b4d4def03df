// int8_encoder_block: the ops of a block one after the other, with everything between them in one planned scratch.
#include <algorithm>

#include "kernels.h"
#include "scratch.h"
#include "vmath.h"

namespace vqvit {
namespace {

int64_t scales_of_row(int32_t groups, int64_t columns) { return groups != 0 ? ceil_div(columns, kGroup) : 1; }

// What the first half of the block hands from op to op, codes, q, k, v and attention's output, goes through L2 a few images
// at a time: so many bytes of it a thread. 1 to 2 % of a model at batch 8 on Zen 5.
constexpr int64_t kAttentionBytes = 1200 * 1024;

// What lives between the ops. The halves of the block share memory.
struct BlockScratch {
    int8_t* codes;  // (rows, max(width, heads · head_dim)): input of attn_out and fc1
    float* scale;   // (rows), or with attn_out_groups (rows, ceil(heads · head_dim / 128))
    // Attention of `images` at a time
    int64_t images;
    int8_t* normalized;       // (images · tokens, width): input of qkv
    float* normalized_scale;  // (images · tokens)
    int8_t* qkv[3];           // (images, heads, tokens, head_dim)
    float* qkv_scale[3];      // (images, heads, tokens) twice, (images, heads, head_dim)
    void* attended;           // (images · tokens, heads · head_dim) of `attended_dtype`
    // MLP
    int8_t* hidden;       // (rows, hidden)
    float* hidden_scale;  // (rows), or with fc2_groups (rows, ceil(hidden / 128))

    BlockScratch(
        const vqvit_encoder_block& b, int64_t batch, int64_t tokens, int attended_dtype, int threads) {
        constexpr int64_t kFloat = sizeof(float);
        const int64_t rows = batch * tokens, inner = b.heads * b.head_dim, attended_size = dtype_size(attended_dtype);
        const int64_t image_bytes = tokens * (b.width + inner * (3 + attended_size));
        images = std::min(std::max<int64_t>(threads * kAttentionBytes / image_bytes, 1), batch);
        int64_t bytes = 0;
        const auto place = [&](int64_t size) {
            const int64_t offset = bytes;
            bytes += round_up(size, kLineBytes);
            return offset;
        };
        const int64_t codes_at = place(rows * std::max(b.width, inner));
        const int64_t scale_at = place(rows * scales_of_row(b.attn_out_groups, inner) * kFloat);
        const int64_t shared = bytes;
        int64_t qkv_at[3], qkv_scale_at[3];
        const int64_t normalized_at = place(images * tokens * b.width);
        const int64_t normalized_scale_at = place(images * tokens * kFloat);
        for (int part = 0; part < 3; ++part) {
            qkv_at[part] = place(images * tokens * inner);
            qkv_scale_at[part] = place(images * b.heads * (part == 2 ? b.head_dim : tokens) * kFloat);
        }
        const int64_t attended_at = place(images * tokens * inner * attended_size);
        const int64_t attention_bytes = bytes;
        bytes = shared;
        const int64_t hidden_at = place(rows * b.hidden);
        const int64_t hidden_scale_at = place(rows * scales_of_row(b.fc2_groups, b.hidden) * kFloat);

        char* base = static_cast<char*>(scratch(Slot::kBlock, std::max(bytes, attention_bytes)));
        codes = reinterpret_cast<int8_t*>(base + codes_at);
        scale = reinterpret_cast<float*>(base + scale_at);
        normalized = reinterpret_cast<int8_t*>(base + normalized_at);
        normalized_scale = reinterpret_cast<float*>(base + normalized_scale_at);
        for (int part = 0; part < 3; ++part) {
            qkv[part] = reinterpret_cast<int8_t*>(base + qkv_at[part]);
            qkv_scale[part] = reinterpret_cast<float*>(base + qkv_scale_at[part]);
        }
        attended = base + attended_at;
        hidden = reinterpret_cast<int8_t*>(base + hidden_at);
        hidden_scale = reinterpret_cast<float*>(base + hidden_scale_at);
    }
};

vqvit_gemm packed_gemm(
    const int8_t* a, const float* a_scale, int32_t a_groups, const int8_t* b, const float* b_scale, const float* bias,
    int64_t m, int64_t n, int64_t k) {
    vqvit_gemm g = {};
    g.a = a;
    g.a_scale = a_scale;
    g.a_groups = a_groups;
    g.b = b;
    g.b_scale = b_scale;
    g.bias = bias;
    g.m = m;
    g.n = n;
    g.k = k;
    g.a_stride = k;
    g.b_packed = 1;
    return g;
}

// Codes and scales of attention's output for `images` from `first` on: LN1, qkv, attention.
void attend(
    const vqvit_encoder_block& b, const BlockScratch& s, const void* x, int dtype, int attended_dtype, int64_t first,
    int64_t images, int64_t tokens, int threads) {
    const int64_t rows = images * tokens, inner = b.heads * b.head_dim, first_row = first * tokens;
    const char* source = static_cast<const char*>(x) + first_row * b.width * dtype_size(dtype);
    int8_t* codes = s.codes + first_row * inner;
    float* scale = s.scale + first_row * scales_of_row(b.attn_out_groups, inner);

    vqvit_cpu_layernorm_quantize(
        source, dtype, nullptr, dtype, nullptr, b.norm1_weight, b.norm1_bias, rows, b.width, b.eps1, 0, b.qkv_delta,
        nullptr, s.normalized, s.normalized_scale, nullptr, nullptr, threads);
    const vqvit_gemm qkv =
        packed_gemm(s.normalized, s.normalized_scale, 0, b.qkv, b.qkv_scale, b.qkv_bias, rows, 3 * inner, b.width);
    vqvit_cpu_int8_linear_qkv(
        &qkv, tokens, b.heads, s.qkv[0], s.qkv[1], s.qkv[2], s.qkv_scale[0], s.qkv_scale[1], s.qkv_scale[2], threads);
    vqvit_cpu_int8_attention(
        s.qkv[0], s.qkv[1], s.qkv[2], s.qkv_scale[0], s.qkv_scale[1], s.qkv_scale[2], b.logit_scale, images, b.heads,
        tokens, tokens, b.head_dim, s.attended, attended_dtype, threads);
    if (b.attn_out_groups != 0) {
        vqvit_cpu_quantize_per_group(s.attended, attended_dtype, rows, inner, nullptr, codes, scale, threads);
    } else {
        vqvit_cpu_quantize(
            s.attended, dtype, rows, inner, nullptr, nullptr, b.attn_out_delta, 1, codes, scale, nullptr, nullptr,
            threads);
    }
}

}  // namespace
}  // namespace vqvit

using namespace vqvit;

extern "C" int vqvit_cpu_int8_encoder_block(
    const vqvit_encoder_block* block, const void* x, int dtype, int64_t batch, int64_t tokens, void* out,
    int threads) {
    const vqvit_encoder_block& b = *block;
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (!known_activation(b.activation)) return VQVIT_UNKNOWN_ACTIVATION;
    const int64_t rows = batch * tokens, inner = b.heads * b.head_dim;
    if (rows == 0) return VQVIT_OK;
    const int attended_dtype = b.attn_out_groups != 0 ? VQVIT_F32 : dtype;
    const BlockScratch s(b, batch, tokens, attended_dtype, threads);

    // out = x + layer_scale1 ∘ attention(LN1(x)) attn_outᵀ
    for (int64_t i = 0; i < batch; i += s.images) {
        attend(b, s, x, dtype, attended_dtype, i, std::min(s.images, batch - i), tokens, threads);
    }
    vqvit_gemm attn_out = packed_gemm(
        s.codes, s.scale, b.attn_out_groups, b.attn_out, b.attn_out_scale, b.attn_out_bias, rows, b.width, inner);
    attn_out.layer_scale = b.layer_scale1;
    attn_out.residual = x;
    attn_out.residual_dtype = dtype;
    vqvit_cpu_int8_linear(&attn_out, out, dtype, threads);

    // out += layer_scale2 ∘ act(LN2(out) fc1ᵀ) fc2ᵀ
    vqvit_cpu_layernorm_quantize(
        out, dtype, nullptr, dtype, nullptr, b.norm2_weight, b.norm2_bias, rows, b.width, b.eps2, 0, b.fc1_delta,
        nullptr, s.codes, s.scale, nullptr, nullptr, threads);
    vqvit_gemm fc1 = packed_gemm(s.codes, s.scale, 0, b.fc1, b.fc1_scale, b.fc1_bias, rows, b.hidden, b.width);
    fc1.activation = b.activation;
    vqvit_cpu_int8_linear_quantize(
        &fc1, nullptr, 1, b.fc2_groups, s.hidden, s.hidden_scale, nullptr, nullptr, threads);
    vqvit_gemm fc2 = packed_gemm(
        s.hidden, s.hidden_scale, b.fc2_groups, b.fc2, b.fc2_scale, b.fc2_bias, rows, b.width, b.hidden);
    fc2.layer_scale = b.layer_scale2;
    fc2.residual = out;
    fc2.residual_dtype = dtype;
    vqvit_cpu_int8_linear(&fc2, out, dtype, threads);
    return VQVIT_OK;
}
