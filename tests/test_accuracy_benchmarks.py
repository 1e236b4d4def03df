"""Fine-tuning, the accuracy table and the ablation, on a small model and a few images."""

import argparse
import csv
import io
import json

import accuracy
import average
import finetune
import numpy as np
import pytest
import table2
import torch
from PIL import Image

from vqvit import data, memory

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}
RECIPE = finetune.Recipe(image_size=16, images=96, full_from=64, batch_size=16, held_out=8, learning_rate=1e-3)


def write_images(path, count, seed):
    """Squares of three brightnesses with noise: a class for each."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    generator = np.random.default_rng(seed)
    encoded, labels = [], []
    for index in range(count):
        buffer = io.BytesIO()
        pixels = 60 + 60 * (index % 3) + generator.integers(-40, 40, (8, 8, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(index % 3)
    parquet.write_table(pa.table({"img": encoded, "label": labels}), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`backbone` with its image processor, `train.parquet` and `test.parquet`."""
    folder = tmp_path_factory.mktemp("table")
    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).save_pretrained(folder / "backbone")
    finetune.save_processor(folder / "backbone", 16)
    write_images(folder / "train.parquet", 72, 0)
    write_images(folder / "test.parquet", 24, 1)
    return folder


def tuned(folder, output):
    finetune.finetune(str(folder / "backbone"), str(folder / "train.parquet"), output, RECIPE, torch.device("cpu"))
    return transformers.ViTForImageClassification.from_pretrained(output).state_dict()


def test_a_killed_run_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    whole = tuned(folder, tmp_path / "whole")
    monkeypatch.setattr(finetune, "SAVE_STEPS", 2)
    save = finetune.save_state

    def killed(file, step, *rest):
        save(file, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        tuned(folder, tmp_path / "killed")
    monkeypatch.setattr(finetune, "save_state", save)
    resumed = tuned(folder, tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "killed.state").exists()
    reports = [json.loads(line) for line in (tmp_path / "killed.log.jsonl").read_text().splitlines()]
    assert reports[0]["recipe"]["images"] == 96 and 0 <= reports[-1]["held_out_top1"] <= 1


def test_an_average_of_models_is_the_mean_of_their_weights(folder, tmp_path):
    parts = [finetune.open_backbone(str(folder / "backbone"), 3) for _ in range(2)]
    with torch.no_grad():
        for index, part in enumerate(parts):
            part.classifier.bias.add_(index + 1.0)
            part.save_pretrained(tmp_path / f"part{index}")
    folders = [str(tmp_path / f"part{index}") for index in range(2)]
    average.average(str(folder / "train.parquet"), tmp_path / "mean", folders, 16, 8)
    mean = transformers.ViTForImageClassification.from_pretrained(tmp_path / "mean").state_dict()
    torch.testing.assert_close(mean["classifier.bias"], (parts[0].classifier.bias + parts[1].classifier.bias) / 2)
    log = [json.loads(line) for line in (tmp_path / "mean.log.jsonl").read_text().splitlines()]
    assert [line.get("model", line.get("average_of")) for line in log] == ["part0", "part1", 2]
    wide = transformers.ViTForImageClassification(transformers.ViTConfig(**{**TINY, "hidden_size": 24}))
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="expected the tensors of"):
        average.average(str(folder / "train.parquet"), tmp_path / "other", [folders[0], str(tmp_path / "wide")], 16, 8)
    assert not (tmp_path / "other").exists()


def test_a_state_of_another_recipe_is_refused(folder, tmp_path):
    model = finetune.open_backbone(str(folder / "backbone"), 3)
    optimizer = torch.optim.AdamW(finetune.parameter_groups(model, RECIPE))
    finetune.save_state(tmp_path / "x.state", 1, finetune.Recipe(seed=7), model, optimizer)
    with pytest.raises(ValueError, match="expected the state of recipe"):
        finetune.resume(tmp_path / "x.state", RECIPE, model, optimizer)


def test_rates_fall_from_the_head_to_the_embeddings(folder):
    model = finetune.open_backbone(str(folder / "backbone"), 3)
    groups = finetune.parameter_groups(model, RECIPE)
    peaks = {id(p): group["peak"] for group in groups for p in group["params"]}
    assert len(peaks) == len(list(model.parameters()))
    assert peaks[id(model.classifier.weight)] == RECIPE.head_learning_rate
    assert peaks[id(model.vit.embeddings.cls_token)] == pytest.approx(1e-3 * 0.8**2)
    assert sorted(set(peaks.values())) == pytest.approx([1e-3 * 0.8**2, 1e-3 * 0.8, 1e-3])


def test_dropped_patches_leave_cls_and_the_share(folder):
    model = finetune.open_backbone(str(folder / "backbone"), 3)
    drop = finetune.PatchDropout(model)
    drop.keep = 0.5
    embedded = model.vit.embeddings(torch.zeros(2, 3, 16, 16))
    drop.remove()
    whole = model.vit.embeddings(torch.zeros(2, 3, 16, 16))
    assert embedded.shape == (2, 9, 32) and torch.equal(embedded[:, 0], whole[:, 0])
    assert all((whole[0] == token).all(-1).any() for token in embedded[0])


def test_enlarged_training_images_are_those_of_evaluation():
    smooth = torch.linspace(0, 255, 8).byte().repeat(3, 8, 1)
    evaluated = data.Resize(16)([Image.fromarray(smooth.permute(1, 2, 0).numpy())])
    assert torch.allclose(finetune.enlarge(smooth[None], 16), evaluated, atol=2 / 255 / min(data.IMAGENET_STD))


def cache(folder, tmp_path, limit=24):
    images = data.open_images(folder / "test.parquet", data.transform_for(folder / "backbone"), 10, limit)
    return accuracy.Cache(tmp_path / "cache", folder / "backbone", images)


def row(calls, recipe=None):
    return accuracy.Row("fp32", "FP32", recipe or {}, lambda model, _folder: calls.append(1) or model)


def test_a_row_is_made_once_for_its_recipe(folder, tmp_path):
    calls = []
    first = cache(folder, tmp_path).logits(row(calls))
    assert first.shape == (24, 3) and len(calls) == 1
    assert torch.equal(cache(folder, tmp_path).logits(row(calls)), first) and len(calls) == 1
    cache(folder, tmp_path).logits(row(calls, {"other": 1}))
    assert len(calls) == 2
    assert cache(folder, tmp_path, limit=12).logits(row(calls, {"other": 1})).shape == (12, 3) and len(calls) == 3


def test_logits_go_on_at_the_next_part(folder, tmp_path, monkeypatch):
    first, seen, calls = cache(folder, tmp_path), [], []

    def run(model, pixels):
        if len(seen) == 2 and not calls[1:]:
            calls.append(1)
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return original(model, pixels)

    original = accuracy.run
    monkeypatch.setattr(accuracy, "run", run)
    with pytest.raises(KeyboardInterrupt):
        first.logits(row(calls))
    assert first.logits(row(calls)).shape == (24, 3)
    assert seen == [10, 10, 4]


def test_bf16_products_in_fp32_are_those_of_bf16(folder):
    model = finetune.open_backbone(str(folder / "backbone"), 3).eval()
    images = torch.randn(4, 3, 16, 16)
    exact = model(images).logits
    with torch.inference_mode():
        plain = model.bfloat16()(images.bfloat16()).logits.float()
        with accuracy._ProductsInFp32():
            widened = model(images.bfloat16()).logits
    assert widened.dtype == torch.bfloat16
    assert (widened.float() - plain).norm() <= (plain - exact).norm()


def test_scores_of_known_logits():
    labels = torch.tensor([0, 0, 1, 1])
    reference = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    found = table2.scores(logits, reference, labels)
    assert (found["top1"], found["change_points"], found["agreement"]) == (50.0, -25.0, 75.0)
    assert found["p_value"] == 1.0 and found["top1_low"] < 50 < found["top1_high"]
    assert found["sqnr_db"] == pytest.approx(10 * np.log10(20 / 2))
    assert table2.scores(reference, reference, labels)["sqnr_db"] is None


@pytest.fixture(scope="module")
def table(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table2, "RESULTS", output / "table2.csv")
        patch.setattr(table2, "CALIBRATION_IMAGES", 24)
        patch.setattr("vqvit.memory.measure", lambda *_a, **_o: memory.Memory(1.0, 2.0, 3.0, 4.0))
        arguments = [
            "--train",
            folder / "train.parquet",
            "--test",
            folder / "test.parquet",
            "--cache",
            output / "cache",
        ]
        options = "--images 24 --held-out 24 --tune-images 24 --check-images 24 --batch 2 --seconds 0.2".split()
        rows = ["--rows", "bf16,w8a8,progressive,w4a8"]
        patch.setattr("sys.argv", ["table2.py", *map(str, [folder / "backbone", *arguments]), *options, *rows])
        table2.main()
    return output


def test_the_table_has_the_chosen_rows(table):
    with open(table / "table2.csv", newline="") as file:
        rows = {entry["key"]: entry for entry in csv.DictReader(file)}
    assert list(rows) == ["fp32", "bf16", "w8a8", "progressive", "w4a8"]
    for key, entry in rows.items():
        assert entry["images"] == "24" and float(entry["b2_median_ms"]) > 0 and float(entry["peak_mib"]) == 4, key
    sizes = {key: float(entry["size_mb"]) for key, entry in rows.items()}
    assert sizes["w4a8"] < sizes["w8a8"] < sizes["bf16"] < sizes["fp32"]
    assert float(rows["w8a8"]["sqnr_db"]) > 20 > float(rows["w8a8"]["top1"]) / 100
    assert rows["fp32"]["paper_top1"] == "98.2"


def test_the_page_shows_table_blocks_and_stages(table):
    document = json.loads((table / "cache" / "results.json").read_text())
    headings = [section["heading"] for section in document["sections"]]
    assert headings[0] == "Accuracy, size, speed" and headings[1].startswith("Error by block")
    assert any(h.startswith("progressive: ") for h in headings)
    assert [entry["block"] for entry in document["sections"][1]["rows"]] == [0, 1, 2]


def test_every_row_of_the_paper_table_is_planned(folder):
    arguments = argparse.Namespace(train=folder / "train.parquet", held_out=24, tune_images=24, check_images=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table2, "CALIBRATION_IMAGES", 24)
        training = table2.TrainingImages(arguments, data.transform_for(folder / "backbone"))
    rows = table2.table_rows(training)
    assert [row.key for row in rows] == ["fp32", "bf16", "naive", "w8a8", "paper", "vqvit", "progressive", "w4a8"]
    sets = [set(training.parts[part]) for part in ("calibration", "tune", "check")]
    assert [len(part) for part in sets] == [24, 24, 24] and len(set.union(*sets)) == 72
    assert min(sets[2]) == 48  # only what was held out decides


def test_a_rerun_makes_nothing_anew(table, folder, monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("made anew")

    monkeypatch.setattr(table2, "RESULTS", table / "again.csv")
    monkeypatch.setattr(table2, "CALIBRATION_IMAGES", 24)
    monkeypatch.setattr("vqvit.memory.measure", lambda *_a, **_o: memory.Memory(1.0, 2.0, 3.0, 3.0))
    monkeypatch.setattr("vqvit.quantize_", refuse)
    monkeypatch.setattr("vqvit.progressive.quantize_progressively_", refuse)
    arguments = ["--train", folder / "train.parquet", "--test", folder / "test.parquet", "--cache", table / "cache"]
    options = "--images 24 --held-out 24 --tune-images 24 --check-images 24 --seconds 0 --rows w8a8,progressive".split()
    monkeypatch.setattr("sys.argv", ["table2.py", *map(str, [folder / "backbone", *arguments]), *options])
    table2.main()
    with open(table / "again.csv", newline="") as file:
        assert [entry["key"] for entry in csv.DictReader(file)] == ["fp32", "w8a8", "progressive"]
