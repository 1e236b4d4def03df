"""benchmarks/gpu.py rehearsed on the CPU: every section in miniature on the CPU's backends, as a user runs it."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_kernels
import gpu_models
import gpu_summary
import gpu_timing
import pytest
import roofline
import torch

from vqvit import backends

pytest.importorskip("triton")
pytest.importorskip("transformers")

BACKENDS = gpu_timing.native_backends("cpu")
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


def test_every_op_is_compared_on_every_backend(rehearsal):
    from vqvit import ops

    found = rows(rehearsal, "correctness")
    assert {(row["op"], row["backend"]) for row in found} == {
        (op, backend) for op in (*ops.NAMES, "vit-ti logits") for backend in BACKENDS
    }
    assert all(int(row["cases"]) > 0 and row["wrong"] == "0" and not row["note"].startswith("stopped") for row in found)


def test_kernels_models_and_timeline_have_times(rehearsal):
    kernels = rows(rehearsal, "kernels")
    for backend in BACKENDS:
        assert {"qkv", "attn_out", "fc1", "fc2", "attention", "attention_quantize", *gpu_summary.ROW_OPS} == {
            row["what"] for row in kernels if row["backend"] == backend
        }
    assert {row["what"]: row["share_of_peak"] for row in kernels if row["backend"] == "torch"} == {
        "int8 peak": "1.000", "copy peak": "1.000",
    }  # fmt: skip
    assert all(float(row["us"]) > 0 for row in kernels if row["backend"] != "torch")
    engines = {(row["engine"], row["backend"]): row for row in rows(rehearsal, "models")}
    for engine in (("bf16 eager", "torch"), *(("vqvit eager", backend) for backend in BACKENDS)):
        assert float(engines[engine]["us"]) > 0
    assert all(float(row["us_per_block"]) > 0 for row in rows(rehearsal, "timeline"))


def test_the_guard_reports_every_layer(rehearsal):
    found = rows(rehearsal, "guard")
    assert {row["backend"] for row in found} == set(BACKENDS)
    assert {row["status"] for row in found} <= {"int8", "skipped"}
    assert all("x of float" in row["reason"] for row in found if row["status"] == "skipped")
    assert {row["role"] for row in found} <= {"block", "patch_embed", "head", *roofline.SHAPES["vit-b16"].linears}


def test_tuning_writes_a_table_that_the_kernels_read(rehearsal):
    from vqvit.kernels import launch, tuned

    found = rows(rehearsal, "tune")
    device = launch.Device(launch.INTERPRETER, 1)
    table = tuned.read(rehearsal / "out" / f"tuned-{tuned.file_name(device)}", device)
    assert table.source == "measured" and len(table.choices) == len(found) > 5
    assert {row["kind"] for row in found} == set(tuned.KINDS)
    assert all(row["wrong"] == "0" and float(row["gain"]) >= 1 for row in found)


def test_rows_carry_their_provenance_and_the_summary_all_sections(rehearsal):
    assert all(row["command"].startswith("python") and row["torch"] for row in rows(rehearsal, "models"))
    summary = (rehearsal / "out" / "gpu.md").read_text()
    assert all(f"## {section}:" in summary for section in gpu.SHARES)
    targets = summary.split("## targets")[1].split("##")[0]
    assert targets.count("not measured") == len(BACKENDS) * (4 + 6 + len(gpu_models.TARGETS))


def kernel(what: str, engine: str, share: str, backend: str = "triton", batch: int = 256) -> dict:
    names = {"arch": "vit-b16", "batch": batch, "what": what, "engine": engine, "backend": backend}
    return {**names, "share_of_peak": share}


def test_verdicts():
    kernels = [
        kernel("fc2", "vqvit", "0.590"),
        kernel("fc2", "vqvit per token", "0.600"),
        kernel("fc2", "int_mm", "0.900"),
        kernel("fc1", "vqvit", "0.449"),
        kernel("fc1", "vqvit", "0.700", backend="cuda"),
        kernel("qkv", "vqvit", "0.700", batch=64),
        kernel("quantize_qkv", "vqvit", "0.81"),
    ]
    model = {"arch": "vit-l16", "batch": 8, "engine": "vqvit graphed", "backend": "triton", "over_best_bf16": "1.79"}
    slower = {**model, "engine": "vqvit eager", "over_best_bf16": "9.00"}
    missing = {**model, "batch": 1, "over_best_bf16": ""}
    found = {
        (row["target"].split(",")[0].split(" at ")[0], row["backend"]): (row["wanted"], row["reached"], row["verdict"])
        for row in gpu_summary.verdicts(kernels, [model, slower, missing], ("cuda", "triton"))
    }
    assert found["fc2", "triton"] == ("0.60", "0.60", "reached")
    assert found["fc1", "triton"] == ("0.45", "0.45", "missed"), "what is shown is rounded, what is compared is not"
    assert found["fc1", "cuda"] == ("0.45", "0.70", "reached")
    assert found["qkv", "triton"] == ("0.45", "", "not measured")
    assert found["quantize_qkv", "triton"] == ("0.80", "0.81", "reached")
    assert found["vit-l16 batch 8", "triton"] == ("1.80", "1.79", "missed")
    assert found["vit-l16 batch 1", "triton"][2] == found["vit-l16 batch 8", "cuda"][2] == "not measured"
    assert len(found) == 2 * (4 + 6 + 8)


def test_native_backends_are_those_of_the_preference_that_can_run(monkeypatch):
    monkeypatch.setitem(backends.PREFERENCE, "cuda", ("cuda", "triton", "reference"))
    able = {"cuda", "triton", "reference"}
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name in able else "no GPU")
    assert gpu_timing.native_backends("cuda") == ("cuda", "triton")
    able.remove("cuda")
    assert gpu_timing.native_backends("cuda") == ("triton",)
    able.remove("triton")
    assert gpu_timing.native_backends("cuda") == ("reference",)


def test_attention_that_stores_codes_is_timed_in_one_launch_and_in_two(monkeypatch):
    from vqvit.kernels import attention_s8

    run_here = gpu_timing.Run(torch.device("cpu"), ("triton",), False, time.monotonic() + 100)
    _, shape = next((batch, shape) for _, batch, shape in gpu_kernels.kernel_shapes(run_here))
    _, stored = gpu_kernels.attention_calls(run_here, "triton", 1, shape)
    launched = []
    right = attention_s8.int8_attention
    monkeypatch.setattr(attention_s8, "int8_attention", lambda *a: launched.append("attention") or right(*a))
    with backends.backend("triton"):
        one, two = stored["one launch"](), stored["two launches"]()
    assert launched == ["attention"] and all(map(torch.equal, one, two))
    video = roofline.Shape(width=128, mlp=256, heads=2, blocks=1, tokens=300)
    assert list(gpu_kernels.attention_calls(run_here, "triton", 1, video)[1]) == ["vqvit"]
    assert list(gpu_kernels.attention_calls(run_here, "cuda", 1, shape)[1]) == ["vqvit"]


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="one backend only")
def test_kernels_models_and_correctness_run_on_every_backend(monkeypatch):
    names = ("reference", "cpu")
    here = gpu_timing.Run(torch.device("cpu"), names, False, time.monotonic() + 300)
    assert {row["backend"] for row in gpu_kernels.kernels(here)} == {"torch", *names}
    used = []
    right = backends.function
    monkeypatch.setattr(backends, "function", lambda op, d: used.append(backends.selected(d)) or right(op, d))
    found = list(gpu_models.models(here))
    assert {(row["engine"], row["backend"]) for row in found if row["us"]} >= {("vqvit eager", name) for name in names}
    assert set(used) >= set(names)
    monkeypatch.setattr(gpu, "CASES", {"int8_mm": gpu.CASES["int8_mm"]})
    monkeypatch.setattr(gpu, "whole_model", lambda run: iter(()))
    assert [(row["backend"], row["wrong"]) for row in gpu.correctness(here)] == [(name, 0) for name in names]


def section(*pauses: float):
    """A section that yields a row after each pause, while there is time."""

    def rows_of(run):
        for pause in pauses:
            if run.late:
                return
            time.sleep(pause)
            yield {"pause": pause}

    return rows_of


def test_sections_share_the_time_and_pass_on_what_they_leave(monkeypatch, tmp_path):
    deadlines = {}

    def note(name):
        def rows_of(run):
            deadlines[name] = run.deadline
            yield {"name": name}

        return rows_of

    monkeypatch.setattr(gpu, "sections", lambda folder: {name: note(name) for name in gpu.SHARES})
    monkeypatch.setattr(gpu, "verdicts", lambda *_: [{"target": "none"}])
    start = time.monotonic()
    assert not gpu.run_all(list(gpu.SHARES), torch.device("cpu"), True, 100, tmp_path)
    ends = [deadlines[name] - start for name in gpu.SHARES]
    assert ends == sorted(ends) and ends[0] == pytest.approx(100 * gpu.SHARES["correctness"], abs=5)
    assert ends[-1] == pytest.approx(100, abs=5)


def test_what_outlasts_the_time_is_cut_off_and_summed_up(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(gpu, "sections", lambda folder: {"kernels": section(0, 60), "models": section(0)})
    monkeypatch.setattr(gpu, "verdicts", lambda *_: [{"target": "none"}])
    start = time.monotonic()
    assert not gpu.run_all(["kernels", "models"], torch.device("cpu"), True, 0.3, tmp_path)
    assert time.monotonic() - start < 30
    summary = (tmp_path / "gpu.md").read_text()
    assert "## kernels: 1 rows" in summary and "## models" not in summary


def test_correctness_lets_the_end_of_time_through(monkeypatch):
    def over(*_):
        raise gpu.OutOfTime

    here = gpu_timing.Run(torch.device("cpu"), ("reference",), False, time.monotonic() + 100)
    monkeypatch.setattr(backends, "function", lambda op, device: over)
    with pytest.raises(gpu.OutOfTime):
        list(gpu.correctness(here))


def test_a_wrong_result_fails_the_run(tmp_path):
    """Of two ops and a model of one block, one op is off by one."""
    code = (
        "import functools, runpy, sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import op_cases\n"
        "from vqvit import engines, reference\n"
        "op_cases.CASES = {op: op_cases.CASES[op] for op in ('int8_mm', 'quantize_per_token')}\n"
        "engines.random_model = functools.partial(engines.random_model, blocks=1)\n"
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
    if not torch.cuda.is_available():
        done = run(folder=tmp_path)
        assert done.returncode == 2 and "expected a CUDA device" in done.stderr
        assert not (tmp_path / "out").exists()
