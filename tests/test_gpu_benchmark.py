"""benchmarks/gpu.py rehearsed on the CPU, as a user runs it: processes die in every way, and all other rows arrive."""

import dataclasses
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_kernels
import gpu_models
import gpu_ops
import gpu_output
import gpu_plan
import gpu_rehearse
import gpu_summary
import gpu_timing
import pytest
import roofline
import torch
from gpu_rehearse import PLANTED

from vqvit import backends, children, device_checks, probe

pytest.importorskip("triton")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
MOST_FILES = 8
"""A machine that is lent may give back no more."""


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)


# ---- the rehearsal --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    folder: Path
    stdout: str

    def rows(self, section: str) -> list[dict]:
        return gpu_output.read_rows(self.folder, section)

    def found(self, section: str) -> list[dict]:
        """Rows that a child wrote, without those that stand for its deaths."""
        return [row for row in self.rows(section) if not row.get("item")]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Rehearsal:
    folder = tmp_path_factory.mktemp("rehearsal") / "out"
    done = run("--rehearse", "--output", str(folder), cwd=folder.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return Rehearsal(folder, done.stdout)


def test_every_planted_fault_is_told_and_the_rehearsal_passes(rehearsal):
    last = rehearsal.stdout.strip().splitlines()[-1]
    assert re.match(rf"REHEARSAL passed: {len(PLANTED)} faults, \d+ rows", last)
    for name, planted in PLANTED.items():
        assert f"planted {planted.fault} in {name}" in rehearsal.stdout


def test_few_files_come_out_and_no_cache(rehearsal):
    names = sorted(path.relative_to(rehearsal.folder).as_posix() for path in rehearsal.folder.rglob("*"))
    assert names == [gpu_output.ARCHIVE, gpu_output.SUMMARY, "tuned-sm_0-1.json"] and len(names) <= MOST_FILES


def test_an_item_that_kills_its_process_is_a_wrong_row_and_its_log_is_kept(rehearsal):
    for name, planted in PLANTED.items():
        rows = [row for row in rehearsal.rows(gpu_plan.section_of(name)) if row.get("process") == name]
        assert [row["item"] for row in rows] == [planted.item] and rows[0]["wrong"] == "1"
        assert planted.said in rows[0]["note"]
    with tarfile.open(rehearsal.folder / gpu_output.ARCHIVE) as archive:
        names = archive.getnames()
    dead = {name.replace("/", "-") for name, planted in PLANTED.items() if not planted.restarted}
    assert {name for name in names if name.startswith("log_")} <= {f"log_{name}.txt" for name in dead}


def test_every_op_case_but_the_deadly_arrives_from_every_backend(rehearsal):
    found = {(row["backend"], f"{row['op']} {row['case']}") for row in rehearsal.found("ops")}
    for backend in gpu_rehearse.BACKENDS:
        planted = PLANTED[f"ops/{backend}"]
        wanted = {f"{op} {case}" for op, case in gpu_ops.items(quick=True)}
        missing = wanted - {case for name, case in found if name == backend}
        assert missing == (set() if planted.fault == "poisoned" else {planted.item})
    wrong = [row for row in rehearsal.found("ops") if row["wrong"] != "0"]
    assert [(row["backend"], row["op"], row["case"]) for row in wrong] == [("cpu", "int8_linear", "odd")]
    assert "illegal memory access" in wrong[0]["note"]


def test_bits_of_every_op_at_every_size_arrive_but_one(rehearsal):
    found = rehearsal.found("bits")
    size = device_checks.SIZES["tiny"]
    assert {(row["op"], int(row["m"])) for row in found} == {
        (op, images * size.tokens) for op in device_checks.CHECKS for images in size.images
    } - {("int8_linear_qkv", 17)}
    assert all(row["wrong"] == "0" and int(row["values"]) > 0 for row in found)
    assert {row["against"] for row in found if row["op"] == "int8_mm"} == {"torch._int_mm"}
    assert {(row["backend"], row["against"]) for row in found if row["op"] != "int8_mm"} == {("cuda", "triton")}


def test_the_probe_ran_every_case(rehearsal):
    wanted = {f"{family}/{sizes}" for family, cases in probe.TWIN.items() for sizes in cases}
    assert {row["case"]: row["wrong"] for row in rehearsal.found("probe")} == dict.fromkeys(wanted, "0")


def test_times_and_tables(rehearsal):
    kernels = rehearsal.found("kernels")
    assert {row["what"] for row in kernels if row["backend"] == "cpu"} == {
        "qkv", "attn_out", "fc1", "fc2", "attention", "attention_quantize", *gpu_summary.ROW_OPS,
    }  # fmt: skip
    engines = {(row["engine"], row["backend"]): row for row in rehearsal.found("models")}
    deadly = tuple(PLANTED["models/tiny-1"].item.partition(",")[0].split(" on "))
    for engine in (("bf16 eager", "torch"), *((n, b) for n in gpu_models.CONTENDERS for b in ("cuda", "cpu"))):
        if engine == deadly:
            assert engines[engine]["us"] == "" and engines[engine]["note"] == "it killed its process"
        else:
            assert float(engines[engine]["us"]) > 0
    timeline = rehearsal.found("timeline")
    assert {row["engine"] for row in timeline} == {"bf16 eager"}, "the next one killed the process"
    assert all(float(row["us_per_block"]) > 0 for row in timeline)


def test_the_guard_reports_every_layer(rehearsal):
    found = rehearsal.found("guard")
    assert {row["status"] for row in found} <= {"int8", "skipped"}
    assert {row["role"] for row in found} <= {"block", "patch_embed", "head", *roofline.SHAPES["vit-b16"].linears}


def test_tuning_writes_a_table_that_the_kernels_read(rehearsal):
    from vqvit.kernels import launch, tuned

    found, device = rehearsal.found("tune"), launch.Device(launch.INTERPRETER, 1)
    table = tuned.read(rehearsal.folder / f"tuned-{tuned.file_name(device)}", device)
    assert table.source == "measured" and len(table.choices) == len(found) > 3
    assert {row["kind"] for row in found} == set(tuned.KINDS)
    assert all(row["wrong"] == "0" and float(row["gain"]) >= 1 for row in found)


def test_rows_carry_their_provenance_and_the_summary_ends_with_the_verdicts(rehearsal):
    assert all(row["command"].startswith("python") and row["torch"] for row in rehearsal.rows("models"))
    summary = (rehearsal.folder / gpu_output.SUMMARY).read_text()
    assert all(f"## {section}:" in summary for section in gpu_rehearse.SECTIONS)
    last = summary.strip().splitlines()[-1]
    assert last.startswith("VERDICT: 7 processes with a fault") and last in rehearsal.stdout
    assert "probe: right" in summary and "ops: WRONG" in summary and "logits: DIED" in summary


# ---- faults that must be found --------------------------------------------------------------------------------------


def tiny(folder: Path, *sections: str, names: tuple[str, ...] = ("cpu",)) -> list[children.Child]:
    settings = gpu_plan.Settings("cpu", names, 2, folder, gpu_rehearse.TWIN, tiny=True)
    return gpu_plan.children(settings, sections)


@pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU kernels cannot run here")
def test_a_wrong_result_fails_the_run(tmp_path):
    item = "int8_mm odd"
    planned = [
        gpu_rehearse.plant(c, gpu_rehearse.Planted("wrong", item, "")) if c.name == "ops/cpu" else c
        for c in tiny(tmp_path, "ops")
    ]
    output = gpu_output.Output(tmp_path / "out", {"device": "a CPU"}, ("ops",))
    output.outcomes += children.run(planned, tmp_path, 2, time.monotonic() + 100)
    wrong = {f"{row['op']} {row['case']}" for row in output.rows("ops") if row["wrong"]}
    cases = [f"{op} {case}" for op, case in gpu_ops.items(quick=True)]
    assert wrong == set(cases[cases.index(item) :])
    assert [o.name for o in output.wrong()] == ["ops/cpu"]
    lines = list(output.verdicts())
    assert any(line.startswith("ops: WRONG") for line in lines) and lines[-1].startswith("VERDICT: 1 processes")


def test_a_clean_run_is_right_and_one_that_lacks_a_process_is_not(tmp_path):
    row = {"op": "int8_mm", "wrong": 0}
    done = children.Outcome("ops/cuda", rows=[row])
    left_out = children.Outcome("guard/cuda", problem="not started: the time is over", started=False)
    for optional, verdict in ((("guard/cuda",), "all right"), ((), "1 processes with a fault: guard/cuda")):
        output = gpu_output.Output(tmp_path, {}, ("ops", "guard"), frozenset(optional))
        output.outcomes += [done, left_out]
        assert list(output.verdicts())[-1] == f"VERDICT: {verdict}"


INTERRUPTED = f"""
import sys
sys.path[:0] = {[str(SCRIPT.parent), str(SCRIPT.parents[1]), str(Path(__file__).parent)]!r}
from pathlib import Path
import gpu, gpu_plan, gpu_output
from vqvit.children import Child
gpu.WRITE_SECONDS = 0.0
folder = Path(sys.argv[1])
planned = [Child("ops/a", ("sh", "quick.sh"), 1, 100), Child("ops/b", ("sh", "slow.sh"), 1, 100, after=("ops/a",))]
settings = gpu_plan.Settings("cpu", (), 1, folder / "work", {{}})
sys.exit(gpu.finish(gpu_output.Output(folder / "out", {{}}, ("ops",)), planned, settings, 100))
"""


@pytest.mark.parametrize(("kill", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 1)])
def test_a_killed_run_leaves_what_came_so_far(tmp_path, kill, status):
    """Archive and summary are whole, and hold the rows of the process that had ended and of the one that ran."""
    say = 'printf \'{"row": {"n": %d}}\\n{"end": true}\\n\' '
    (tmp_path / "quick.sh").write_text(f"{say} 1 > $VQVIT_ROWS\n")
    (tmp_path / "slow.sh").write_text(f"{say} 2 > $VQVIT_ROWS\nexec sleep 20\n")
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    for line in parent.stdout:
        if line.startswith("ops/b:"):
            break
    time.sleep(0.5)  # the row is printed just before it is written
    parent.send_signal(kill)
    rest = parent.communicate(timeout=30)[0]
    assert parent.returncode == status
    assert [row["n"] for row in gpu_output.read_rows(tmp_path / "out", "ops")] == ["1", "2"]
    last = (tmp_path / "out" / gpu_output.SUMMARY).read_text().rstrip().splitlines()[-1]
    assert last == "VERDICT: 1 processes with a fault: ops/b"
    assert kill == signal.SIGKILL or "interrupted: what came before is kept" in rest


def test_rows_of_an_unforeseen_form_do_not_end_a_run(tmp_path):
    output = gpu_output.Output(tmp_path, {"backends": ["cuda"]}, ("models",))
    output.add(children.Outcome("models/x", rows=[{"unforeseen": 1}]))
    output.write()
    assert gpu_output.read_rows(tmp_path, "models") == [{"unforeseen": "1"}]
    assert "no targets can be read off the rows: KeyError: 'arch'" in (tmp_path / gpu_output.SUMMARY).read_text()
    assert list(gpu_output.Output(tmp_path, {}, ()).verdicts()) == ["VERDICT: nothing ran"]


def test_sections_of_an_earlier_call_stay_in_the_archive(tmp_path):
    for section in ("ops", "models"):
        output = gpu_output.Output(tmp_path, {}, (section,))
        output.outcomes.append(children.Outcome(f"{section}/cuda", rows=[{"what": section}], problem="died", log="why"))
        output.write()
    assert [gpu_output.read_rows(tmp_path, s)[0]["what"] for s in ("ops", "models")] == ["ops", "models"]
    output = gpu_output.Output(tmp_path, {}, ("ops", "models"))
    output.write()
    assert gpu_output.read_rows(tmp_path, "ops") == [], "a section that runs again starts anew"


# ---- verdicts and sections ------------------------------------------------------------------------------------------


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
    model = {"arch": "vit-l16", "batch": 8, "engine": "vqvit per token", "backend": "triton", "over_best_bf16": "1.79"}
    slower = {**model, "engine": "vqvit groups", "over_best_bf16": "1.20"}
    other = {**model, "engine": "bf16 eager", "over_best_bf16": "9.00"}
    missing = {**model, "batch": 1, "over_best_bf16": ""}
    rows = list(gpu_summary.verdicts(kernels, [model, slower, other, missing], ("cuda", "triton")))
    found = {
        (row["target"].split(",")[0].split(" at ")[0], row["backend"]): (row["wanted"], row["reached"], row["verdict"])
        for row in rows
    }
    assert found["fc2", "triton"] == ("0.60", "0.60", "reached")
    assert found["fc1", "triton"] == ("0.45", "0.45", "missed"), "what is shown is rounded, what is compared is not"
    assert found["fc1", "cuda"] == ("0.45", "0.70", "reached")
    assert found["qkv", "triton"] == ("0.45", "", "not measured")
    assert found["quantize_qkv", "triton"] == ("0.80", "0.81", "reached")
    assert found["vit-l16 batch 8", "triton"] == ("1.80", "1.79", "missed")
    assert found["vit-l16 batch 1", "triton"][2] == found["vit-l16 batch 8", "cuda"][2] == "not measured"
    assert len(found) == 2 * (4 + 6 + 8)
    lines = list(gpu_summary.target_lines(kernels, [model], ("cuda", "triton")))
    assert any(line.startswith("missed: vit-l16 batch 8") for line in lines)
    assert lines[-1] == "31 of 36 targets not measured"


def test_native_backends_are_those_that_can_run(monkeypatch):
    able = {"cuda", "triton", "reference"}
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name in able else "no GPU")
    monkeypatch.setattr(backends, "device_types", lambda name: ("cuda",))
    assert device_checks.native_backends("cuda") == ("cuda", "triton")
    able.remove("cuda")
    assert device_checks.native_backends("cuda") == ("triton",)
    able.remove("triton")
    assert device_checks.native_backends("cuda") == ()


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


def test_the_compiled_baseline_has_static_shapes_and_fused_attention(monkeypatch):
    run_here = gpu_timing.Run(torch.device("cpu"), (), False, time.monotonic() + 100)
    made = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: made.append((model, options)) or model)
    monkeypatch.setattr(gpu_timing.Run, "cuda", True)
    monkeypatch.setattr(gpu_models, "float_model", _tiny_model)
    gpu_models.contenders(run_here, "tiny")["bf16 max-autotune", "torch"]()
    ((model, options),) = made
    assert options == {"mode": "max-autotune", "dynamic": False}
    assert model.config._attn_implementation == "sdpa"


def _tiny_model(run: gpu_timing.Run, arch: str) -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    config = ViTConfig(image_size=32, patch_size=16, attn_implementation="eager", **shape)
    return ViTForImageClassification(config).eval()


def test_errors(tmp_path):
    done = run("--only", "speed")
    assert done.returncode == 2 and "expected sections among build, probe" in done.stderr
    if not torch.cuda.is_available():
        done = run("--call", "correctness", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
        assert done.returncode == 2 and "expected a CUDA device that torch can use" in done.stderr
        assert not (tmp_path / "out").exists()
