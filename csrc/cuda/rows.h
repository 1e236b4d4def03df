// What the row-wise kernels share: the threads of a row, tiles of it as fp32 in registers, exact statistics, codes.
//
// The `count` threads of a row hold tiles of E · count columns, E registers a thread in octets of 8. In a `vector`
// tile an octet is 8 neighbouring columns: 16-byte loads, 8-byte stores of codes. Else, where an address or k is not a
// multiple of them, its columns lie `count` apart: neighbouring threads still touch neighbouring columns.
// Columns beyond the row are 0 and never loaded or stored; sums subtract what they add (0 has the zero point's code).
#pragma once

#include <type_traits>

#include "numerics.h"

namespace vqvit {

constexpr int kOctet = 8;

VQVIT_HOST_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Drops the first `By` elements and appends those of `last`.
template <int By, class T, int N>
VQVIT_DEVICE void rotate(T (&a)[N], const T (&last)[By]) {
    VQVIT_UNROLL
    for (int i = 0; i + By < N; ++i) a[i] = a[i + By];
    VQVIT_UNROLL
    for (int i = 0; i < By; ++i) a[N - By + i] = last[i];
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// The columns that one thread of `count` holds of a tile with `limit` columns inside the row.
struct Tile {
    int thread, count, limit;
    bool vector;

    VQVIT_DEVICE int octet(int o) const { return (o * count + thread) * kOctet; }
    VQVIT_DEVICE int column(int o, int j) const { return vector ? octet(o) + j : (o * kOctet + j) * count + thread; }
};

// body(octet, o) for the octets of x, unrolled in vector tiles. Elsewhere, which is not the fast path, x moves through
// one octet: a loop keeps the code short.
template <int E, class Body>
VQVIT_DEVICE void for_octets(bool unrolled, float (&x)[E], const Body& body) {
    float octet[kOctet];
    if (unrolled) {
        VQVIT_UNROLL
        for (int o = 0; o < E / kOctet; ++o) {
            VQVIT_UNROLL
            for (int j = 0; j < kOctet; ++j) octet[j] = x[o * kOctet + j];
            body(octet, o);
            VQVIT_UNROLL
            for (int j = 0; j < kOctet; ++j) x[o * kOctet + j] = octet[j];
        }
    } else {
        VQVIT_NO_UNROLL
        for (int o = 0; o < E / kOctet; ++o) {
            VQVIT_UNROLL
            for (int j = 0; j < kOctet; ++j) octet[j] = x[j];
            body(octet, o);
            rotate<kOctet>(x, octet);
        }
    }
}

// body(p as a pointer to the elements that `dtype` names).
template <class Void, class Body>
VQVIT_DEVICE void with_dtype(Void* p, int dtype, const Body& body) {
    constexpr bool constant = std::is_const<Void>::value;
    if (dtype == VQVIT_F32) {
        body(static_cast<std::conditional_t<constant, const float*, float*>>(p));
    } else if (dtype == VQVIT_F16) {
        body(static_cast<std::conditional_t<constant, const Half*, Half*>>(p));
    } else {
        body(static_cast<std::conditional_t<constant, const BFloat16*, BFloat16*>>(p));
    }
}

// Octets of a tile as fp32; `address(column)` points at a column, and in a vector tile at those after it.
template <class Address, int E>
VQVIT_DEVICE void load_tile(const Address& address, const Tile& tile, float (&x)[E], int first_octet = 0) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(address(0))>>;
    constexpr int kPack = 16 / sizeof(T), kPacks = kOctet / kPack;
    if (tile.vector) {
        Pack<T, kPack> packs[E / kPack];
        VQVIT_UNROLL
        for (int i = 0; i < E / kPack; ++i) {  // all loads before the first use
            const int column = tile.octet(first_octet + i / kPacks) + i % kPacks * kPack;
            if (column < tile.limit) {
                packs[i] = *reinterpret_cast<const Pack<T, kPack>*>(address(column));
            } else {
                packs[i] = {};
            }
        }
        VQVIT_UNROLL
        for (int i = 0; i < E; ++i) x[i] = to_fp32(packs[i / kPack].at[i % kPack]);
    } else {
        VQVIT_UNROLL
        for (int i = 0; i < E; ++i) x[i] = 0.0f;
        for_octets(false, x, [&](float (&octet)[kOctet], int o) {
            VQVIT_UNROLL
            for (int j = 0; j < kOctet; ++j) {
                const int column = tile.column(first_octet + o, j);
                octet[j] = column < tile.limit ? to_fp32(*address(column)) : 0.0f;
            }
        });
    }
}

// x · factors, columns of both.
template <int E>
VQVIT_DEVICE void multiply_columns(const float* factors, const Tile& tile, float (&x)[E]) {
    const auto address = [=](int column) { return factors + column; };
    for_octets(tile.vector, x, [&](float (&octet)[kOctet], int o) {
        float f[kOctet];
        load_tile(address, tile, f, o);
        VQVIT_UNROLL
        for (int j = 0; j < kOctet; ++j) octet[j] *= f[j];
    });
}

// Octet `o` of a vector (k) of any dtype.
VQVIT_DEVICE void load_octet(const void* p, int dtype, int64_t first, const Tile& tile, int o, float (&x)[kOctet]) {
    with_dtype(p, dtype, [&](const auto* typed) {
        load_tile([=](int column) { return typed + first + column; }, tile, x, o);
    });
}

// Rounds x to the elements of p, stores them and keeps what was stored.
template <class T, int E>
VQVIT_DEVICE void round_and_store_tile(T* p, const Tile& tile, float (&x)[E]) {
    constexpr int kPack = 16 / sizeof(T);
    for_octets(tile.vector, x, [&](float (&octet)[kOctet], int o) {
        VQVIT_UNROLL
        for (int start = 0; start < kOctet; start += kPack) {
            Pack<T, kPack> pack;
            VQVIT_UNROLL
            for (int j = 0; j < kPack; ++j) {
                pack.at[j] = from_fp32<T>(octet[start + j]);
                octet[start + j] = to_fp32(pack.at[j]);
            }
            if (tile.vector) {
                const int column = tile.octet(o) + start;
                if (column < tile.limit) *reinterpret_cast<Pack<T, kPack>*>(p + column) = pack;
            } else {
                VQVIT_UNROLL
                for (int j = 0; j < kPack; ++j) {
                    const int column = tile.column(o, start + j);
                    if (column < tile.limit) p[column] = pack.at[j];
                }
            }
        }
    });
}

// ---- codes of a tile: words of four ---------------------------------------------------------------------------------

template <class Encode, int E>
VQVIT_DEVICE void encode_tile(const Encode& encode, const float (&x)[E], uint32_t (&words)[E / 4]) {
    VQVIT_UNROLL
    for (int i = 0; i < E / 4; ++i) words[i] = encode_4(encode, x + 4 * i);
}

// The same as a loop, for long encoders.
template <class Encode, int E>
VQVIT_DEVICE void encode_tile_in_loop(const Encode& encode, float (&x)[E], uint32_t (&words)[E / 4]) {
    for_octets(false, x, [&](float (&octet)[kOctet], int) {
        const uint32_t pair[] = {encode_4(encode, octet), encode_4(encode, octet + 4)};
        rotate<2>(words, pair);
    });
}

template <int Words>
VQVIT_DEVICE void store_codes(int8_t* codes, const Tile& tile, uint32_t (&words)[Words]) {
    if (tile.vector) {
        VQVIT_UNROLL
        for (int o = 0; o < Words / 2; ++o) {
            const int column = tile.octet(o);
            const Pack<uint32_t, 2> pair = {{words[2 * o], words[2 * o + 1]}};
            if (column < tile.limit) *reinterpret_cast<Pack<uint32_t, 2>*>(codes + column) = pair;
        }
    } else {
        VQVIT_NO_UNROLL
        for (int o = 0; o < Words / 2; ++o) {
            const uint32_t pair[] = {words[0], words[1]};
            VQVIT_UNROLL
            for (int j = 0; j < kOctet; ++j) {
                const int column = tile.column(o, j);
                if (column < tile.limit) codes[column] = static_cast<int8_t>(pair[j / 4] >> (8 * (j % 4)));
            }
            rotate<2>(words, pair);
        }
    }
}

// A float matrix with rows `stride` apart.
struct Matrix {
    const void* data;
    int dtype;
    int64_t stride;

    static constexpr bool kPlain = false;

    template <int E>
    VQVIT_DEVICE void load(int64_t row, int64_t first, const Tile& tile, float (&x)[E]) const {
        with_dtype(data, dtype, [&](const auto* p) {
            p += row * stride + first;
            load_tile([=](int column) { return p + column; }, tile, x);
        });
    }
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// The threads that share a row: neighbouring lanes of a warp (a power of two of them), or all warps of the block.
struct Team {
    int thread, count;
    unsigned char* slots;  // shared memory of the reductions to come, kSlotBytes each

    static constexpr int kSlotBytes = kWarp * sizeof(int64_t);

    VQVIT_DEVICE explicit Team(int count_)
        : thread(count_ <= kWarp ? thread_id() & (count_ - 1) : thread_id()), count(count_), slots(shared_memory()) {}

    template <class T>
    VQVIT_DEVICE T sum(T value) {
        return reduce(value, [](T a, T b) { return a + b; });
    }
    // Largest of values >= 0.
    template <class T>
    VQVIT_DEVICE T max(T value) {
        return reduce(value, [](T a, T b) { return a < b ? b : a; });
    }

private:
    template <class T, class Operation>
    VQVIT_DEVICE T reduce(T value, const Operation& operation) {
        VQVIT_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
            if (mask < count) value = operation(value, shuffle_xor(value, mask));
        }
        if (count <= kWarp) return value;
        T* slot = reinterpret_cast<T*>(slots);
        slots += kSlotBytes;  // no reduction overwrites another: one barrier each
        if (lane_id() == 0) slot[warp_id()] = value;
        block_barrier();
        value = lane_id() < count / kWarp ? slot[lane_id()] : T{0};
        VQVIT_UNROLL
        for (int mask = kWarp / 2; mask > 0; mask /= 2) value = operation(value, shuffle_xor(value, mask));
        return value;
    }
};

constexpr int kRowsBlock = 128;  // threads of a block whose rows share warps

struct RowsShape {
    int64_t rows, k;
    int threads;  // of a row
    bool vector;
};

// log2 of the threads of a row that shares a warp: 8, 16 or 32 (team_size).
VQVIT_DEVICE int lane_bits(int lanes) { return lanes == 8 ? 3 : lanes == 16 ? 4 : 5; }

// The row of this thread. `Held`: one tile, which stays in registers; else tiles, none of them vector tiles, are loaded
// again in every pass.
template <int E, bool Held>
struct Row {
    Team team;
    int64_t index, k;
    bool inside, vector;

    VQVIT_DEVICE explicit Row(const RowsShape& shape)
        : team(shape.threads),
          index(shape.threads <= kWarp ? (block_x() * kRowsBlock + thread_id()) >> lane_bits(shape.threads) : block_x()),
          k(shape.k), inside(index < shape.rows), vector(Held && shape.vector) {}

    VQVIT_DEVICE int64_t tile_columns() const { return int64_t{E} * team.count; }
    VQVIT_DEVICE Tile tile(int64_t first) const {
        const int limit = inside ? static_cast<int>(smaller(k - first, tile_columns())) : 0;
        return {team.thread, team.count, limit, Held && vector};
    }
    // Columns of the tiles that are not the row's.
    VQVIT_DEVICE int64_t padding() const {
        return Held ? tile_columns() - k : ceil_div(k, tile_columns()) * tile_columns() - k;
    }

    // body(x, first) for the tiles of the row, x being loaded by load(x, first).
    template <class Load, class Body>
    VQVIT_DEVICE void each(float (&x)[E], const Load& load, const Body& body) const {
        if (Held) {
            body(x, int64_t{0});
        } else {
            for (int64_t first = 0; first < k; first += tile_columns()) {
                load(x, first);
                body(x, first);
            }
        }
    }
};

template <int E>
VQVIT_DEVICE int32_t largest_magnitude(const float (&x)[E]) {
    int32_t bits = 0;
    VQVIT_UNROLL
    for (int i = 0; i < E; ++i) bits = magnitude_bits(x[i]) > bits ? magnitude_bits(x[i]) : bits;
    return bits;
}

// Bits of the row's largest magnitude.
template <int E, bool Held, class Load>
VQVIT_DEVICE int32_t row_absmax_bits(Row<E, Held>& row, float (&x)[E], const Load& load) {
    int32_t bits = 0;
    row.each(x, load, [&](const float (&v)[E], int64_t) {
        const int32_t tile_bits = largest_magnitude(v);
        bits = tile_bits > bits ? tile_bits : bits;
    });
    return row.team.max(bits);
}

struct Moments {
    float mean, variance;
};

// Of a row with finite elements: exact sums on its grid. Every column of padding adds the square of the mean.
template <int E, bool Held, class Load>
VQVIT_DEVICE Moments row_moments(Row<E, Held>& row, float (&x)[E], const Load& load, int32_t absmax_bits) {
    const int32_t exponent = grid_exponent(absmax_bits);
    const float per_unit = pow2(kMeanGridBits - exponent);
    uint64_t sum = 0;  // unsigned: a row with NaN or Inf has no sum, and its sums may overflow
    row.each(x, load, [&](const float (&v)[E], int64_t) {
        uint32_t tile_sum = 0;  // E steps of at most 2^21
        VQVIT_UNROLL
        for (int i = 0; i < E; ++i) tile_sum += static_cast<uint32_t>(rne_int(v[i] * per_unit));
        sum += static_cast<uint64_t>(static_cast<int32_t>(tile_sum));
    });
    const float mean = grid_mean(static_cast<int64_t>(row.team.sum(sum)), row.k, exponent, 1);

    const auto squared = [](int64_t steps) { return static_cast<uint64_t>(steps * steps); };
    uint64_t squares = 0;
    row.each(x, load, [&](const float (&v)[E], int64_t) {
        VQVIT_UNROLL
        for (int i = 0; i < E; ++i) squares += squared(rne_int((v[i] - mean) * per_unit));
    });
    const uint64_t padding = static_cast<uint64_t>(row.padding()) * squared(rne_int(mean * per_unit));
    return {mean, grid_mean(static_cast<int64_t>(row.team.sum(squares) - padding), row.k, exponent, 2)};
}

}  // namespace vqvit
