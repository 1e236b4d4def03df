// Asynchronous work of the host's twin, and what the asynchronous proxy knows of shared memory; see twin.h.
#include "twin_block.h"

namespace vqvit {
namespace twin {

// ---- asynchronous work ----------------------------------------------------------------------------------------------

void copy_async(void* to, const void* from, int bytes, int valid_bytes) {
    const auto size = static_cast<size_t>(bytes), valid = static_cast<size_t>(valid_bytes);
    require_shared(to, size, size, "target of an asynchronous copy");
    require(valid <= size, "an asynchronous copy reads more than it writes");
    require(valid == 0 || reinterpret_cast<uintptr_t>(from) % size == 0, "source of an asynchronous copy: misaligned");
    Work work{
        [=] {
            std::memset(to, 0, size);
            std::memcpy(to, from, valid);
        },
        block->copy_rounds()};
    if (work.rounds == 0) work.land();
    current->copies.groups.back().push_back(std::move(work));
}

void copy_async_commit() { current->copies.groups.emplace_back(); }

void copy_async_wait(int groups_left) {
    current->copies.wait(groups_left, [](const Work&) {});
    pause();
}

void bulk_copy(std::function<void()> land) {
    const int rounds = block->seeded ? block->some_rounds() : kBulkRounds;
    block->bulk_copies.push_back({std::move(land), rounds});
    pause();
}

void multiply_later(const void* registers, std::function<void()> work) {
    auto& known = current->registers;
    auto found = std::find_if(known.begin(), known.end(), [&](const Registers& r) { return r.at == registers; });
    if (found == known.end()) found = known.insert(known.end(), Registers{registers, 0, 0});
    if (found->in_flight == 0 && found->fences == current->fences) {
        fail("a product is queued on registers without wgmma_fence since they were the thread's own");
    }
    ++found->in_flight;
    current->products.groups.back().push_back({std::move(work), block->copy_rounds(), registers});
    pause();
}

void commit_products() { current->products.groups.emplace_back(); }

void wait_products(int groups_left) {
    Fibre& fibre = *current;
    fibre.products.wait(groups_left, [&](const Work& work) {
        for (Registers& r : fibre.registers) {
            if (r.at == work.registers && --r.in_flight == 0) r.fences = fibre.fences;
        }
    });
}

void fence_registers() { ++current->fences; }

// ---- the asynchronous proxy -----------------------------------------------------------------------------------------

void fence_proxy() {
    auto& view = block->view();
    std::memcpy(view.data(), block->shared.get(), view.size());
}

void async_write(void* to, const void* from, size_t bytes) {
    auto& view = block->view();
    const size_t at = block->offset(to);
    if (std::memcmp(view.data() + at, to, bytes) != 0) {
        fail("a copy overwrites shared memory that threads wrote without a proxy fence");
    }
    std::memcpy(to, from, bytes);
    std::memcpy(view.data() + at, from, bytes);
}

void async_read(void* to, const void* from, size_t bytes) {
    if (!block->holds(from, bytes)) return fail("a product reads outside of the block's shared memory");
    if (std::memcmp(block->view().data() + block->offset(from), from, bytes) != 0) {
        fail("a product reads shared memory that threads wrote without a proxy fence");
    }
    std::memcpy(to, from, bytes);
}

void note_initialised(void* barrier) { current->initialised.push_back(barrier); }

void fence_initialised(const std::function<void(void*)>& fenced) {
    for (void* barrier : current->initialised) fenced(barrier);
    current->initialised.clear();
}

}  // namespace twin
}  // namespace vqvit
