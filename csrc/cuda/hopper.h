// What sm_90a adds to device.h: barriers in shared memory, bulk tensor copies (TMA) and warpgroup products (wgmma), on
// a GPU or in the host's twin.
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
    uint8_t arrivals, pending, phase, state;
    int32_t bytes;
};
constexpr uint8_t kInitialised = 0x1b, kFenced = 0x2d;  // states; memory that nobody wrote has another one

VQVIT_DEVICE void barrier_check(const SharedBarrier* b) {
    twin::require_shared(b, sizeof *b, sizeof *b, "barrier");
    twin::require(b->state == kInitialised || b->state == kFenced, "a barrier is used before it is initialised");
}
VQVIT_DEVICE void barrier_init(SharedBarrier* b, int arrivals) {
    twin::require_shared(b, sizeof *b, sizeof *b, "barrier");
    *b = {static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, kInitialised, 0};
    twin::note_initialised(b);
}
VQVIT_DEVICE void barrier_init_done() {
    twin::fence_initialised([](void* b) { static_cast<SharedBarrier*>(b)->state = kFenced; });
}
VQVIT_DEVICE void barrier_settle(SharedBarrier* b) {
    if (b->pending > 0 || b->bytes > 0) return;
    b->pending = b->arrivals;
    b->phase ^= 1;
    twin::note_event();
}
VQVIT_DEVICE void barrier_arrive(SharedBarrier* b) {
    barrier_check(b);
    twin::require(b->pending > 0, "a barrier gets more arrivals in a phase than it counts");
    --b->pending;
    barrier_settle(b);
    twin::pause();
}
VQVIT_DEVICE void barrier_expect(SharedBarrier* b, int bytes) {
    b->bytes += bytes;
    barrier_arrive(b);
}
VQVIT_DEVICE void barrier_wait(SharedBarrier* b, int parity) {
    barrier_check(b);
    while (b->phase == parity) twin::yield();
    twin::pause();
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
    const int bytes = from.box_rows * kSwizzleBytes;
    twin::require_shared(to, static_cast<size_t>(bytes), 1024, "target of a bulk copy");
    barrier_check(b);
    twin::require(b->state == kFenced, "a bulk copy uses a barrier whose initialisation nobody fenced");
    twin::bulk_copy([=] {
        for (int r = 0; r < from.box_rows; ++r) {
            for (int chunk = 0; chunk < kSwizzleBytes / 16; ++chunk) {
                int8_t row_bytes[16];
                for (int i = 0; i < 16; ++i) {
                    const int64_t row = int64_t{first_row} + r, column = int64_t{first_k} + 16 * chunk + i;
                    const bool inside = row >= 0 && row < from.rows && column >= 0 && column < from.k;
                    row_bytes[i] = inside ? from.data[row * from.stride + column] : int8_t{0};
                }
                twin::async_write(
                    static_cast<int8_t*>(to) + r * kSwizzleBytes + (chunk ^ (r % 8)) * 16, row_bytes, 16);
            }
        }
        b->bytes -= bytes;
        barrier_settle(b);
    });
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
VQVIT_DEVICE void wgmma_fence() {
    twin::warp_collective("wgmma_fence", nullptr, [](void* const*) {});
    twin::fence_registers();
}
VQVIT_DEVICE void wgmma_commit() {
    twin::warp_collective("wgmma_commit", nullptr, [](void* const*) {});
    twin::commit_products();
}
template <int GroupsLeft, int N>
VQVIT_DEVICE void wgmma_wait(int32_t (&)[N][4]) {
    // The lanes of a warp come here together, or the first would release what the others still read.
    twin::wait_products(GroupsLeft);
    twin::warp_collective("wgmma_wait", nullptr, [](void* const*) {});
}
VQVIT_DEVICE void wgmma_s8(int32_t (&d)[kWgmmaColumns / 8][4], const void* a, const void* b, bool add) {
    const auto check = [](const void* operand) {
        const auto address = reinterpret_cast<uintptr_t>(operand);
        twin::require(address % 32 == 0 && (address >> 7) % 8 == 0, "an operand of wgmma is not 32 bytes of an atom");
    };
    check(a);
    check(b);
    const int lane = thread_id() % kWarp, warp = thread_id() % kWarpgroup / kWarp;
    twin::multiply_later(&d, [=, &d] {
        // 32 bytes of a row: the hardware swizzles addresses, bits 4 to 6 are crossed with bits 7 to 9.
        const auto load = [](int8_t* to, const void* operand, int row) {
            for (int half = 0; half < 2; ++half) {
                const auto address =
                    reinterpret_cast<uintptr_t>(operand) + static_cast<uintptr_t>(row * kSwizzleBytes + 16 * half);
                const auto* from = reinterpret_cast<const void*>(address ^ ((address >> 7 & 7) << 4));
                twin::async_read(to + 16 * half, from, 16);
            }
        };
        int8_t rows[2][32], columns[2][32];
        for (int i = 0; i < 2; ++i) load(rows[i], a, 16 * warp + lane / 4 + 8 * i);
        for (int j = 0; j < kWgmmaColumns / 8; ++j) {
            for (int i = 0; i < 2; ++i) load(columns[i], b, 8 * j + lane % 4 * 2 + i);
            for (int i = 0; i < 4; ++i) {
                int32_t sum = add ? d[j][i] : 0;
                for (int k = 0; k < 32; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
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
