"""`vqvit quantize --progressive`: what it writes, how it goes on, and what it refuses."""

import json

import pytest
from progressive_cases import classifier

import vqvit
from vqvit import cli
from vqvit.progressive import RunLog

pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "float"
    classifier(layers=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "quick.json"
    tuning = {"schedule": [0.5, 1.0], "final_steps": 1, "batch_size": 8}
    path.write_text(json.dumps({"tuning": tuning, "ranking_images": 16}))
    return str(path)


def run(capsys, *options: str) -> tuple[int, str, str]:
    status = cli.main(["quantize", *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_run_writes_checkpoint_log_and_report(capsys, source, recipe_file, tmp_path):
    options = (source, str(tmp_path / "out"), "--progressive", "--data", "digits-train", "--images", "60")
    options += ("--check", "digits", "--check-images", "50", "--recipe", recipe_file, "--steps", "1", "--seed", "7")
    options += ("--kl-limit", "0.5", "--report", str(tmp_path / "report"), "--preset", "vqvit", "--json")
    status, out, err = run(capsys, *options)
    assert status == 0, err
    result = json.loads(out)
    log = RunLog.load(tmp_path / "out" / "progressive.json")
    assert result["log"]["passed"] and log.passed and 0 < result["ratio"] < 0.4
    assert (log.tune_images, log.check_images) == (60, 50)
    assert (log.config["seed"], log.config["tuning"]["steps"], log.config["acceptance"]["kl_limit"]) == (7, 1, 0.5)
    assert [t.blend for t in log.stages[0].attempts[0].lambdas] == [0.5, 1.0]
    assert vqvit.rewriter.plan_of(vqvit.load(tmp_path / "out")) == log.plan
    assert {x.activation for x in log.plan.layers if x.role == "fc2"} == {"per_token_group"}
    assert "Progressive quantization of ViTForImageClassification" in (tmp_path / "report" / "report.html").read_text()


def test_a_run_is_taken_up_and_its_text_is_for_people(capsys, source, recipe_file, tmp_path):
    options = ("--progressive", "--data", "digits-train", "--images", "60", "--recipe", recipe_file, "--steps", "1")
    options += ("--preset", "paper", "--kl-limit", "9", "--tolerance", "0.9", "--workdir", str(tmp_path / "work"))
    status, first, err = run(capsys, source, str(tmp_path / "a"), *options)
    assert status == 0, err
    assert "After each stage, on the checking images" in first and "MB -> " in first
    status, _, err = run(capsys, source, str(tmp_path / "b"), *options)
    assert status == 2 and "expected a new folder, or resume" in err and not (tmp_path / "b").exists()
    status, again, err = run(capsys, source, str(tmp_path / "b"), *options, "--resume")
    assert status == 0 and again.replace(str(tmp_path / "b"), str(tmp_path / "a")) == first, err
    logs = [RunLog.load(tmp_path / name / "progressive.json") for name in "ab"]
    assert logs[1].resumed == 1 and logs[0].plan == logs[1].plan
    assert 0 < logs[0].check_images < logs[0].tune_images and logs[0].check_images + logs[0].tune_images == 60


@pytest.mark.parametrize(
    "options, message",
    [
        (("--data", "digits"), "--data: expected --progressive with it"),
        (("--resume",), "--resume: expected --progressive with it"),
        (("--progressive",), "--progressive: expected --data"),
        (("--progressive", "--data", "digits", "--resume"), "--resume: expected --workdir"),
        (("--progressive", "--data", "digits", "--calibration", "digits"), "expected no --calibration"),
        (("--preset", "paper"), "--preset paper: expected --progressive with it"),
        (("--progressive", "--data", "digits", "--rounding", "error_aware"), "expected nearest or auto"),
        (("--progressive", "--data", "digits", "--bits", "4"), "expected 8 bits"),
        (("--progressive", "--data", "digits", "--check", "digits"), "expected images that are not tuned on"),
        (("--progressive", "--data", "digits", "--recipe", "nowhere.json"), "nowhere.json"),
        (("--progressive", "--data", "digits", "--steps", "-1"), "steps: expected at least 0; got -1"),
    ],
)
def test_what_is_refused(capsys, source, tmp_path, options, message):
    status, _, err = run(capsys, source, str(tmp_path / "out"), *options)
    assert status == 2 and message in err
    assert not (tmp_path / "out").exists()
