// int8_encoder_block: the ops of a block one after the other, with everything between them in one planned scratch.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "scratch.h"
#include "vmath.h"

namespace vqvit {
namespace {

// What a call computes: from x (batch, tokens, width) the first `leading` tokens of each image, `rows` in all.
struct BlockCall {
    const vqvit_encoder_block& block;
    const char* x;
    int dtype;
    int64_t batch, tokens, leading;
    int threads;

    int64_t rows() const { return batch * leading; }
    int64_t inner() const { return block.heads * block.head_dim; }
    int64_t row_bytes() const { return block.width * dtype_size(dtype); }
    int attended_dtype() const { return block.attn_out_groups != 0 ? VQVIT_F32 : dtype; }
};

int64_t scales_of_row(int32_t groups, int64_t columns) { return groups != 0 ? ceil_div(columns, kGroup) : 1; }

// What the first half of the block hands from op to op, codes, q, k, v and attention's output, goes through L2 a few
// images at a time: so many bytes of it a thread. 2 to 3 % of a model at batch 16 and 32 on Zen 5, nothing at 8.
constexpr int64_t kAttentionBytes = 1200 * 1024;

// What lives between the ops. The halves of the block share memory.
struct BlockScratch {
    int8_t* codes;  // (rows, max(width, inner)): input of attn_out and fc1
    float* scale;   // (rows), or with attn_out_groups (rows, ceil(inner / 128))
    // Attention of `images` at a time
    int64_t images;
    int8_t* normalized;       // (images · tokens, width): input of qkv
    float* normalized_scale;  // (images · tokens)
    Qkv qkv;                  // of `images`
    void* attended;           // (images · leading, inner) of `attended_dtype`
    // MLP
    int8_t* hidden;       // (rows, hidden)
    float* hidden_scale;  // (rows), or with fc2_groups (rows, ceil(hidden / 128))

    explicit BlockScratch(const BlockCall& c) {
        constexpr int64_t kFloat = sizeof(float);
        const vqvit_encoder_block& b = c.block;
        const int64_t attended_size = dtype_size(c.attended_dtype());
        const int64_t image_bytes = c.tokens * (b.width + c.inner() * (3 + attended_size));
        images = std::min(std::max<int64_t>(c.threads * kAttentionBytes / image_bytes, 1), c.batch);
        int64_t bytes = 0;
        const auto place = [&](int64_t size) {
            const int64_t offset = bytes;
            bytes += round_up(size, kLineBytes);
            return offset;
        };
        const int64_t codes_at = place(c.rows() * std::max(b.width, c.inner()));
        const int64_t scale_at = place(c.rows() * scales_of_row(b.attn_out_groups, c.inner()) * kFloat);
        const int64_t shared = bytes;
        const int64_t normalized_at = place(images * c.tokens * b.width);
        const int64_t normalized_scale_at = place(images * c.tokens * kFloat);
        int64_t qkv_at[3], qkv_scale_at[3];
        for (int part = 0; part < 3; ++part) {
            const int64_t tokens = part == 0 ? c.leading : c.tokens;
            qkv_at[part] = place(images * tokens * c.inner());
            qkv_scale_at[part] = place(images * b.heads * (part == 2 ? b.head_dim : tokens) * kFloat);
        }
        const int64_t attended_at = place(images * c.leading * c.inner() * attended_size);
        const int64_t attention_bytes = bytes;
        bytes = shared;
        const int64_t hidden_at = place(c.rows() * b.hidden);
        const int64_t hidden_scale_at = place(c.rows() * scales_of_row(b.fc2_groups, b.hidden) * kFloat);

        char* base = static_cast<char*>(scratch(Slot::kBlock, std::max(bytes, attention_bytes)));
        const auto codes_from = [&](int64_t at) { return reinterpret_cast<int8_t*>(base + at); };
        const auto scales_from = [&](int64_t at) { return reinterpret_cast<float*>(base + at); };
        codes = codes_from(codes_at);
        scale = scales_from(scale_at);
        normalized = codes_from(normalized_at);
        normalized_scale = scales_from(normalized_scale_at);
        qkv = {c.tokens, c.leading, b.heads, b.head_dim, {}, {}};
        for (int part = 0; part < 3; ++part) {
            qkv.codes[part] = codes_from(qkv_at[part]);
            qkv.scale[part] = scales_from(qkv_scale_at[part]);
        }
        attended = base + attended_at;
        hidden = codes_from(hidden_at);
        hidden_scale = scales_from(hidden_scale_at);
    }
};

// What a layer multiplies by.
struct Layer {
    const int8_t* b;
    int32_t layout;
    const float *scale, *bias;
};

// y (m, n) of a layer and contiguous a (m, k).
vqvit_gemm gemm_of(
    const Layer& layer, const int8_t* a, const float* a_scale, int32_t a_groups, int64_t m, int64_t n, int64_t k) {
    vqvit_gemm g = {};
    g.a = a;
    g.a_scale = a_scale;
    g.a_groups = a_groups;
    g.b = layer.b;
    g.b_layout = layer.layout;
    g.b_scale = layer.scale;
    g.bias = layer.bias;
    g.m = m;
    g.n = n;
    g.k = k;
    g.a_stride = k;
    return g;
}

// Codes and scales of attention's output for `images` from `first` on: LN1, qkv, attention.
void attend(const BlockCall& c, const BlockScratch& s, int64_t first, int64_t images) {
    const vqvit_encoder_block& b = c.block;
    const int64_t rows = images * c.tokens, out_rows = images * c.leading, first_out = first * c.leading;
    int8_t* codes = s.codes + first_out * c.inner();
    float* scale = s.scale + first_out * scales_of_row(b.attn_out_groups, c.inner());

    vqvit_cpu_layernorm_quantize(
        c.x + first * c.tokens * c.row_bytes(), c.dtype, nullptr, c.dtype, nullptr, b.norm1_weight, b.norm1_bias, rows,
        b.width, b.eps1, 0, b.qkv_delta, nullptr, s.normalized, s.normalized_scale, nullptr, nullptr, c.threads);
    const Layer qkv = {b.qkv, b.qkv_layout, b.qkv_scale, b.qkv_bias};
    project_qkv(
        gemm_of(qkv, s.normalized, s.normalized_scale, 0, rows, 3 * c.inner(), b.width), s.qkv, c.threads);
    const auto [q, k, v] = s.qkv.codes;
    const auto [q_scale, k_scale, v_scale] = s.qkv.scale;
    vqvit_cpu_int8_attention(
        q, k, v, q_scale, k_scale, v_scale, b.logit_scale, images, b.heads, c.leading, c.tokens, b.head_dim, s.attended,
        c.attended_dtype(), c.threads);
    if (b.attn_out_groups != 0) {
        vqvit_cpu_quantize_per_group(
            s.attended, c.attended_dtype(), out_rows, c.inner(), nullptr, codes, scale, c.threads);
    } else {
        vqvit_cpu_quantize(
            s.attended, c.attended_dtype(), out_rows, c.inner(), nullptr, nullptr, b.attn_out_delta, 1, codes, scale,
            nullptr, nullptr, c.threads);
    }
}

// What the first half adds to: x itself, or its leading tokens, which go to `out`.
const void* residual_rows(const BlockCall& c, void* out) {
    if (c.leading == c.tokens) return c.x;
    const int64_t bytes = c.leading * c.row_bytes(), stride = c.tokens * c.row_bytes();
    for (int64_t i = 0; i < c.batch; ++i) {
        std::memcpy(static_cast<char*>(out) + i * bytes, c.x + i * stride, static_cast<size_t>(bytes));
    }
    return out;
}

}  // namespace
}  // namespace vqvit

using namespace vqvit;

extern "C" int vqvit_cpu_int8_encoder_block(
    const vqvit_encoder_block* block, const void* x, int dtype, int64_t batch, int64_t tokens, int64_t leading_tokens,
    void* out, int threads) try {
    const vqvit_encoder_block& b = *block;
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    if (!known_activation(b.activation)) return VQVIT_UNKNOWN_ACTIVATION;
    for (const int32_t layout : {b.qkv_layout, b.attn_out_layout, b.fc1_layout, b.fc2_layout}) {
        if (!known_layout(layout)) return VQVIT_UNKNOWN_LAYOUT;
    }
    const BlockCall c = {b, static_cast<const char*>(x), dtype, batch, tokens, leading_tokens, threads};
    if (c.rows() == 0) return VQVIT_OK;
    const BlockScratch s(c);

    // out = x + layer_scale1 ∘ attention(LN1(x)) attn_outᵀ
    for (int64_t i = 0; i < batch; i += s.images) attend(c, s, i, std::min(s.images, batch - i));
    vqvit_gemm attn_out = gemm_of(
        {b.attn_out, b.attn_out_layout, b.attn_out_scale, b.attn_out_bias}, s.codes, s.scale, b.attn_out_groups,
        c.rows(), b.width, c.inner());
    attn_out.layer_scale = b.layer_scale1;
    attn_out.residual = residual_rows(c, out);
    attn_out.residual_dtype = dtype;
    vqvit_cpu_int8_linear(&attn_out, out, dtype, threads);

    // out += layer_scale2 ∘ act(LN2(out) fc1ᵀ) fc2ᵀ
    vqvit_cpu_layernorm_quantize(
        out, dtype, nullptr, dtype, nullptr, b.norm2_weight, b.norm2_bias, c.rows(), b.width, b.eps2, 0, b.fc1_delta,
        nullptr, s.codes, s.scale, nullptr, nullptr, threads);
    vqvit_gemm fc1 = gemm_of(
        {b.fc1, b.fc1_layout, b.fc1_scale, b.fc1_bias}, s.codes, s.scale, 0, c.rows(), b.hidden, b.width);
    fc1.activation = b.activation;
    vqvit_cpu_int8_linear_quantize(
        &fc1, nullptr, 1, b.fc2_groups, s.hidden, s.hidden_scale, nullptr, nullptr, threads);
    vqvit_gemm fc2 = gemm_of(
        {b.fc2, b.fc2_layout, b.fc2_scale, b.fc2_bias}, s.hidden, s.hidden_scale, b.fc2_groups, c.rows(), b.width,
        b.hidden);
    fc2.layer_scale = b.layer_scale2;
    fc2.residual = out;
    fc2.residual_dtype = dtype;
    vqvit_cpu_int8_linear(&fc2, out, dtype, threads);
    return VQVIT_OK;
} VQVIT_CATCH_OUT_OF_MEMORY
