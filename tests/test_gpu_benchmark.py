"""benchmarks/gpu.py rehearsed on the CPU: every section in miniature on the reference backend, as a user runs it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--output", str(folder / "out"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def rows(folder: Path, section: str) -> list[dict]:
    with open(folder / "out" / f"gpu_{section}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    done = run("--device", "cpu", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_op_is_compared(rehearsal):
    from vqvit import ops

    found = rows(rehearsal, "correctness")
    assert {row["op"] for row in found} == {*ops.NAMES, "vit-ti logits"}
    assert all(int(row["cases"]) > 0 and row["wrong"] == "0" and not row["note"].startswith("stopped") for row in found)


def test_kernels_models_and_timeline_have_times(rehearsal):
    kernels = rows(rehearsal, "kernels")
    assert {"qkv", "attn_out", "fc1", "fc2", "attention", "layernorm_quantize"} <= {row["what"] for row in kernels}
    assert all(float(row["us"]) > 0 for row in kernels)
    engines = {row["engine"]: row for row in rows(rehearsal, "models")}
    assert float(engines["vqvit eager"]["us"]) > 0 and float(engines["bf16 eager"]["us"]) > 0
    assert all(float(row["us_per_block"]) > 0 for row in rows(rehearsal, "timeline"))


def test_rows_carry_their_provenance_and_the_summary_all_sections(rehearsal):
    assert all(row["command"].startswith("python") and row["torch"] for row in rows(rehearsal, "models"))
    summary = (rehearsal / "out" / "gpu.md").read_text()
    assert all(f"## {section}:" in summary for section in ("correctness", "kernels", "models", "timeline"))


def test_a_wrong_result_fails_the_run(tmp_path):
    code = (
        "import runpy, sys, torch\n"
        "from vqvit import reference\n"
        "right = reference.int8_mm\n"
        "import vqvit.registry, vqvit.backends as b\n"
        "find = b.function\n"
        "b.function = lambda op, device: (lambda *a: right(*a) + 1) if op == 'int8_mm' else find(op, device)\n"
        f"sys.argv = ['gpu.py', '--device', 'cpu', '--only', 'correctness', '--output', {str(tmp_path / 'out')!r}]\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    root = SCRIPT.parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    wrong = {row["op"]: int(row["wrong"]) for row in rows(tmp_path, "correctness")}
    assert wrong.pop("int8_mm") > 0
    assert not any(wrong.values())


def test_errors(tmp_path):
    done = run("--device", "cpu", "--only", "speed", folder=tmp_path)
    assert done.returncode == 2 and "expected sections among correctness" in done.stderr
    import torch

    if not torch.cuda.is_available():
        done = run(folder=tmp_path)
        assert done.returncode == 2 and "expected a CUDA device" in done.stderr
        assert not (tmp_path / "out").exists()
