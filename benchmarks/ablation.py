"""Each component of VQ-ViT switched on or off, alone: logits or CLS feature against the float model.

    python benchmarks/ablation.py MODEL IMAGES --calibration CALIBRATION [--images 1000] [--only NAME,...]

MODEL is a float Hugging Face folder; IMAGES, and CALIBRATION with other images, are what `vqvit.data.open_images`
reads. The first group changes one thing in W8A8 with nearest rounding, per-token activations and no data; the second
takes one thing out of the calibrated default. Appends a row a variant to results/ablation.csv.
"""

import argparse
import copy
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accuracy import run
from torch import Tensor, nn

import vqvit
from vqvit import data, engines
from vqvit.plan import QuantConfig
from vqvit.provenance import append_csv, provenance_row
from vqvit.report import text_table
from vqvit.rewriter import make_plan

RESULTS = Path(__file__).parent / "results" / "ablation.csv"

CALIBRATION_IMAGES = 128


@dataclass(frozen=True)
class Variant:
    """One model: a configuration, changes to every layer of the plan made from it, and whether it sees data."""

    name: str
    config: QuantConfig = field(default_factory=QuantConfig)
    layers: dict = field(default_factory=dict)
    calibrated: bool = False


def nearest(**fields) -> QuantConfig:
    return QuantConfig(rounding="nearest", **fields)


def default(**fields) -> QuantConfig:
    return dataclasses.replace(QuantConfig.vqvit(), **fields)


VARIANTS = (
    Variant("W8A8, nearest, per token", nearest()),
    Variant("without equalisation", nearest(equalize=False)),
    Variant("weights per tensor", nearest(per_channel=False)),
    Variant("activations static (EMA)", nearest(activation="static"), calibrated=True),
    Variant("naive: per tensor, static, not equalised", nearest(per_channel=False, activation="static", equalize=False),
            calibrated=True),
    Variant("activations asymmetric", nearest(activation="per_token_asym")),
    Variant("activations per group of 128", nearest(activation="per_token_group")),
    Variant("weights asymmetric", nearest(tier="int8_asym")),
    Variant("beta = 0.5", nearest(), {"beta": 0.5}),
    Variant("beta = -0.5", nearest(), {"beta": -0.5}),
    Variant("delta = -0.5", nearest(), {"delta": -0.5}),
    Variant("E_comp of the paper", nearest(compensations={"*": "paper"})),
    Variant("compensation: activation", nearest(compensations={"*": "activation"})),
    Variant("compensation: weight", nearest(compensations={"*": "weight"})),
    Variant("compensation: full", nearest(compensations={"*": "full"})),
    Variant("attention in float", nearest(attention="float")),
    Variant("attention scales static per head", nearest(attention_scales="static"), calibrated=True),
    Variant("patch scales factorised", nearest(factorize_patches=True), calibrated=True),
    Variant("error-aware rounding", QuantConfig(rounding="error_aware"), calibrated=True),
    Variant("VQ-ViT default, calibrated", default(), calibrated=True),
    Variant("default without equalisation", default(equalize=False), calibrated=True),
    Variant("default without error-aware rounding", default(rounding="nearest")),
    Variant("default without group scales", default(activations={}), calibrated=True),
    Variant("W4A8, nearest", default(bits=4, rounding="nearest")),
    Variant("W4A8, error-aware", default(bits=4), calibrated=True),
    Variant("W3A8, error-aware", default(bits=3), calibrated=True),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images_path", metavar="images")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--image-size", type=int, help="default: the model's image processor")
    parser.add_argument("--only", help="parts of names, between commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transform = data.transform_for(arguments.model, arguments.image_size)
    measured = data.open_images(arguments.images_path, transform, 100, arguments.images)
    calibration = data.open_images(arguments.calibration, transform, 32, CALIBRATION_IMAGES)
    model = engines.open_model(arguments.model).float()
    reference, labels = outputs(model, measured)
    rows = []
    for variant in VARIANTS:
        if arguments.only and not any(part in variant.name for part in arguments.only.split(",")):
            continue
        row = {"model": Path(arguments.model).name, **figures(variant, model, measured, calibration, reference, labels)}
        append_csv(RESULTS, {**row, **provenance_row()})
        rows.append([str(value) for value in row.values()])
        print(row, flush=True)
    print(text_table(list(row), rows))


def figures(
    variant: Variant, model: nn.Module, measured, calibration, reference: Tensor, labels: Tensor | None
) -> dict:
    """Differences of a variant from the float outputs `reference` (images, outputs)."""
    quantized = copy.deepcopy(model)
    wanted = variant.config
    if variant.layers:
        plan, _ = make_plan(quantized, variant.config)
        layers = tuple(dataclasses.replace(layer, **variant.layers) for layer in plan.layers)
        wanted = dataclasses.replace(plan, layers=layers)
    started = time.perf_counter()
    vqvit.quantize_(quantized, wanted, calibration if variant.calibrated else None)
    seconds = time.perf_counter() - started
    out, _ = outputs(quantized, measured)
    noise = (out - reference).square().sum()
    classified = labels is not None
    return {
        "variant": variant.name,
        "images": len(out),
        "image_size": measured.transform.size if hasattr(measured.transform, "size") else None,
        "calibration_images": calibration.images if variant.calibrated else 0,
        "sqnr_db": round(10 * torch.log10(reference.square().sum() / noise).item(), 2),
        "agreement": round((out.argmax(-1) == reference.argmax(-1)).double().mean().item(), 4) if classified else None,
        "top1": round((out.argmax(-1) == labels).double().mean().item(), 4) if classified else None,
        "float_top1": round((reference.argmax(-1) == labels).double().mean().item(), 4) if classified else None,
        "quantize_s": round(seconds, 1),
    }


def outputs(model: nn.Module, images) -> tuple[Tensor, Tensor | None]:
    """fp64 logits or CLS features (images, outputs), and labels if the model classifies."""
    found, labels = [], []
    for batch in images:
        pixels, label = batch if images.labelled else (batch, None)
        found.append(run(model, pixels).double())
        labels.append(label)
    classified = images.labelled and hasattr(model, "classifier")
    return torch.cat(found), torch.cat(labels) if classified else None


if __name__ == "__main__":
    main()
