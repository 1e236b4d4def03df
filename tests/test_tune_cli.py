"""`vqvit tune`: predicted tables, and measured ones with a device that is not there."""

import os

import pytest
import torch
from cli_cases import check_error, run


@pytest.mark.parametrize("source", ["float_folder", "quantized_folder", "vit-ti"])
def test_tune_predicts(capsys, request, source, tmp_path):
    tuned = pytest.importorskip("vqvit.kernels.tuned")
    from vqvit.kernels.launch import Device

    model = ["--arch", source] if source == "vit-ti" else [request.getfixturevalue(source)]
    path = tmp_path / "tables" / "table.json"
    status, result, _ = run(
        capsys, "tune", *model, "--batch", "1,4", "--predict", "h100", "--output", str(path)
    )  # fmt: skip
    assert status == 0 and os.listdir(path.parent) == ["table.json"]
    table = tuned.read(path, Device(90, 132))
    assert table.source == "predicted" and len(table.choices) == len(result["rows"])
    for row in result["rows"]:
        at = tuned.Launch(row["kind"], row["m"], tuple(row["shape"]))
        assert table.choices[at] == tuned.predict(table.device, at)
        assert row["chosen"] == row["predicted"] and row["us"] == []
    kinds = {row["kind"] for row in result["rows"]}
    pairs_of_heads = source == "vit-ti"  # heads of 64 columns fill groups; those of 32 do not
    assert kinds == {"gemm", "gemm_groups"} | ({"attention_quantize"} if pairs_of_heads else set())


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    """A device of row 90 whose tensors live on the CPU, where Triton's interpreter runs the kernels."""
    launch = pytest.importorskip("vqvit.kernels.launch")
    from vqvit import precompile, tuning
    from vqvit.commands import tune

    monkeypatch.setattr(precompile, "warm", lambda jobs, part: None)  # the interpreter compiles nothing
    monkeypatch.setenv("VQVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_cuda_device", lambda arguments: torch.device("cpu"))
    monkeypatch.setattr(launch, "cuda_device", lambda index: launch.Device(90, 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tuning, "medians", lambda calls, device: {c: 12.0 if c == "1" else 24.0 for c in calls})
    return tmp_path / "cache" / "tuned" / "sm_90-132.json"


def test_tune_measures_and_writes_where_the_kernels_look(capsys, fake_gpu, quantized_folder):
    from vqvit.commands import tune
    from vqvit.kernels import tuned

    status, result, err = run(capsys, "tune", quantized_folder, "--batch", "2")
    assert status == 0 and result["output"] == str(fake_gpu) and result["source"] == "measured"
    assert {row["chosen"] for row in result["rows"]} == {1}
    assert err.count("1: 12.00 us") == len(result["rows"])
    table = tuned.read(fake_gpu)
    assert table.source == "measured" and table.provenance["device"] == "a GPU"
    assert {tuned.configs(at.kind, 90).index(config) for at, config in table.choices.items()} == {1}
    text, changed = tune.to_text(result), sum(row["predicted"] != 1 for row in result["rows"])
    assert changed and f"{changed} differ from the predicted ones" in text and "2.00x" in text


def test_tune_writes_no_table_from_wrong_results(capsys, monkeypatch, fake_gpu, quantized_folder):
    from vqvit import tuning

    fake_gpu.parent.mkdir(parents=True)
    fake_gpu.write_text("mine")
    monkeypatch.setattr(tuning, "_same_bits", lambda a, b: False)
    status, _, err = run(capsys, "tune", quantized_folder, "--batch", "2")
    assert status == 2 and "expected every config to compute the same; no table is written" in err
    assert fake_gpu.read_text() == "mine" and list(fake_gpu.parent.iterdir()) == [fake_gpu]


def test_tune_errors(capsys, quantized_folder, tmp_path):
    output = ["--output", str(tmp_path / "table.json")]
    (tmp_path / "file").write_text("mine")
    cases = [
        ([quantized_folder, "--arch", "vit-ti"], "expected a MODEL folder or --arch; got both"),
        (["--predict", "v100", *output], "expected one of a100, a40, l40s, h100; got 'v100'"),
        (["--predict", "a100"], "expected --output FILE"),
        (["--predict", "a100", "--output", str(tmp_path / "file" / "table.json")], "expected a folder; .* is a file"),
        (["--predict", "a100", "--arch", "resnet", *output], "expected one of vit-ti"),
        ([str(tmp_path / "absent"), "--predict", "a100", *output], "there is no folder .*absent"),
    ]
    if not torch.cuda.is_available():
        cases.append(([quantized_folder], "expected a CUDA device; PyTorch finds none here"))
    for argv, message in cases:
        status, result, err = run(capsys, "tune", *argv)
        assert (status, result) == (2, None)
        check_error(err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
