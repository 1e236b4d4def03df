// The state of a block of the host's twin: its fibres, barriers, shared memory and asynchronous work; see twin.h.
#pragma once

#include "twin.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace vqvit {
namespace twin {

// ---- fibres ---------------------------------------------------------------------------------------------------------

#ifdef __x86_64__
using Context = void*;  // the stack pointer
#else
using Context = ucontext_t;
#endif

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kBarriers = 16;
constexpr size_t kSharedAlignment = 1024;  // of a block's shared memory, as swizzled tiles want it
constexpr unsigned char kUnwritten = 0xA5;  // not zero: reading what was not written shows

// ---- chance ---------------------------------------------------------------------------------------------------------

// xorshift64*: the same numbers on every machine.
struct Chance {
    uint64_t state;

    explicit Chance(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u | 1) {
        for (int i = 0; i < 4; ++i) next();
    }
    uint64_t next() {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545F4914F6CDD1Du >> 32;
    }
    int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
    bool one_in(int n) { return below(n) == 0; }
    template <class T>
    void shuffle(std::vector<T>& items) {
        for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next() % i]);
    }
};

constexpr int kOnlyWhenWaitedFor = -1;
constexpr int kBulkRounds = 2;                // of a bulk copy without a seed
constexpr int kMostRounds[] = {2, 12, 100};   // with a seed, one of these is the most
constexpr int kPauses = 8;                    // a thread pauses at one of so many places

// ---- asynchronous work ----------------------------------------------------------------------------------------------

struct Work {
    std::function<void()> act;
    int rounds;  // until it happens, or kOnlyWhenWaitedFor
    const void* registers = nullptr;

    void land() {
        if (act) act();
        act = nullptr;
    }
};

// Groups of work of a thread, oldest first; the last one is open.
struct Later {
    std::vector<std::vector<Work>> groups{1};
    bool in_order;

    explicit Later(bool in_order_) : in_order(in_order_) {}

    bool empty() const { return groups.size() == 1 && groups[0].empty(); }
    void wait(int groups_left, const std::function<void(const Work&)>& waited) {
        while (static_cast<int>(groups.size()) - 1 > groups_left) {
            for (Work& work : groups.front()) {
                work.land();
                waited(work);
            }
            groups.erase(groups.begin());
        }
    }
    // A round has passed.
    void tick() {
        for (auto& group : groups) {
            for (Work& work : group) {
                if (!work.act) continue;
                if (work.rounds > 0) --work.rounds;
                if (work.rounds == 0) {
                    work.land();
                } else if (in_order) {
                    return;
                }
            }
        }
    }
};

// Accumulators of a thread: products in flight on them, and fences so far when they became the thread's again.
struct Registers {
    const void* at;
    int in_flight;
    uint64_t fences;
};

struct Fibre {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Position position;
    bool done = false;
    Later copies{false}, products{true};
    uint64_t fences = 0;
    std::vector<Registers> registers;
    std::vector<void*> initialised;
};

// ---- a block --------------------------------------------------------------------------------------------------------

struct Warp {
    const char* what = nullptr;
    void* arguments[kLanes] = {};
    int arrived = 0;
    uint64_t generation = 0;
    int one_turn_in = 1;
};

struct Barrier {
    int arrived = 0, count = 0;
    uint64_t generation = 0;
};

struct FreeShared {
    void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t{kSharedAlignment}); }
};

struct Block {
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    size_t shared_bytes;
    std::unique_ptr<unsigned char, FreeShared> shared;
    std::vector<unsigned char> async_view;  // of shared memory, from its first use on
    std::vector<Work> bulk_copies;
    uint64_t events = 0;  // barriers passed, collectives done, copies landed, threads ended
    std::string error;
    bool seeded;
    Chance chance;

    Block(int threads, size_t bytes, int seed, uint64_t index)
        : warps(static_cast<size_t>((threads + kLanes - 1) / kLanes)), shared_bytes(bytes),
          shared(static_cast<unsigned char*>(
              ::operator new(std::max<size_t>(bytes, 1), std::align_val_t{kSharedAlignment}))),
          seeded(seed > 0), chance(static_cast<uint64_t>(seed) + (index << 32)) {
        std::memset(shared.get(), kUnwritten, bytes);
    }

    void fail(const std::string& message) {
        if (error.empty()) error = message;
    }
    size_t offset(const void* p) const { return static_cast<size_t>(static_cast<const unsigned char*>(p) - shared.get()); }
    bool holds(const void* p, size_t bytes) const {
        const auto address = reinterpret_cast<uintptr_t>(p), first = reinterpret_cast<uintptr_t>(shared.get());
        return address >= first && address - first <= shared_bytes && bytes <= shared_bytes - (address - first);
    }
    std::vector<unsigned char>& view() {
        if (async_view.empty()) async_view.assign(shared_bytes, kUnwritten);
        return async_view;
    }
    int some_rounds() { return 1 + chance.below(kMostRounds[chance.below(3)]); }
    // A third at once, a third some rounds later, a third when it is waited for.
    int copy_rounds() {
        if (!seeded) return kOnlyWhenWaitedFor;
        const int kind = chance.below(3);
        return kind == 0 ? 0 : kind == 1 ? some_rounds() : kOnlyWhenWaitedFor;
    }
};

// Of the host's thread: the fibre that runs, or null between two turns, and the block it belongs to.
extern thread_local Fibre* current;
extern thread_local Block* block;

// Ends the launch with a message: of the running thread, or of work that lands between two turns, which returns.
void fail(const std::string& message);

}  // namespace twin
}  // namespace vqvit
