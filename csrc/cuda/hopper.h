// What sm_90a adds to device.h: barriers in shared memory, bulk tensor copies (TMA) and warpgroup products (wgmma), on
// a GPU or in the host's twin, where products are computed when they are waited for.
#pragma once

#include "device.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace vqvit {

constexpr int kWarpgroup = 128;
constexpr int kSwizzleBytes = 128;  // of a row in shared memory: 16-byte chunk c of row r lies at c ^ (r % 8)

// ---- barriers in shared memory --------------------------------------------------------------------------------------

#ifdef __CUDACC__
using SharedBarrier = uint64_t;

VQVIT_DEVICE void barrier_init(SharedBarrier* b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to copies; a block barrier has to follow.
VQVIT_DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
VQVIT_DEVICE void barrier_arrive(SharedBarrier* b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrive, and let the phase also wait for `bytes` of copies.
VQVIT_DEVICE void barrier_expect(SharedBarrier* b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}
// Wait until the phase of this parity is over. On a new barrier the phase of parity 1 is.
VQVIT_DEVICE void barrier_wait(SharedBarrier* b, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(shared_address(b)),
        "r"(parity)
        : "memory");
}
#else
struct SharedBarrier {
    uint8_t arrivals, pending, phase, unused;
    int32_t bytes;
};

VQVIT_DEVICE void barrier_init(SharedBarrier* b, int arrivals) {
    *b = {static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0, 0};
}
VQVIT_DEVICE void barrier_init_done() {}
VQVIT_DEVICE void barrier_settle(SharedBarrier* b) {
    if (b->pending > 0 || b->bytes > 0) return;
    b->pending = b->arrivals;
    b->phase ^= 1;
    twin::note_event();
}
VQVIT_DEVICE void barrier_arrive(SharedBarrier* b) {
    --b->pending;
    barrier_settle(b);
}
VQVIT_DEVICE void barrier_expect(SharedBarrier* b, int bytes) {
    b->bytes += bytes;
    barrier_arrive(b);
}
VQVIT_DEVICE void barrier_wait(SharedBarrier* b, int parity) {
    while (b->phase == parity) twin::yield();
}
#endif

// ---- bulk tensor copies ---------------------------------------------------------------------------------------------

// A row-major matrix of bytes, copied in boxes of `box_rows` rows of kSwizzleBytes.
#ifdef __CUDACC__
struct TensorMap {
    CUtensorMap map;
};
#else
struct TensorMap {
    const int8_t* data;
    int64_t rows, k, stride;
    int box_rows;
};
#endif

// Describes (rows, k), rows `stride` bytes apart: a status. data and stride must be multiples of 16 bytes.
int describe_tensor(TensorMap* map, const int8_t* data, int64_t rows, int64_t k, int64_t stride, int box_rows);

// Queue the box at (first_row, first_k), zeros outside, into `to`, which is aligned to 1024 bytes; its bytes count
// towards the barrier's phase.
#ifdef __CUDACC__
VQVIT_DEVICE void copy_box(void* to, const TensorMap& from, int first_k, int first_row, SharedBarrier* b) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(shared_address(to)), "l"(&from.map), "r"(first_k), "r"(first_row), "r"(shared_address(b))
        : "memory");
}
VQVIT_DEVICE void prefetch(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map.map) : "memory");
}
#else
VQVIT_DEVICE void copy_box(void* to, const TensorMap& from, int first_k, int first_row, SharedBarrier* b) {
    for (int r = 0; r < from.box_rows; ++r) {
        for (int k = 0; k < kSwizzleBytes; ++k) {
            const int64_t row = first_row + r, column = first_k + k;
            const bool inside = row < from.rows && column < from.k;
            const int chunk = (k / 16) ^ (r % 8);
            static_cast<int8_t*>(to)[r * kSwizzleBytes + chunk * 16 + k % 16] =
                inside ? from.data[row * from.stride + column] : int8_t{0};
        }
    }
    b->bytes -= from.box_rows * kSwizzleBytes;
    barrier_settle(b);
}
VQVIT_DEVICE void prefetch(const TensorMap&) {}
#endif

// ---- warpgroup products ---------------------------------------------------------------------------------------------

// d (64, 128) int32 (+)= A (64, 32) · B (128, 32)ᵀ of s8 in swizzled shared memory, by all threads of a warpgroup.
// Warp w of the group holds rows 16 w ... in the fragments of gemm_s8.h. Products are queued: wgmma_fence before the
// first that touches registers, wgmma_commit after a group of them, wgmma_wait before the results or operands are used.
constexpr int kWgmmaColumns = 128;

#ifdef __CUDACC__
// Descriptor of K-major rows swizzled over 128 bytes: eight rows are 1024 bytes.
VQVIT_DEVICE uint64_t operand_descriptor(const void* p) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
    return kSwizzle128 | kEightRows | uint64_t{1} << 16 | ((shared_address(p) & 0x3ffff) >> 4);
}
VQVIT_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VQVIT_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most GroupsLeft groups are under way. The registers pass through, so that nothing reads them before.
template <int GroupsLeft, int N>
VQVIT_DEVICE void wgmma_wait(int32_t (&d)[N][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GroupsLeft) : "memory");
    VQVIT_UNROLL
    for (int j = 0; j < N; ++j) {
        VQVIT_UNROLL
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(d[j][i])::"memory");
    }
}
#define VQVIT_D4(j) "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])
VQVIT_DEVICE void wgmma_s8(int32_t (&d)[kWgmmaColumns / 8][4], const void* a, const void* b, bool add) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add;\n"
        "}"
        : VQVIT_D4(0), VQVIT_D4(1), VQVIT_D4(2), VQVIT_D4(3), VQVIT_D4(4), VQVIT_D4(5), VQVIT_D4(6), VQVIT_D4(7),
          VQVIT_D4(8), VQVIT_D4(9), VQVIT_D4(10), VQVIT_D4(11), VQVIT_D4(12), VQVIT_D4(13), VQVIT_D4(14), VQVIT_D4(15)
        : "l"(operand_descriptor(a)), "l"(operand_descriptor(b)), "r"(static_cast<int>(add)));
#endif
}
#undef VQVIT_D4
template <int Registers>
VQVIT_DEVICE void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
VQVIT_DEVICE void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
#else
VQVIT_DEVICE void wgmma_fence() {}
VQVIT_DEVICE void wgmma_commit() { twin::commit_later(); }
template <int GroupsLeft, int N>
VQVIT_DEVICE void wgmma_wait(int32_t (&)[N][4]) {
    twin::run_later(GroupsLeft);
    warp_barrier();  // the lanes of a warp come here together, or the first would release what the others still read
}
VQVIT_DEVICE void wgmma_s8(int32_t (&d)[kWgmmaColumns / 8][4], const void* a, const void* b, bool add) {
    const auto byte = [](const void* operand, int row, int k) {
        // The hardware swizzles addresses: bits 4 to 6 are crossed with bits 7 to 9.
        const auto address = reinterpret_cast<uintptr_t>(operand) + static_cast<uintptr_t>(row * kSwizzleBytes + k);
        return int32_t{*reinterpret_cast<const int8_t*>(address ^ ((address >> 7 & 7) << 4))};
    };
    const int lane = thread_id() % kWarp, warp = thread_id() % kWarpgroup / kWarp;
    twin::later([=, &d] {
        for (int j = 0; j < kWgmmaColumns / 8; ++j) {
            for (int i = 0; i < 4; ++i) {
                int32_t sum = add ? d[j][i] : 0;
                for (int k = 0; k < 32; ++k) {
                    sum += byte(a, 16 * warp + lane / 4 + i / 2 * 8, k) * byte(b, 8 * j + lane % 4 * 2 + i % 2, k);
                }
                d[j][i] = sum;
            }
        }
    });
}
template <int>
VQVIT_DEVICE void raise_registers() {}
template <int>
VQVIT_DEVICE void lower_registers() {}
#endif

}  // namespace vqvit
