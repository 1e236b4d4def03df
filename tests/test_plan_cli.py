"""The commands that make, compare and check precision plans."""

import json

import pytest
from cli_cases import run, save_images
from test_budget import labelled, vit

import vqvit
from vqvit import cli
from vqvit.budget import with_tiers
from vqvit.plan import TIERS, Plan, QuantConfig
from vqvit.rewriter import make_plan, plan_of
from vqvit.sensitivity import measure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model folder, images for it, and its scores."""
    root = tmp_path_factory.mktemp("plans")
    vit().save_pretrained(root / "model")
    save_images(root / "images", count=16, classes=2, side=16)
    measure(vit(), labelled(), damage_tiers=TIERS).save(root / "scores.json")
    return {"model": str(root / "model"), "images": str(root / "images"), "scores": str(root / "scores.json")}


def counts(result: dict) -> dict[str, int]:
    planned = [layer["tier"] for layer in result["plan"]["layers"]]
    return {tier: planned.count(tier) for tier in TIERS}


def test_quantize_by_sensitivity(capsys, folders, tmp_path):
    status, other, _ = run(
        capsys, "quantize", folders["model"], tmp_path / "out", "--tiers-by", "damage=0.5,0.5",
        "--scores", folders["scores"],
    )  # fmt: skip
    assert status == 0 and counts(other) == {"int8": 5, "int8_asym": 0, "fp16": 5}
    status, result, _ = run(
        capsys, "quantize", folders["model"], tmp_path / "out", "--tiers-by", "sensitivity",
        "--sensitivity-data", folders["images"], "--batch-size", 4, "--save-plan", tmp_path / "plans" / "plan.json",
    )  # fmt: skip
    assert status == 0 and counts(result) == {"int8": 6, "int8_asym": 3, "fp16": 1}
    assert result["tiers_by"]["fp16"] == 1
    saved = Plan.load(tmp_path / "plans" / "plan.json")
    assert [p.name for p in (tmp_path / "plans").iterdir()] == ["plan.json"]
    assert json.loads(saved.to_json())["layers"] == result["plan"]["layers"]
    assert plan_of(vqvit.load(tmp_path / "out")) == saved


def test_quantize_by_bytes_with_saved_scores(capsys, folders, tmp_path):
    argv = ["quantize", folders["model"], tmp_path / "out", "--scores", folders["scores"], "--tiers-by"]
    status, least, _ = run(capsys, *argv, "bytes=1MB")
    assert status == 0 and counts(least)["int8"] < 10
    status, _, err = run(capsys, *argv, "bytes=1KB")
    assert status == 2 and "budget: expected at least" in err
    smallest = int(err.split("at least ")[1].split(" bytes")[0].replace(",", ""))
    status, result, _ = run(capsys, *argv, f"bytes={smallest}")
    assert status == 0 and counts(result) == {"int8": 10, "int8_asym": 0, "fp16": 0}
    assert result["tiers_by"]["bytes of the layers"] == smallest
    assert result["plan"]["blocks"][1]["leading_tokens"] == 1, "the CLS shortcut is planned as without --tiers-by"


def test_quantize_by_accuracy(capsys, folders, tmp_path):
    argv = ["quantize", folders["model"], tmp_path / "out", "--attention", "float", "--calibration", folders["images"]]
    argv += ["--batch-size", 4, "--tiers-by"]
    status, result, _ = run(capsys, *argv, "kl=1000")
    assert status == 0 and counts(result)["int8"] == 10 and result["tiers_by"]["evaluations"] == 1
    limit = result["tiers_by"]["kl"] / 2
    status, result, _ = run(capsys, *argv, f"kl={limit}", "--set", "classifier=skip")
    assert status == 0 and result["tiers_by"]["kl"] <= limit < result["tiers_by"]["before"]
    assert "classifier" in {layer["name"] for layer in result["layers"] if layer["status"] == "skipped"}
    assert cli.main([*map(str, argv), "top1=50"]) == 0
    assert "top1: " in capsys.readouterr().out


BAD_REQUESTS = {
    "kind": (
        ["--tiers-by", "magic"],
        "--tiers-by: expected one of sensitivity, fisher, damage, bytes, kl, top1, feature_error",
    ),
    "number": (["--tiers-by", "kl=low"], "--tiers-by kl: expected a number, not negative; got 'low'"),
    "negative": (["--tiers-by", "bytes=-5MB"], "expected N, NKB or NMB, not negative; got '-5MB'"),
    "one quantile": (["--tiers-by", "sensitivity=0.6"], "expected LOW,HIGH"),
    "no data": (["--tiers-by", "sensitivity"], "expected --sensitivity-data or --calibration; got neither"),
    "no check": (["--tiers-by", "kl=1", "--scores", "{scores}"], "expected --sensitivity-data or --calibration"),
    "no scores": (["--tiers-by", "bytes=1MB", "--scores", "absent"], "there is no absent"),
    "alone": (["--scores", "{scores}"], "expected --tiers-by with them"),
    "one batch": (["--tiers-by", "kl=1", "--calibration", "{images}"], "expected at least 2 batches"),
    "plan file": (["--save-plan", "{model}"], "--save-plan: expected a file"),
    "unreachable": (
        ["--tiers-by", "kl=0", "--calibration", "{images}", "--batch-size", "8"],
        "expected a loss that promotions bring to 0",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_leave_nothing(capsys, folders, tmp_path, case):
    options, message = BAD_REQUESTS[case]
    status, result, err = run(
        capsys, "quantize", folders["model"], tmp_path / "out", *(o.format(**folders) for o in options)
    )
    assert (status, result) == (2, None) and message in err
    assert list(tmp_path.iterdir()) == []


def test_plan_commands(capsys, folders, tmp_path):
    plan = make_plan(vit(), QuantConfig())[0]
    plan.save(tmp_path / "a.json")
    with_tiers(plan, {"classifier": "fp16"}).save(tmp_path / "b.json")
    status, result, _ = run(capsys, "plan", "diff", tmp_path / "a.json", tmp_path / "b.json")
    change = {"name": "classifier", "option": "tier", "before": "int8", "after": "fp16"}
    assert status == 0 and result["changes"] == [change]
    assert cli.main(["plan", "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out == "classifier: tier int8 -> fp16\n"
    assert cli.main(["plan", "diff", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    assert "are the same plan" in capsys.readouterr().out
    assert cli.main(["plan", "check", str(tmp_path / "a.json"), folders["model"]]) == 0
    assert "fits" in capsys.readouterr().out


def test_a_checkpoint_is_a_plan_too(capsys, folders, tmp_path):
    assert cli.main(["quantize", folders["model"], str(tmp_path / "w8a8"), "--set", "head=fp16"]) == 0
    make_plan(vit(), QuantConfig(cls_only="off"))[0].save(tmp_path / "a.json")
    status, result, _ = run(capsys, "plan", "diff", tmp_path / "a.json", tmp_path / "w8a8")
    assert status == 0
    assert {(c["name"], c["option"]) for c in result["changes"]} == {
        ("classifier", "tier"), ("vit.layers.1", "leading_tokens"),
    }  # fmt: skip


def edited(plan: Plan, old: str, new: str) -> str:
    text = plan.to_json()
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize("command", ["check", "quantize"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"tier": "int8"', '"tier": "int9"', "expected one of int8, int8_asym, fp16; got 'int9'"),
        ('"vit.layers.0.qkv"', '"vit.layers.0.qvk"', "(vit.layers.0.qkv, vit.layers.0.attn_out, vit.layers.0.fc1"),
        ('"name": "classifier"', '"name": "clasifier"', "classifier); got 'clasifier'"),
        ('"role": "fc1"', '"role": "fc2"', "expected role fc1 of vit.layers.0.fc1; got 'fc2'"),
    ],
)
def test_edited_plans_are_refused_with_the_valid_names(capsys, folders, tmp_path, command, old, new, message):
    (tmp_path / "plan.json").write_text(edited(make_plan(vit(), QuantConfig())[0], old, new))
    argv = {
        "check": ["plan", "check", tmp_path / "plan.json", folders["model"]],
        "quantize": ["quantize", folders["model"], tmp_path / "out", "--config", tmp_path / "plan.json"],
    }[command]
    status, _, err = run(capsys, *argv)
    assert status == 2 and message in err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_plan_command_errors(capsys, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, message in (("absent", "there is no"), ("binary", "got one that is no text"), (".", "vqvit.json")):
        status, _, err = run(capsys, "plan", "diff", tmp_path / path, tmp_path / path)
        assert status == 2 and message in err
