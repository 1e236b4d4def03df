"""A pretrained model, float against W8A8, on images: features, size and latency.

    python benchmarks/pretrained.py MODEL IMAGES [--images 256] [--image-size 224] [--batch 1,8] [--threads 2]

MODEL is a local Hugging Face folder; IMAGES a folder of images, or a parquet file with a column `img` or `image`.
Compared is what `vqvit.evaluate.pick_output` picks: logits, or the CLS feature. Appends to results/pretrained.csv.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from vqvit import data, engines
from vqvit.evaluate import evaluate
from vqvit.plan import QuantConfig
from vqvit.provenance import append_csv, provenance_row
from vqvit.report import text_table
from vqvit.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "pretrained.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images_path", metavar="images")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", default="1,8", help="batch sizes of the latency rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch size")
    parser.add_argument("--attention", default="int8", help="int8 or float")
    parser.add_argument("--activation", default="per_token", help="per_token or per_token_asym")
    parser.add_argument("--no-equalize", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = QuantConfig(
        attention=arguments.attention, activation=arguments.activation, equalize=not arguments.no_equalize
    )
    transform = data.transform_for(arguments.model, arguments.image_size)
    batches = data.open_images(arguments.images_path, transform, 16, arguments.images)
    pixels = [batch[0] if batches.labelled else batch for batch in batches]
    models = engines.variants(engines.open_model(arguments.model).float(), config)
    row = {
        "model": Path(arguments.model).name,
        "class": type(models["fp32"]).__name__,
        "images_from": Path(arguments.images_path).name,
        "image_size": arguments.image_size,
        "attention": arguments.attention,
        "activation": arguments.activation,
        "equalize": not arguments.no_equalize,
        **figures(models, pixels),
        **sizes(models),
    }
    for batch in map(int, arguments.batch.split(",")):
        row |= latencies(models, torch.cat(pixels)[:batch], arguments.seconds)
    append_csv(RESULTS, {**row, **provenance_row("cpu")})
    print(text_table(["figure", ""], [[key, str(value)] for key, value in row.items()]))


def figures(models: dict, pixels: list) -> dict:
    """Difference of bf16 and W8A8 from fp32."""
    measured = {}
    for engine in ("bf16", "w8a8"):
        scores = evaluate(models[engine], pixels, reference=models["fp32"], progress=True)
        measured |= {
            "images": scores.images,
            f"{engine}_cosine_mean": f"{scores.cosine_mean:.6f}",
            f"{engine}_cosine_min": f"{scores.cosine_min:.6f}",
            f"{engine}_sqnr_db": f"{scores.sqnr_db:.2f}",
        }
    return measured


def sizes(models: dict) -> dict:
    """Bytes of each engine's folder, stored as a user would store it."""
    with tempfile.TemporaryDirectory(prefix="vqvit-") as scratch:
        folders = {engine: engines.save(engine, model, Path(scratch) / engine) for engine, model in models.items()}
        stored = {engine: engines.folder_bytes(folder) for engine, folder in folders.items()}
    ratio = stored["w8a8"] / stored["fp32"]
    return {**{f"{engine}_bytes": size for engine, size in stored.items()}, "size_ratio": f"{ratio:.4f}"}


def latencies(models: dict, images: torch.Tensor, seconds: float) -> dict:
    """Interleaved medians, p20 and p80 in milliseconds at one batch size."""
    calls = {engine: engines.timed_call(model, images) for engine, model in models.items()}
    measured = interleaved(calls, seconds, progress=f"batch {len(images)}")
    return {
        f"{engine}_b{len(images)}_{key}": round(getattr(latency, key), 3)
        for engine, latency in measured.items()
        for key in ("median_ms", "p20_ms", "p80_ms")
    }


if __name__ == "__main__":
    main()
