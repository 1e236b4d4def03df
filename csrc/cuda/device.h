// What the kernels of this folder are written in: thread positions, barriers, shuffles, int8 tensor-core products,
// asynchronous copies, float conversions and launches, on a GPU or in the host's twin (twin.h).
//
// Arithmetic is IEEE: nvcc gets -fmad=false, a fused multiply-add is one that says fmaf, and division and square root
// are the correctly rounded ones (vqvit/numerics.py).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define VQVIT_DEVICE __device__ __forceinline__
#define VQVIT_HOST_DEVICE __host__ __device__ __forceinline__
#define VQVIT_KERNEL(threads, blocks, name, ...) __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
#define VQVIT_UNROLL _Pragma("unroll")
#define VQVIT_NO_UNROLL _Pragma("unroll 1")
#define VQVIT_PRAGMA(text) _Pragma(#text)
#define VQVIT_UNROLL_BY(n) VQVIT_PRAGMA(unroll n)
#else
#include "twin.h"
#define VQVIT_DEVICE inline
#define VQVIT_HOST_DEVICE inline
#define VQVIT_KERNEL(threads, blocks, name, ...) void name(twin::Bounds<(threads), (blocks)>, __VA_ARGS__)
#define VQVIT_UNROLL
#define VQVIT_NO_UNROLL
#define VQVIT_UNROLL_BY(n)
#endif

namespace vqvit {

constexpr int kWarp = 32;

VQVIT_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neighbouring elements that are loaded and stored as one.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

// ---- positions, barriers --------------------------------------------------------------------------------------------

#ifdef __CUDACC__
using Dim3 = dim3;
VQVIT_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
VQVIT_DEVICE int64_t block_x() { return blockIdx.x; }
VQVIT_DEVICE int64_t block_y() { return blockIdx.y; }
VQVIT_DEVICE int64_t grid_x() { return gridDim.x; }
VQVIT_DEVICE void block_barrier() { __syncthreads(); }
VQVIT_DEVICE void warp_barrier() { __syncwarp(); }
VQVIT_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return dynamic_shared_memory;
}
#else
VQVIT_DEVICE int thread_id() { return twin::position().thread; }
VQVIT_DEVICE int64_t block_x() { return twin::position().block.x; }
VQVIT_DEVICE int64_t block_y() { return twin::position().block.y; }
VQVIT_DEVICE int64_t grid_x() { return twin::position().blocks.x; }
VQVIT_DEVICE void block_barrier() { twin::barrier(0, twin::position().threads); }
VQVIT_DEVICE void warp_barrier() {
    twin::warp_collective("warp_barrier", nullptr, [](void* const*) {});
}
VQVIT_DEVICE unsigned char* shared_memory() { return twin::shared_memory(); }
#endif

// `x` itself, of which the compiler knows nothing: what is computed from it inside a loop stays inside.
#ifdef __CUDACC__
VQVIT_DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
#else
VQVIT_DEVICE int opaque(int x) { return x; }
#endif

VQVIT_DEVICE int lane_id() { return thread_id() % kWarp; }
VQVIT_DEVICE int warp_id() { return thread_id() / kWarp; }

// ---- shuffles: all lanes of a warp take part ------------------------------------------------------------------------

#ifdef __CUDACC__
template <class T>
VQVIT_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
VQVIT_DEVICE bool warp_any(bool value) { return __any_sync(0xffffffffu, value); }
VQVIT_DEVICE void atomic_add(int32_t* p, int32_t value) { atomicAdd(p, value); }
#else
template <class T>
VQVIT_DEVICE T shuffle_xor(T value, int mask) {
    struct Argument {
        T value, result;
        int mask;
    } argument{value, value, mask};
    twin::warp_collective("shuffle_xor", &argument, [](void* const* lanes) {
        for (int i = 0; i < kWarp; ++i) {
            auto* own = static_cast<Argument*>(lanes[i]);
            own->result = static_cast<const Argument*>(lanes[i ^ own->mask])->value;
        }
    });
    return argument.result;
}
VQVIT_DEVICE bool warp_any(bool value) {
    int any = value;
    twin::warp_collective("warp_any", &any, [](void* const* lanes) {
        int result = 0;
        for (int i = 0; i < kWarp; ++i) result |= *static_cast<const int*>(lanes[i]);
        for (int i = 0; i < kWarp; ++i) *static_cast<int*>(lanes[i]) = result;
    });
    return any != 0;
}
VQVIT_DEVICE void atomic_add(int32_t* p, int32_t value) { *p += value; }
#endif

// Σ and max over groups of `Lanes` neighbouring lanes (a power of two), in every lane. Exact integers only: float sums
// would depend on the order.
template <int Lanes = kWarp, class T>
VQVIT_DEVICE T group_sum(T value) {
    VQVIT_UNROLL
    for (int mask = Lanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}
template <int Lanes = kWarp, class T>
VQVIT_DEVICE T group_max(T value) {
    VQVIT_UNROLL
    for (int mask = Lanes / 2; mask > 0; mask /= 2) {
        const T other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}

// ---- int8 tensor-core products --------------------------------------------------------------------------------------

// d += A Bᵀ for A (16, 32), B (8, 32): lane l of the warp holds, with g = l / 4 and c = l % 4,
//   a[0] = A[g, 4c..4c+3], a[1] = A[g+8, 4c..], a[2] = A[g, 16+4c..], a[3] = A[g+8, 16+4c..],
//   b0 = B[g, 4c..4c+3], b1 = B[g, 16+4c..],  d[0..1] = D[g, 2c..2c+1], d[2..3] = D[g+8, 2c..2c+1].
// A is s8, or u8 if `UnsignedA`; B is s8. On sm_75 it is four products of half the size.
#ifdef __CUDACC__
template <bool UnsignedA = false>
VQVIT_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    if (UnsignedA) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#else
    VQVIT_UNROLL
    for (int i = 0; i < 4; ++i) {  // i & 1: rows g + 8; i / 2: second half of k
        int32_t* half = d + 2 * (i & 1);
        const uint32_t b = i / 2 ? b1 : b0;
        if (UnsignedA) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(half[0]), "+r"(half[1])
                : "r"(a[i]), "r"(b));
        } else {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(half[0]), "+r"(half[1])
                : "r"(a[i]), "r"(b));
        }
    }
#endif
}
#else
template <bool UnsignedA = false>
VQVIT_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Argument {
        int32_t* d;
        uint32_t a[4], b[2];
    } argument{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    twin::warp_collective(UnsignedA ? "mma_u8s8" : "mma_s8", &argument, [](void* const* lanes) {
        const auto lane = [&](int i) { return static_cast<const Argument*>(lanes[i]); };
        int32_t a_rows[16][32], b_rows[8][32];
        const auto unpack = [](int32_t* to, uint32_t word, bool is_unsigned) {
            for (int i = 0; i < 4; ++i) {
                const auto byte = static_cast<uint8_t>(word >> (8 * i));
                to[i] = is_unsigned ? int32_t{byte} : int32_t{static_cast<int8_t>(byte)};
            }
        };
        for (int i = 0; i < kWarp; ++i) {
            const int g = i / 4, c = 4 * (i % 4);
            for (int part = 0; part < 4; ++part) {
                unpack(a_rows[g + part % 2 * 8] + part / 2 * 16 + c, lane(i)->a[part], UnsignedA);
            }
            for (int half = 0; half < 2; ++half) unpack(b_rows[g] + 16 * half + c, lane(i)->b[half], false);
        }
        for (int row = 0; row < 16; ++row) {
            for (int column = 0; column < 8; ++column) {
                int32_t sum = 0;
                for (int k = 0; k < 32; ++k) sum += a_rows[row][k] * b_rows[column][k];
                lane(row % 8 * 4 + column / 2)->d[row / 8 * 2 + column % 2] += sum;
            }
        }
    });
}
#endif

// Four 8 x 16-byte matrices from shared memory, `row` of lane l being row l % 8 of matrix l / 8: r[i] of lane l gets
// bytes 4 (l % 4) ... of row l / 4 of matrix i.
#ifdef __CUDACC__
VQVIT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
VQVIT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#else
VQVIT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    twin::require_shared(row, 16, 16, "row of load_matrices");
    struct Argument {
        uint32_t* r;
        const unsigned char* row;
    } argument{r, static_cast<const unsigned char*>(row)};
    twin::warp_collective("load_matrices", &argument, [](void* const* lanes) {
        for (int i = 0; i < kWarp; ++i) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const auto* source = static_cast<const Argument*>(lanes[matrix * 8 + i / 4]);
                std::memcpy(static_cast<Argument*>(lanes[i])->r + matrix, source->row + i % 4 * 4, 4);
            }
        }
    });
}
#endif

// The same matrices of 8 x 8 pairs of bytes, transposed: r[i] of lane l gets pair l / 4 of row 2 (l % 4) of matrix i in
// its low half, and of the next row in its high half.
#ifdef __CUDACC__
VQVIT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#else
VQVIT_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    twin::require_shared(row, 16, 16, "row of load_matrices_transposed");
    struct Argument {
        uint32_t* r;
        const unsigned char* row;
    } argument{r, static_cast<const unsigned char*>(row)};
    twin::warp_collective("load_matrices_transposed", &argument, [](void* const* lanes) {
        for (int i = 0; i < kWarp * 8; ++i) {  // lane i / 8, matrix i % 8 / 2, half i % 2
            const int matrix = i % 8 / 2, source_row = i / 8 % 4 * 2 + i % 2;
            const auto* source = static_cast<const Argument*>(lanes[matrix * 8 + source_row]);
            auto* half = reinterpret_cast<unsigned char*>(static_cast<Argument*>(lanes[i / 8])->r + matrix) + i % 2 * 2;
            std::memcpy(half, source->row + i / 32 * 2, 2);
        }
    });
}
#endif

// Byte i of the result is byte s of the eight bytes a, b; s is hex digit i of `selector`, the lowest first.
#ifdef __CUDACC__
VQVIT_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
#else
VQVIT_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t{b} << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
#endif

// ---- asynchronous copies to shared memory: 16 bytes each, of which the first `valid` are read, zeros after them -----

#ifdef __CUDACC__
VQVIT_DEVICE void copy_async_16(void* to, const void* from, int valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
#else
    uint4 value = make_uint4(0, 0, 0, 0);
    if (valid > 0) value = *static_cast<const uint4*>(from);  // callers copy whole chunks or none
    *static_cast<uint4*>(to) = value;
#endif
}
// Four bytes, all of them.
VQVIT_DEVICE void copy_async_4(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
    *static_cast<uint32_t*>(to) = *static_cast<const uint32_t*>(from);
#endif
}
VQVIT_DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int GroupsLeft>
VQVIT_DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}
#else
VQVIT_DEVICE void copy_async_16(void* to, const void* from, int valid) { twin::copy_async(to, from, 16, valid); }
VQVIT_DEVICE void copy_async_4(void* to, const void* from) { twin::copy_async(to, from, 4, 4); }
VQVIT_DEVICE void copy_async_commit() { twin::copy_async_commit(); }
template <int GroupsLeft>
VQVIT_DEVICE void copy_async_wait() {
    twin::copy_async_wait(GroupsLeft);
}
#endif

// ---- floats ---------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
using Half = __half;
using BFloat16 = __nv_bfloat16;
VQVIT_DEVICE float to_fp32(float x) { return x; }
VQVIT_DEVICE float to_fp32(Half x) { return __half2float(x); }
VQVIT_DEVICE float to_fp32(BFloat16 x) { return __bfloat162float(x); }
template <class T>
VQVIT_DEVICE T from_fp32(float x);
template <>
VQVIT_DEVICE float from_fp32<float>(float x) {
    return x;
}
template <>
VQVIT_DEVICE Half from_fp32<Half>(float x) {
    return __float2half_rn(x);
}
template <>
VQVIT_DEVICE BFloat16 from_fp32<BFloat16>(float x) {
    return __float2bfloat16_rn(x);
}
VQVIT_DEVICE int32_t bits_of(float x) { return __float_as_int(x); }
VQVIT_DEVICE float from_bits(int32_t x) { return __int_as_float(x); }
#else
using std::fmaf;
VQVIT_DEVICE int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
VQVIT_DEVICE float from_bits(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
using Half = _Float16;
struct BFloat16 {
    uint16_t bits;
};
VQVIT_DEVICE float to_fp32(float x) { return x; }
VQVIT_DEVICE float to_fp32(Half x) { return static_cast<float>(x); }
VQVIT_DEVICE float to_fp32(BFloat16 x) { return from_bits(static_cast<int32_t>(uint32_t{x.bits} << 16)); }
template <class T>
VQVIT_DEVICE T from_fp32(float x);
template <>
VQVIT_DEVICE float from_fp32<float>(float x) {
    return x;
}
template <>
VQVIT_DEVICE Half from_fp32<Half>(float x) {
    return static_cast<Half>(x);
}
template <>
VQVIT_DEVICE BFloat16 from_fp32<BFloat16>(float x) {
    const auto bits = static_cast<uint32_t>(bits_of(x));
    if (x != x) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
#endif

// The larger of |a| and |b|; NaN if either is, with a clear sign.
VQVIT_DEVICE float max_magnitude(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float largest;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(fabsf(a)), "f"(fabsf(b)));
    return largest;
#else
    const int32_t a_bits = bits_of(a) & 0x7fffffff, b_bits = bits_of(b) & 0x7fffffff;
    return from_bits(a_bits > b_bits ? a_bits : b_bits);
#endif
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Status of a launch on `stream` of `grid` blocks: VQVIT_OK, or VQVIT_CUDA_ERROR with the reason kept for
// vqvit_cuda_last_error. An empty grid is no launch.
#ifdef __CUDACC__
int cuda_status(cudaError_t error);

template <class... P, class... A>
int launch(void (*kernel)(P...), Dim3 grid, int threads, int shared_bytes, void* stream, A... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    if (shared_bytes > 48 * 1024) {  // more than a launch gets unasked
        const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
        if (const int status = cuda_status(cudaFuncSetAttribute(kernel, attribute, shared_bytes))) return status;
    }
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cuda_status(cudaGetLastError());
}
#else
int twin_status(const char* error);

template <int Threads, int Blocks, class... P, class... A>
int launch(
    void (*kernel)(twin::Bounds<Threads, Blocks>, P...), Dim3 grid, int threads, int shared_bytes, void*,
    A... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    return twin_status(twin::run(
        grid, threads, Threads, static_cast<size_t>(shared_bytes), [=] { kernel({}, arguments...); }));
}
#endif

}  // namespace vqvit
