"""Every Triton kernel and config compiles, without a GPU, to what its table claims.

The compiler runs in a process of its own, since this one interprets kernels (see conftest).
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
LEAST_SHARED_BYTES = 99 * 1024  # of sm_86 and sm_89, which run the configs of sm_80


@pytest.fixture(scope="module", params=[80, 90], ids=["sm_80", "sm_90"])
def reports(request, tmp_path_factory) -> list[dict]:
    """The rows of the compile gate for one architecture."""
    table = tmp_path_factory.mktemp("compile_gate") / f"{request.param}.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    gate = [
        sys.executable,
        str(ROOT / "benchmarks" / "compile_gate.py"),
        "--arch",
        str(request.param),
        "--csv",
        str(table),
    ]
    done = subprocess.run(gate, env=environment, capture_output=True, text=True, timeout=300)
    assert table.exists(), done.stderr[-2000:]
    assert "Error" not in done.stderr, done.stderr[-2000:]
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def test_nothing_spills_exceeds_shared_memory_or_rounds_inexactly(reports):
    assert [(r["case"], r["problems"]) for r in reports if r["problems"]] == []


def test_every_config_is_compiled(reports):
    row = 90 if reports[0]["arch"] == "90" else 80
    for c in gemm_s8.GEMM_CONFIGS[row]:
        tile = f"BLOCK_M={c.block_m} BLOCK_N={c.block_n} BLOCK_K={c.block_k}"
        assert any(tile in r["config"] for r in reports if r["kernel"] == "int8_gemm_kernel")


def test_gemm_runs_on_the_tensor_core_of_its_architecture(reports):
    instruction = "wgmma.mma_async.sync.aligned.m64n" if reports[0]["arch"] == "90" else "mma.sync.aligned.m16n8k32"
    gemms = [r for r in reports if r["kernel"] in ("int8_gemm_kernel", "int8_compensated_kernel")]
    assert gemms and all(r["tensor_core"].startswith(instruction) for r in gemms)


def test_as_many_blocks_share_a_multiprocessor_as_the_table_says(reports):
    row = 90 if reports[0]["arch"] == "90" else 80
    claims = {(str(c.block_m), str(c.block_n), str(c.block_k)): c.ctas for c in gemm_s8.GEMM_CONFIGS[row]}
    for r in reports:
        if r["kernel"] == "int8_gemm_kernel":
            config = dict(item.split("=") for item in r["config"].split())
            assert int(r["ctas_per_sm"]) >= claims[config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]], r["case"]


def test_configs_of_sm_80_fit_smaller_parts(reports):
    if reports[0]["arch"] == "80":
        assert max(int(r["shared_bytes"]) for r in reports) <= LEAST_SHARED_BYTES
