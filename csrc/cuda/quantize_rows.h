// Codes of rows, from registers or, in tiles, from memory; and the kernel that quantizes the rows of a source: a struct
// whose load(row, first, tile, x) loads the tile that begins at column `first`, and whose kPlain says that its rows get
// symmetric codes of the range alone.
#pragma once

#include "rows.h"

namespace vqvit {
namespace {

// clamp(rne(x / scale) + zero_point, -127, 127); NaN becomes the zero point.
struct DividingEncoder {
    float scale;
    int32_t zero_point;

    VQVIT_DEVICE int8_t operator()(float x) const {
        const float quotient = x / scale;
        const int32_t steps = quotient == quotient ? rne_int(fminf(fmaxf(quotient, -512.0f), 512.0f)) : 0;
        const int32_t code = steps + zero_point;  // both ends are beyond the codes for every zero point
        return static_cast<int8_t>(code < -127 ? -127 : code > 127 ? 127 : code);
    }
};

// What is made of rows: codes (rows, k) and a scale each; the others may be null.
struct Codes {
    int8_t* codes;
    float* scale;
    int32_t* zero_point;
    int32_t* row_sum;
    const float* static_scale;
    float delta;
};

// Codes, scale, zero point and sum of a row, which is in x if it is held, else comes from `load`.
template <int E, bool Held, class Load>
VQVIT_DEVICE void quantize_row(Row<E, Held>& row, float (&x)[E], const Load& load, const Codes& out) {
    const int32_t absmax_bits = row_absmax_bits(row, x, load);
    const bool finite = absmax_bits < kInfinityBits, is_static = out.static_scale != nullptr;
    const bool asymmetric = !is_static && out.zero_point != nullptr, in_range = !is_static && !asymmetric && out.delta == 0.0f;

    float scale = 0.0f;
    int32_t zero_point = 0;
    if (is_static) {
        scale = *out.static_scale;
    } else if (asymmetric) {
        float low = 0.0f, high = 0.0f;  // magnitudes on either side of 0
        row.each(x, load, [&](const float (&v)[E], int64_t) {
            VQVIT_UNROLL
            for (int i = 0; i < E; ++i) {
                high = fmaxf(high, v[i]);
                low = fmaxf(low, -v[i]);
            }
        });
        high = row.team.max(high);
        low = row.team.max(low);
        scale = scale_of(high + low, kAsymSteps);
        zero_point = finite ? rne_int(low / scale) - 127 : 0;
    } else {
        float span = from_bits(absmax_bits);
        if (!in_range) span = fmaf(sqrtf(row_moments(row, x, load, absmax_bits).variance), out.delta, span);
        scale = finite ? scale_of(span, kQMax) : not_a_number();
    }

    const StaticEncoder clamping(scale);
    const uint32_t mask = finite || is_static ? ~0u : 0u;
    int32_t sum = 0;
    row.each(x, load, [&](float (&v)[E], int64_t first) {
        uint32_t words[E / 4] = {};
        if (in_range) {
            encode_tile(Encoder::in_range(scale), v, words);
        } else if (asymmetric || clamping.divides) {
            encode_tile_in_loop(DividingEncoder{scale, zero_point}, v, words);
        } else {
            encode_tile(clamping, v, words);
        }
        VQVIT_UNROLL
        for (int i = 0; i < E / 4; ++i) words[i] &= mask;
        if (out.row_sum != nullptr) {
            VQVIT_UNROLL
            for (int i = 0; i < E / 4; ++i) sum += sum_codes(words[i]);
        }
        store_codes(out.codes + row.index * row.k + first, row.tile(first), words);
    });
    if (out.row_sum != nullptr) sum = row.team.sum(sum) - static_cast<int32_t>(row.padding()) * zero_point;
    if (row.inside && row.team.thread == 0) {
        out.scale[row.index] = finite ? scale : not_a_number();
        if (asymmetric) out.zero_point[row.index] = zero_point;
        if (out.row_sum != nullptr) out.row_sum[row.index] = sum;
    }
}

template <int Octets, bool Held, class Source>
VQVIT_KERNEL(Held ? max_team(Octets) : kMaxTeam, 1)
quantize_kernel(Source source, const float* equalizer, RowsShape shape, Codes out) {
    constexpr int E = Octets * kOctet;
    if (Source::kPlain) out = {out.codes, out.scale, nullptr, nullptr, nullptr, 0.0f};  // known when compiled
    Row<E, Held> row(shape);
    float x[E];
    const auto load = [&](float (&v)[E], int64_t first) {
        const Tile tile = row.tile(first);
        source.load(row.index, first, tile, v);
        if (equalizer != nullptr) multiply_columns(equalizer + first, tile, v);
    };
    if (Held) load(x, 0);
    quantize_row(row, x, load, out);
}

// `vector`: whether the source allows vector tiles.
template <int MaxOctets, class Source>
int quantize_rows(
    const Source& source, const float* equalizer, int64_t rows, int64_t k, bool vector, const Codes& out,
    void* stream) {
    vector = vector && k % kOctet == 0 && aligned(equalizer, 16) && aligned(out.codes, 8);
    return launch_rows<MaxOctets>(rows, k, [&](auto octets, auto held, int threads, Dim3 grid, int block, int shared) {
        const RowsShape shape = {rows, k, threads, vector};
        return launch(
            quantize_kernel<decltype(octets)::value, decltype(held)::value, Source>, grid, block, shared, stream, source,
            equalizer, shape, out);
    });
}

}  // namespace
}  // namespace vqvit
