"""A progressive run that is stopped anywhere goes on to the same plan and the same codes."""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from progressive_cases import QUICK, classifier, sets, without_times

from vqvit.progressive import ProgressiveError, RunLog, Tuning, quantize_progressively_, recipe
from vqvit.progressive.workdir import RUN_FILE

pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]

STEPS_SEEN = 6

CONFIG = dataclasses.replace(QUICK, tuning=Tuning(schedule=(0.5, 1.0), steps=1, final_steps=1, batch_size=8))


def stubborn() -> torch.nn.Module:
    """A classifier one fc2 of which has to be promoted: its run rolls back twice (see test_progressive.py)."""
    model = classifier(layers=1)
    mlp = model.vit.layers[0].mlp
    with torch.no_grad():
        mlp.fc1.weight[3], mlp.fc1.bias[3] = 0.0, 0.0
        mlp.fc2.weight[:, 3] = 1000 * mlp.fc2.weight.abs().amax()
    return model


@pytest.fixture(scope="module")
def start():
    return stubborn()


@pytest.fixture(scope="module")
def uninterrupted(start):
    """The integer model, its log, and how many steps there were."""
    model, steps = copy.deepcopy(start), []
    log = quantize_progressively_(model, *sets(), CONFIG, watcher=lambda done, _: steps.append(done))
    assert [p.layer for p in log.promotions] == ["vit.layers.0.fc2"] * 2
    return model, log, steps


class StopError(RuntimeError):
    pass


class StopAfter:
    """A watcher that fails after so many steps."""

    def __init__(self, steps: int):
        self.left = steps

    def __call__(self, done, log):
        self.left -= 1
        if self.left == 0:
            raise StopError(done)


def require_same(model, log, uninterrupted):
    want, want_log, _ = uninterrupted
    assert without_times(log) == without_times(want_log)
    for name, tensor in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_stopped_after_every_step_in_turn(start, uninterrupted, tmp_path):
    """Each process does one step: the run is taken up as often as it has steps."""
    _, _, steps = uninterrupted
    for number, expected in enumerate(steps):
        model = copy.deepcopy(start)
        with pytest.raises(StopError, match=expected):
            quantize_progressively_(
                model, *sets(), CONFIG, workdir=tmp_path / "run", resume=number > 0, watcher=StopAfter(1)
            )
        assert type(model.vit.layers[0]).__name__ == "ViTLayer"
        states = list((tmp_path / "run").glob("state-*"))
        assert 1 <= len(states) <= 2
    model = copy.deepcopy(start)
    log = quantize_progressively_(model, *sets(), CONFIG, workdir=tmp_path / "run", resume=True)
    assert log.resumed == len(steps)
    require_same(model, log, uninterrupted)


@pytest.mark.parametrize("written", [1, 4, 9])
def test_killed_while_it_writes(start, uninterrupted, tmp_path, monkeypatch, written):
    """A state file is complete but not yet named, the next one half written: the run goes on from the step before."""
    from vqvit.progressive import workdir

    calls = []
    original = workdir.write_json

    def fail(document, path):
        calls.append(path)
        if len(calls) == written:
            path.with_name(f".{path.name}.part").write_text('{"half')
            raise StopError
        original(document, path)

    monkeypatch.setattr(workdir, "write_json", fail)
    with pytest.raises(StopError):
        quantize_progressively_(copy.deepcopy(start), *sets(), CONFIG, workdir=tmp_path / "run")
    monkeypatch.undo()
    model = copy.deepcopy(start)
    log = quantize_progressively_(model, *sets(), CONFIG, workdir=tmp_path / "run", resume=True)
    require_same(model, log, uninterrupted)


def test_the_paper_recipe_goes_on_too(tmp_path):
    """Static scales, compensation, factorised patches and mixed precision are all in the snapshots."""
    paper = recipe("paper")
    quick = dataclasses.replace(paper.config.tuning, schedule=(1.0,), steps=1, final_steps=1)
    config = dataclasses.replace(paper, config=dataclasses.replace(paper.config, tuning=quick, ranking_images=16))
    straight, broken = classifier(), classifier()
    log = quantize_progressively_(straight, *sets(), config)
    for steps in (8, 3, 1):  # into the attention output, the QKV stage and its promotion, and on
        with pytest.raises(StopError):
            quantize_progressively_(
                broken, *sets(), config, workdir=tmp_path / "run", resume=True, watcher=StopAfter(steps)
            )
    resumed = quantize_progressively_(broken, *sets(), config, workdir=tmp_path / "run", resume=True)
    assert any(stage.initial for stage in log.stages)
    require_same(broken, resumed, (straight, log, []))


CHILD = """
import sys
sys.path.insert(0, "tests")
import torch
torch.set_num_threads(1)
from progressive_cases import sets
from test_progressive_resume import CONFIG, stubborn
from vqvit.progressive import quantize_progressively_
tell = lambda done, _: print(done, flush=True)
quantize_progressively_(stubborn(), *sets(), CONFIG, workdir=sys.argv[1], watcher=tell)
"""


def test_killed_by_the_system(start, uninterrupted, tmp_path):
    """SIGKILL in the middle of a step, at a random point of it."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    seen = [child.stdout.readline().strip() for _ in range(STEPS_SEEN)]
    time.sleep(0.03)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert seen == uninterrupted[2][:STEPS_SEEN] and child.returncode == -signal.SIGKILL
    assert not json.loads((tmp_path / "run" / RUN_FILE).read_text())["log"]["passed"]
    model = copy.deepcopy(start)
    log = quantize_progressively_(model, *sets(), CONFIG, workdir=tmp_path / "run", resume=True)
    require_same(model, log, uninterrupted)


@pytest.fixture(scope="module")
def begun(start, tmp_path_factory):
    """A workdir with a run that has done three steps."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    with pytest.raises(StopError):
        quantize_progressively_(copy.deepcopy(start), *sets(), CONFIG, workdir=folder, watcher=StopAfter(3))
    return folder


def other_model(start):
    with torch.no_grad():
        start.vit.layernorm.bias[0] += 1e-3
    return {}


OTHERS = {
    "model": other_model,
    "tuning data": lambda _: {"tune": [(images, labels.flip(0)) for images, labels in sets()[0]]},
    "checking data": lambda _: {"check": [(images[:-1], labels[:-1]) for images, labels in sets()[1]]},
    "configuration": lambda _: {"config": dataclasses.replace(CONFIG, seed=1)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_run_of_another_is_refused(start, begun, what):
    model, (tune, check) = copy.deepcopy(start), sets()
    changes = OTHERS[what](model)
    files = sorted(begun.iterdir())
    with pytest.raises(ProgressiveError, match=f"expected a run of the same {what}; got another's"):
        quantize_progressively_(
            model, **{"tune": tune, "check": check, "config": CONFIG, **changes}, workdir=begun, resume=True
        )
    assert sorted(begun.iterdir()) == files


def test_a_run_is_not_overwritten_without_being_asked(start, begun, tmp_path):
    with pytest.raises(FileExistsError, match="expected a new folder, or resume"):
        quantize_progressively_(copy.deepcopy(start), *sets(), CONFIG, workdir=begun)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="got other content"):
        quantize_progressively_(copy.deepcopy(start), *sets(), CONFIG, workdir=tmp_path, resume=True)
    with pytest.raises(NotADirectoryError, match="got a file"):
        quantize_progressively_(copy.deepcopy(start), *sets(), CONFIG, workdir=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def each_state(folder: Path, change) -> None:
    for file in folder.glob("state-*"):
        change(file)


DAMAGES = {
    "is missing": lambda folder: each_state(folder, Path.unlink),
    "cannot be read": lambda folder: each_state(folder, lambda file: file.write_bytes(b"x" * 100)),
    "fails to parse": lambda folder: (folder / RUN_FILE).write_text("{"),
    "expected the identity of a run": lambda folder: (folder / RUN_FILE).write_text("{}"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_an_error(start, begun, tmp_path, message):
    shutil.copytree(begun, tmp_path / "run")
    DAMAGES[message](tmp_path / "run")
    with pytest.raises(ProgressiveError, match=message):
        quantize_progressively_(copy.deepcopy(start), *sets(), CONFIG, workdir=tmp_path / "run", resume=True)


def test_a_finished_run_is_loaded_not_repeated(start, uninterrupted, tmp_path):
    first = quantize_progressively_(copy.deepcopy(start), *sets(), CONFIG, workdir=tmp_path / "run")
    model, repeated = copy.deepcopy(start), []
    again = quantize_progressively_(
        model, *sets(), CONFIG, workdir=tmp_path / "run", resume=True, watcher=lambda done, _: repeated.append(done)
    )
    assert not repeated and again == dataclasses.replace(first, resumed=1)
    require_same(model, again, uninterrupted)
    log = RunLog.from_dict(json.loads((tmp_path / "run" / RUN_FILE).read_text())["log"])
    assert log.finished and log.final == first.final
