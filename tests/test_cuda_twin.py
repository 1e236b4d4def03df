"""The twin of CUDA shows mistakes, each planted here in a small program: missing barriers, waits and fences, divergent
lanes, addresses and launches that a GPU refuses. Right programs pass under every schedule."""

import ctypes
import shutil

import pytest
from twin_programs import Programs, ints

from vqvit import native

if native.csrc_directory() is None or shutil.which("g++") is None:
    pytest.skip("needs the C++ sources and g++", allow_module_level=True)

SEEDS = range(1, 9)

SOURCE = r"""
namespace vqvit {
constexpr int kThreads = 64;

// Each thread reads what its neighbour wrote; forwards and backwards blocks differ without a barrier.
VQVIT_KERNEL(kThreads, 1, neighbours, int* out, bool waits) {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    const int i = thread_id();
    shared[i] = i;
    if (waits) block_barrier();
    out[block_x() * kThreads + i] = shared[(i + 1) % kThreads];
}
// The same within a warp.
VQVIT_KERNEL(kThreads, 1, lanes, int* out, bool waits) {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    const int i = thread_id(), first = i / kWarp * kWarp;
    shared[i] = i;
    if (waits) warp_barrier();
    out[i] = shared[first + (i + 1) % kWarp];
}
VQVIT_KERNEL(kThreads, 1, divergent, int) {
    if (lane_id() == 0) warp_any(true); else warp_barrier();
}
VQVIT_KERNEL(kThreads, 1, half_arrives, int) {
    if (thread_id() < kThreads / 2) block_barrier();
}

// ---- copies of threads

VQVIT_KERNEL(kThreads, 1, reads_early, int* out, const int* from, bool waits) {
    auto* shared = reinterpret_cast<int*>(shared_memory()) + 4 * thread_id();
    copy_async_16(shared, from, 16);
    copy_async_commit();
    if (waits) copy_async_wait<0>();
    out[thread_id()] = shared[0];
}
VQVIT_KERNEL(kThreads, 1, copies, const char* from, int to, int shift) {
    copy_async_16(shared_memory() + to, from + shift, 16);
    copy_async_wait<0>();
}
VQVIT_KERNEL(kThreads, 1, loads_matrices, int shift) {
    uint32_t r[4];
    load_matrices(r, shared_memory() + 16 * lane_id() + shift);
}

// ---- barriers in shared memory

enum Mistake { kNone, kNoInit, kNoInitFence, kNoBlockBarrier, kTwoArrivals };
VQVIT_KERNEL(kThreads, 1, phases, int* out, int mistake) {
    auto* barrier = reinterpret_cast<SharedBarrier*>(shared_memory());
    auto* value = reinterpret_cast<int*>(shared_memory() + 64);
    if (thread_id() == 0 && mistake != kNoInit) barrier_init(barrier, 1);
    if (mistake != kNoBlockBarrier) block_barrier();
    if (thread_id() == 40) {
        *value = 7;
        barrier_arrive(barrier);
    }
    if (mistake == kTwoArrivals && thread_id() < 2) barrier_expect(barrier, 16);
    barrier_wait(barrier, 0);
    out[thread_id()] = *value;
}

// ---- bulk copies and products: a warpgroup multiplies a tile of ones

struct Tile {
    unsigned char *a = shared_memory(), *b = a + 64 * 128;
    SharedBarrier* full = reinterpret_cast<SharedBarrier*>(b + 128 * 128);
};
enum ProductMistake {
    kRight, kNoFullWait, kNoWgmmaFence, kNoWgmmaWait, kNoSecondFence, kThreadWrites, kThreadWritesAndFences,
    kReleasesEarly, kWritesBeforeCopy, kLeavesCopy, kUnfencedBarrier, kShortOfAtom,
};
VQVIT_KERNEL(kWarpgroup, 1, product, TensorMap a_map, TensorMap b_map, int* out, int mistake) {
    const Tile tile;
    if (thread_id() == 0) {
        barrier_init(tile.full, 1);
        if (mistake != kUnfencedBarrier) barrier_init_done();
        if (mistake == kWritesBeforeCopy) tile.a[7] = 1;
    }
    block_barrier();
    if (thread_id() == 0) {
        barrier_expect(tile.full, (64 + 128) * 128);
        copy_box(tile.a, a_map, 0, 0, tile.full);
        copy_box(tile.b, b_map, 0, 0, tile.full);
        if (mistake == kLeavesCopy) copy_box(tile.a, a_map, 0, 0, tile.full);
    }
    if (mistake != kNoFullWait) barrier_wait(tile.full, 0);
    block_barrier();
    if (mistake == kThreadWrites || mistake == kThreadWritesAndFences) {
        if (thread_id() == 5) tile.a[7] = 1 - tile.a[7];
        block_barrier();
        if (thread_id() == 5) tile.a[7] = 1 - tile.a[7] + 2;
        if (thread_id() == 5 && mistake == kThreadWritesAndFences) {
            tile.a[7] -= 2;
            twin::fence_proxy();
        }
        block_barrier();
    }
    int32_t d[kWgmmaColumns / 8][4];
    if (mistake != kNoWgmmaFence) wgmma_fence();
    wgmma_s8(d, tile.a + (mistake == kShortOfAtom ? 16 : 0), tile.b, false);
    wgmma_commit();
    if (mistake == kReleasesEarly) {
        block_barrier();
        if (thread_id() == 0) {
            barrier_expect(tile.full, 64 * 128);
            copy_box(tile.a, b_map, 128, 0, tile.full);  // zeros
        }
        barrier_wait(tile.full, 1);
    }
    if (mistake == kNoWgmmaWait) {
        out[thread_id()] = d[0][0];
        wgmma_wait<0>(d);
        return;
    }
    wgmma_wait<0>(d);
    if (mistake != kNoSecondFence) wgmma_fence();
    wgmma_s8(d, tile.a + 32, tile.b + 32, true);
    wgmma_commit();
    wgmma_wait<0>(d);
    out[thread_id()] = d[0][0];
}
VQVIT_KERNEL(kWarpgroup, 1, unwaited, int) {
    int32_t d[kWgmmaColumns / 8][4];
    wgmma_fence();
    wgmma_s8(d, shared_memory(), shared_memory() + 64 * 128, false);
    wgmma_commit();
}
VQVIT_KERNEL(kThreads, 1, nothing, int) {}
}  // namespace vqvit
using namespace vqvit;
extern "C" {
int run_neighbours(int* out, int waits) {
    return launch(neighbours, Dim3(2), kThreads, 1024, nullptr, out, waits != 0);
}
int run_lanes(int* out, int waits) { return launch(lanes, Dim3(1), kThreads, 1024, nullptr, out, waits != 0); }
int run_divergent() { return launch(divergent, Dim3(1), kThreads, 0, nullptr, 0); }
int run_half_arrives() { return launch(half_arrives, Dim3(1), kThreads, 0, nullptr, 0); }
int run_reads_early(int* out, const int* from, int waits) {
    return launch(reads_early, Dim3(1), kThreads, kThreads * 16, nullptr, out, from, waits != 0);
}
int run_copies(const char* from, int to, int shift) {
    return launch(copies, Dim3(1), kThreads, 64, nullptr, from, to, shift);
}
int run_loads_matrices(int shift) { return launch(loads_matrices, Dim3(1), kThreads, 1024, nullptr, shift); }
int run_phases(int* out, int mistake) { return launch(phases, Dim3(1), kThreads, 128, nullptr, out, mistake); }
int run_product(const int8_t* a, const int8_t* b, int* out, int mistake) {
    const TensorMap a_map = {a, 64, 128, 128, 64}, b_map = {b, 128, 128, 128, 128};
    return launch(product, Dim3(1), kWarpgroup, (64 + 128) * 128 + 8, nullptr, a_map, b_map, out, mistake);
}
int run_unwaited() { return launch(unwaited, Dim3(1), kWarpgroup, (64 + 128) * 128, nullptr, 0); }
int run_nothing(int x, int y, int z, int threads, int shared) {
    const Dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    return launch(nothing, grid, threads, shared, nullptr, 0);
}
}
"""

SCHEDULES = [0, *SEEDS]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    return Programs(SOURCE, tmp_path_factory.mktemp("twin"))


@pytest.mark.parametrize("name", ["run_neighbours", "run_lanes"])
def test_a_missing_barrier_shows(programs, name):
    blocks_of_64, warps = [(i + 1) % 64 for i in range(64)] * 2, [i // 32 * 32 + (i + 1) % 32 for i in range(64)]
    right, wrong = blocks_of_64 if name == "run_neighbours" else warps, 0
    for seed in SCHEDULES:
        out = ints(len(right))
        assert programs.error(name, out, 1, seed=seed) == "" and list(out) == right
        assert programs.error(name, out, 0, seed=seed) == ""
        wrong += list(out) != right
    assert wrong >= len(SEEDS)


@pytest.mark.parametrize("seed", SCHEDULES)
def test_lanes_that_disagree_end_the_launch(programs, seed):
    assert "lanes of a warp disagree" in programs.error("run_divergent", seed=seed)


@pytest.mark.parametrize("seed", SCHEDULES)
def test_a_wait_without_end_is_an_error(programs, seed):
    assert "deadlock" in programs.error("run_half_arrives", seed=seed)


def test_copies_arrive_when_they_are_waited_for_or_before(programs):
    source, early = (ctypes.c_int * 4)(5, 6, 7, 8), []
    for seed in SCHEDULES:
        out = ints(64)
        assert programs.error("run_reads_early", out, source, 1, seed=seed) == "" and set(out) == {5}
        assert programs.error("run_reads_early", out, source, 0, seed=seed) == ""
        early.append(sum(value == 5 for value in out))
    assert early[0] == 0 and all(0 < count < 64 for count in early[1:])


def test_addresses_are_checked(programs):
    source = (ctypes.c_longlong * 8)()
    assert programs.error("run_copies", source, 48, 0) == ""
    assert "not in the block's shared memory" in programs.error("run_copies", source, 64, 0)
    assert "not on a multiple of 16 bytes" in programs.error("run_copies", source, 8, 0)
    assert "source of an asynchronous copy: misaligned" in programs.error("run_copies", source, 0, 4)
    assert programs.error("run_loads_matrices", 0) == ""
    assert "row of load_matrices: not on a multiple" in programs.error("run_loads_matrices", 8)
    assert "row of load_matrices: not in the block" in programs.error("run_loads_matrices", 528)


PHASE_MISTAKES = {1: "before it is initialised", 3: "before it is initialised", 4: "more arrivals"}


@pytest.mark.parametrize("mistake", [0, *PHASE_MISTAKES])
def test_barriers_in_shared_memory(programs, mistake):
    said = []
    for seed in SCHEDULES:
        out = ints(64)
        said.append(programs.error("run_phases", out, mistake, seed=seed))
        if mistake == 0:
            assert said[-1] == "" and list(out) == [7] * 64
    if mistake:
        assert sum(PHASE_MISTAKES[mistake] in message for message in said) > len(said) // 2, said


PRODUCT_MISTAKES = {
    "no_wgmma_fence": (2, "without wgmma_fence"),
    "no_second_fence": (4, "without wgmma_fence"),
    "thread_writes": (5, "a product reads shared memory that threads wrote without a proxy fence"),
    "writes_before_copy": (8, "a copy overwrites shared memory that threads wrote without a proxy fence"),
    "unfenced_barrier": (10, "initialisation nobody fenced"),
    "short_of_atom": (11, "not 32 bytes of an atom"),
}
"""Shown by every schedule."""

PRODUCT_RACES = {"no_full_wait": 1, "no_wgmma_wait": 3, "releases_early": 7, "leaves_copy": 9}
"""Shown by some: wrong results, or an error."""


def product(programs, mistake: int, seed: int) -> tuple[str, set]:
    """What the twin says, and the distinct results: 64 everywhere for two products of 32 ones."""
    a, b = (ctypes.c_int8 * (64 * 128))(*[1] * 64 * 128), (ctypes.c_int8 * (128 * 128))(*[1] * 128 * 128)
    out = ints(128)
    return programs.error("run_product", a, b, out, mistake, seed=seed), set(out)


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("right", [0, 6], ids=["plain", "thread_writes_and_fences"])
def test_right_products_pass(programs, seed, right):
    assert product(programs, right, seed) == ("", {64})


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("mistake", PRODUCT_MISTAKES)
def test_mistakes_around_products_show(programs, mistake, seed):
    number, message = PRODUCT_MISTAKES[mistake]
    assert message in product(programs, number, seed)[0]


@pytest.mark.parametrize("race", PRODUCT_RACES)
def test_races_around_products_show(programs, race):
    found = [product(programs, PRODUCT_RACES[race], seed) for seed in SCHEDULES]
    assert sum(result != ("", {64}) for result in found) >= 2, found


@pytest.mark.parametrize("seed", SCHEDULES)
def test_products_are_waited_for(programs, seed):
    assert "before its products were waited for" in programs.error("run_unwaited", seed=seed)


def test_launches_are_those_that_the_part_takes(programs):
    def said(x=1, y=1, z=1, threads=64, shared=0, arch=90):
        return programs.error("run_nothing", x, y, z, threads, shared, arch=arch)

    assert said() == said(0) == said(y=65535) == ""
    assert "96 threads a block, at most 64" in said(threads=96)
    assert "at most 2147483647 x 65535 x 65535" in said(y=65536) and "65535" in said(z=65536)
    for arch, kilobytes in ((75, 64), (80, 163), (86, 99), (89, 99), (90, 227)):
        assert said(shared=kilobytes * 1024, arch=arch) == ""
        assert "bytes of shared memory" in said(shared=kilobytes * 1024 + 1, arch=arch)


def test_a_seed_gives_the_same_schedule_again(programs):
    source = (ctypes.c_int * 4)(5, 6, 7, 8)

    def early(seed):
        out = ints(64)
        programs.error("run_reads_early", out, source, 0, seed=seed)
        return list(out)

    assert early(3) == early(3) != early(4)
