// (Residual add, then) LayerNorm of rows, then codes, or the rows themselves:
//
//   stream = fma(x, layer scale, residual), rounded to residual's dtype
//   y = fma((stream - mean) · rstd, weight, bias),  codes of y per token or static
//
// Bytes of a row: (input size + 1) · k, with the residual (input size + 2 · stream size + 1) · k, of `layer_norm`
// twice the input size · k. Operations of an
// element: about 25, of which the exact sums of mean and variance take 9. A row is read once if it has at most 16384
// columns, else once a pass, from L2.
// Grid: a block of whole rows, or a row (rows.h).
#include "quantize_rows.h"

namespace vqvit {
namespace {

// A vector (k) of any dtype, or null.
struct Channels {
    const void* data;
    int dtype;

    VQVIT_DEVICE void load(int64_t first, const Tile& tile, int o, float (&x)[kOctet]) const {
        load_octet(data, dtype, first, tile, o, x);
    }
};

struct LayerNorm {
    Matrix x, residual;  // residual.data may be null
    void* stream;        // (rows, k) of residual's dtype
    Channels layer_scale, weight, bias;
    float eps;
    bool paper;

    // What is normalized, from memory that holds it, once `add_residual` has run.
    VQVIT_DEVICE Matrix sum(int64_t k) const {
        return residual.data == nullptr ? x : Matrix{stream, residual.dtype, k};
    }

    // v = fma(v, layer scale, residual) rounded to the stream's dtype; stored.
    template <int E>
    VQVIT_DEVICE void add_residual(int64_t row, int64_t k, int64_t first, const Tile& tile, float (&v)[E]) const {
        float base[E];
        residual.load(row, first, tile, base);
        if (layer_scale.data == nullptr) {
            VQVIT_UNROLL
            for (int i = 0; i < E; ++i) v[i] = base[i] + v[i];
        } else if (tile.vector) {
            VQVIT_UNROLL
            for (int o = 0; o < E / kOctet; ++o) {
                float factor[kOctet];
                layer_scale.load(first, tile, o, factor);
                VQVIT_UNROLL
                for (int j = 0; j < kOctet; ++j) {
                    const int i = o * kOctet + j;
                    v[i] = fmaf(v[i], factor[j], base[i]);
                }
            }
        } else {  // as for_octets
            VQVIT_NO_UNROLL
            for (int o = 0; o < E / kOctet; ++o) {
                float factor[kOctet];
                layer_scale.load(first, tile, o, factor);
                VQVIT_UNROLL
                for (int j = 0; j < kOctet; ++j) factor[j] = fmaf(v[j], factor[j], base[j]);
                rotate<kOctet>(v, factor);
                rotate<kOctet>(base, factor);
            }
        }
        with_dtype(stream, residual.dtype, [&](auto* p) { round_and_store_tile(p + row * k + first, tile, v); });
    }

    VQVIT_DEVICE float reciprocal_spread(float variance) const {
        return 1.0f / (paper ? sqrtf(variance) + eps : sqrtf(variance + eps));
    }

    // 0 beyond the row, where weight and bias are.
    template <int E>
    VQVIT_DEVICE void normalize(float mean, float rstd, int64_t first, const Tile& tile, float (&v)[E]) const {
        for_octets(tile.vector, v, [&](float (&y)[kOctet], int o) {
            float w[kOctet], b[kOctet];
            weight.load(first, tile, o, w);
            bias.load(first, tile, o, b);
            VQVIT_UNROLL
            for (int j = 0; j < kOctet; ++j) y[j] = fmaf((y[j] - mean) * rstd, w[j], b[j]);
        });
    }
};

// (rows, k) of dtype.
struct Normalized {
    void* y;
    int dtype;
};

// A normalized row, which is in x if it is held, else comes from `load`.
template <int E, bool Held, class Load>
VQVIT_DEVICE void finish_row(Row<E, Held>& row, float (&x)[E], const Load& load, const Normalized& out) {
    row.each(x, load, [&](float (&v)[E], int64_t first) {
        with_dtype(out.y, out.dtype, [&](auto* y) {
            round_and_store_tile(y + row.index * row.k + first, row.tile(first), v);
        });
    });
}

template <int E, bool Held, class Load>
VQVIT_DEVICE void finish_row(Row<E, Held>& row, float (&x)[E], const Load& load, Codes out) {
    out.zero_point = nullptr;  // known when compiled
    quantize_row(row, x, load, out);
}

template <int Octets, bool Held, class Out>
VQVIT_KERNEL(Held ? max_team(Octets) : kMaxTeam, 1, layernorm_kernel, LayerNorm op, RowsShape shape, Out out) {
    constexpr int E = Octets * kOctet;
    Row<E, Held> row(shape);
    float x[E];
    const auto add = [&](float (&v)[E], int64_t first) {
        const Tile tile = row.tile(first);
        op.x.load(row.index, first, tile, v);
        if (op.residual.data != nullptr) op.add_residual(row.index, row.k, first, tile, v);
    };
    if (Held) add(x, 0);
    const int32_t absmax_bits = row_absmax_bits(row, x, add);

    const Matrix sum = op.sum(row.k);
    const auto load = [&](float (&v)[E], int64_t first) { sum.load(row.index, first, row.tile(first), v); };
    const Moments moments = row_moments(row, x, load, absmax_bits);
    const float mean = absmax_bits < kInfinityBits ? moments.mean : not_a_number();
    const float rstd = op.reciprocal_spread(moments.variance);

    const auto load_normalized = [&](float (&v)[E], int64_t first) {
        if (!Held) load(v, first);
        op.normalize(mean, rstd, first, row.tile(first), v);
    };
    if (Held) load_normalized(x, 0);
    finish_row(row, x, load_normalized, out);
}

template <class Out>
int layernorm_rows(const LayerNorm& op, int64_t rows, int64_t k, bool vector, const Out& out, void* stream) {
    vector = vector && k % kOctet == 0 && vector_rows(op.x.data, op.x.dtype, op.x.stride) &&
             vector_rows(op.residual.data, op.residual.dtype, op.residual.stride);
    const void* const vectors[] = {op.stream, op.layer_scale.data, op.weight.data, op.bias.data};
    for (const void* p : vectors) vector = vector && aligned(p, 16);
    return launch_rows<4>(rows, k, [&](auto octets, auto held, int threads, Dim3 grid, int block, int shared) {
        const RowsShape shape = {rows, k, threads, vector};
        const auto kernel = layernorm_kernel<decltype(octets)::value, decltype(held)::value, Out>;
        return launch(kernel, grid, block, shared, stream, op, shape, out);
    });
}

}  // namespace
}  // namespace vqvit

using namespace vqvit;

extern "C" int vqvit_cuda_layernorm_quantize(
    const void* x, int dtype, int64_t x_stride, const void* residual, int residual_dtype, int64_t residual_stride,
    const void* layer_scale, int layer_scale_dtype, const void* weight, int weight_dtype, const void* bias,
    int bias_dtype, int64_t rows, int64_t k, float eps, int paper, float delta, const float* static_scale,
    int8_t* codes, float* scale, int32_t* row_sum, void* residual_stream, void* stream) {
    for (const int d : {dtype, residual_dtype, layer_scale_dtype, weight_dtype, bias_dtype}) {
        if (!known_dtype(d)) return VQVIT_UNKNOWN_DTYPE;
    }
    const LayerNorm op = {
        {x, dtype, x_stride}, {residual, residual_dtype, residual_stride}, residual_stream,
        {layer_scale, layer_scale_dtype}, {weight, weight_dtype}, {bias, bias_dtype}, eps, paper != 0};
    const Codes out = {codes, scale, nullptr, row_sum, static_scale, delta};
    return layernorm_rows(op, rows, k, aligned(codes, 8), out, stream);
}

extern "C" int vqvit_cuda_layer_norm(
    const void* x, int dtype, int64_t x_stride, const void* weight, int weight_dtype, const void* bias, int bias_dtype,
    int64_t rows, int64_t k, float eps, int paper, void* y, void* stream) {
    for (const int d : {dtype, weight_dtype, bias_dtype}) {
        if (!known_dtype(d)) return VQVIT_UNKNOWN_DTYPE;
    }
    const LayerNorm op = {
        {x, dtype, x_stride}, {nullptr, dtype, 0}, nullptr, {nullptr, VQVIT_F32}, {weight, weight_dtype},
        {bias, bias_dtype}, eps, paper != 0};
    return layernorm_rows(op, rows, k, aligned(y, 16), Normalized{y, dtype}, stream);
}
