"""Table 2 of the VQ-ViT paper on CIFAR-10: accuracy, agreement, size, latency and memory of every precision.

    python benchmarks/table2.py MODEL --train TRAIN --test TEST --cache FOLDER [--images 10000] [--rows fp32,w8a8,...]

MODEL is a float Hugging Face folder fine-tuned to the classes of TEST, such as `benchmarks/finetune.py` writes; its
image processor decides the preprocessing. TRAIN gives calibration, tuning and checking images, disjoint sets of it;
with `--held-out N` (as fine-tuning had it) the images that decide on rollback are among the N that MODEL never saw.
TEST is only measured. Models, logits and run logs stay in FOLDER; delete a row's folder to make it anew.

Appends to results/table2.csv and writes a page with plots into FOLDER.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from accuracy import PART, Cache, Row, labels_of
from safetensors.torch import save_file
from torch import Tensor, nn

import vqvit
from vqvit import data, engines, memory, report
from vqvit.plan import QuantConfig
from vqvit.progressive import ProgressiveConfig, quantize_progressively
from vqvit.provenance import append_csv, environment, provenance_row
from vqvit.statistics import mcnemar, wilson_interval
from vqvit.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "table2.csv"

PAPER = {
    "fp32": {"accuracy": 98.2, "size_mb": 327, "latency_ms": 15.3},
    "paper": {"accuracy": 97.8, "size_mb": 82, "latency_ms": 5.2},
}
"""The paper's figures for ViT-B at 224 x 224 on its GPU."""

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
    folders = {row.key: cache.prepared(row) for row in rows}
    first = next(iter(test))[0]
    add_sizes(measured, folders, cache.folder, first[:1], arguments.device)
    for batch in map(int, arguments.batch.split(",")) if arguments.seconds > 0 else ():
        add_latency(measured, folders, first[:batch], arguments.seconds, arguments.device)
    for entry in measured:
        append_csv(RESULTS, {"model": Path(arguments.model).name, **entry, **provenance_row(arguments.device)})
    document = page(measured, folders, arguments)
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
        "p_value": mcnemar(right, reference_right),
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
    """Interleaved medians of all rows."""
    models = {key: engines.open_model(folder, device) for key, folder in folders.items()}
    calls = {key: engines.timed_call(model, images) for key, model in models.items()}
    for entry in measured:
        entry |= {f"b{len(images)}_{name}": None for name in ("median_ms", "p20_ms", "p80_ms")}
    for key, latency in interleaved(calls, seconds, device, f"latency at batch {len(images)}").items():
        entry = next(entry for entry in measured if entry["key"] == key)
        entry |= {f"b{len(images)}_{name}": getattr(latency, name) for name in ("median_ms", "p20_ms", "p80_ms")}
