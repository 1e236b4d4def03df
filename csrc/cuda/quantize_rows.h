// Codes of rows, from registers or, in tiles, from memory; the threads that rows get; and the kernel that quantizes the
// rows of a source: a struct whose load(row, first, tile, x) loads the tile that begins at column `first`, and whose
// kPlain says that its rows get symmetric codes of the range alone.
#pragma once

#include "library.h"
#include "rows.h"

namespace vqvit {
namespace {

// clamp(rne(x / scale) + zero_point, -127, 127); NaN becomes the zero point.
struct DividingEncoder {
    float scale;
    int32_t zero_point;

    VQVIT_DEVICE uint32_t byte(float x) const {
        const float quotient = x / scale;
        const int32_t steps = quotient == quotient ? rne_int(fminf(fmaxf(quotient, -512.0f), 512.0f)) : 0;
        const int32_t code = steps + zero_point;  // both ends are beyond the codes for every zero point
        return static_cast<uint32_t>(code < -127 ? -127 : code > 127 ? 127 : code);
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
    const bool asymmetric = !is_static && out.zero_point != nullptr;
    const bool in_range = !is_static && !asymmetric && out.delta == 0.0f;

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

// ---- launches -------------------------------------------------------------------------------------------------------

constexpr int64_t kMaxGridY = 65535;

inline bool vector_rows(const void* p, int dtype, int64_t stride) {
    return aligned(p, 16) && stride * bytes_of(dtype) % 16 == 0;
}

// Below this many rows a row gets as many threads as it has octets: one warp a row would leave most of the 64 warps of
// 108 to 132 multiprocessors empty.
constexpr int64_t kFewRows = 2048;
constexpr int kMaxTeam = 512, kMaxTeamOfOctets = 1024;
constexpr int kReductions = 8;  // most of one row

// Most threads of a row with so many octets a thread: 64 or 128 registers.
constexpr int max_team(int octets) { return octets == 1 ? kMaxTeamOfOctets : kMaxTeam; }

// Threads of a row of so many octets: a power of two of lanes, of which 8 read 128 bytes of half precision, or warps.
inline int64_t team_size(int64_t octets, int per_thread) {
    const int64_t threads = ceil_div(octets, per_thread);
    int lanes = 8;
    while (lanes < kWarp && lanes < threads) lanes *= 2;
    return threads <= kWarp ? lanes : ceil_div(threads, kWarp) * kWarp;
}

struct RowsConfig {
    int octets, threads;  // octets of a thread, threads of a row
    bool held;
};

// Many rows: 3 or 4 octets a thread, whichever leaves fewer columns unused; few reductions, many bytes in flight.
inline RowsConfig rows_config(int64_t rows, int64_t k, int max_octets) {
    const int64_t octets = ceil_div(k, kOctet);
    const auto fits = [&](int per_thread) {
        return per_thread <= max_octets && team_size(octets, per_thread) <= max_team(per_thread);
    };
    const auto held = [&](int per_thread) {
        return RowsConfig{per_thread, static_cast<int>(team_size(octets, per_thread)), true};
    };
    if ((rows < kFewRows || octets <= 8 || max_octets == 1) && fits(1)) return held(1);
    if (fits(3) && (!fits(4) || 3 * team_size(octets, 3) <= 4 * team_size(octets, 4))) return held(3);
    if (fits(4)) return held(4);
    return {1, kMaxTeam, false};
}

// run(octets, held, threads, grid, block, shared bytes) with the first two as std::integral_constant: 1, 3 or 4 octets
// up to MaxOctets.
template <int MaxOctets, class Run>
int launch_rows(int64_t rows, int64_t k, const Run& run) {
    using std::integral_constant;
    const RowsConfig config = rows_config(rows, k, MaxOctets);
    const bool one_warp = config.threads <= kWarp;
    const int block = one_warp ? kRowsBlock : config.threads;
    const Dim3 grid(static_cast<unsigned>(one_warp ? ceil_div(rows, block / config.threads) : rows));
    const auto start = [&](auto octets, auto held) {
        return run(octets, held, config.threads, grid, block, one_warp ? 0 : kReductions * Team::kSlotBytes);
    };
    if (!config.held) return start(integral_constant<int, 1>{}, std::false_type{});
    if constexpr (MaxOctets >= 4) {
        if (config.octets == 4) return start(integral_constant<int, 4>{}, std::true_type{});
    }
    if constexpr (MaxOctets >= 3) {
        if (config.octets == 3) return start(integral_constant<int, 3>{}, std::true_type{});
    }
    return start(integral_constant<int, 1>{}, std::true_type{});
}

// ---- rows of a source -----------------------------------------------------------------------------------------------

template <int Octets, bool Held, class Source>
VQVIT_KERNEL(
    Held ? max_team(Octets) : kMaxTeam, 1, quantize_kernel, Source source, const float* equalizer, RowsShape shape,
    Codes out) {
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

// run(first image, images) for the images of a batch, in parts of less than 2^31 rows, which a Divisor takes; until a
// status is not VQVIT_OK.
template <class Run>
int in_parts(int64_t batch, int64_t rows_of_image, const Run& run) {
    const int64_t most = rows_of_image > 0 ? INT32_MAX / rows_of_image : batch;
    for (int64_t first = 0; first < batch && most > 0; first += most) {
        if (const int status = run(first, smaller(batch - first, most))) return status;
    }
    return VQVIT_OK;
}

// `vector`: whether the source allows vector tiles.
template <int MaxOctets, class Source>
int quantize_rows(
    const Source& source, const float* equalizer, int64_t rows, int64_t k, bool vector, const Codes& out,
    void* stream) {
    vector = vector && k % kOctet == 0 && aligned(equalizer, 16) && aligned(out.codes, 8);
    return launch_rows<MaxOctets>(rows, k, [&](auto octets, auto held, int threads, Dim3 grid, int block, int shared) {
        const RowsShape shape = {rows, k, threads, vector};
        const auto kernel = quantize_kernel<decltype(octets)::value, decltype(held)::value, Source>;
        return launch(kernel, grid, block, shared, stream, source, equalizer, shape, out);
    });
}

}  // namespace
}  // namespace vqvit
