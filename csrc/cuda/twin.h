// The host's twin of a GPU: runs the kernels of this folder, compiled as C++, with the meaning that CUDA gives them.
//
// Every CUDA thread is a fibre. Blocks run one after the other; the threads of a block take turns, forwards in even
// blocks and backwards in odd ones, so that a missing barrier shows. What is asynchronous on a GPU happens as late as
// the program allows: copies when they are waited for, wgmma products likewise. A warp whose lanes disagree on the
// next collective, and a block in which nothing moves any more, end the launch with an error.
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

struct Fibre;

struct Position {
    Dim3 block{0}, blocks{0};
    int thread = 0, threads = 0;  // of the block
};

// The running thread's.
const Position& position();
unsigned char* shared_memory();

// Wait until the other threads have moved on.
void yield();

// Blocks the lanes of the warp until all 32 have called with the same `what`; then `act` runs once, on the last lane's
// stack, with each lane's argument.
void warp_collective(const char* what, void* argument, const std::function<void(void* const*)>& act);

// Blocks until `count` threads have arrived at barrier `id` of the block.
void barrier(int id, int count);

// Copies of the calling thread, done when they are waited for, in groups.
void copy_async(void* to, const void* from, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// Work of the calling thread that is done when it is waited for, in groups.
void later(std::function<void()> work);
void commit_later();
void run_later(int groups_left);

// Something happened that another thread may be waiting for.
void note_event();

// Runs `body` on every thread of a grid. Returns null, or what went wrong.
const char* run(Dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace twin
}  // namespace vqvit
