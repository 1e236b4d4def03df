"""Every CUDA C++ kernel compiles, without a GPU, to what benchmarks/cuda_gate.py asks: no spills, int8 tensor cores."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from vqvit import _build

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
FILES = {"80": ("gemm", "attention", "quantize"), "90a": ("wgmma",)}
"""By architecture: parts of the names of files. The whole table is benchmarks/results/cuda_gate.csv."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The reports of all files, compiled side by side."""
    try:
        _build.compiler(_build.CUDA)
    except _build.BuildError as error:
        pytest.skip(str(error))
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


def test_no_kernel_spills_serialises_or_rounds_inexactly(rows):
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
    found = [r for r in rows if r["arch"] == arch and r["kernel"].split("<")[0].endswith(kernel)]
    assert found and all(r["tensor_core"].startswith(instruction) for r in found)
