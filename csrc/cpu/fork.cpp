// Threads of a forked child. OpenMP's do not survive a fork, and its next parallel region waits for them for ever: a
// child has a pool of its own, made at its first call.
#include "fork.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#include "vqvit.h"

namespace vqvit {
namespace {

// Threads that wait for calls, one call at a time. A call that finds the pool busy does its work alone: bodies take what
// others leave (parallel.h), so one of them does all of it.
class Pool {
public:
    void run(int threads, Body body, const void* context) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return body(context, 0);
        grow(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            body_ = body;
            context_ = context;
            started_ = 0;
            wanted_ = threads - 1;
            ++call_;
        }
        wake_.notify_all();
        body(context, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // whoever has not begun finds nothing left
        idle_.wait(lock, [this] { return inside_ == 0; });
    }

private:
    // Up to `count` threads; fewer where the system gives no more. They take no signals: those are the caller's.
    void grow(int count) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; size_ < count; ++size_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (int64_t seen = 0;;) {
            wake_.wait(lock, [&] { return call_ != seen && started_ < wanted_; });
            seen = call_;
            ++inside_;
            const int own = ++started_;
            lock.unlock();
            body_(context_, own);
            lock.lock();
            if (--inside_ == 0) idle_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, idle_;
    Body body_ = nullptr;
    const void* context_ = nullptr;
    int size_ = 0, started_ = 0, wanted_ = 0, inside_ = 0;
    int64_t call_ = 0;
};

std::atomic<bool> forked{false};
std::atomic<Pool*> pool{nullptr};  // never freed: its threads wait in it until the process ends
std::atomic<int> limit{INT_MAX};

// A child of a child leaves its parent's pool behind, whose threads it does not have.
void begin_child() {
    forked.store(true, std::memory_order_relaxed);
    pool.store(nullptr, std::memory_order_relaxed);
}

const int watching = pthread_atfork(nullptr, nullptr, begin_child);

}  // namespace

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

int thread_limit() { return limit.load(std::memory_order_relaxed); }

void run_in_child(int threads, Body body, const void* context) {
    Pool* mine = pool.load(std::memory_order_acquire);
    if (mine == nullptr) {
        Pool* made = new Pool;
        if (pool.compare_exchange_strong(mine, made, std::memory_order_acq_rel)) {
            mine = made;
        } else {
            delete made;
        }
    }
    mine->run(threads, body, context);
}

}  // namespace vqvit

extern "C" int vqvit_cpu_limit_threads(int threads) {
    vqvit::limit.store(std::max(threads, 1), std::memory_order_relaxed);
    return VQVIT_OK;
}
