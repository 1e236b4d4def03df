"""The twin's products, copies and swizzle put every element where the instructions of a GPU do, by CuTe's layouts; the
compiled kernels describe their operands with CuTe's constants."""

import ctypes
import re
import shutil
import subprocess

import golden_fragments as golden
import pytest
import torch

from vqvit import _build, native

CSRC = native.csrc_directory()
if CSRC is None or shutil.which("g++") is None:
    pytest.skip("needs the C++ sources and g++", allow_module_level=True)

SOURCE = r"""
#include "hopper.h"
#define KERNEL(threads, name, ...) VQVIT_KERNEL(threads, 1, name, __VA_ARGS__)
#include <string>

namespace vqvit {
std::string reason;
int twin_status(const char* error) { reason = error == nullptr ? "" : error; return error != nullptr; }

// Waits for boxes of both operands, whole rows of 128 bytes.
template <class Copy>
void fetch(SharedBarrier* full, const Copy& copy) {
    if (thread_id() == 0) {
        barrier_init(full, 1);
        barrier_init_done();
    }
    block_barrier();
    if (thread_id() == 0) copy();
    barrier_wait(full, 0);
}
KERNEL(kWarpgroup, copied, TensorMap map, int8_t* out) {
    auto* tile = reinterpret_cast<int8_t*>(shared_memory());
    const int bytes = map.box_rows * kSwizzleBytes;
    auto* full = reinterpret_cast<SharedBarrier*>(tile + bytes);
    fetch(full, [&] {
        barrier_expect(full, bytes);
        copy_box(tile, map, 0, 0, full);
    });
    for (int i = thread_id(); i < bytes; i += kWarpgroup) out[i] = tile[i];
}
KERNEL(kWarpgroup, multiplied, TensorMap a_map, TensorMap b_map, int32_t* out) {
    auto* a = reinterpret_cast<int8_t*>(shared_memory());
    int8_t* b = a + 64 * kSwizzleBytes;
    auto* full = reinterpret_cast<SharedBarrier*>(b + kWgmmaColumns * kSwizzleBytes);
    fetch(full, [&] {
        barrier_expect(full, (64 + kWgmmaColumns) * kSwizzleBytes);
        copy_box(a, a_map, 0, 0, full);
        copy_box(b, b_map, 0, 0, full);
    });
    int32_t d[kWgmmaColumns / 8][4];
    wgmma_fence();
    for (int k = 0; k < kSwizzleBytes; k += 32) wgmma_s8(d, a + k, b + k, k > 0);
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int i = 0; i < kWgmmaColumns / 2; ++i) out[thread_id() * (kWgmmaColumns / 2) + i] = d[i / 4][i % 4];
}
KERNEL(kWarp, fragments, const uint32_t* a, const uint32_t* b, int32_t* out) {
    const uint32_t* of_a = a + 4 * lane_id();
    const uint32_t words[4] = {of_a[0], of_a[1], of_a[2], of_a[3]};
    int32_t d[4] = {};
    mma_s8(d, words, b[2 * lane_id()], b[2 * lane_id() + 1]);
    for (int i = 0; i < 4; ++i) out[4 * lane_id() + i] = d[i];
}
KERNEL(kWarp, matrices, const uint32_t* from, uint32_t* out, bool transposed) {
    auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
    for (int i = 0; i < 4; ++i) shared[4 * lane_id() + i] = from[4 * lane_id() + i];
    warp_barrier();
    uint32_t r[4];
    if (transposed) load_matrices_transposed(r, shared + 4 * lane_id()); else load_matrices(r, shared + 4 * lane_id());
    for (int i = 0; i < 4; ++i) out[4 * lane_id() + i] = r[i];
}
TensorMap whole(const int8_t* data, int rows) { return {data, rows, kSwizzleBytes, kSwizzleBytes, rows}; }
}  // namespace vqvit
using namespace vqvit;
extern "C" {
const char* last() { return reason.c_str(); }
int run_copied(const int8_t* from, int rows, int8_t* out) {
    return launch(copied, Dim3(1), kWarpgroup, rows * kSwizzleBytes + 64, nullptr, whole(from, rows), out);
}
int run_multiplied(const int8_t* a, const int8_t* b, int32_t* out) {
    const int bytes = (64 + kWgmmaColumns) * kSwizzleBytes + 64;
    return launch(multiplied, Dim3(1), kWarpgroup, bytes, nullptr, whole(a, 64), whole(b, kWgmmaColumns), out);
}
int run_fragments(const uint32_t* a, const uint32_t* b, int32_t* out) {
    return launch(fragments, Dim3(1), kWarp, 0, nullptr, a, b, out);
}
int run_matrices(const uint32_t* from, uint32_t* out, int transposed) {
    return launch(matrices, Dim3(1), kWarp, 512, nullptr, from, out, transposed != 0);
}
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a program of `SOURCE` on tensors and numbers."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "programs.cpp").write_text(SOURCE)
    files = [folder / "programs.cpp", *sorted((CSRC / "cuda").glob("twin*.cpp"))]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    compiler = _build.compiler(_build.CUDA_TWIN)
    subprocess.run([compiler, *flags, *map(str, files), "-o", folder / "programs.so"], check=True)
    library = ctypes.CDLL(str(folder / "programs.so"))
    library.last.restype = ctypes.c_char_p

    def call(name: str, *arguments: object) -> None:
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        assert getattr(library, name)(*pointers) == 0, library.last().decode()

    return call


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """int8 of the whole range."""
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def registers(matrix: torch.Tensor, layout: golden.Layout) -> torch.Tensor:
    """(lanes, bytes) of the registers that hold a matrix."""
    return matrix.T.flatten()[torch.tensor(layout.expand())].contiguous()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.int() @ b.int().T


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.LAYOUTS)
def test_the_table_is_what_cute_printed(name):
    layout = golden.LAYOUTS[name]
    indices = [index for thread in layout.expand() for index in thread]
    assert golden.checksum(indices) == layout.checksum
    assert sorted(indices) == list(range(len(indices))), "every element has one place"


@pytest.mark.parametrize("rows", golden.SWIZZLE_CHECKSUMS)
def test_the_swizzle_is_what_cute_printed(rows):
    bytes_of = [golden.swizzled(row, column) for row in range(rows) for column in range(128)]
    assert golden.checksum(bytes_of) == golden.SWIZZLE_CHECKSUMS[rows]


def test_the_descriptor_says_what_its_fields_say():
    fields = {"start": (0, 0), "leading": (16, 1), "stride": (32, 1024 // 16), "base offset": (49, 0), "type": (62, 1)}
    assert sum(value << bit for bit, value in fields.values()) == golden.DESCRIPTOR
    assert golden.K_STEP * 16 == 32 and golden.ROWS_STEP * 16 == 64 * 128
    assert all(golden.swizzled(64 + row, 0) - golden.swizzled(row, 0) == 64 * 128 for row in range(64))


# ---- the twin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [64, 128])
def test_copies_swizzle_as_the_descriptor_says(run, rows):
    tile, shared = values(rows, 128), torch.empty(rows * 128, dtype=torch.int8)
    run("run_copied", tile, rows, shared)
    places = torch.tensor([[golden.swizzled(row, column) for column in range(128)] for row in range(rows)])
    assert torch.equal(shared[places], tile)


def test_wgmma_leaves_each_product_in_its_register(run):
    """Element (m, n) of the result is 128 m + n, which tells where it is."""
    a, b = torch.zeros(64, 128, dtype=torch.int8), torch.zeros(128, 128, dtype=torch.int8)
    a[:, 0], a[:, 1], a[:, 2] = torch.arange(64), torch.arange(64), 1
    b[:, 0], b[:, 1], b[:, 2] = 127, 1, torch.arange(128)
    found = torch.empty(128, 64, dtype=torch.int32)
    run("run_multiplied", a, b, found)
    index = torch.tensor(golden.WGMMA_C.expand())
    assert torch.equal(found.long(), 128 * (index % 64) + index // 64)


@pytest.mark.parametrize("k", [*range(0, 128, 5), 127])
def test_wgmma_reads_each_column_of_its_operands(run, k):
    a, b, found = values(64, 128), values(128, 128, seed=1), torch.empty(128, 64, dtype=torch.int32)
    one_column = torch.zeros_like(a)
    one_column[:, k] = a[:, k]
    run("run_multiplied", one_column, b, found)
    assert torch.equal(found, product(one_column, b).T.flatten()[torch.tensor(golden.WGMMA_C.expand())])


def test_mma_reads_each_byte_of_a_where_it_is(run):
    """With a one at row m, column k of A the result has column k of B, all of whose elements differ, in row m."""
    b = torch.arange(-128, 128).to(torch.int8).view(8, 32)
    for lane, places in enumerate(golden.MMA_A.expand()):
        for byte, index in enumerate(places):
            one = torch.zeros(32, 16, dtype=torch.int8)
            one[lane, byte] = 1
            a = torch.zeros(16, 32, dtype=torch.int8)
            a[index % 16, index // 16] = 1
            found = torch.empty(32, 4, dtype=torch.int32)
            run("run_fragments", one, registers(b, golden.MMA_B), found)
            assert torch.equal(found, registers(product(a, b), golden.MMA_C)), (lane, byte)


def test_mma_reads_each_byte_of_b_where_it_is(run):
    a = values(16, 32)
    for lane, places in enumerate(golden.MMA_B.expand()):
        for byte, index in enumerate(places):
            one = torch.zeros(32, 8, dtype=torch.int8)
            one[lane, byte] = 1
            b = torch.zeros(8, 32, dtype=torch.int8)
            b[index % 8, index // 8] = 1
            found = torch.empty(32, 4, dtype=torch.int32)
            run("run_fragments", registers(a, golden.MMA_A), one, found)
            assert torch.equal(found, registers(product(a, b), golden.MMA_C)), (lane, byte)


def test_an_mma_is_four_of_half_the_size():
    """What device.h does on Turing: register i of A holds rows 8 (i % 2) ... and columns 16 (i / 2) ..., and so on."""
    a, b, c = (torch.tensor(golden.LAYOUTS[name].expand()) for name in ("MMA_A", "MMA_B", "MMA_C"))
    small_a, small_b, small_c = (
        torch.tensor(golden.LAYOUTS[name].expand()) for name in ("SMALL_MMA_A", "SMALL_MMA_B", "SMALL_MMA_C")
    )
    for i in range(4):
        quarter = a[:, 4 * i : 4 * i + 4]
        assert torch.equal(quarter % 16, small_a % 8 + 8 * (i % 2))
        assert torch.equal(quarter // 16, small_a // 8 + 16 * (i // 2))
    for half in range(2):
        assert torch.equal(b[:, 4 * half : 4 * half + 4], small_b + 8 * 16 * half)
        rows = c[:, 2 * half : 2 * half + 2]
        assert torch.equal(rows % 16, small_c % 8 + 8 * half) and torch.equal(rows // 16, small_c // 8)


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_hands_each_byte_to_its_lane(run, transposed):
    layout = golden.LDMATRIX_TRANSPOSED if transposed else golden.LDMATRIX
    bits = torch.tensor(layout.expand()).view(32, 16, 8)
    assert torch.equal(bits - bits[..., :1], torch.arange(8).expand(32, 16, 8)), "bytes stay whole"
    for place in (torch.arange(512) % 256, torch.arange(512) // 256):  # both digits of a byte's place
        source, found = place.to(torch.uint8), torch.empty(512, dtype=torch.uint8)
        run("run_matrices", source, found, transposed)
        assert torch.equal(found, source[bits[..., 0].flatten() // 8])


# ---- compiled kernels -----------------------------------------------------------------------------------------------

BASE = 0x8000
"""In the place of what the PTX computes an operand's address from: a stage, aligned to 1024 bytes."""

STEPS = {
    "or.b64": lambda x, y: x | y,
    "cvt.u64.u32": lambda x: x,
    "shr.u32": lambda x, y: x >> y,
    "and.b32": lambda x, y: x & y,
    "add.s32": lambda x, y: x + y,
    "or.b32": lambda x, y: x | y,
}


def evaluate(ptx: dict[str, list[tuple[str, list[str]]]], operand: str) -> int:
    """A register's value by the instructions with constants that lead to it; what others compute is `BASE`."""
    if not operand.startswith("%"):
        return int(operand)
    definitions = ptx.get(operand, [])
    if len(definitions) != 1:
        return BASE
    opcode, (first, *constants) = definitions[0]
    if opcode not in STEPS or any(x.startswith("%") for x in constants):
        return BASE
    return STEPS[opcode](evaluate(ptx, first), *map(int, constants))


def wgmma_groups(entry: str) -> list[list[tuple[int, int]]]:
    """(A, B) descriptors of each group of products of a kernel."""
    ptx, groups, group = {}, [], []
    for opcode, result, rest in re.findall(r"^\s*([a-z][\w.]+)\s+(%\w+), ([^;{}\n]+);", entry, re.MULTILINE):
        ptx.setdefault(result, []).append((opcode, rest.split(", ")))
    for event in re.findall(r"wgmma\.(?:mma_async.*?\}, (%\w+), (%\w+), add|(commit_group))", entry, re.DOTALL):
        if event[2]:
            groups.append(group)
            group = []
        else:
            group.append((evaluate(ptx, event[0]), evaluate(ptx, event[1])))
    return groups


def test_compiled_products_use_these_descriptors(tmp_path):
    """Every descriptor of every `wgmma` in the PTX, by 32 columns and by 64 rows."""
    try:
        nvcc = _build.compiler(_build.CUDA)
    except _build.BuildError as error:
        pytest.skip(str(error))
    source = min((CSRC / "cuda").glob("gemm_s8_wgmma*.cu"), key=lambda path: (path.stat().st_size, path.name))
    command = [nvcc, *_build.NVCC_FLAGS, f"-I{CSRC}", "-arch=sm_90a", "-ptx", "-o", tmp_path / "wgmma.ptx", source]
    subprocess.run([*map(str, command)], check=True)
    entries = re.split(r"\.entry ", (tmp_path / "wgmma.ptx").read_text())[1:]
    multiplying = [wgmma_groups(entry) for entry in entries if "wgmma.mma_async" in entry]
    assert len(multiplying) >= 3, "plain kernels of 64 and 128 rows, and one with group scales"
    seen = set()
    for groups in multiplying:
        for group in groups:
            tiles = len(group) // 4
            seen.add(tiles)
            first = group[0][0]
            assert first == golden.DESCRIPTOR | BASE >> 4
            for number, (a, b) in enumerate(group):
                k, rows = divmod(number, tiles)
                assert a - first == golden.K_STEP * k + golden.ROWS_STEP * rows
                assert b - first == golden.K_STEP * k + golden.ROWS_STEP * tiles, "B follows the rows of A"
    assert seen == {1, 2}
