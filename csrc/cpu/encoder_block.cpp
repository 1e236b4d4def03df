// int8_encoder_block: the ops of a block one after the other, with everything between them in one planned scratch.
#include <algorithm>

#include "kernels.h"
#include "scratch.h"

namespace vqvit {
namespace {

int64_t scales_of_row(int32_t groups, int64_t columns) { return groups != 0 ? ceil_div(columns, kGroup) : 1; }

// What lives between the ops. Codes of the two halves of the block share memory.
struct BlockScratch {
    int8_t* codes;  // (rows, max(width, heads · head_dim)): input of qkv, attn_out and fc1
    float* scale;   // (rows), or with attn_out_groups (rows, ceil(heads · head_dim / 128))
    // Attention
    int8_t* qkv[3];         // (batch, heads, tokens, head_dim)
    float* qkv_scale[3];    // (batch, heads, tokens) twice, (batch, heads, head_dim)
    void* attended;         // (rows, heads · head_dim) of `attended_dtype`
    // MLP
    int8_t* hidden;       // (rows, hidden)
    float* hidden_scale;  // (rows), or with fc2_groups (rows, ceil(hidden / 128))

    BlockScratch(const vqvit_encoder_block& b, int64_t batch, int64_t tokens, int attended_dtype) {
        constexpr int64_t kFloat = sizeof(float);
        const int64_t rows = batch * tokens, inner = b.heads * b.head_dim;
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
        for (int part = 0; part < 3; ++part) {
            qkv_at[part] = place(rows * inner);
            qkv_scale_at[part] = place(batch * b.heads * (part == 2 ? b.head_dim : tokens) * kFloat);
        }
        const int64_t attended_at = place(rows * inner * (attended_dtype == VQVIT_F32 ? 4 : 2));
        const int64_t attention_bytes = bytes;
        bytes = shared;
        const int64_t hidden_at = place(rows * b.hidden);
        const int64_t hidden_scale_at = place(rows * scales_of_row(b.fc2_groups, b.hidden) * kFloat);

        char* base = static_cast<char*>(scratch(Slot::kBlock, std::max(bytes, attention_bytes)));
        codes = reinterpret_cast<int8_t*>(base + codes_at);
        scale = reinterpret_cast<float*>(base + scale_at);
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
    const BlockScratch s(b, batch, tokens, attended_dtype);

    // out = x + layer_scale1 ∘ attention(LN1(x)) attn_outᵀ
    vqvit_cpu_layernorm_quantize(
        x, dtype, nullptr, dtype, nullptr, b.norm1_weight, b.norm1_bias, rows, b.width, b.eps1, 0, b.qkv_delta, nullptr,
        s.codes, s.scale, nullptr, nullptr, threads);
    const vqvit_gemm qkv = packed_gemm(s.codes, s.scale, 0, b.qkv, b.qkv_scale, b.qkv_bias, rows, 3 * inner, b.width);
    vqvit_cpu_int8_linear_qkv(
        &qkv, tokens, b.heads, s.qkv[0], s.qkv[1], s.qkv[2], s.qkv_scale[0], s.qkv_scale[1], s.qkv_scale[2], threads);
    vqvit_cpu_int8_attention(
        s.qkv[0], s.qkv[1], s.qkv[2], s.qkv_scale[0], s.qkv_scale[1], s.qkv_scale[2], b.logit_scale, batch, b.heads,
        tokens, tokens, b.head_dim, s.attended, attended_dtype, threads);
    if (b.attn_out_groups != 0) {
        vqvit_cpu_quantize_per_group(s.attended, attended_dtype, rows, inner, nullptr, s.codes, s.scale, threads);
    } else {
        vqvit_cpu_quantize(
            s.attended, dtype, rows, inner, nullptr, nullptr, b.attn_out_delta, 1, s.codes, s.scale, nullptr, nullptr,
            threads);
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
