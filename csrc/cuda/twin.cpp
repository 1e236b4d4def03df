// Threads, rounds and launches of the host's twin; see twin.h.
#include "twin.h"

#include <cstdlib>
#include <numeric>

#include "twin_block.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace vqvit {
namespace twin {

thread_local Fibre* current = nullptr;
thread_local Block* block = nullptr;

namespace {

// A place to go on from. ucontext asks the system at every switch; on x86-64 it takes the registers that a call keeps.
#ifdef __x86_64__
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
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, char* stack, size_t bytes, void (*enter)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
}
#endif


thread_local Context scheduler;
thread_local const std::function<void()>* program = nullptr;
thread_local std::string last_error;

void leave() {
    current->done = true;
    for (;;) switch_to(current->context, scheduler);
}

void enter() {
    (*program)();
    if (!current->products.empty()) block->fail("a thread ended before its products were waited for");
    ++block->events;
    leave();
}

void start(Fibre& fibre, const Position& position) {
    fibre.position = position;
    fibre.done = false;
    fibre.copies = Later{false};
    fibre.products = Later{true};
    fibre.fences = 0;
    fibre.registers.clear();
    fibre.initialised.clear();
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(fibre.stack.get(), kStackBytes);  // the frames of the block before never returned
#endif
    prepare(fibre.context, fibre.stack.get(), kStackBytes, enter);
}

using Fibres = std::vector<std::unique_ptr<Fibre>>;

// ---- rounds ---------------------------------------------------------------------------------------------------------

// What lands between two rounds.
void land(Block& state, const Fibres& fibres) {
    current = nullptr;
    for (Work& copy : state.bulk_copies) {
        if (--copy.rounds > 0) continue;
        copy.land();
        ++state.events;
    }
    auto& copies = state.bulk_copies;
    copies.erase(std::remove_if(copies.begin(), copies.end(), [](const Work& w) { return !w.act; }), copies.end());
    if (!state.seeded) return;
    for (const auto& fibre : fibres) {
        if (!fibre->copies.empty()) fibre->copies.tick();
        if (!fibre->products.empty()) fibre->products.tick();
    }
}

constexpr int kRoundsOfPace = 32;
constexpr int kPaces[] = {1, 1, 2, 8, 30};  // a warp gets a turn in one of so many rounds

// One turn of every thread, or with a seed of the threads of some warps: how many live on.
int take_turns(Block& state, const Fibres& fibres, std::vector<int>& order, bool backwards, uint64_t round) {
    const auto threads = static_cast<int>(fibres.size());
    if (state.seeded) {
        if (round % kRoundsOfPace == 0) {
            for (Warp& warp : state.warps) warp.one_turn_in = kPaces[state.chance.below(5)];
        }
        state.chance.shuffle(order);
    }
    std::vector<char> rests(state.warps.size());
    for (size_t w = 0; w < rests.size(); ++w) {
        rests[w] = state.seeded && !state.chance.one_in(state.warps[w].one_turn_in);
    }
    int left = 0;
    for (int turn = 0; turn < threads && state.error.empty(); ++turn) {
        const int thread = state.seeded ? order[static_cast<size_t>(turn)] : backwards ? threads - 1 - turn : turn;
        Fibre& fibre = *fibres[static_cast<size_t>(thread)];
        if (fibre.done) continue;
        if (!rests[static_cast<size_t>(thread / kLanes)]) {
            current = &fibre;
            switch_to(scheduler, fibre.context);
        }
        left += !fibre.done;
    }
    return left;
}

constexpr int kIdleRounds = 2000;  // of a seeded block, in which every warp had many turns

void run_block(Block& state, const Fibres& fibres, bool backwards) {
    std::vector<int> order(fibres.size());
    std::iota(order.begin(), order.end(), 0);
    int idle = 0;
    for (uint64_t round = 0; state.error.empty(); ++round) {
        const uint64_t before = state.events;
        const int left = take_turns(state, fibres, order, backwards, round);
        if (state.error.empty()) land(state, fibres);
        if (left == 0) break;
        idle = state.events == before && state.bulk_copies.empty() ? idle + 1 : 0;
        if (idle > (state.seeded ? kIdleRounds : 0)) state.fail("deadlock: every thread waits");
    }
    if (!state.bulk_copies.empty()) state.fail("a block ended while a copy to its shared memory was under way");
}

}  // namespace

// ---- threads --------------------------------------------------------------------------------------------------------

void fail(const std::string& message) {
    block->fail(message);
    if (current != nullptr) leave();
}

int setting(const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value == nullptr ? otherwise : std::atoi(value);
}

int compute_capability() { return setting("VQVIT_TWIN_ARCH", 80); }

const Position& position() { return current->position; }

unsigned char* shared_memory() { return block->shared.get(); }

void yield() { switch_to(current->context, scheduler); }

void pause() {
    if (block->seeded && current != nullptr && block->chance.one_in(kPauses)) {
        ++block->events;  // it goes on by itself
        yield();
    }
}

void require(bool holds, const char* message) {
    if (!holds) fail(message);
}

void require_shared(const void* p, size_t bytes, size_t alignment, const char* message) {
    if (!block->holds(p, bytes)) fail(std::string(message) + ": not in the block's shared memory");
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
        fail(std::string(message) + ": not on a multiple of " + std::to_string(alignment) + " bytes");
    }
}

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
        return pause();
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
        return pause();
    }
    for (const uint64_t generation = b.generation; b.generation == generation;) yield();
}

void note_event() { ++block->events; }

// ---- launches -------------------------------------------------------------------------------------------------------

namespace {

// Most shared memory of a block, by compute capability (CUDA C++ Programming Guide, table of technical specifications).
size_t shared_limit(int capability) {
    constexpr size_t kKiB = 1024;
    if (capability < 80) return 64 * kKiB;
    if (capability == 80 || capability == 87) return 163 * kKiB;
    return capability < 90 ? 99 * kKiB : 227 * kKiB;
}

std::string refused(Dim3 grid, int threads, int bound, size_t shared_bytes) {
    const auto number = [](auto n) { return std::to_string(n); };
    const size_t most = shared_limit(compute_capability());
    if (threads < 1 || threads > bound) {
        return "launch: " + number(threads) + " threads a block, at most " + number(bound) + " by its launch bounds";
    }
    if (shared_bytes > most) {
        return "launch: " + number(shared_bytes) + " bytes of shared memory, at most " + number(most) + " on this part";
    }
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return "launch: a grid of " + number(grid.x) + " x " + number(grid.y) + " x " + number(grid.z) +
               " blocks, at most 2147483647 x 65535 x 65535";
    }
    return "";
}

}  // namespace

const char* run(Dim3 grid, int threads, int bound, size_t shared_bytes, const std::function<void()>& body) {
    last_error = refused(grid, threads, bound, shared_bytes);
    if (!last_error.empty()) return last_error.c_str();
    Fibres fibres;
    for (int i = 0; i < threads; ++i) fibres.emplace_back(new Fibre);
    program = &body;
    const int seed = setting("VQVIT_TWIN_SEED", 0);
    std::vector<uint64_t> blocks(size_t{grid.x} * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (seed > 0) Chance(static_cast<uint64_t>(seed)).shuffle(blocks);
    for (const uint64_t index : blocks) {
        Block state(threads, shared_bytes, seed, index);
        block = &state;
        const Dim3 at(
            static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
            static_cast<unsigned>(index / grid.x / grid.y));
        for (int i = 0; i < threads; ++i) start(*fibres[static_cast<size_t>(i)], {at, grid, i, threads});
        run_block(state, fibres, index % 2 != 0);
        if (!state.error.empty()) {
            last_error = state.error;
            return last_error.c_str();
        }
    }
    return nullptr;
}

}  // namespace twin
}  // namespace vqvit
