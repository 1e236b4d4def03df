"""Table 2 of the VQ-ViT paper on CIFAR-10: accuracy, agreement, size, latency and memory of every precision.

    python benchmarks/table2.py MODEL --train TRAIN --test TEST --cache FOLDER [--images 10000] [--rows fp32,w8a8,...]

MODEL is a float Hugging Face folder fine-tuned to the classes of TEST, such as `benchmarks/finetune.py` writes; its
image processor decides the preprocessing. TRAIN gives calibration, tuning and checking images, disjoint sets of it;
with `--held-out N` (as fine-tuning had it) the images that decide on rollback are among the N that MODEL never saw.
TEST is only measured. Models, logits and run logs stay in FOLDER; delete a row's folder to make it anew.

Appends to results/table2.csv and writes a page with plots into FOLDER.
"""

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

import torch
from accuracy import PART, Cache, Row, labels_of
from safetensors.torch import save_file
from torch import Tensor, nn

import vqvit
from vqvit import data, engines, memory, progressive, report
from vqvit.evaluate import eval_mode
from vqvit.plan import QuantConfig
from vqvit.provenance import append_csv, environment, provenance_row
from vqvit.statistics import mcnemar, wilson_interval
from vqvit.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "table2.csv"

PAPER = {
    "fp32": {"paper_top1": 98.2, "paper_size_mb": 327, "paper_ms": 15.3},
    "paper": {"paper_top1": 97.8, "paper_size_mb": 82, "paper_ms": 5.2},
}
"""The paper's own figures: ViT-B at 224 x 224 on its GPU."""

RUN_LOG = "run-log.json"

BLOCK_ERROR_IMAGES = 64

CALIBRATION_IMAGES = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--cache", required=True, type=Path)
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--held-out", type=int, default=2000, help="images at the end of TRAIN that MODEL never saw")
    parser.add_argument("--tune-images", type=int, default=512)
    parser.add_argument("--check-images", type=int, default=512)
    parser.add_argument("--rows", default=None, help="keys of rows, between commas (default: all)")
    parser.add_argument("--batch", default="1,8", help="batch sizes of the latency columns")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch size; 0 leaves latency out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transform = data.transform_for(arguments.model)
    test = data.open_images(arguments.test, transform, PART, arguments.images)
    cache = Cache(arguments.cache, arguments.model, test, arguments.device)
    rows = table_rows(TrainingImages(arguments, transform))
    if arguments.rows:
        chosen = arguments.rows.split(",")
        if unknown := set(chosen) - {row.key for row in rows}:
            raise ValueError(f"--rows: expected keys among {[row.key for row in rows]}; got {sorted(unknown)}")
        rows = [row for row in rows if row.key in {"fp32", *chosen}]
    logits = {row.key: cache.logits(row) for row in rows}
    labels = labels_of(test)
    measured = [{"key": row.key, "row": row.title, **scores(logits[row.key], logits["fp32"], labels)} for row in rows]
    for entry in measured:
        entry |= dict.fromkeys(PAPER["fp32"]) | PAPER.get(entry["key"], {})
    folders = {row.key: cache.prepared(row) for row in rows}
    first = next(iter(test))[0]
    add_sizes(measured, folders, cache.folder, first[:1], arguments.device)
    for batch in map(int, arguments.batch.split(",")):
        add_latency(measured, folders, first[:batch], arguments.seconds, arguments.device)
    for entry in measured:
        append_csv(RESULTS, {"model": Path(arguments.model).name, **entry, **provenance_row(arguments.device)})
    document = page(measured, block_errors(folders, first[:BLOCK_ERROR_IMAGES], arguments.device), arguments)
    document["sections"] += stage_logs(folders)
    report.write(document, arguments.cache)
    print(report.to_text(document))


class TrainingImages:
    """Disjoint parts of TRAIN: calibration and tuning at even steps through what MODEL was trained on, checking at even
    steps through what was held out from it.
    """

    def __init__(self, arguments: argparse.Namespace, transform):
        self.path, self.transform = arguments.train, transform
        total = data.open_images(self.path, transform).images
        seen = range(total - arguments.held_out)
        count = CALIBRATION_IMAGES + arguments.tune_images
        if len(seen) < count or arguments.held_out < arguments.check_images:
            raise ValueError(
                f"{self.path}: expected at least {count} images and {arguments.check_images} held out; "
                f"got {total}, {arguments.held_out} of them held out"
            )
        chosen = [seen[i * len(seen) // count] for i in range(count)]
        step = count / CALIBRATION_IMAGES
        calibration = {chosen[int(i * step)] for i in range(CALIBRATION_IMAGES)}
        held_out = range(total - arguments.held_out, total)
        self.parts = {
            "calibration": sorted(calibration),
            "tune": [index for index in chosen if index not in calibration],
            "check": [held_out[i * len(held_out) // arguments.check_images] for i in range(arguments.check_images)],
        }

    def batches(self, part: str) -> data.ImageBatches:
        return data.open_images(self.path, self.transform, 32, indices=self.parts[part])


def scores(logits: Tensor, reference: Tensor, labels: Tensor) -> dict:
    """Accuracy with its 95 % interval, change in points and its paired test, agreement, SQNR."""
    right, reference_right = logits.argmax(-1) == labels, reference.argmax(-1) == labels
    low, high = wilson_interval(int(right.sum()), len(labels))
    noise = (logits - reference).double().square().sum().item()
    return {
        "images": len(labels),
        "top1": 100 * right.float().mean().item(),
        "top1_low": 100 * low,
        "top1_high": 100 * high,
        "change_points": 100 * (right.float().mean() - reference_right.float().mean()).item(),
        "p_value": mcnemar(int((reference_right & ~right).sum()), int((right & ~reference_right).sum())),
        "agreement": 100 * (logits.argmax(-1) == reference.argmax(-1)).float().mean().item(),
        "sqnr_db": 10 * math.log10(reference.double().square().sum().item() / noise) if noise else None,
    }


def add_sizes(measured: list[dict], folders: dict[str, Path], scratch: Path, image: Tensor, device: str) -> None:
    """Bytes on disk and peak memory at batch 1, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        inputs = Path(folder) / "inputs.safetensors"
        save_file({"pixel_values": image.contiguous()}, inputs)
        for entry in measured:
            used = memory.measure(folders[entry["key"]], inputs, batch_size=1, device=device)
            entry |= {"size_mb": engines.folder_bytes(folders[entry["key"]]) / 1e6, "peak_mib": used.peak}
    for entry in measured:
        entry["size_ratio"] = measured[0]["size_mb"] / entry["size_mb"]


def add_latency(measured: list[dict], folders: dict[str, Path], images: Tensor, seconds: float, device: str) -> None:
    """Interleaved medians of all rows; None without `seconds`."""
    for entry in measured:
        entry |= {f"b{len(images)}_{name}": None for name in ("median_ms", "p20_ms", "p80_ms")}
    if seconds <= 0:
        return
    models = {key: engines.open_model(folder, device) for key, folder in folders.items()}
    calls = {key: engines.timed_call(model, images) for key, model in models.items()}
    for key, latency in interleaved(calls, seconds, device, f"latency at batch {len(images)}").items():
        entry = next(entry for entry in measured if entry["key"] == key)
        entry |= {f"b{len(images)}_{name}": getattr(latency, name) for name in ("median_ms", "p20_ms", "p80_ms")}


def table_rows(training: TrainingImages) -> list[Row]:
    """The table's rows, the float model first."""

    def quantized(key: str, title: str, config: QuantConfig, calibrated: bool = False) -> Row:
        def make(model: nn.Module, _folder: Path) -> nn.Module:
            batches = training.batches("calibration") if calibrated else None
            vqvit.quantize_(model, config, batches, progress=True)
            return model

        recipe = {"config": dataclasses.asdict(config), "calibration_images": CALIBRATION_IMAGES if calibrated else 0}
        return Row(key, title, recipe, make)

    def tuned(key: str, title: str, preset: str) -> Row:
        def make(model: nn.Module, folder: Path) -> nn.Module:
            log = progressive.quantize_progressively_(
                model, training.batches("tune"), training.batches("check"), preset,
                workdir=folder.with_name(f"{key}-run"), resume=True, progress=True,
            )  # fmt: skip
            log.save(folder / RUN_LOG)
            return model

        sizes = {part: len(training.parts[part]) for part in ("tune", "check")}
        return Row(key, title, {"preset": dataclasses.asdict(progressive.recipe(preset)), **sizes}, make)

    naive = QuantConfig(per_channel=False, activation="static", equalize=False, rounding="nearest")
    return [
        Row("fp32", "FP32", {}, lambda model, _folder: model),
        Row("bf16", "BF16", {"dtype": "bfloat16"}, lambda model, _folder: model.bfloat16()),
        quantized("naive", "W8A8, naive per tensor", naive, calibrated=True),
        quantized("w8a8", "W8A8, no data", QuantConfig()),
        tuned("paper", 'VQ-ViT, preset "paper"', "paper"),
        quantized("vqvit", "VQ-ViT, calibrated", QuantConfig.vqvit(), calibrated=True),
        tuned("progressive", "VQ-ViT, progressive", "default"),
        quantized("w4a8", "W4A8, calibrated", dataclasses.replace(QuantConfig.vqvit(), bits=4), calibrated=True),
    ]


@torch.inference_mode()
def block_errors(folders: dict[str, Path], images: Tensor, device: str) -> list[dict]:
    """SQNR in dB of each hidden state against the float model's, a row a block."""
    states = {}
    for key, folder in folders.items():
        model = engines.open_model(folder, device)
        dtype = next(model.parameters()).dtype
        with eval_mode(model):
            found = model(images.to(device, dtype), output_hidden_states=True).hidden_states
        states[key] = [state.double().cpu() for state in found]
    rows = []
    for block, reference in enumerate(states["fp32"]):
        signal = reference.square().sum()
        noise = {key: (state[block] - reference).square().sum() for key, state in states.items() if key != "fp32"}
        rows.append({"block": block, **{key: (10 * torch.log10(signal / n)).item() for key, n in noise.items()}})
    return rows


def page(measured: list[dict], errors: list[dict], arguments: argparse.Namespace) -> dict:
    """The result document (see `vqvit.report`)."""
    latency = [key for key in measured[0] if key.endswith("_median_ms")]
    titles = {entry["key"]: entry["row"] for entry in measured}
    interval = {"low": "top1_low", "high": "top1_high"}
    return {
        "title": f"CIFAR-10 with {Path(arguments.model).name}",
        "summary": [f"{measured[0]['images']} test images; every row was saved, reloaded and run as its user would."],
        "sections": [
            {
                "heading": "Accuracy, size, speed",
                "columns": [
                    {"key": "row", "label": "Model"},
                    {"key": "top1", "label": "Accuracy (%)", "format": ".2f"},
                    {"key": "change_points", "label": "Points", "format": "+.2f"},
                    {"key": "p_value", "label": "p (McNemar)", "format": ".3f"},
                    {"key": "agreement", "label": "Agreement (%)", "format": ".2f"},
                    {"key": "sqnr_db", "label": "Logits (dB)", "format": ".1f"},
                    {"key": "size_mb", "label": "Size (MB)", "format": ".1f"},
                    {"key": "size_ratio", "label": "x smaller", "format": ".2f"},
                    *({"key": key, "label": f"Batch {key[1:-10]} (ms)", "format": ".1f"} for key in latency),
                    {"key": "peak_mib", "label": "Peak memory (MiB)", "format": ".0f"},
                    {"key": "paper_top1", "label": "Paper: accuracy", "format": ".1f"},
                    {"key": "paper_size_mb", "label": "Paper: MB", "format": ".0f"},
                    {"key": "paper_ms", "label": "Paper: ms", "format": ".1f"},
                ],
                "rows": measured,
                "notes": [
                    "Points and p: against FP32 on the same images. Size: all files of the model's folder.",
                    "Paper: its ViT-B at 224 x 224 on its GPU, for orientation: another model and machine.",
                ],
                "charts": [
                    {"column": "top1", "title": "Accuracy (%), 95 % interval", **interval},
                    {"column": "top1", "title": "Accuracy against size", "against": "size_mb", **interval},
                    *({"column": key, "title": f"Latency at batch {key[1:-10]} (ms)"} for key in latency),
                ],
            },
            {
                "heading": f"Error by block, {BLOCK_ERROR_IMAGES} images",
                "columns": [
                    {"key": "block", "label": "Hidden state"},
                    *(
                        {"key": key, "label": f"{titles[key]} (dB)", "format": ".1f"}
                        for key in errors[0]
                        if key in titles
                    ),
                ],
                "rows": errors,
                "notes": ["SQNR of the hidden states against FP32; state 0 is the embedding."],
                "charts": [{"column": key, "title": f"{titles[key]} (dB)"} for key in errors[0] if key in titles],
            },
        ],
        "environment": environment(arguments.device),
    }


def stage_logs(folders: dict[str, Path]) -> list[dict]:
    """Sections of the progressive runs, by their logs."""
    sections = []
    for key, folder in folders.items():
        log = folder.parent / RUN_LOG
        if log.is_file():
            found = progressive.document(progressive.RunLog.load(log))["sections"]
            sections += [{**section, "heading": f"{key}: {section['heading']}"} for section in found]
    return sections


if __name__ == "__main__":
    main()
