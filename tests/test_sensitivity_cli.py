"""The command that ranks layers by sensitivity."""

import json

import pytest
from cli_cases import save_images
from test_sensitivity import vit

from vqvit import cli
from vqvit.sensitivity import Sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model folder, and a folder of images for it."""
    root = tmp_path_factory.mktemp("sensitivity")
    vit().save_pretrained(root / "model")
    save_images(root / "images", count=8, classes=2, side=16)
    return str(root / "model"), str(root / "images")


def test_scores_and_report(capsys, folders, tmp_path):
    model, images = folders
    argv = ["sensitivity", model, "--data", images, "--images", "6", "--output", str(tmp_path / "out")]
    assert cli.main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "sensitivity.json", "results.json", "report.md", "report.html",
    }  # fmt: skip
    damages = [row["damage"] for row in result["matrices"]]
    assert result["images"] == 6 and damages == sorted(damages, reverse=True) and len(damages) == 14
    scores = Sensitivity.load(tmp_path / "out" / "sensitivity.json")
    assert scores.correlations == result["correlations"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img alt=") + page.count("matplotlib is not installed") == 3
    assert cli.main(argv[:6]) == 0
    out = capsys.readouterr().out
    assert "Spearman's rank correlation: S and S_F" in out and "vit.layers.0.qkv.q" in out


def test_without_damage(capsys, folders):
    model, images = folders
    argv = ["sensitivity", model, "--data", images, "--damage", "none", "--objective", "sampled", "--json"]
    assert cli.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    fishers = [row["fisher"] for row in result["matrices"]]
    assert result["objective"] == "sampled" and fishers == sorted(fishers, reverse=True)
    assert result["correlations"]["score_damage"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--damage", "int2"], "expected tiers among int8, int8_asym, fp16; got int2"),
        (["--objective", "x"], "objective: expected one of"),
        (["--plan", "absent.json"], "absent.json"),
    ],
)
def test_errors(capsys, folders, tmp_path, options, message):
    model, images = folders
    output = tmp_path / "out"
    assert cli.main(["sensitivity", model, "--data", images, "--output", str(output), *options]) == 2
    assert message in capsys.readouterr().err and not output.exists()
