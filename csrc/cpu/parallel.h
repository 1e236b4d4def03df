// One loop over tasks on at most `threads` OpenMP threads. Every thread starts at its own share of them, the same in each
// loop, so that the rows it reads are mostly those it wrote; then it takes what others have left (a slow core takes
// fewer).
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

namespace vqvit {

// Below this many MACs (row-wise operations count as kRowOperations MACs an element) one core needs about 2 µs, and
// waking another costs more than it gives.
constexpr int64_t kSerialWork = int64_t{1} << 19;
constexpr int64_t kRowOperations = 32;

// Tasks a thread should find, so that the last one to finish keeps the others waiting for 3 % of the time at most.
constexpr int64_t kTasksPerThread = 16;

// Tasks [next, end) that are not taken yet, on a cache line of their own.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};
constexpr int64_t kMaxShares = 64;

// Block i of `blocks` even parts of [0, total).
inline int64_t block_start(int64_t i, int64_t blocks, int64_t total) { return i * total / blocks; }

// task(state, i) for i in [0, tasks); every thread has one State of its own. Throws std::bad_alloc where a thread has no
// memory for its scratch; an exception may not leave a parallel region, and so goes on behind it.
template <class State, class Task>
void parallel_for(int64_t tasks, int64_t work, int threads, const Task& task) {
    const int64_t wanted = work < kSerialWork ? 1 : std::min<int64_t>(threads, tasks);
    if (wanted <= 1) {
        State state;
        for (int64_t i = 0; i < tasks; ++i) task(state, i);
        return;
    }
    const int64_t shares = std::min(wanted, kMaxShares);
    Share share[kMaxShares];
    for (int64_t s = 0; s < shares; ++s) {
        share[s].next.store(block_start(s, shares, tasks), std::memory_order_relaxed);
        share[s].end = block_start(s + 1, shares, tasks);
    }
    std::atomic<bool> out_of_memory{false};
#pragma omp parallel num_threads(static_cast<int>(wanted))
    try {
        State state;
        const int64_t own = omp_get_thread_num();
        for (int64_t s = 0; s < shares; ++s) {
            Share& from = share[(own + s) % shares];
            for (int64_t i; (i = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) task(state, i);
        }
    } catch (const std::bad_alloc&) {
        out_of_memory.store(true, std::memory_order_relaxed);
    }
    if (out_of_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

struct Stateless {};

// task(first, last) over rows of `row_elements` elements, a few blocks a thread.
template <class Task>
void parallel_rows(int64_t rows, int64_t row_elements, int threads, const Task& task) {
    constexpr int64_t kBlocksPerThread = 8;
    const int64_t blocks = std::min<int64_t>(rows, int64_t{threads} * kBlocksPerThread);
    parallel_for<Stateless>(blocks, rows * row_elements * kRowOperations, threads, [&](Stateless&, int64_t i) {
        task(block_start(i, blocks, rows), block_start(i + 1, blocks, rows));
    });
}

}  // namespace vqvit
