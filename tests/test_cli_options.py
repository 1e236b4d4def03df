"""Options that would change nothing, folders of another kind, and budgets that cannot be met are errors that name them,
before any work.
"""

import argparse
import json
import os
import stat
import threading

import pytest
from cli_cases import check_error, run, save_images
from PIL import Image

import vqvit.backends
import vqvit.plan as plans
from vqvit import cli
from vqvit.plan import Plan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(float_folder, quantized_folder, tmp_path_factory):
    """A folder of each kind, and images."""
    root = tmp_path_factory.mktemp("kinds")
    save_images(root / "images", count=9, classes=3, side=40)
    assert cli.main(["export", quantized_folder, str(root / "export")]) == 0
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    kinds = {"export": "export", "empty": "empty", "file": "file", "images": "images"}
    return {
        "float": float_folder,
        "checkpoint": quantized_folder,
        **{name: str(root / folder) for name, folder in kinds.items()},
    }


INAPPLICABLE = {
    "--observer": ["quantize", "{float}", "{out}", "--observer", "mse"],
    "--serve-batch": ["quantize", "{float}", "{out}", "--serve-batch", "4"],
    "--calibration-state": ["quantize", "{float}", "{out}", "--calibration-state", "{out}.state"],
    "--calibration-state, not static": [
        "quantize", "{float}", "{out}", "--calibration", "{images}", "--calibration-state", "{out}.state",
    ],
    "--images": ["quantize", "{float}", "{out}", "--images", "4"],
    "--batch-size": ["quantize", "{float}", "{out}", "--batch-size", "4"],
    "--strict": ["quantize", "{float}", "{out}", "--strict"],
    "--image-size": ["quantize", "{float}", "{out}", "--image-size", "64"],
    "--image-size of digits": ["eval", "{float}", "--data", "digits", "--image-size", "64"],
    "--half-dtype": ["quantize", "{float}", "{out}", "--half-dtype", "float16"],
    "--engine": ["bench", "{float}", "--engine", "fp32"],
    "--profile": ["bench", "{float}", "--profile", "--seconds", "2"],
    "--predict": ["tune", "{float}", "--predict", "a100", "--device", "cpu", "--output", "{out}"],
    "--set": ["quantize", "{float}", "{out}", "--set", "heads=skip"],
    "--set of a name": ["quantize", "{float}", "{out}", "--set", "*.7.fc1=fp16"],
    "--set of a role": ["quantize", "{float}", "{out}", "--set", "linear=fp16"],
    "--progressive": ["quantize", "{float}", "{out}", "--progressive", "--data", "x", "--calibration-state", "y"],
    "--progressive, scores": ["quantize", "{float}", "{out}", "--progressive", "--data", "x", "--scores", "y"],
}  # fmt: skip
"""By the option that does nothing in that call."""


@pytest.mark.parametrize("case", INAPPLICABLE)
def test_options_that_change_nothing_are_errors(capsys, folders, tmp_path, case):
    argv = [part.format(out=tmp_path / "out", **folders) for part in INAPPLICABLE[case]]
    status, result, err = run(capsys, *argv)
    assert (status, result) == (2, None)
    check_error(err, case.partition(" of")[0].partition(",")[0])
    assert list(tmp_path.iterdir()) == []


def test_names_in_a_config_file_are_checked(capsys, folders, tmp_path):
    for table, value in (("tiers", "fp16"), ("activations", "static"), ("bits_exceptions", 4)):
        (tmp_path / "c.json").write_text(json.dumps({table: {"nowhere*": value}}))
        status, _, err = run(capsys, "quantize", folders["float"], tmp_path / "out", "--config", tmp_path / "c.json")
        assert status == 2
        check_error(err, rf"--config, {table}: expected a role among .*'nowhere\*' fits none")


def test_names_inside_a_block_are_found(capsys, folders, tmp_path):
    """A block of which a part is left out falls into its layers, which have other names."""
    argv = ["quantize", folders["float"], tmp_path / "out", "--set", "fc1=skip", "--set"]
    status, result, _ = run(capsys, *argv, "*.mlp.*=skip")
    assert status == 0 and not [p for p in result["plan"]["layers"] if ".mlp." in p["name"]]
    assert run(capsys, *argv, "*.layers.0.fc2=skip")[0] == 0, "and the names of the whole block stay known"


WRONG_KINDS = [
    ("quantize", "checkpoint", "a vqvit checkpoint, which is quantized already"),
    ("quantize", "export", "a model exported for vqvit.serving: pass the float model"),
    ("sensitivity", "checkpoint", "a vqvit checkpoint, which is quantized already"),
    ("plan", "checkpoint", "a vqvit checkpoint, which is quantized already"),
    ("export", "float", "a float Hugging Face model: vqvit quantize makes a checkpoint of it"),
    ("export", "export", "a model exported for vqvit.serving: pass the checkpoint"),
    *[(command, "export", "a model exported for vqvit.serving") for command in ("eval", "inspect", "bench", "tune")],
    *[(c, "empty", "which is none") for c in ("quantize", "sensitivity", "eval", "export", "inspect", "bench")],
    *[(c, "file", "it is a file") for c in ("quantize", "sensitivity", "eval", "export", "inspect", "bench")],
]


@pytest.mark.parametrize(("command", "kind", "message"), WRONG_KINDS)
def test_folders_of_another_kind_are_named(capsys, folders, tmp_path, command, kind, message):
    before = {"plan": ["check", folders["checkpoint"]]}.get(command, [])
    after = {
        "quantize": [tmp_path / "out"], "export": [tmp_path / "out"], "eval": ["--data", folders["images"]],
        "sensitivity": ["--data", folders["images"]], "tune": ["--predict", "a100", "--output", tmp_path / "table"],
    }.get(command, [])  # fmt: skip
    status, result, err = run(capsys, command, *before, folders[kind], *after)
    assert (status, result) == (2, None)
    check_error(err, message)
    assert list(tmp_path.iterdir()) == []


def test_impossible_budgets_are_refused_before_measuring(capsys, monkeypatch, folders, tmp_path):
    from vqvit import sensitivity

    monkeypatch.setattr(sensitivity, "measure", lambda *a, **k: pytest.fail("measured"))
    argv = ["quantize", folders["float"], tmp_path / "out", "--calibration", folders["images"], "--tiers-by"]
    status, _, err = run(capsys, *argv, "bytes=1KB")
    assert status == 2
    check_error(err, "budget: expected at least [0-9,]+ bytes, which the plan's layers take; got 1,000")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "b.png")
    status, _, err = run(
        capsys, *argv, "top1=1", "--sensitivity-data", tmp_path, "--batch-size", "1"
    )  # fmt: skip
    assert status == 2
    check_error(err, "loss top1: expected labels and logits; there are none")


def test_the_least_bytes_are_those_of_the_measured_layers(float_folder):
    from test_budget import labelled, vit

    from vqvit import budget
    from vqvit.plan import TIERS, QuantConfig
    from vqvit.rewriter import make_plan
    from vqvit.sensitivity import measure

    model = vit()
    for tier in TIERS:
        plan = make_plan(model, QuantConfig(tier=tier))[0]
        assert budget.least_bytes(model, plan) == budget.layer_bytes(plan, measure(model, labelled(), plan))


def test_a_plan_goes_through_links_and_into_fifos(capsys, folders, tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    os.mkfifo(tmp_path / "fifo")
    received = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "fifo").read_text()))
    reader.start()
    for name in ("link.json", "fifo"):
        argv = ["quantize", folders["float"], tmp_path / "out", "--save-plan", tmp_path / name]
        assert run(capsys, *argv)[0] == 0
    reader.join()
    assert (tmp_path / "link.json").is_symlink() and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert Plan.load(tmp_path / "real.json") == Plan.from_json(received[0])


def test_eval_names_what_it_skips_and_strict_refuses_it(capsys, folders, tmp_path):
    save_images(tmp_path / "images", count=4, classes=2, side=40)
    (tmp_path / "images" / "class0" / "broken.png").write_bytes(b"not an image")
    argv = ["eval", folders["float"], "--data", tmp_path / "images"]
    status, scores, err = run(capsys, *argv)
    assert status == 0 and scores["images"] == 4
    assert scores["skipped"] == [str(tmp_path / "images" / "class0" / "broken.png")]
    assert "1 of 5 images skipped: image " in err
    status, _, err = run(capsys, *argv, "--strict")
    assert status == 2
    check_error(err, "broken.png: expected a readable image")
    status, scores, _ = run(
        capsys, "eval", folders["float"], "--data", tmp_path / "images" / "class1" / "1.png", "--reference",
        folders["checkpoint"],
    )  # fmt: skip
    assert status == 0 and scores["images"] == 1, "one picture is read as one"


def test_quantize_names_what_it_skips(capsys, folders, tmp_path):
    save_images(tmp_path / "images", count=4, classes=2, side=40)
    (tmp_path / "images" / "class0" / "broken.png").write_bytes(b"not an image")
    argv = ["quantize", folders["float"], tmp_path / "out", "--calibration", tmp_path / "images"]
    status, result, err = run(capsys, *argv)
    assert status == 0 and len(result["skipped_images"]) == 1 and err.count("images skipped") == 1


def test_every_loader_of_a_run_names_what_it_skips(capsys, folders, tmp_path):
    """Those of --sensitivity-data too."""
    save_images(tmp_path / "images", count=4, classes=2, side=40)
    (tmp_path / "images" / "class0" / "broken.png").write_bytes(b"not an image")
    argv = ["quantize", folders["float"], tmp_path / "out", "--sensitivity-data", tmp_path / "images", "--tiers-by"]
    status, _, err = run(capsys, *argv, "sensitivity")
    assert status == 0 and err.count("1 of 5 images skipped: image ") == 1


def test_a_calibration_state_is_a_file(capsys, folders, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    argv = [
        "quantize",
        folders["float"],
        tmp_path / "out",
        "--calibration",
        folders["images"],
        "--activation",
        "static",
    ]
    for place in (tmp_path / "fifo", tmp_path):
        status, _, err = run(capsys, *argv, "--calibration-state", place)
        assert status == 2
        check_error(err, "calibration state: expected a file, or a name for a new one")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode) and not (tmp_path / "out").exists()


def test_how_images_become_the_input_is_said(capsys, folders, tmp_path):
    argv = ["eval", folders["float"], "--data", folders["images"]]
    status, scores, err = run(capsys, *argv)
    shown = "32 x 32, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    assert status == 0 and scores["input"] == shown
    assert f"no preprocessor_config.json; images are resized to {shown} (the size in config.json, ImageNet's" in err
    model = tmp_path / "timm"
    model.mkdir()
    for path in os.scandir(folders["float"]):
        (model / path.name).write_bytes(open(path.path, "rb").read())
    config = json.loads((model / "config.json").read_text())
    trained = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (model / "config.json").write_text(json.dumps({**config, "pretrained_cfg": trained}))
    status, scores, err = run(capsys, "eval", model, "--data", folders["images"])
    assert scores["input"] == "32 x 32, mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)" and "pretrained_cfg" in err


@pytest.mark.parametrize("field", ["beta", "delta", "mu"])
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_plans_with_numbers_that_are_none_are_refused(capsys, folders, tmp_path, field, value):
    manifest = json.loads(open(os.path.join(folders["checkpoint"], "vqvit.json")).read())
    plan = manifest["plan"]
    plan["layers"][0][field] = float(value.replace("Infinity", "inf"))
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    status, _, err = run(capsys, "quantize", folders["float"], tmp_path / "out", "--config", tmp_path / "plan.json")
    assert status == 2 and not (tmp_path / "out").exists()
    check_error(err, f"{field} of .*: expected a finite number; got")


def test_help_lists_every_choice():
    """Of the options that take one of a table of names: no name is left out."""
    helps = {}
    for name, module in cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        helps[name] = {action.dest: action.help or "" for action in parser._actions}
    tables = {
        "tier": plans.TIERS, "activation": plans.ACTIVATIONS, "attention": plans.ATTENTION, "rounding": plans.ROUNDINGS,
        "observer": plans.OBSERVERS, "half_dtype": plans.HALF_DTYPES, "bits": map(str, plans.WEIGHT_BITS),
        "cls_only": plans.CLS_ONLY,
    }  # fmt: skip
    for option, choices in tables.items():
        missing = [choice for choice in choices if choice not in helps["quantize"][option]]
        assert not missing, f"--{option} hides {missing}"
    for name, texts in helps.items():
        for choice in vqvit.backends.NAMES if "backend" in texts else ():
            assert choice in texts["backend"], f"{name} --backend hides {choice}"
