// Attention's operands as int8 codes: q and k with a scale for each token of a head, v with one for each channel of a
// head over its tokens. qkv (B, S, 3 H D) -> q, k, v (B, H, S, D).
//
// Bytes of an element: input size + 1. v is read once if it has at most 256 tokens (1024 in small batches), else twice,
// the second time from L1 or L2. About 8 operations an element.
// Grid: q and k: rows of D channels in the order of the codes (rows.h); v: (blocks of columns, images).
#include "divisor.h"
#include "quantize_rows.h"

namespace vqvit {
namespace {

// Row m of q or k is (image, head, token) in raster order.
struct HeadTokens {
    const void* x;  // that of the first head of the first token
    int dtype;
    Divisor tokens, heads;
    int64_t head_dim, batch_stride, token_stride;

    static constexpr bool kPlain = true;

    template <int E>
    VQVIT_DEVICE void load(int64_t row, int64_t first, const Tile& tile, float (&v)[E]) const {
        const auto index = static_cast<uint32_t>(row);
        const uint32_t image_head = tokens.quotient(index), image = heads.quotient(image_head);
        const uint32_t token = index - image_head * tokens.divisor, head = image_head - image * heads.divisor;
        const int64_t offset = image * batch_stride + token * token_stride + head * head_dim + first;
        with_dtype(x, dtype, [&](const auto* p) {
            load_tile([=](int column) { return p + offset + column; }, tile, v);
        });
    }
};

// ---- v --------------------------------------------------------------------------------------------------------------

constexpr int kQuad = 4, kValueThreads = 256, kValueWarps = kValueThreads / kWarp, kSteps = 8;

struct Values {
    const void* v;  // (batch, tokens, columns) with columns = heads · head_dim
    int dtype;
    int64_t tokens, columns;
    Divisor head_dim;
    int64_t batch_stride, token_stride;
    int lane_bits;  // of the number of lanes, the threads of a token; a block has 4 · lanes columns
    int8_t* codes;
    float* scale;

    VQVIT_HOST_DEVICE int lanes() const { return 1 << lane_bits; }
    VQVIT_DEVICE int tokens_of_step() const { return kValueThreads >> lane_bits; }
};

// The columns of a thread, and where the codes of the first token go. `Vector`: neighbours in one head, else `lanes`
// apart.
template <bool Vector>
struct ValueColumns {
    int64_t first, column[kQuad], codes[kQuad];
    bool inside[kQuad];

    VQVIT_DEVICE explicit ValueColumns(const Values& op) {
        const int lane = thread_id() & (op.lanes() - 1);
        first = block_x() * op.lanes() * kQuad;
        VQVIT_UNROLL
        for (int j = 0; j < kQuad; ++j) {
            column[j] = first + (Vector ? lane * kQuad + j : j * op.lanes() + lane);
            inside[j] = column[j] < op.columns;
            const uint32_t channel = op.head_dim.remainder(static_cast<uint32_t>(column[j]));
            codes[j] = (block_y() * op.columns + column[j] - channel) * op.tokens + channel;
        }
    }
};

// x[i] = the thread's columns of token first + i · (tokens of a step), 0 outside.
template <bool Vector>
VQVIT_DEVICE void load_values(
    const Values& op, const ValueColumns<Vector>& at, int64_t first, float (&x)[kSteps][kQuad]) {
    const int64_t step = op.tokens_of_step();
    with_dtype(op.v, op.dtype, [&](const auto* p) {
        using T = std::remove_cv_t<std::remove_reference_t<decltype(*p)>>;
        p += block_y() * op.batch_stride;
        if (Vector) {
            Pack<T, kQuad> packs[kSteps];
            VQVIT_UNROLL
            for (int i = 0; i < kSteps; ++i) {
                const int64_t token = first + i * step;
                if (at.inside[0] && token < op.tokens) {
                    packs[i] = *reinterpret_cast<const Pack<T, kQuad>*>(p + token * op.token_stride + at.column[0]);
                } else {
                    packs[i] = {};
                }
            }
            VQVIT_UNROLL
            for (int i = 0; i < kSteps; ++i) {
                VQVIT_UNROLL
                for (int j = 0; j < kQuad; ++j) x[i][j] = to_fp32(packs[i].at[j]);
            }
        } else {
            VQVIT_UNROLL
            for (int i = 0; i < kSteps; ++i) {
                VQVIT_UNROLL
                for (int j = 0; j < kQuad; ++j) {
                    const bool inside = at.inside[j] && first + i * step < op.tokens;
                    x[i][j] = inside ? to_fp32(p[(first + i * step) * op.token_stride + at.column[j]]) : 0.0f;
                }
            }
        }
    });
}

// bits[j] = the largest of the block's for that column.
VQVIT_DEVICE void max_over_block(const Values& op, int32_t (&bits)[kQuad]) {
    const int lane = lane_id() & (op.lanes() - 1);
    auto* shared = reinterpret_cast<Pack<int32_t, kQuad>*>(shared_memory());  // (warps, lanes)
    VQVIT_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        if (mask < op.lanes()) break;
        VQVIT_UNROLL
        for (int j = 0; j < kQuad; ++j) {
            const int32_t other = shuffle_xor(bits[j], mask);
            bits[j] = other > bits[j] ? other : bits[j];
        }
    }
    if (lane_id() < op.lanes()) shared[warp_id() * op.lanes() + lane] = {{bits[0], bits[1], bits[2], bits[3]}};
    block_barrier();
    for (int warp = 0; warp < kValueWarps; ++warp) {
        const Pack<int32_t, kQuad> other = shared[warp * op.lanes() + lane];
        VQVIT_UNROLL
        for (int j = 0; j < kQuad; ++j) bits[j] = other.at[j] > bits[j] ? other.at[j] : bits[j];
    }
}

// A block has 4 · lanes columns of one image: their ranges over all tokens, then the codes.
template <bool Vector>
VQVIT_KERNEL(kValueThreads, (Vector ? 2 : 1), quantize_values_kernel, Values op) {
    const ValueColumns<Vector> at(op);
    const int64_t start = thread_id() >> op.lane_bits, tile = int64_t{kSteps} * op.tokens_of_step();
    const bool held = op.tokens <= tile;
    float x[kSteps][kQuad];
    int32_t bits[kQuad] = {};
    for (int64_t first = start; first < op.tokens + start; first += tile) {
        load_values(op, at, first, x);
        VQVIT_UNROLL
        for (int i = 0; i < kSteps; ++i) {
            VQVIT_UNROLL
            for (int j = 0; j < kQuad; ++j) {
                const int32_t magnitude = magnitude_bits(x[i][j]);
                bits[j] = magnitude > bits[j] ? magnitude : bits[j];
            }
        }
    }
    max_over_block(op, bits);

    Encoder encode[kQuad];
    bool finite[kQuad];
    VQVIT_UNROLL
    for (int j = 0; j < kQuad; ++j) {
        const float scale = symmetric_scale(bits[j]);
        finite[j] = scale == scale;
        encode[j] = Encoder::in_range(scale);
        if (start == 0 && at.inside[j]) op.scale[block_y() * op.columns + at.column[j]] = scale;
    }
    for (int64_t first = start; first < op.tokens + start; first += tile) {
        if (!held) load_values(op, at, first, x);
        VQVIT_UNROLL
        for (int i = 0; i < kSteps; ++i) {
            const int64_t token = first + i * op.tokens_of_step();
            if (token >= op.tokens) continue;
            Pack<int8_t, kQuad> q;
            VQVIT_UNROLL
            for (int j = 0; j < kQuad; ++j) q.at[j] = finite[j] ? encode[j](x[i][j]) : int8_t{0};
            if (Vector) {
                int8_t* p = op.codes + at.codes[0] + token * op.head_dim.divisor;
                if (at.inside[0]) *reinterpret_cast<Pack<int8_t, kQuad>*>(p) = q;
            } else {
                VQVIT_UNROLL
                for (int j = 0; j < kQuad; ++j) {
                    if (at.inside[j]) op.codes[at.codes[j] + token * op.head_dim.divisor] = q.at[j];
                }
            }
        }
    }
}

constexpr int kManyLaneBits = 3, kFewLaneBits = 1;  // 32 columns a block (128 bytes of fp32); 8 columns: a sector
constexpr int64_t kFewBlocks = 256;           // two for each multiprocessor

int quantize_values(Values op, int64_t batch, void* stream) {
    const auto blocks = [&](int lane_bits) { return ceil_div(op.columns, kQuad << lane_bits); };
    op.lane_bits = batch * blocks(kManyLaneBits) < kFewBlocks ? kFewLaneBits : kManyLaneBits;
    const int64_t quad = kQuad * bytes_of(op.dtype), element = bytes_of(op.dtype);
    const bool vector = op.head_dim.divisor % kQuad == 0 && aligned(op.v, quad) && aligned(op.codes, kQuad) &&
                        op.batch_stride * element % quad == 0 && op.token_stride * element % quad == 0;
    const int shared = kValueWarps * op.lanes() * kQuad * static_cast<int>(sizeof(int32_t));
    for (int64_t first = 0; first < batch; first += kMaxGridY) {  // images go in grid.y
        const auto images = static_cast<unsigned>(smaller(batch - first, kMaxGridY));
        Values part = op;
        part.v = static_cast<const char*>(op.v) + first * op.batch_stride * element;
        part.codes += first * op.columns * op.tokens;
        part.scale += first * op.columns;
        const Dim3 grid(static_cast<unsigned>(blocks(op.lane_bits)), images);
        const auto run = [&](auto kernel) { return launch(kernel, grid, kValueThreads, shared, stream, part); };
        const int status = vector ? run(quantize_values_kernel<true>) : run(quantize_values_kernel<false>);
        if (status != VQVIT_OK) return status;
    }
    return VQVIT_OK;
}

}  // namespace
}  // namespace vqvit

using namespace vqvit;

extern "C" {

int vqvit_cuda_quantize_qkv(
    const void* qkv, int dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int64_t batch_stride,
    int64_t token_stride, int8_t* q, int8_t* k, int8_t* v, float* q_scale, float* k_scale, float* v_scale,
    void* stream) {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const int64_t columns = heads * head_dim, element = bytes_of(dtype);
    const auto part = [&](int i) -> const void* { return static_cast<const char*>(qkv) + i * columns * element; };
    const auto tokens_of = [&](int i, int8_t* codes, float* scale) {
        HeadTokens source = {
            part(i), dtype, Divisor(tokens), Divisor(heads), head_dim, batch_stride, token_stride};
        const bool vector = vector_rows(part(i), dtype, token_stride) && batch_stride * element % 16 == 0;
        const int64_t rows = heads * tokens;
        return in_parts(batch, rows, [&](int64_t first, int64_t images) {
            source.x = static_cast<const char*>(part(i)) + first * batch_stride * element;
            const Codes out = {
                codes + first * rows * head_dim, scale + first * rows, nullptr, nullptr, nullptr, 0.0f};
            return quantize_rows<1>(source, nullptr, images * rows, head_dim, vector, out, stream);
        });
    };
    if (const int status = tokens_of(0, q, q_scale)) return status;
    if (const int status = tokens_of(1, k, k_scale)) return status;
    const Values op = {
        part(2), dtype, tokens, columns, Divisor(head_dim), batch_stride, token_stride, 0, v, v_scale};
    return quantize_values(op, batch, stream);
}

int vqvit_cuda_quantize_values(
    const float* v, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim, int8_t* codes, float* scale,
    void* stream) {
    const int64_t columns = heads * head_dim;
    const Values op = {
        v, VQVIT_F32, tokens, columns, Divisor(head_dim), tokens * columns, columns, 0, codes, scale};
    return quantize_values(op, batch, stream);
}

}  // extern "C"
