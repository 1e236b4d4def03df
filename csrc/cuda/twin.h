// The host's twin of a GPU: runs the kernels of this folder, compiled as C++, with the meaning that CUDA gives them.
//
// Every CUDA thread is a fibre. Blocks run one after the other. Without a seed the threads of a block take turns,
// forwards in even blocks and backwards in odd ones, and what is asynchronous on a GPU happens late: copies to shared
// memory and wgmma products when they are waited for, bulk copies two rounds of turns after they were queued.
// With VQVIT_TWIN_SEED=n (n > 0) everything that CUDA leaves open is drawn at random, the same way for the same n: the
// order of blocks and threads, how often a warp gets its turn, where a thread pauses, and when copies and products
// land: at once, after some rounds, or when they are waited for; bulk copies in any order.
//
// What CUDA leaves undefined ends the launch with an error, where the twin can see it: lanes of a warp that disagree on
// the next collective, a block in which nothing moves any more, barriers that nobody initialised or fenced or that get
// more arrivals than they count, registers given to wgmma without a fence, shared memory that threads wrote and an
// asynchronous operation reads or overwrites without a proxy fence, misaligned addresses, addresses outside of shared
// memory, launches beyond the limits of the part or of __launch_bounds__.
// What it cannot see: a proxy fence of another thread than the one that wrote, and the order of memory between
// threads, which is that of their turns.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace vqvit {

struct Dim3 {
    unsigned x, y, z;
    Dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace twin {

constexpr int kLanes = 32;

// First parameter of every kernel here: its __launch_bounds__.
template <int Threads, int Blocks>
struct Bounds {
    static_assert(Threads % kLanes == 0 && Threads <= 1024, "a block has whole warps, 32 at most");
};

// An integer of the environment.
int setting(const char* name, int otherwise);
// Of the part that is played, ten times the major version and the minor one: $VQVIT_TWIN_ARCH, or 80.
int compute_capability();

struct Position {
    Dim3 block{0}, blocks{0};
    int thread = 0, threads = 0;  // of the block
};

// The running thread's.
const Position& position();
unsigned char* shared_memory();

// Wait until the other threads have moved on.
void yield();
// Perhaps do so, if there is a seed.
void pause();

// Ends the launch with this message unless `holds`.
void require(bool holds, const char* message);
// The same for `bytes` from p on: in the block's shared memory, on a multiple of `alignment`.
void require_shared(const void* p, size_t bytes, size_t alignment, const char* message);

// Blocks the lanes of the warp until all 32 have called with the same `what`; then `act` runs once, on the last lane's
// stack, with each lane's argument.
void warp_collective(const char* what, void* argument, const std::function<void(void* const*)>& act);

// Blocks until `count` threads have arrived at barrier `id` of the block.
void barrier(int id, int count);

// Copies of the calling thread, done when they are waited for or before, in groups.
void copy_async(void* to, const void* from, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// A copy to shared memory that no thread does: `land` runs some rounds later.
void bulk_copy(std::function<void()> land);

// Products of the calling thread, in order, done when they are waited for or before, in groups. `registers` is where
// the results go: without a fence since they were the thread's own, that is an error.
void multiply_later(const void* registers, std::function<void()> work);
void commit_products();
void wait_products(int groups_left);
void fence_registers();

// What the asynchronous proxy, which bulk copies and products belong to, knows of shared memory: what bulk copies
// wrote, and what threads had written when one of them fenced.
void fence_proxy();
void async_write(void* to, const void* from, size_t bytes);
void async_read(void* to, const void* from, size_t bytes);

// Barriers in shared memory that the calling thread initialised, and its fence of them.
void note_initialised(void* barrier);
void fence_initialised(const std::function<void(void*)>& fenced);

// Something happened that another thread may be waiting for.
void note_event();

// Runs `body` on every thread of a grid of blocks of at most `bound` threads. Returns null, or what went wrong.
const char* run(Dim3 grid, int threads, int bound, size_t shared_bytes, const std::function<void()>& body);

}  // namespace twin
}  // namespace vqvit
