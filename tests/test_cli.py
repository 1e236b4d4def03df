"""Every command of `vqvit`, with good and bad input: exit status, output, and nothing left behind after an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_cases import check_error, run, save_images
from PIL import Image
from test_checkpoint import weights

import vqvit
from vqvit import cli, demo, guard
from vqvit.timing import Latency

pytest.importorskip("transformers")

ROOT = Path(vqvit.__file__).resolve().parents[1]
CLASSES = 3


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder with three images for each of three classes."""
    folder = tmp_path_factory.mktemp("images")
    save_images(folder, count=9, classes=CLASSES, side=40)
    return str(folder)


def test_quantize(capsys, float_folder, tmp_path):
    out = tmp_path / "deep" / "out"
    status, result, _ = run(capsys, "quantize", float_folder, str(out))
    assert status == 0
    assert {p.name for p in out.iterdir()} == {weights(out).name, "vqvit.json", "config.json"}
    assert {layer["status"] for layer in result["layers"]} <= {"int8", "block"}
    assert result["bytes"] == sum(p.stat().st_size for p in out.iterdir())
    assert list(out.parent.iterdir()) == [out]


def test_quantize_options(capsys, float_folder, images, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"attention": "float", "tiers": {"fc1": "int8_asym"}}))
    status, result, _ = run(
        capsys, "quantize", float_folder, str(tmp_path / "out"), "--config", str(config), "--set", "head=skip",
        "--set", "*.0.fc2=fp16", "--activation", "static", "--calibration", images, "--images", "8",
        "--observer", "percentile:99.9", "--calibration-state", str(tmp_path / "state"), "--batch-size", "1",
    )  # fmt: skip
    assert status == 0
    by_role = {(layer["role"], layer["tier"]) for layer in result["plan"]["layers"]}
    assert ("fc1", "int8_asym") in by_role and ("fc2", "fp16") in by_role and ("fc2", "int8") in by_role
    assert "head" not in {role for role, _ in by_role}
    assert {layer["observer"] for layer in result["plan"]["layers"]} == {"percentile:99.9"}
    ranges = json.loads((tmp_path / "out" / "vqvit.json").read_text())["ranges"]
    assert len(ranges) == 7 and {layer["observer"] for layer in ranges.values()} == {"percentile:99.9"}
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "out"}, "the state goes once the ranges are known"
    assert {block["attention"] for block in result["plan"]["blocks"]} == {"float"}
    status, scores, _ = run(capsys, "eval", str(tmp_path / "out"), "--data", images, "--reference", float_folder)
    assert status == 0 and scores["cosine_mean"] > 0.98


def test_quantize_preset_with_calibration(capsys, float_folder, images, tmp_path):
    status, result, _ = run(
        capsys, "quantize", float_folder, str(tmp_path / "out"), "--preset", "vqvit", "--calibration", images,
        "--images", "6", "--batch-size", "3", "--bits", "4",
    )  # fmt: skip
    assert status == 0
    layers = {layer["name"].rpartition(".")[2]: layer for layer in result["plan"]["layers"]}
    assert layers["fc2"]["activation"] == "per_token_group" and layers["fc1"]["activation"] == "per_token"
    assert {layer["bits"] for layer in result["plan"]["layers"]} == {4}
    status, scores, _ = run(capsys, "eval", str(tmp_path / "out"), "--data", images, "--reference", float_folder)
    assert status == 0 and scores["cosine_mean"] > 0.9


@pytest.mark.parametrize(
    "options, message",
    [
        (("--rounding", "error_aware"), "expected batches for rounding='error_aware'; got calibration=None"),
        (("--rounding", "up"), "rounding: expected one of auto, nearest, error_aware; got 'up'"),
        (("--bits", "5"), "bits: expected one of 8, 4, 3; got 5"),
        (("--bits", "4", "--tier", "int8_asym"), "expected tier int8 and per_channel with 4 bits"),
    ],
)
def test_quantize_rounding_refused(capsys, float_folder, tmp_path, options, message):
    status, _, err = run(capsys, "quantize", float_folder, str(tmp_path / "out"), *options)
    assert status != 0 and message in err and not (tmp_path / "out").exists()


def test_quantize_leaves_float_what_int8_does_not_make_faster(capsys, monkeypatch, float_folder, tmp_path):
    monkeypatch.setattr(guard, "SECONDS", 0.01)
    command = ["quantize", float_folder, str(tmp_path / "out"), "--serve-batch", "2", "--min-speedup"]
    status, _, err = run(capsys, *command, "1e9")
    assert status == 2 and "nothing stays in int8" in err and not (tmp_path / "out").exists()
    status, result, _ = run(capsys, *command, "1e-9")
    assert status == 0 and "skipped" not in {layer["status"] for layer in result["layers"]}


def test_quantize_takes_a_plan(capsys, float_folder, quantized_folder, tmp_path):
    plan = json.loads((Path(quantized_folder) / "vqvit.json").read_text())["plan"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    out = tmp_path / "out"
    status, result, _ = run(capsys, "quantize", float_folder, str(out), "--config", str(tmp_path / "plan.json"))
    assert status == 0 and [p["name"] for p in result["plan"]["layers"]] == [p["name"] for p in plan["layers"]]


@pytest.mark.parametrize(("mode", "tokens"), [("auto", 1), ("on", 1), ("off", None)])
def test_quantize_cls_only(capsys, float_folder, tmp_path, mode, tokens):
    status, result, _ = run(capsys, "quantize", float_folder, str(tmp_path / "out"), "--cls-only", mode)
    assert status == 0 and [block["leading_tokens"] for block in result["plan"]["blocks"]] == [None, tokens]
    assert cli.main(["quantize", float_folder, str(tmp_path / "text"), "--cls-only", mode]) == 0
    assert f"CLS shortcut: {result['cls_only']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cls-only", "on", "--attention", "float"], "its attention is float"),
        (["--cls-only", "yes"], "cls_only: expected one of auto, on, off; got 'yes'"),
    ],
)
def test_quantize_cls_only_refused(capsys, float_folder, tmp_path, options, message):
    status, _, err = run(capsys, "quantize", float_folder, str(tmp_path / "out"), *options)
    assert status == 2 and message in err and not (tmp_path / "out").exists()


def test_quantize_keeps_the_image_processor(float_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in Path(float_folder).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    assert cli.main(["quantize", str(source), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_eval(capsys, float_folder, quantized_folder, images):
    status, scores, _ = run(capsys, "eval", quantized_folder, "--data", images, "--reference", float_folder)
    assert status == 0 and scores["images"] == 9
    assert 0 <= scores["top1"] <= 1 and scores["cosine_mean"] > 0.98 and scores["sqnr_db"] > 15
    status, scores, _ = run(capsys, "eval", float_folder, "--data", images, "--no-labels", "--reference", float_folder)
    assert status == 0 and scores["top1"] is None and scores["sqnr_db"] == "inf"


def test_eval_text(capsys, quantized_folder, images):
    assert cli.main(["eval", quantized_folder, "--data", images]) == 0
    out = capsys.readouterr().out
    assert "top-1" in out and "SQNR" not in out


@pytest.mark.parametrize("folder", ["float_folder", "quantized_folder"])
def test_bench(capsys, request, folder):
    model = request.getfixturevalue(folder)
    status, result, _ = run(capsys, "bench", model, "--batch", "1,2", "--seconds", "0.05", "--threads", "1")
    torch.set_num_threads(2)
    assert status == 0 and result["image_size"] == 32
    assert [(r["engine"], r["batch"]) for r in result["rows"]] == [
        (engine, batch) for batch in (1, 2) for engine in ("fp32", "bf16", "w8a8")
    ]
    assert all(0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"] for r in result["rows"])
    assert result["environment"]["threads"] == 1


def test_bench_memory(capsys, float_folder):
    status, result, _ = run(capsys, "bench", float_folder, "--batch", "1", "--seconds", "0.05", "--memory")
    assert status == 0
    assert list(result["memory"]) == ["fp32", "bf16", "w8a8"]
    for used in result["memory"].values():
        assert used["peak"] >= used["baseline"] > 0
    assert result["memory"]["w8a8"]["bytes"] < result["memory"]["fp32"]["bytes"]


def test_inspect(capsys, float_folder, quantized_folder):
    status, result, _ = run(capsys, "inspect", quantized_folder)
    assert status == 0 and result["quantized"]
    codes = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 128) + 64 * 3 * 64 + CLASSES * 64
    assert result["bytes"]["int8 codes"] == codes and result["bytes"]["codes of 4 and 3 bits"] == 0
    assert result["bytes"]["scales"] > 0
    assert sum(result["bytes"].values()) + result["other_bytes"] == result["total_bytes"]
    status, result, _ = run(capsys, "inspect", float_folder)
    assert status == 0 and not result["quantized"]
    assert result["bytes"]["int8 codes"] == 0 and len(result["layers"]) == 2 * 4 + 2


@pytest.mark.parametrize("bits", [4, 3])
def test_inspect_counts_packed_codes(capsys, float_folder, tmp_path, bits):
    assert cli.main(["quantize", float_folder, str(tmp_path / "out"), "--bits", str(bits)]) == 0
    (tmp_path / "out" / "notes.bin").write_bytes(b"mine" * 1000)
    status, result, _ = run(capsys, "inspect", tmp_path / "out")
    codes = 2 * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 128) + 64 * 3 * 64 + CLASSES * 64
    assert status == 0 and result["bytes"]["codes of 4 and 3 bits"] == codes * bits // 8
    assert result["bytes"]["int8 codes"] == 0 and result["bytes"]["float"] < codes // 2
    assert result["total_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) - 4000
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert f"int8, {bits} bits" in capsys.readouterr().out


def test_env(capsys):
    status, result, _ = run(capsys, "env")
    assert status == 0
    assert [b["name"] for b in result["backends"]] == ["reference", "cpu", "triton", "cuda"]
    assert result["torch"] == torch.__version__
    assert result["devices"][0]["backend"] in ("cpu", "reference")


def test_demo(capsys, tmp_path):
    pytest.importorskip("sklearn")
    status, result, _ = run(capsys, "demo", "--quick", "--output", str(tmp_path / "demo"))
    assert status == 0
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {
        "digits-fp32", "digits-bf16", "digits-w8a8", "report.html", "report.md", "results.json",
    }  # fmt: skip
    rows = {row["engine"]: row for row in result["sections"][0]["rows"]}
    assert list(rows) == ["FP32", "BF16", "W8A8"]
    assert rows["W8A8"]["reload_equal"] and rows["W8A8"]["size_mb"] < 0.4 * rows["FP32"]["size_mb"]
    assert rows["W8A8"]["agreement"] > 95
    w8a8 = str(tmp_path / "demo" / "digits-w8a8")
    status, scores, _ = run(capsys, "eval", w8a8, "--data", "digits")
    assert status == 0 and scores["top1"] * 100 == pytest.approx(rows["W8A8"]["accuracy"])


def test_demo_leaves_out_what_is_emulated():
    latency = {name: Latency(ms, ms, ms, 5) for name, ms in {"fp32": 10.0, "bf16": 21.0, "w8a8": 4.0}.items()}
    assert demo._emulated(latency) == ["bf16"]
    without = {name: figures for name, figures in latency.items() if name != "bf16"}
    assert demo._speedup_cells("bf16", {1: latency, 8: without}) == {"b1_speedup": 10 / 21}
    assert demo._latency_cells("bf16", {8: without}) == {}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_text_of_every_command_is_for_people(capsys, command, float_folder, quantized_folder, images, tmp_path):
    argv = {
        "quantize": [float_folder, str(tmp_path / "out")],
        "sensitivity": [float_folder, "--data", images, "--damage", "none"],
        "plan": ["diff", quantized_folder, quantized_folder],
        "eval": [quantized_folder, "--data", images],
        "export": [quantized_folder, str(tmp_path / "served")],
        "bench": [quantized_folder, "--batch", "1", "--seconds", "0.05"],
        "tune": [quantized_folder, "--predict", "a100", "--batch", "1", "--output", str(tmp_path / "table.json")],
        "inspect": [quantized_folder],
        "env": [],
        "doctor": ["--help"],
        "demo": ["--help"],
    }[command]
    if argv == ["--help"]:  # minutes otherwise; test_doctor.py and test_demo read what they print
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, *argv])
    else:
        assert cli.main([command, *argv]) == 0
    out = capsys.readouterr().out
    assert out.strip() and not out.lstrip().startswith("{")


BAD_QUANTIZE = {
    "no such source": (["{tmp}/absent", "{tmp}/out"], r"\(config.json\); there is no folder .*absent"),
    "unknown tier": (["{float}", "{tmp}/out", "--tier", "int9"], "expected one of int8, int8_asym, fp16; got 'int9'"),
    "unknown activation": (["{float}", "{tmp}/out", "--activation", "x"], "expected one of per_token"),
    "bad setting": (["{float}", "{tmp}/out", "--set", "head"], "expected LAYER=TIER; got 'head'"),
    "unknown observer": (["{float}", "{tmp}/out", "--observer", "x"], "observer: expected one of ema, max, percentile"),
    "few images": (
        ["{float}", "{tmp}/out", "--activation", "static", "--calibration", "{images}", "--images", "7"],
        "expected at least 8 images for static scales; got 7",
    ),
    "no calibration": (["{float}", "{tmp}/out", "--activation", "static"], "expected batches .*got calibration=None"),
    "calibration without images": (
        ["{float}", "{tmp}/out", "--activation", "static", "--calibration", "{tmp}"],
        r"expected a folder with \.jpg",
    ),
    "missing config": (["{float}", "{tmp}/out", "--config", "{tmp}/absent.json"], "expected a JSON file; there is no"),
    "unknown backend": (["{float}", "{tmp}/out", "--backend", "tpu"], "expected one of reference, cpu, triton"),
    "unknown device": (["{float}", "{tmp}/out", "--device", "tpu"], "--device: expected auto, cpu or cuda; got 'tpu'"),
    "quantized source": (["{w8a8}", "{tmp}/out"], ""),
}


@pytest.mark.parametrize("kind", BAD_QUANTIZE)
def test_quantize_errors_leave_nothing(capsys, kind, float_folder, quantized_folder, images, tmp_path):
    argv, message = BAD_QUANTIZE[kind]
    names = {"float": float_folder, "w8a8": quantized_folder, "images": images, "tmp": str(tmp_path)}
    status, result, err = run(capsys, "quantize", *(a.format(**names) for a in argv))
    assert (status, result) == (2, None)
    check_error(err, message)
    assert list(tmp_path.iterdir()) == []


def test_quantize_output_errors_come_before_work(capsys, float_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for out, message in (
        ("file", "expected a folder; .*file is a file"),
        ("file/out", "file is a file"),
        ("full", "expected a new folder or a vqvit checkpoint to replace; got other content"),
    ):
        status, _, err = run(capsys, "quantize", str(tmp_path / "absent-model"), str(tmp_path / out))
        assert status == 2
        check_error(err, message)
    status, _, err = run(capsys, "quantize", float_folder, "/proc/vqvit-out")
    assert status == 2
    check_error(err, "expected a folder that can be written to")
    assert (tmp_path / "file").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "full"}


def test_config_file_errors(capsys, float_folder, tmp_path):
    config = tmp_path / "config.json"
    for content, message in (
        ("{", "expected JSON"),
        ("[]", "expected a JSON object; got list"),
        ('{"tyer": "int8"}', "expected fields among .*got \\['tyer'\\]"),
        ('{"layers": []}', "format 1"),
    ):
        config.write_text(content)
        status, _, err = run(capsys, "quantize", float_folder, str(tmp_path / "out"), "--config", str(config))
        assert status == 2
        check_error(err, message)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json"}


def test_eval_errors(capsys, float_folder, quantized_folder, images, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in Path(quantized_folder).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    weights(damaged).write_bytes(weights(damaged).read_bytes()[:-100])
    unlabelled = tmp_path / "flat"
    unlabelled.mkdir()
    Image.new("RGB", (32, 32)).save(unlabelled / "a.png")
    for argv, message in (
        ([str(tmp_path / "absent"), "--data", images], "there is no folder .*absent"),
        (
            [str(tmp_path / "empty"), "--data", images],
            r"\(config.json\) or a vqvit checkpoint \(vqvit.json\); got .*empty, which is none",
        ),
        ([float_folder, "--data", str(tmp_path / "empty")], "expected a folder with"),
        ([float_folder, "--data", str(tmp_path / "absent")], "there is no .*absent"),
        ([float_folder, "--data", str(unlabelled)], "expected a reference model, or labels"),
        ([str(damaged), "--data", images], "truncated or corrupted"),
    ):
        status, result, err = run(capsys, "eval", *argv)
        assert (status, result) == (2, None)
        check_error(err, message)


def test_bench_errors(capsys, float_folder):
    for argv, message in (
        ([float_folder, "--arch", "vit-b16"], "expected a MODEL folder or --arch; got both"),
        (["--arch", "resnet"], "expected one of vit-ti"),
        ([float_folder, "--device", "cuda"] if not torch.cuda.is_available() else ["--arch", "x"], "expected"),
    ):
        status, result, err = run(capsys, "bench", *argv)
        assert (status, result) == (2, None)
        check_error(err, message)


@pytest.mark.parametrize("argv", [["bench", "--batch", "0"], ["eval"], ["nonsense"], []])
def test_usage_errors(capsys, argv):
    with pytest.raises(SystemExit) as error:
        cli.main(argv)
    assert error.value.code == 2
    assert "usage: vqvit" in capsys.readouterr().err


def test_inspect_errors(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    status, _, err = run(capsys, "inspect", str(tmp_path))
    assert status == 2
    check_error(err, "expected weights in safetensors files; got none")
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    status, _, err = run(capsys, "inspect", str(tmp_path))
    assert status == 2
    check_error(err, "expected a safetensors file")


def test_demo_output_error_comes_before_work(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = run(capsys, "demo", "--output", str(tmp_path / "file"))
    assert status == 2
    check_error(err, "expected a folder")


def test_traceback_on_request(capsys, tmp_path):
    status, _, err = run(capsys, "inspect", str(tmp_path / "absent"), "--traceback")
    assert status == 2 and "Traceback (most recent call last)" in err


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom vqvit import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('transformers', 'triton', 'matplotlib', 'sklearn', 'pyarrow')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "quantize" in done.stdout
