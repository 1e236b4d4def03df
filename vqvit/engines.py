"""The three engines that every comparison here runs: one model in fp32, in bf16, and in W8A8.

- fp32: the float model, eager, as transformers runs it (its default attention)
- bf16: the same with parameters and inputs in bfloat16
- w8a8: `vqvit.quantize_` of the float model
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqvit import checkpoint, hf
from vqvit.batches import Batch
from vqvit.evaluate import forward, pick_output
from vqvit.plan import QuantConfig
from vqvit.quantize import quantize_

ENGINES = ("fp32", "bf16", "w8a8")

TITLES = {"fp32": "FP32", "bf16": "BF16", "w8a8": "W8A8"}


@dataclass(frozen=True)
class Architecture:
    """A transformers class, the fields of its configuration that differ from the default, and the usual image size."""

    model_class: str
    config: dict
    image_size: int = 224


_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

ARCHITECTURES = {
    "vit-ti": Architecture("ViTForImageClassification", _TINY),
    "deit-s": Architecture("DeiTForImageClassification", _SMALL),
    "dinov2-s": Architecture(
        "Dinov2Model", {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224, "patch_size": 14}
    ),
    "vit-b16": Architecture("ViTForImageClassification", {"num_labels": 1000}),
    "vit-l16": Architecture("ViTForImageClassification", {**_LARGE, "num_labels": 1000}),
}
"""Models that `vqvit bench --arch` builds with random weights: latency and size do not depend on their values."""


def random_model(arch: str, seed: int = 0, blocks: int | None = None) -> nn.Module:
    """An fp32 model of `ARCHITECTURES` in eval mode, with transformers' initial weights for `seed`.

    `blocks`: how many, if not as many as the architecture has.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    import transformers

    chosen = ARCHITECTURES[arch]
    fields = chosen.config if blocks is None else {**chosen.config, "num_hidden_layers": blocks}
    model_class = getattr(transformers, chosen.model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(model_class.config_class(**fields)).eval()


def is_quantized_folder(folder: str | Path) -> bool:
    """Whether `folder` holds a checkpoint of `vqvit.save`."""
    return (Path(folder) / checkpoint.MANIFEST).is_file()


def open_model(folder: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a local folder, in eval mode: a vqvit checkpoint or a float Hugging Face model in its own dtype.

    Raises `FileNotFoundError` if there is neither.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model: expected a folder; there is no folder {folder}")
    if is_quantized_folder(folder):
        return checkpoint.load(folder, device=device)
    return hf.load_float(folder).to(device).eval()


def import_class(folder: str | Path) -> None:
    """Import the transformers class of a model folder, as opening it would; nothing for other models."""
    import transformers

    if is_quantized_folder(folder):
        names = [checkpoint.read_manifest(folder)["class"]]
    else:
        names = json.loads((Path(folder) / checkpoint.CONFIG).read_text()).get("architectures") or []
    for name in names:
        getattr(transformers, name, None)


def random_like(folder: str | Path) -> nn.Module:
    """A float model with random weights in the architecture of a vqvit checkpoint."""
    manifest = checkpoint.read_manifest(folder)
    if manifest["library"] != "transformers":
        raise ValueError(f"{folder}: expected a transformers model; got class {manifest['class']}")
    import transformers

    model_class = getattr(transformers, manifest["class"])
    fields = json.loads((Path(folder) / checkpoint.CONFIG).read_text())
    return model_class(model_class.config_class.from_dict(fields)).eval()


def variants(model: nn.Module, config: QuantConfig | None = None) -> dict[str, nn.Module]:
    """All of `ENGINES` from one fp32 model, which becomes the fp32 engine itself. Needs memory for the copies."""
    quantized = copy.deepcopy(model)
    quantize_(quantized, config)
    return {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), "w8a8": quantized}


def save(engine: str, model: nn.Module, folder: str | Path) -> Path:
    """Store an engine as its user would: `save_pretrained` for float, `vqvit.save` for w8a8."""
    if engine == "w8a8":
        return checkpoint.save(model, folder)
    model.save_pretrained(folder)
    return Path(folder)


def folder_bytes(folder: str | Path) -> int:
    """Size of all files of a model folder: weights, scales, plan and configuration."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def call(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits or feature (B, D) of `model` for images, which are moved to its device and dtype first."""
    return pick_output(forward(model, Batch((pixels,), {})))[0]


def timed_call(model: nn.Module, pixels: Tensor):
    """A call without arguments for `vqvit.timing`, with the inputs placed beforehand."""
    parameter = next(model.parameters())
    placed = pixels.to(parameter.device, parameter.dtype)

    def run() -> None:
        with torch.inference_mode():
            model(placed)

    return run
