"""The logic of the CPU benchmark with stand-in engines: no peer is needed."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cpu
import cpu_engines
import cpu_exports
import cpu_models
import cpu_rounds
import cpu_worker
import numpy as np
import pytest
import torch
from cpu_rounds import Entry, Worker, WorkerFailureError

SETTINGS = cpu.Settings(threads=1, seconds=0.0, min_rounds=2, calibration=2, images=None, dinov2=None)

ENVIRONMENT = dict(os.environ)


# Rounds: what happens between the parent and its workers


class StandIn:
    """A worker whose answers are computed here; `log` is shared, to see who ran when."""

    def __init__(self, name, log, ms=300.0, offset=0.0, fails=None):
        self.name, self.log, self.ms, self.offset, self.fails, self.closed = name, log, ms, offset, fails, False

    def ask(self, request, timeout_s):
        assert not self.closed
        self.log.append((self.name, request["do"], request.get("calls")))
        if request["do"] == self.fails:
            raise WorkerFailureError("stand-in failed")
        if request["do"] == "open":
            return {"load_s": 1.0, "first_s": 2.0, "resident_mb": 100.0, "anonymous_mb": 50.0}
        if request["do"] == "outputs":
            np.save(request["path"], np.arange(1.0, 17.0, dtype=np.float32).reshape(8, 2) + self.offset)
            return {}
        return {"ms": [self.ms] * request["calls"]}

    def close(self):
        self.closed = True


@pytest.fixture
def stand_ins(monkeypatch):
    """Engines a (the reference), b, c and own, none of which needs a package or a file."""
    table = {
        name: cpu_engines.Engine(name.upper(), (), cpu_exports.FLOAT, None, own=name == "own")
        for name in ("a", "b", "c", "own")
    }
    monkeypatch.setattr(cpu, "ENGINES", table)
    monkeypatch.setattr(cpu, "REFERENCE", "a")
    return table


def compared(tmp_path, workers, settings=SETTINGS):
    """Entries of `cpu.compare` at batch 2 with a stand-in worker for each name."""
    waiting = iter(workers.values())
    exports = cpu.Exports(tmp_path, tmp_path / "none.npy", ENVIRONMENT)
    images = np.zeros((8, 3, 4, 4), np.float32)
    return cpu.compare(list(workers), 2, images, exports, {}, settings, tmp_path, lambda *_: next(waiting))


def test_engines_take_turns_in_an_order_that_rotates():
    log = []
    entries = {name: Entry(StandIn(name, log)) for name in ("a", "b", "c")}
    assert cpu_rounds.take_turns(entries, seconds=0.0, min_rounds=4) == 4
    assert [name for name, _, _ in log] == list("abc" + "bca" + "cab" + "abc")
    assert all(entry.samples == [300.0] * 4 for entry in entries.values())


def test_a_turn_lasts_about_as_long_for_every_engine():
    assert cpu_rounds.turn([]) == {"calls": 1, "warm": True}
    assert cpu_rounds.turn([10.0, 10.0, 500.0]) == {"calls": 25, "warm": True}
    assert cpu_rounds.turn([2000.0]) == {"calls": 1, "warm": False}


def test_rounds_go_on_until_the_time_is_over():
    entries = {"a": Entry(StandIn("a", []))}
    start = time.monotonic()
    cpu_rounds.take_turns(entries, seconds=0.05, min_rounds=1)
    assert time.monotonic() - start >= 0.05


def test_an_engine_that_fails_in_a_round_is_left_out_of_the_next(tmp_path):
    log = []
    entries = {"a": Entry(StandIn("a", log)), "b": Entry(StandIn("b", log, fails="run"))}
    failing = entries["b"].worker
    cpu_rounds.take_turns(entries, seconds=0.0, min_rounds=3)
    assert [name for name, _, _ in log] == ["a", "b", "a", "a"]
    assert entries["b"].failure == "stand-in failed" and entries["b"].samples == [] and failing.closed


def test_rows_of_engines_that_ran_and_of_one_that_did_not(stand_ins, tmp_path):
    log = []
    workers = {
        "a": StandIn("a", log),
        "b": StandIn("b", log, ms=200.0, offset=0.1),
        "c": StandIn("c", log, fails="open"),
        "own": StandIn("own", log, ms=100.0, offset=0.2),
    }
    entries = compared(tmp_path, workers)
    assert all(worker.closed for worker in workers.values())
    rows = {row["engine"]: row for row in cpu.rows(entries, batch=2)}
    assert [row["best_peer"] for row in rows.values()] == ["b"] * 4
    assert rows["c"]["status"] == "stand-in failed" and rows["c"]["median_ms"] == ""
    assert rows["own"]["speedup_over_fp32"] == 3.0 and rows["own"]["speedup_over_best_peer"] == 2.0
    assert rows["a"]["speedup_over_best_peer"] == round(2 / 3, 3) and rows["a"]["sqnr_db"] == ""
    assert rows["own"]["resident_mb"] == 100.0 and rows["own"]["first_result_s"] == 2.0
    reference, all_eight = np.arange(1.0, 5.0), np.arange(1.0, 17.0)
    assert float(rows["own"]["relative_error"]) == pytest.approx(0.4 / np.linalg.norm(reference), rel=5e-3)
    assert rows["own"]["sqnr_db"] == pytest.approx(20 * np.log10(np.linalg.norm(all_eight) / 0.8), abs=0.01)
    assert len({tuple(row) for row in rows.values()}) == 1, "all rows have the same columns"
    assert "c: stand-in failed" in cpu.table(list(rows.values()))


def test_an_engine_that_computes_something_else_has_no_latency(stand_ins, tmp_path):
    entries = compared(tmp_path, {"a": StandIn("a", []), "b": StandIn("b", [], offset=100.0)})
    [_, row] = cpu.rows(entries, batch=2)
    assert row["status"].startswith("relative error") and row["median_ms"] == ""


@pytest.mark.parametrize("outputs", [np.full((8, 2), np.nan, np.float32), np.zeros((8, 3), np.float32)])
def test_nan_and_outputs_of_another_shape_fail(stand_ins, outputs):
    entries = {"a": Entry(outputs=np.ones((8, 2), np.float32)), "b": Entry(outputs=outputs)}
    cpu.check_outputs(entries)
    assert entries["a"].failure is None and entries["b"].failure is not None


@pytest.mark.parametrize("step", ["open", "outputs", "run"])
def test_nothing_is_reported_without_the_reference(stand_ins, tmp_path, step):
    workers = {"a": StandIn("a", [], fails=step), "b": StandIn("b", [])}
    with pytest.raises(RuntimeError, match="a: stand-in failed"):
        compared(tmp_path, workers)
    assert all(worker.closed for worker in workers.values())


def test_missing_packages_are_the_reason(stand_ins, tmp_path, monkeypatch):
    monkeypatch.setitem(stand_ins, "b", replace(stand_ins["b"], packages=("json", "no_such_package")))
    entries = compared(tmp_path, {"a": StandIn("a", []), "b": StandIn("b", [])})
    assert entries["b"].failure == "not installed: no_such_package"


# Worker processes


def script(tmp_path, body: str) -> Worker:
    """A worker that runs `body` for each request `r`."""
    path = tmp_path / "worker.py"
    path.write_text(
        "import json, os, sys, time\nfor line in sys.stdin:\n r = json.loads(line)\n " + body.replace("\n", "\n ")
    )
    return Worker([sys.executable, str(path)], ENVIRONMENT, tmp_path / "log")


def test_a_worker_is_stopped_between_requests(tmp_path):
    worker = script(tmp_path, "print(json.dumps({'pid': os.getpid()}), flush=True)")
    try:
        for _ in range(3):
            pid = worker.ask({}, 60)["pid"]
            assert os.waitid(os.P_PID, pid, os.WSTOPPED).si_status == signal.SIGSTOP
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print(json.dumps({'error': 'ValueError: no'}), flush=True)", "ValueError: no"),
        ("print('last words', file=sys.stderr)\nsys.exit(3)", "ended with status 3: last words"),
        ("time.sleep(60)", "no answer in 0.5 s"),
    ],
    ids=["error", "death", "silence"],
)
def test_failures_of_a_worker(tmp_path, body, message):
    worker = script(tmp_path, body)
    try:
        with pytest.raises(WorkerFailureError, match=message):
            worker.ask({}, 0.5 if "sleep" in body else 60)
    finally:
        worker.close()
    assert worker.process.returncode is not None


@pytest.mark.skipif(sys.platform != "linux", reason="the signal of a dead parent is Linux's")
def test_a_stopped_worker_does_not_outlive_its_parent(tmp_path):
    parent = (
        "import os, sys\nfrom pathlib import Path\nimport cpu_rounds\n"
        "worker = cpu_rounds.python_worker(os.environ, Path(sys.argv[1]))\n"
        "try:\n worker.ask({'do': 'nothing'}, 60)\nexcept cpu_rounds.WorkerFailureError:\n pass\n"
        "print(worker.process.pid, flush=True)\nos._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, str(tmp_path / "log")],
        env=cpu_engines.environment(1, tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    status, end = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 60
    while status.exists() and ") Z" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not status.exists() or ") Z" in status.read_text()


def test_a_worker_that_has_died_says_so_again(tmp_path):
    worker = script(tmp_path, "sys.exit('gone')")
    for _ in range(2):
        with pytest.raises(WorkerFailureError, match="gone"):
            worker.ask({}, 60)
    worker.close()


def test_the_server_answers_requests_and_keeps_going_after_an_error():
    class Echo:
        def run(self, request):
            return {"ms": [1.0] * request["calls"]}

    answers = io.StringIO()
    cpu_worker.serve(['{"do": "run"}', '{"do": "run", "calls": 2}'], answers, Echo())
    first, second = map(json.loads, answers.getvalue().splitlines())
    assert first == {"error": "KeyError: 'calls'"} and second == {"ms": [1.0, 1.0]}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="memory is read from Linux's /proc")
def test_the_server_serves_an_engine(tmp_path, monkeypatch):
    calls, buffer = [], np.zeros((2, 3), np.float32)

    def open_engine(path, options, batch, threads):
        assert (path, options, batch, threads) == (tmp_path / "m", {"x": 1}, 2, 1)

        def call(images):
            calls.append(images)
            buffer[:] = images.reshape(2, -1)[:, :3]
            return buffer

        return cpu_engines.Session(lambda images: images, call, lambda output: output)

    monkeypatch.setitem(cpu_engines.ENGINES, "stand-in", cpu_engines.Engine("", (), "float", open_engine, {"x": 1}))
    images = np.arange(4 * 3, dtype=np.float32).reshape(4, 3, 1, 1)
    np.save(tmp_path / "images.npy", images)
    server = cpu_worker.Server()
    request = {"engine": "stand-in", "path": str(tmp_path / "m"), "batch": 2, "threads": 1}
    opened = server.open({**request, "images": str(tmp_path / "images.npy")})
    assert len(calls) == cpu_worker.WARMUP_CALLS
    assert opened["first_s"] >= opened["load_s"] >= 0 and opened["resident_mb"] > opened["anonymous_mb"] > 1
    assert len(server.run({"calls": 3, "warm": True})["ms"]) == 3 and len(calls) == cpu_worker.WARMUP_CALLS + 4
    server.outputs({"path": str(tmp_path / "out.npy")})
    assert np.array_equal(np.load(tmp_path / "out.npy"), images.reshape(4, 3)), "a buffer that is used again is copied"


# Artifacts


def test_artifacts_are_made_once_and_failures_reach_those_that_need_them(tmp_path, monkeypatch):
    made = []
    table = {
        "base": cpu_exports.Artifact("base.x", None),
        "broken": cpu_exports.Artifact("broken.x", None),
        "after": cpu_exports.Artifact("after.x", None, "base"),
        "late": cpu_exports.Artifact("late.x", None, "broken"),
    }
    monkeypatch.setattr(cpu, "ARTIFACTS", table)
    exports = cpu.Exports(tmp_path, tmp_path / "images.npy", ENVIRONMENT)

    def make(artifact, target, options):
        made.append(target)
        return "it broke" if artifact == "broken" else None

    monkeypatch.setattr(exports, "_make", make)
    assert exports.failure("float", "float", {}) is None
    assert exports.failure("after", "after.x", {}) is None and exports.failure("base", "base.x", {}) is None
    assert (
        exports.failure("late", "late.x", {}) == "it broke" and exports.failure("broken", "broken.x", {}) == "it broke"
    )
    assert made == ["base.x", "after.x", "broken.x"]


def test_what_a_process_says_is_the_reason_that_an_artifact_is_missing(tmp_path):
    exports = cpu.Exports(tmp_path, tmp_path / "absent.npy", cpu_engines.environment(1, tmp_path))
    reason = exports.failure("vqvit", "vqvit", {})
    assert reason.startswith("making vqvit: FileNotFoundError") and "absent.npy" in reason


def test_engines_name_artifacts_and_share_only_those_without_options():
    assert cpu_engines.REFERENCE in cpu_engines.ENGINES
    for name, engine in cpu_engines.ENGINES.items():
        assert engine.artifact == cpu_exports.FLOAT or engine.artifact in cpu_exports.ARTIFACTS, name
    own = [engine.target(name) for name, engine in cpu_engines.ENGINES.items() if engine.own]
    assert own and len(set(own)) == len(own)


def test_names_on_the_command_line():
    assert cpu.chosen("all", {"x": 1, "y": 2}, "--engines") == ["x", "y"]
    with pytest.raises(ValueError, match="expected names among x; got z"):
        cpu.chosen("x,z", {"x": 1}, "--engines")


# The whole, with PyTorch and vqvit alone


def test_our_own_engines_end_to_end(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from vqvit import engines

    tiny = replace(
        engines.ARCHITECTURES["vit-ti"],
        config={"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2,
                "image_size": 32, "patch_size": 8, "num_labels": 10},
        image_size=32,
    )  # fmt: skip
    monkeypatch.setitem(engines.ARCHITECTURES, "tiny", tiny)
    monkeypatch.setattr(cpu_rounds, "TURN_S", 0.001)
    output = tmp_path / "cpu.csv"
    cpu.run(["tiny"], [3], ["torch_fp32", "vqvit"], SETTINGS, output)
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["engine"], row["batch"], row["status"]) for row in rows] == [
        (engine, "3", "ok") for engine in ("torch_fp32", "vqvit")
    ]
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["best_peer"] == "torch_fp32" and float(row["resident_mb"]) > 50
        assert row["command"] and row["device"] and "torch 2" in row["versions"]
    assert all(0 < float(row["relative_error"]) < cpu.MAX_RELATIVE_ERROR for row in rows if row["engine"] == "vqvit")
    assert "tiny, batch 3" in capsys.readouterr().out


def test_realistic_weights_are_repeatable_and_make_outlier_channels():
    pytest.importorskip("transformers")
    from vqvit import engines

    first, second = (cpu_models.with_realistic_weights(engines.random_model("vit-ti", blocks=2)) for _ in range(2))
    states = first.state_dict(), second.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for module in first.modules():
        if type(module) is torch.nn.LayerNorm:
            assert int((module.weight > 3.5).sum()) == cpu_models.OUTLIER_CHANNELS
    with torch.inference_mode():
        logits = first(torch.from_numpy(cpu_models.images(4, 224, None, None))).logits
    assert logits.isfinite().all() and float((logits - logits.mean(0)).norm() / logits.norm()) > 0.05


def test_real_weights_need_their_folder():
    with pytest.raises(ValueError, match="--dinov2"):
        cpu_models.float_model(cpu_models.REAL_WEIGHTS, None)
