// Quantization of rows to int8 codes: per token (symmetric or with a zero point), static, per group of 128 columns, the
// rows gathered from images, residual codes. Formulas: vqvit/numerics.py.
//
// Bytes of a row: (input size + 1) · k; residual codes (input size + 2) · k. Operations of an element: about 8 per
// token (magnitude, maximum, five for the code, its share of packing), 10 static, 20 with a zero point, which divides,
// and 10 more with δ. A row is read once if it has at most 8192 to 16384 columns, else once a pass, from L2.
// Grid: a block of whole rows, or a row; groups and residual codes: (rows, tiles of a row).
#include "divisor.h"
#include "quantize_rows.h"

namespace vqvit {
namespace {

// ---- images ---------------------------------------------------------------------------------------------------------

// Row m is patch (image, y, x) in raster order, column c pixel (channel, dy, dx) of it.
struct Patches {
    const void* pixels;
    int dtype;
    int64_t image_stride, channel_stride, y_stride, x_stride;
    Divisor grid_height, grid_width, patch_area, patch_height, patch_width;

    static constexpr bool kPlain = true;

    template <int E>
    VQVIT_DEVICE void load(int64_t row, int64_t first, const Tile& tile, float (&x)[E]) const {
        const auto index = static_cast<uint32_t>(row);
        const uint32_t line = grid_width.quotient(index), image = grid_height.quotient(line);
        const int64_t left = int64_t{index - line * grid_width.divisor} * patch_width.divisor;
        const int64_t top = int64_t{line - image * grid_height.divisor} * patch_height.divisor;
        const int64_t corner = image * image_stride + top * y_stride + left * x_stride;
        with_dtype(pixels, dtype, [&](const auto* p) {
            const auto address = [&](int column) {
                const auto c = static_cast<uint32_t>(first + column);
                const uint32_t channel = patch_area.quotient(c), pixel = c - channel * patch_area.divisor;
                const uint32_t dy = patch_width.quotient(pixel), dx = pixel - dy * patch_width.divisor;
                return p + corner + channel * channel_stride + dy * y_stride + dx * x_stride;
            };
            load_tile(address, tile, x);
        });
    }
};

// ---- groups of columns ----------------------------------------------------------------------------------------------

constexpr int kGroupLanes = kGroup / kOctet, kGroupOctets = 3, kGroupThreads = 128;

// 16 lanes hold one group in each of their octets.
template <int Octets>
VQVIT_KERNEL(
    kGroupThreads, 1, quantize_groups_kernel, Matrix x, const float* equalizer, int64_t rows, int64_t k, bool vector,
    int8_t* codes, float* scale) {
    constexpr int E = Octets * kOctet;
    const int lane = thread_id() % kGroupLanes;
    const int64_t row = (block_x() * kGroupThreads + thread_id()) / kGroupLanes, groups = ceil_div(k, kGroup);
    for (int64_t group = block_y() * Octets; group < groups; group += kMaxGridY * Octets) {
        const int64_t first = group * kGroup;
        const int limit = row < rows ? static_cast<int>(smaller(k - first, Octets * kGroup)) : 0;
        const Tile tile = {lane, kGroupLanes, limit, vector};
        float v[E];
        x.load(row, first, tile, v);
        if (equalizer != nullptr) multiply_columns(equalizer + first, tile, v);
        uint32_t words[E / 4];
        for_octets(true, v, [&](float (&octet)[kOctet], int o) {
            const float group_scale = symmetric_scale(group_max<kGroupLanes>(largest_magnitude(octet)));
            const uint32_t mask = group_scale == group_scale ? ~0u : 0u;
            const Encoder encode = Encoder::in_range(group_scale);
            words[2 * o] = encode_4(encode, octet) & mask;
            words[2 * o + 1] = encode_4(encode, octet + 4) & mask;
            if (lane == 0 && o * kGroup < limit) scale[row * groups + group + o] = group_scale;
        });
        store_codes(codes + row * k + first, tile, words);
    }
}

// ---- residual codes -------------------------------------------------------------------------------------------------

constexpr int kResidualOctets = 2, kResidualThreads = 128;

// Octet `o` of codes; 0 beyond the row.
VQVIT_DEVICE Pack<int8_t, kOctet> load_codes(const int8_t* codes, const Tile& tile, int o) {
    Pack<int8_t, kOctet> q = {};
    if (tile.vector) {
        const int column = tile.octet(o);
        if (column < tile.limit) q = *reinterpret_cast<const Pack<int8_t, kOctet>*>(codes + column);
    } else {
        VQVIT_UNROLL
        for (int j = 0; j < kOctet; ++j) {
            const int column = tile.column(o, j);
            if (column < tile.limit) q.at[j] = codes[column];
        }
    }
    return q;
}

// R = rne(254 (x - α q) / α): a warp for a tile of a row.
VQVIT_KERNEL(
    kResidualThreads, 1, quantize_residual_kernel, Matrix x, const int8_t* codes, const float* scale, int64_t rows,
    int64_t k, bool vector, int8_t* residual_codes) {
    constexpr int E = kResidualOctets * kOctet, kColumns = E * kWarp;
    const int64_t row = (block_x() * kResidualThreads + thread_id()) / kWarp;
    if (row >= rows) return;
    const float row_scale = scale[row];
    const StaticEncoder clamping(row_scale);
    for (int64_t first = block_y() * kColumns; first < k; first += kMaxGridY * kColumns) {
        const Tile tile = {lane_id(), kWarp, static_cast<int>(smaller(k - first, kColumns)), vector};
        const int64_t start = row * k + first;
        float v[E];
        x.load(row, first, tile, v);
        for_octets(vector, v, [&](float (&octet)[kOctet], int o) {
            const Pack<int8_t, kOctet> q = load_codes(codes + start, tile, o);
            VQVIT_UNROLL
            for (int j = 0; j < kOctet; ++j) {
                octet[j] = kResidualSteps * (octet[j] - row_scale * small_int_to_fp32(q.at[j]));
            }
        });
        uint32_t words[E / 4] = {};
        if (clamping.divides) {
            encode_tile_in_loop(DividingEncoder{row_scale, 0}, v, words);
        } else {
            encode_tile(clamping, v, words);
        }
        store_codes(residual_codes + start, tile, words);
    }
}

Dim3 tiles_of_rows(int64_t rows, int64_t rows_of_block, int64_t tiles) {
    return {static_cast<unsigned>(ceil_div(rows, rows_of_block)), static_cast<unsigned>(smaller(tiles, kMaxGridY))};
}

}  // namespace
}  // namespace vqvit

using namespace vqvit;

extern "C" {

int vqvit_cuda_quantize(
    const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const float* equalizer,
    const float* static_scale, float delta, int symmetric, int8_t* codes, float* scale, int32_t* zero_point,
    int32_t* row_sum, void* stream) {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const Codes out = {codes, scale, symmetric ? nullptr : zero_point, row_sum, static_scale, delta};
    const Matrix source = {x, dtype, x_stride};
    return quantize_rows<4>(source, equalizer, rows, k, vector_rows(x, dtype, x_stride), out, stream);
}

int vqvit_cuda_patchify_quantize(
    const void* pixels, int dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
    const int64_t* strides, int64_t patch_height, int64_t patch_width, const float* equalizer, int8_t* codes,
    float* scale, void* stream) {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const int64_t grid_height = height / patch_height, grid_width = width / patch_width;
    const int64_t rows_of_image = grid_height * grid_width, k = channels * patch_height * patch_width;
    Patches source = {
        pixels, dtype, strides[0], strides[1], strides[2], strides[3], Divisor(grid_height), Divisor(grid_width),
        Divisor(patch_height * patch_width), Divisor(patch_height), Divisor(patch_width)};
    const bool octets_in_lines = patch_width % kOctet == 0 && strides[3] == 1;
    const bool vector = octets_in_lines && vector_rows(pixels, dtype, strides[0]) &&
                        vector_rows(pixels, dtype, strides[1]) && vector_rows(pixels, dtype, strides[2]);
    return in_parts(batch, rows_of_image, [&](int64_t first, int64_t images) {
        source.pixels = static_cast<const char*>(pixels) + first * strides[0] * bytes_of(dtype);
        const int64_t row = first * rows_of_image;
        const Codes out = {codes + row * k, scale + row, nullptr, nullptr, nullptr, 0.0f};
        return quantize_rows<3>(source, equalizer, images * rows_of_image, k, vector, out, stream);
    });
}

int vqvit_cuda_quantize_per_group(
    const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const float* equalizer, int8_t* codes,
    float* scale, void* stream) {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const bool vector =
        k % kOctet == 0 && vector_rows(x, dtype, x_stride) && aligned(equalizer, 16) && aligned(codes, 8);
    const int64_t groups = ceil_div(k, kGroup), rows_of_block = kGroupThreads / kGroupLanes;
    const auto run = [&](auto kernel, int64_t octets) {
        const Dim3 grid = tiles_of_rows(rows, rows_of_block, ceil_div(groups, octets));
        const Matrix matrix = {x, dtype, x_stride};
        return launch(kernel, grid, kGroupThreads, 0, stream, matrix, equalizer, rows, k, vector, codes, scale);
    };
    if (rows < kFewRows) return run(quantize_groups_kernel<1>, 1);
    return run(quantize_groups_kernel<kGroupOctets>, kGroupOctets);
}

int vqvit_cuda_quantize_residual(
    const void* x, int dtype, int64_t rows, int64_t k, int64_t x_stride, const int8_t* codes, const float* scale,
    int8_t* residual_codes, void* stream) {
    if (!known_dtype(dtype)) return VQVIT_UNKNOWN_DTYPE;
    const bool vector =
        k % kOctet == 0 && vector_rows(x, dtype, x_stride) && aligned(codes, 8) && aligned(residual_codes, 8);
    const int64_t columns = kResidualOctets * kOctet * kWarp;
    const Dim3 grid = tiles_of_rows(rows, kResidualThreads / kWarp, ceil_div(k, columns));
    const Matrix matrix = {x, dtype, x_stride};
    return launch(
        quantize_residual_kernel, grid, kResidualThreads, 0, stream, matrix, codes, scale, rows, k, vector,
        residual_codes);
}

}  // extern "C"
