"""A pretrained model, float against W8A8 with and without calibration data: SQNR of what its users read.

    python benchmarks/calibrated.py MODEL CALIBRATION IMAGES [--calibration-images 64] [--images 256] [--image-size 224]

MODEL is a local Hugging Face folder; CALIBRATION and IMAGES are folders of images, or parquet files with a column `img`
or `image`, and should share no image. Compared is what `vqvit.evaluate.pick_output` picks: logits, or the CLS feature,
the float model's as the signal. Every layer and attention run in int8.

`outliers_*` is the same model with six channels of each LayerNorm thirty times larger and the columns of the next
weight as much smaller, which leaves the float function as it is. Columns: nearest codes with scales per token, without
and with the equaliser that needs no data; scales per 128 columns behind GELU and attention; the preset with
calibration data (`QuantConfig.vqvit`). Appends to results/calibrated.csv.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from torch import nn

from vqvit import data, engines, families
from vqvit.evaluate import evaluate
from vqvit.plan import QuantConfig
from vqvit.provenance import append_csv, provenance_row
from vqvit.quantize import quantize_
from vqvit.report import text_table

RESULTS = Path(__file__).parent / "results" / "calibrated.csv"

OUTLIER_CHANNELS, OUTLIER_FACTOR = 6, 30.0

CONFIGS = {
    "per_token_unequalized": QuantConfig(equalize=False),
    "per_token": QuantConfig(),
    "groups": QuantConfig.vqvit(calibrated=False),
    "calibrated": QuantConfig.vqvit(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration_path", metavar="calibration")
    parser.add_argument("images_path", metavar="images")
    parser.add_argument("--calibration-images", type=int, default=64)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transform = data.transform_for(arguments.model, arguments.image_size)
    calibration = pixels(arguments.calibration_path, transform, arguments.calibration_images)
    images = pixels(arguments.images_path, transform, arguments.images)
    model = engines.open_model(arguments.model).float()
    row = {
        "model": Path(arguments.model).name,
        "class": type(model).__name__,
        "image_size": arguments.image_size,
        "calibration_images": sum(map(len, calibration)),
        "calibration_from": Path(arguments.calibration_path).name,
        "images": sum(map(len, images)),
        "images_from": Path(arguments.images_path).name,
    }
    references = Replay(model, images)
    for prefix, source in (("", model), ("outliers_", with_outliers(model))):
        for name, config in CONFIGS.items():
            quantized = copy.deepcopy(source)
            start = time.perf_counter()
            quantize_(quantized, config, calibration if name == "calibrated" else None, progress=True)
            seconds = time.perf_counter() - start
            scores = evaluate(quantized, images, reference=references.rewound(), progress=True)
            row[f"{prefix}{name}_sqnr_db"] = f"{scores.sqnr_db:.2f}"
            if name == "calibrated":
                row[f"{prefix}calibration_seconds"] = f"{seconds:.0f}"
            print(f"{prefix}{name}: {scores.sqnr_db:.2f} dB", flush=True)
    append_csv(RESULTS, {**row, **provenance_row("cpu")})
    print(text_table(["figure", ""], [[key, str(value)] for key, value in row.items()]))


class Replay(nn.Module):
    """What a model returned for a list of batches, once more in the same order: it runs once for all comparisons."""

    def __init__(self, model: nn.Module, batches: list[torch.Tensor]):
        super().__init__()
        with torch.inference_mode():
            self.outputs = [engines.call(model, batch) for batch in batches]
        self.following = 0

    def rewound(self) -> "Replay":
        self.following = 0
        return self

    def forward(self, _images: torch.Tensor) -> dict:
        self.following += 1
        return {"pooler_output": self.outputs[self.following - 1]}


def pixels(path: str, transform, limit: int) -> list[torch.Tensor]:
    batches = data.open_images(path, transform, 16, limit)
    return [batch[0] if batches.labelled else batch for batch in batches]


@torch.no_grad()
def with_outliers(model: nn.Module) -> nn.Module:
    """A copy with `OUTLIER_CHANNELS` amplified channels behind each LayerNorm of a block: the same float function."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for block in changed.modules():
        try:
            parts = families.probe(block)
        except families.NotABlock:
            continue
        for norm, linears in ((parts.norm1, parts.qkv), (parts.norm2, (parts.fc1,))):
            channels = torch.randperm(len(norm.weight), generator=generator)[:OUTLIER_CHANNELS]
            norm.weight[channels] *= OUTLIER_FACTOR
            norm.bias[channels] *= OUTLIER_FACTOR
            for linear in linears:
                linear.weight[:, channels] /= OUTLIER_FACTOR
    return changed


if __name__ == "__main__":
    main()
