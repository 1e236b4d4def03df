"""Models made from one float model, and their logits on labelled images: kept in a folder, so that a rerun is cheap.

A row's folder holds the model as its user would store it, its logits in parts of `PART` images (a killed run goes on
at the next part), what the row was made from, and, where tuning wrote one, its run log.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from vqvit import checkpoint, engines, rewriter
from vqvit.provenance import commit, cpu_flags

PART = 500
BATCH = 32
FINGERPRINT = "made-from.json"
PRODUCTS = (F.linear, F.conv2d, F.scaled_dot_product_attention)


@dataclass(frozen=True)
class Row:
    """One model of a table.

    Attributes:
        key: name of its folder.
        title: name in the table.
        recipe: everything that decides what `make` returns, JSON-ready; another recipe makes the row anew.
        make: turns a float model, which it may change, and the row's folder into the model to measure.
    """

    key: str
    title: str
    recipe: dict
    make: Callable[[nn.Module, Path], nn.Module]


class Cache:
    """Rows of one float model folder and one set of images, in a folder of their own."""

    def __init__(self, folder: str | Path, model: str | Path, images, device: str = "cpu"):
        """`images`: a loader of (pixels, labels) batches of `PART` images, always in the same order."""
        self.folder, self.model, self.images, self.device = Path(folder), Path(model), images, device
        self.source = hashlib.sha256((self.model / "model.safetensors").read_bytes()).hexdigest()[:16]

    def prepared(self, row: Row) -> Path:
        """The row's model folder, made now if it is not there or was made from something else."""
        folder = self.folder / row.key
        stored = folder / FINGERPRINT
        if stored.is_file() and _same(json.loads(stored.read_text()), self._made_from(row)):
            return folder / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = row.make(engines.open_model(self.model, self.device).float(), folder)
        if any(rewriter.quantized_modules(model)):
            checkpoint.save(model, folder / "model")
        else:
            model.save_pretrained(folder / "model")
        _write(stored, json.dumps({**self._made_from(row), "commit": commit()}, indent=1))
        return folder / "model"

    def logits(self, row: Row) -> Tensor:
        """fp32 (images, classes), computed part by part where they are not there yet."""
        model_folder = self.prepared(row)
        parts = [model_folder.parent / f"logits-{index:03d}.safetensors" for index in range(len(self.images))]
        if not all(part.is_file() for part in parts):
            model = engines.open_model(model_folder, self.device)
            batches = tqdm(self.images, desc=row.title, unit="part", total=len(parts))
            for part, (pixels, _labels) in zip(parts, batches, strict=True):
                if not part.is_file():
                    temporary = part.with_suffix(".part")
                    save_file({"logits": run(model, pixels)}, temporary)
                    os.replace(temporary, part)
        return torch.cat([load_file(part)["logits"] for part in parts])

    def _made_from(self, row: Row) -> dict:
        return {"model": self.source, "recipe": json.loads(json.dumps(row.recipe)), "images": self.images.images}


@torch.inference_mode()
def run(model: nn.Module, pixels: Tensor) -> Tensor:
    """fp32 logits (B, classes) in batches of `BATCH`."""
    with products_in_fp32(model):
        return torch.cat([engines.call(model, batch).float().cpu() for batch in pixels.split(BATCH)]).contiguous()


class _ProductsInFp32(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in PRODUCTS:
            return function(*args, **(kwargs or {}))
        widened = [_widen(value) for value in args]
        result = function(*widened, **{name: _widen(value) for name, value in (kwargs or {}).items()})
        return result.to(args[0].dtype)


def products_in_fp32(model: nn.Module) -> _ProductsInFp32 | torch.no_grad:
    """Where a half-precision model runs on a CPU without such instructions, its products run in fp32, rounded to half
    precision afterwards: what the hardware would compute but for the order of sums, in a fraction of the time.
    """
    tensor = next(model.parameters(), None)
    slow = tensor is not None and tensor.dtype != torch.float32 and tensor.device.type == "cpu"
    if slow and not {"avx512_bf16", "amx_bf16"} & set(cpu_flags()):
        return _ProductsInFp32()
    return torch.no_grad()


def labels_of(images) -> Tensor:
    """int64 (images,)."""
    return torch.cat([labels for _, labels in images])


def _same(stored: dict, wanted: dict) -> bool:
    return all(stored.get(key) == value for key, value in wanted.items())


def _widen(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text + "\n")
    os.replace(temporary, path)
