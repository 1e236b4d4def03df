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
    add_sizes(measured, folders, cache.folder)
    first = next(iter(test))[0]
    if arguments.seconds > 0:
        for batch in map(int, arguments.batch.split(",")):
            add_latency(measured, folders, first[:batch], arguments)
    for entry in measured:
        append_csv(RESULTS, {"model": Path(arguments.model).name, **entry, **provenance_row(arguments.device)})
    document = page(measured, folders, arguments)
    report.write(document, arguments.cache)
    print(report.to_text(document))
