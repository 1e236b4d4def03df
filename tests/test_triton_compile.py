"""Every Triton kernel and config compiles, without a GPU, to what its table claims.

The compiler runs in processes of its own, since this one interprets kernels (see conftest).
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from vqvit.kernels import gemm_s8

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = {80: "mma.sync.aligned.m16n8k32", 90: "wgmma.mma_async.sync.aligned.m64n"}
LEAST_SHARED_BYTES = 99 * 1024  # of sm_86 and sm_89, which run the configs of sm_80


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[int, list[dict]]:
    """The rows of the compile gate by architecture."""
    folder = tmp_path_factory.mktemp("compile_gate")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    gates = {}
    for arch in INSTRUCTIONS:
        command = [sys.executable, ROOT / "benchmarks" / "compile_gate.py", "--arch", str(arch)]
        with open(folder / f"{arch}.log", "w") as log:
            gates[arch] = subprocess.Popen(
                [*command, "--csv", folder / f"{arch}.csv"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    rows = {}
    for arch, gate in gates.items():
        status = gate.wait(timeout=1800)
        log = (folder / f"{arch}.log").read_text()
        assert status in (0, 1) and "Traceback" not in log, log[-3000:]
        with open(folder / f"{arch}.csv", newline="") as file:
            rows[arch] = list(csv.DictReader(file))
    return rows


@pytest.mark.parametrize("arch", INSTRUCTIONS)
def test_nothing_spills_exceeds_shared_memory_or_rounds_inexactly(tables, arch):
    assert tables[arch]
    assert [(r["case"], r["problems"]) for r in tables[arch] if r["problems"]] == []


@pytest.mark.parametrize("arch", INSTRUCTIONS)
def test_gemm_runs_on_the_tensor_core_of_its_architecture(tables, arch):
    gemms = [r for r in tables[arch] if r["kernel"] in ("int8_gemm_kernel", "int8_compensated_kernel")]
    assert gemms and all(r["tensor_core"].startswith(INSTRUCTIONS[arch]) for r in gemms)


@pytest.mark.parametrize("arch", INSTRUCTIONS)
def test_as_many_blocks_share_a_multiprocessor_as_the_table_says(tables, arch):
    for c in (*gemm_s8.GEMM_CONFIGS[arch], *gemm_s8.GROUP_CONFIGS[arch]):
        tile = f"BLOCK_M={c.block_m} BLOCK_N={c.block_n} BLOCK_K={c.block_k}"
        groups = c in gemm_s8.GROUP_CONFIGS[arch]
        compiled = [r for r in tables[arch] if tile in r["config"] and r["kernel"] == "int8_gemm_kernel"]
        compiled = [r for r in compiled if ("group" in r["case"] or "qkv" in r["case"]) == groups]
        compiled = [r for r in compiled if int(r["num_warps"]) == c.num_warps]
        assert compiled, f"{tile} was not compiled"
        assert all(int(r["ctas_per_sm"]) >= c.ctas for r in compiled), tile


@pytest.mark.parametrize("arch", INSTRUCTIONS)
def test_gemms_copy_asynchronously_into_a_main_loop(tables, arch):
    gemms = [r for r in tables[arch] if r["kernel"] == "int8_gemm_kernel" and "K_UNIT=16" in r["config"]]
    assert gemms
    for r in gemms:
        assert int(r["async_copies"]) > 0 and int(r["tma_copies"]) == 0, r["case"]
        assert 0 < int(r["loop_instructions"]) < int(r["instructions"]), r["case"]
        assert float(r["epilogue_per_output"]) > 0, r["case"]


def test_shares_of_k_take_a_second_launch(tables):
    for arch, rows in tables.items():
        kernels = {r["kernel"] for r in rows if "split K" in r["case"]}
        assert kernels == {"int8_gemm_kernel", "reduce_shares_kernel"}, arch


def test_configs_of_sm_80_fit_smaller_parts(tables):
    assert max(int(r["shared_bytes"]) for r in tables[80]) <= LEAST_SHARED_BYTES
