"""The twin of CUDA shows mistakes: missing barriers, divergent lanes, waits without end, copies read too early."""

import ctypes
import shutil
import subprocess

import pytest

from vqvit import _build, native

CSRC = native.csrc_directory()
if CSRC is None or shutil.which("g++") is None:
    pytest.skip("needs the C++ sources and g++", allow_module_level=True)

SOURCE = r"""
#include "hopper.h"
#include <string>

namespace vqvit {
std::string reason;
int twin_status(const char* error) { reason = error == nullptr ? "" : error; return error != nullptr; }

constexpr int kThreads = 64;

// Each thread reads what its neighbour wrote; forwards and backwards blocks differ without a barrier.
void neighbours(int* out, bool waits) {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    const int i = thread_id();
    shared[i] = i;
    if (waits) block_barrier();
    out[block_x() * kThreads + i] = shared[(i + 1) % kThreads];
}
void divergent() {
    if (lane_id() == 0) warp_any(true); else warp_barrier();
}
void half_arrives() {
    if (thread_id() < kThreads / 2) block_barrier();
}
void reads_early(int* out, const int* from, bool waits) {
    auto* shared = reinterpret_cast<int*>(shared_memory());
    copy_async_16(shared, from, 16);
    copy_async_commit();
    if (waits) copy_async_wait<0>();
    out[0] = shared[0];
}
void phases(int* out) {
    auto* barrier = reinterpret_cast<SharedBarrier*>(shared_memory());
    auto* value = reinterpret_cast<int*>(shared_memory() + 64);
    if (thread_id() == 0) barrier_init(barrier, 1);
    block_barrier();
    if (thread_id() == 40) {
        *value = 7;
        barrier_arrive(barrier);
    }
    barrier_wait(barrier, 0);
    out[thread_id()] = *value;
}
}  // namespace vqvit
using namespace vqvit;
extern "C" {
const char* last() { return reason.c_str(); }
int run_neighbours(int* out, int waits) {
    return launch(neighbours, Dim3(2), kThreads, 1024, nullptr, out, waits != 0);
}
int run_divergent() { return launch(divergent, Dim3(1), kThreads, 0, nullptr); }
int run_half_arrives() { return launch(half_arrives, Dim3(1), kThreads, 0, nullptr); }
int run_reads_early(int* out, const int* from, int waits) {
    return launch(reads_early, Dim3(1), 1, 64, nullptr, out, from, waits != 0);
}
int run_phases(int* out) { return launch(phases, Dim3(1), kThreads, 128, nullptr, out); }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("twin")
    (folder / "mistakes.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    files = [folder / "mistakes.cpp", CSRC / "cuda" / "twin.cpp"]
    compiler = _build.compiler(_build.CUDA_TWIN)
    subprocess.run([compiler, *flags, *map(str, files), "-o", folder / "mistakes.so"], check=True)
    opened = ctypes.CDLL(str(folder / "mistakes.so"))
    opened.last.restype = ctypes.c_char_p
    return opened


def ints(count: int) -> ctypes.Array:
    return (ctypes.c_int * count)()


def test_a_missing_barrier_shows(library):
    right = [(i + 1) % 64 for i in range(64)] * 2
    out = ints(128)
    assert library.run_neighbours(out, 1) == 0 and list(out) == right
    assert library.run_neighbours(out, 0) == 0 and list(out) != right


def test_lanes_that_disagree_end_the_launch(library):
    assert library.run_divergent() == 1
    assert b"lanes of a warp disagree" in library.last()


def test_a_wait_without_end_is_an_error(library):
    assert library.run_half_arrives() == 1
    assert b"deadlock" in library.last()


def test_copies_arrive_when_they_are_waited_for(library):
    out, source = ints(1), (ctypes.c_int * 4)(5, 6, 7, 8)
    assert library.run_reads_early(out, source, 1) == 0 and out[0] == 5
    assert library.run_reads_early(out, source, 0) == 0 and out[0] != 5


def test_barriers_in_shared_memory_wait_for_their_phase(library):
    out = ints(64)
    assert library.run_phases(out) == 0 and list(out) == [7] * 64
