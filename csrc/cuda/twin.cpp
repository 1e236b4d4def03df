// Fibres, barriers and collectives of the host's twin; see twin.h.
#include "twin.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <memory>
#include <string>
#include <vector>

namespace vqvit {
namespace twin {

namespace {

// A place to go on from. ucontext asks the system at every switch; on x86-64 it takes the registers that a call keeps.
#ifdef __x86_64__
using Context = void*;  // the stack pointer

extern "C" void vqvit_twin_switch(Context* from, Context to);
asm(R"(
    .text
    .local vqvit_twin_switch
    .type vqvit_twin_switch, @function
vqvit_twin_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void switch_to(Context& from, Context& to) { vqvit_twin_switch(&from, to); }

void prepare(Context& context, char* stack, size_t bytes, void (*enter)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
    auto* words = reinterpret_cast<uintptr_t*>(top);
    *--words = 0;  // the return address that `enter` never uses
    *--words = reinterpret_cast<uintptr_t>(enter);
    for (int i = 0; i < 6; ++i) *--words = 0;
    context = words;
}
#else
using Context = ucontext_t;

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, char* stack, size_t bytes, void (*enter)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
}
#endif

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kBarriers = 16;

// Groups of work, oldest first; the last one is open.
struct Later {
    std::vector<std::vector<std::function<void()>>> groups{1};

    void run(int groups_left) {
        while (static_cast<int>(groups.size()) - 1 > groups_left) {
            for (const auto& work : groups.front()) work();
            groups.erase(groups.begin());
        }
    }
};

}  // namespace

struct Fibre {
    Context context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Position position;
    bool done = false;
    Later copies, products;
};

namespace {

struct Warp {
    const char* what = nullptr;
    void* arguments[kLanes] = {};
    int arrived = 0;
    uint64_t generation = 0;
};

struct Barrier {
    int arrived = 0, count = 0;
    uint64_t generation = 0;
};

struct Block {
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    std::vector<unsigned char> shared;
    uint64_t events = 0;  // barriers passed, collectives done, threads ended
    std::string error;
};

thread_local Fibre* current = nullptr;
thread_local Block* block = nullptr;
thread_local Context scheduler;
thread_local const std::function<void()>* program = nullptr;
thread_local std::string last_error;

void enter() {
    (*program)();
    current->done = true;
    ++block->events;
    switch_to(current->context, scheduler);
}

[[noreturn]] void fail(const std::string& message) {
    if (block->error.empty()) block->error = message;
    current->done = true;
    for (;;) switch_to(current->context, scheduler);
}

void start(Fibre& fibre, const Position& position) {
    fibre.position = position;
    fibre.done = false;
    fibre.copies = fibre.products = Later{};
    prepare(fibre.context, fibre.stack.get(), kStackBytes, enter);
}

constexpr size_t kSharedAlignment = 1024;  // of a block's shared memory, as swizzled tiles want it

}  // namespace

const Position& position() { return current->position; }

unsigned char* shared_memory() {
    const auto address = reinterpret_cast<uintptr_t>(block->shared.data());
    return reinterpret_cast<unsigned char*>((address + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment);
}

void yield() { switch_to(current->context, scheduler); }

void warp_collective(const char* what, void* argument, const std::function<void(void* const*)>& act) {
    const int thread = current->position.thread;
    Warp& warp = block->warps[static_cast<size_t>(thread / kLanes)];
    if (warp.arrived > 0 && warp.what != what && std::strcmp(warp.what, what) != 0) {
        fail(std::string("lanes of a warp disagree: ") + warp.what + " and " + what);
    }
    warp.what = what;
    warp.arguments[thread % kLanes] = argument;
    if (++warp.arrived == kLanes) {
        act(warp.arguments);
        warp.arrived = 0;
        ++warp.generation;
        ++block->events;
        return;
    }
    for (const uint64_t generation = warp.generation; warp.generation == generation;) yield();
}

void barrier(int id, int count) {
    Barrier& b = block->barriers[id];
    if (b.arrived > 0 && b.count != count) fail("threads disagree on the size of a barrier");
    b.count = count;
    if (++b.arrived == count) {
        b.arrived = 0;
        ++b.generation;
        ++block->events;
        return;
    }
    for (const uint64_t generation = b.generation; b.generation == generation;) yield();
}

void copy_async(void* to, const void* from, int bytes, int valid_bytes) {
    current->copies.groups.back().push_back([=] {
        std::memset(to, 0, static_cast<size_t>(bytes));
        std::memcpy(to, from, static_cast<size_t>(valid_bytes));
    });
}

void copy_async_commit() { current->copies.groups.emplace_back(); }

void copy_async_wait(int groups_left) { current->copies.run(groups_left); }

void later(std::function<void()> work) { current->products.groups.back().push_back(std::move(work)); }

void commit_later() { current->products.groups.emplace_back(); }

void run_later(int groups_left) { current->products.run(groups_left); }

void note_event() { ++block->events; }

const char* run(Dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
    std::vector<std::unique_ptr<Fibre>> fibres;
    for (int i = 0; i < threads; ++i) fibres.emplace_back(new Fibre);
    program = &body;
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    for (uint64_t index = 0; index < blocks; ++index) {
        Block state;
        state.warps.resize(static_cast<size_t>((threads + kLanes - 1) / kLanes));
        state.shared.assign(shared_bytes + kSharedAlignment, 0xA5);  // not zero: reading what was not written shows
        block = &state;
        const Dim3 at(
            static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
            static_cast<unsigned>(index / grid.x / grid.y));
        for (int i = 0; i < threads; ++i) start(*fibres[static_cast<size_t>(i)], {at, grid, i, threads});
        for (int left = threads; left > 0 && state.error.empty();) {
            const uint64_t before = state.events;
            left = 0;
            for (int turn = 0; turn < threads && state.error.empty(); ++turn) {
                current = fibres[static_cast<size_t>(index % 2 ? threads - 1 - turn : turn)].get();
                if (current->done) continue;
                switch_to(scheduler, current->context);
                left += !current->done;
            }
            if (left > 0 && state.events == before && state.error.empty()) state.error = "deadlock: every thread waits";
        }
        if (!state.error.empty()) {
            last_error = state.error;
            return last_error.c_str();
        }
    }
    return nullptr;
}

}  // namespace twin
}  // namespace vqvit
