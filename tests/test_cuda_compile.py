"""Every CUDA C++ kernel compiles, without a GPU, to what benchmarks/cuda_gate.py asks; the gate finds what is wrong."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from vqvit import _build

pytest.importorskip("triton")

import cuda_gate

ROOT = Path(__file__).resolve().parents[1]

FILES = {"80": ("gemm", "attention", "quantize"), "90a": ("wgmma",)}
"""By architecture: parts of the names of files. The whole table is benchmarks/results/cuda_gate.csv."""

try:
    _build.compiler(_build.CUDA)
except _build.BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The reports of all files, compiled side by side."""
    folder = tmp_path_factory.mktemp("cuda_gate")
    gates = {}
    for arch, names in FILES.items():
        for name in names:
            command = [sys.executable, ROOT / "benchmarks" / "cuda_gate.py", "--arch", arch, "--only", name]
            table = folder / f"{arch}-{name}.csv"
            with open(table.with_suffix(".log"), "w") as log:
                gates[table] = subprocess.Popen([*command, "--csv", table], stdout=log, stderr=subprocess.STDOUT)
    found = []
    for table, gate in gates.items():
        status = gate.wait(timeout=1800)
        log = table.with_suffix(".log").read_text()
        assert status in (0, 1) and "Traceback" not in log, log[-3000:]
        with open(table, newline="") as file:
            found += csv.DictReader(file)
    return found


def test_no_kernel_has_a_problem(rows):
    assert [(r["kernel"], r["arch"], r["problems"]) for r in rows if r["problems"]] == []


@pytest.mark.parametrize(
    ("arch", "kernel", "instruction"),
    [
        ("80", "gemm_kernel", "IMMA.16832"),
        ("80", "grouped_gemm_kernel", "IMMA.16832"),
        ("80", "compensated_gemm_kernel", "IMMA.16832"),
        ("80", "attention_resident_kernel", "IMMA.16832"),
        ("80", "attention_streaming_kernel", "IMMA.16832"),
        ("90a", "wgmma_kernel", "IGMMA.64x128x32"),
    ],
)
def test_products_run_on_tensor_cores(rows, arch, kernel, instruction):
    found = [r for r in rows if r["arch"] == arch and r["kernel"].split("<")[0] == kernel]
    assert found and all(r["tensor_core"].startswith(instruction) for r in found)


# ---- planted mistakes -----------------------------------------------------------------------------------------------

PLANTED = r"""
#include "CSRC/cuda/hopper.h"
using namespace vqvit;

#define LOOP(first, type) _Pragma("unroll 1") for (type i = first; i < n; i += 256)

__global__ void __launch_bounds__(256) divides_kernel(int* out, const int* in, int n) {
    LOOP(threadIdx.x, int) out[i] = i / in[i];
}
__global__ void __launch_bounds__(256) divides_long_kernel(int64_t* out, const int64_t* in, int64_t n) {
    LOOP(threadIdx.x, int64_t) out[i] = i % in[i];
}
__global__ void __launch_bounds__(256) divides_short_kernel(uint16_t* out, const uint16_t* in, int n) {
    LOOP(threadIdx.x, int) out[i] = in[i] / in[i + 1];
}
__device__ __noinline__ int quotient(int a, int b) { return a / b; }
__global__ void __launch_bounds__(256) divides_far_away_kernel(int* out, const int* in, int n) {
    LOOP(threadIdx.x, int) out[i] = quotient(i, in[i]);
}
__global__ void __launch_bounds__(256) divides_inside_kernel(int* out, const int* in, int n) {
    LOOP(threadIdx.x, int) {
        int x = i;
        for (int j = 0; j < in[0]; ++j) x /= in[j];
        out[i] = x;
    }
}
__global__ void __launch_bounds__(256) divides_before_kernel(int* out, const int* in, int n) {
    LOOP(threadIdx.x / in[0], int) out[i] = 3 * i;
}
__global__ void __launch_bounds__(256) divides_a_tile_kernel(int* out, const int* sizes, int tiles) {
    for (int tile = 0; tile < tiles; ++tile) {
        const int n = sizes[tile];
        LOOP(tile / sizes[tile + 1], int) out[i] = 3 * i;
    }
}
__global__ void __launch_bounds__(256) divides_floats_kernel(float* out, const float* in, int n) {
    LOOP(threadIdx.x / static_cast<int>(in[0]), int) out[i] = in[i] / in[i + 1];
}
__global__ void __launch_bounds__(1024, 1) spills_kernel(float* out, const float* in, int n) {
    float x[128];
    VQVIT_UNROLL
    for (int i = 0; i < 128; ++i) x[i] = in[i * 1024 + threadIdx.x];
    for (int k = 0; k < n; ++k) {
        VQVIT_UNROLL
        for (int i = 0; i < 128; ++i) x[i] = fmaf(x[i], x[(i + 37) % 128], x[(i + 1) % 128]);
    }
    VQVIT_UNROLL
    for (int i = 0; i < 128; ++i) out[i * 1024 + threadIdx.x] = x[i];
}
__global__ void unbounded_kernel(int* out) { out[threadIdx.x] = 1; }
__global__ void __launch_bounds__(1024, 4) crowds_kernel(int* out) { out[threadIdx.x] = 1; }
__global__ void __launch_bounds__(256) rounds_kernel(float* out) { out[threadIdx.x] = __fdividef(out[0], out[1]); }
"""

PLANTED_HOPPER = r"""
#include "CSRC/cuda/hopper.h"
using namespace vqvit;

template <bool Touches>
__device__ void multiply(int* out, int steps) {
    unsigned char* a = shared_memory();
    unsigned char* b = a + 64 * kSwizzleBytes;
    int32_t d[kWgmmaColumns / 8][4];
    VQVIT_UNROLL_BY(4)
    for (int i = 0; i < steps; ++i) {
        wgmma_fence();
        wgmma_s8(d, a, b, i > 0);
        if (Touches) d[0][0] += i;
        wgmma_s8(d, a + 32, b + 32, true);
        wgmma_commit();
        wgmma_wait<0>(d);
    }
    VQVIT_UNROLL
    for (int i = 0; i < kWgmmaColumns / 2; ++i) out[i * kWarpgroup + threadIdx.x] = d[i / 4][i % 4];
}
__global__ void __launch_bounds__(128, 1) touches_kernel(int* out, int steps) { multiply<true>(out, steps); }
__global__ void __launch_bounds__(128, 1) waits_kernel(int* out, int steps) { multiply<false>(out, steps); }
"""

PLANTED_REGISTERS = r"""
#include "CSRC/cuda/hopper.h"
using namespace vqvit;

__device__ void moves(int* out) {
    if (threadIdx.x < 128) return lower_registers<24>();
    raise_registers<240>();
    out[threadIdx.x] = 1;
}
__global__ void ignores_kernel(int* out) { moves(out); }
__global__ void __launch_bounds__(384, 1) moves_kernel(int* out) { moves(out); }
__global__ void __launch_bounds__(384, 1) keeps_kernel(int* out) { out[threadIdx.x] = 1; }
"""


def planted(folder: Path, text: str, arch: str) -> dict[str, cuda_gate.Report]:
    """Reports of a file's kernels by name."""
    source = folder / "cuda" / "planted.cu"
    source.parent.mkdir(exist_ok=True)
    source.write_text(text.replace("CSRC", str(ROOT / "csrc")))
    return {r.kernel: r for r in cuda_gate.compiled(source, arch)}


@pytest.fixture(scope="module", params=["75", "90a"])
def reports(request, tmp_path_factory) -> dict[str, cuda_gate.Report]:
    return planted(tmp_path_factory.mktemp("planted"), PLANTED, request.param)


@pytest.mark.parametrize("kernel", ["divides", "divides_long", "divides_short", "divides_far_away", "divides_inside"])
def test_an_integer_division_in_a_loop_of_stores_is_found(reports, kernel):
    assert "integer divisions in a loop of" in reports[f"{kernel}_kernel"].problems


@pytest.mark.parametrize("kernel", ["divides_before", "divides_a_tile", "divides_floats"])
def test_divisions_elsewhere_and_of_floats_pass(reports, kernel):
    assert reports[f"{kernel}_kernel"].problems == "" and reports[f"{kernel}_kernel"].store_loop_max > 0


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        ("spills", "bytes of stack"),
        ("unbounded", "no launch bounds"),
        ("crowds", "ptxas: Value of threads per SM is out of range"),
        ("rounds", "inexact: div.approx"),
    ],
)
def test_other_mistakes_are_found(reports, kernel, problem):
    assert problem in reports[f"{kernel}_kernel"].problems


def test_serialised_products_are_found(tmp_path):
    found = planted(tmp_path, PLANTED_HOPPER, "90a")
    assert "C7511: Potential Performance Loss: wgmma.mma_async" in found["touches_kernel"].problems
    assert "C7519: warpgroup.arrive is injected" in found["touches_kernel"].problems
    assert found["waits_kernel"].problems == "" and found["waits_kernel"].mma_loop_products == 4 * 2


def test_ignored_register_moves_are_found(tmp_path):
    found = planted(tmp_path, PLANTED_REGISTERS, "90a")
    assert "C7508: Potential Performance Loss: 'setmaxnreg' ignored" in found["ignores_kernel"].problems
    assert "2 setmaxnreg in the PTX, none in the SASS" in found["ignores_kernel"].problems
    assert found["keeps_kernel"].problems == ""


def test_registers_of_all_blocks_must_fit():
    assert cuda_gate.register_problems(168, 384, 1) == []  # 64512
    assert cuda_gate.register_problems(128, 128, 4) == []  # all of them
    (problem,) = cuda_gate.register_problems(129, 128, 4)  # 136 a thread
    assert problem == "4 blocks of 128 threads want 69632 registers, 65536 are there"


def test_missing_wide_copies_are_found(tmp_path):
    narrow = "__global__ void __launch_bounds__(32) quantize_residual_kernel(float* out) { out[1] = out[0]; }"
    wide = narrow.replace("float*", "float4*")
    assert planted(tmp_path, narrow, "90a")["quantize_residual_kernel"].problems == "no LDG.E.128"
    assert planted(tmp_path, wide, "90a")["quantize_residual_kernel"].problems == ""


def test_loops_are_counted_by_what_they_store(tmp_path):
    text = """
        __global__ void __launch_bounds__(32) loops_kernel(char* bytes, float4* packs, int n, int m) {
            #pragma unroll 1
            for (int i = threadIdx.x; i < n; i += 32) bytes[i] = i;
            #pragma unroll 1
            for (int i = threadIdx.x; i < m; i += 32) packs[i] = make_float4(i, i, i, i);
        }
    """
    found = planted(tmp_path, text, "80")["loops_kernel"]
    lengths = [int(part.split()[0]) for part in found.store_loops.split(", ")]
    assert [part.split()[1] for part in found.store_loops.split(", ")] == ["(1)", "(16)"]
    assert (found.store_loop_min, found.store_loop_max) == (min(lengths), max(lengths)) and max(lengths) < 20
    assert found.per_output_min is None, "only loops of GEMMs are divided by their outputs"
    assert found.code_bytes == 16 * found.instructions
