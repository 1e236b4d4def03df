"""Fine-tune a local Hugging Face backbone to the classes of a labelled image set; a killed run goes on where it was.

    python benchmarks/finetune.py BACKBONE TRAIN OUT --image-size 98 --images 80000 --full-from 64000

BACKBONE is a folder that `AutoModelForImageClassification` reads; TRAIN a folder of images by class or a parquet file
with columns `img` or `image` and `label`. The last `--held-out` images of TRAIN are never trained on: the log has the
accuracy on them. OUT becomes a Hugging Face folder with its image processor; OUT.log.jsonl has the recipe and a line
for each report, and OUT.state the optimizer until the run is complete.

Defaults are for two CPU cores at a small image size; on a GPU pass `--autocast bfloat16`, and for the VQ-ViT paper's
Table 1 its batch size, rates and epochs at 224 pixels.
"""

import argparse
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvit import data

REPORT_STEPS = 20
SAVE_STEPS = 60
SHIFT_PIXELS = 4


@dataclass(frozen=True)
class Recipe:
    """How a backbone is tuned.

    Attributes:
        image_size: side in pixels that images are enlarged to (bicubic).
        images: training images in all, counted with repetitions.
        full_from: images after which every patch is kept; before, `keep` of them at random (PatchDropout, Liu et al.
            2022), which costs about as much less.
        learning_rate, head_learning_rate: peaks of the cosine for the last block and for the classifier.
        layer_decay: factor of the rate from each block to the one before it.
    """

    image_size: int = 98
    images: int = 80_000
    full_from: int = 64_000
    keep: float = 0.5
    batch_size: int = 64
    learning_rate: float = 2e-4
    head_learning_rate: float = 1e-3
    layer_decay: float = 0.8
    weight_decay: float = 0.05
    warmup: float = 0.05
    label_smoothing: float = 0.1
    held_out: int = 2000
    autocast: str | None = None
    seed: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("train")
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Recipe):
        kind = str if field.name == "autocast" else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Recipe)})
    finetune(arguments.backbone, arguments.train, arguments.output, recipe, torch.device(arguments.device))


def finetune(backbone: str, train: str, output: Path, recipe: Recipe, device: torch.device) -> None:
    """Run or resume `recipe`. Raises `ValueError` if `output`'s state is of another recipe."""
    images, labels = load_images(train)
    count = len(images) - recipe.held_out
    if count < recipe.batch_size:
        raise ValueError(f"{train}: expected over {recipe.held_out + recipe.batch_size} images; got {len(images)}")
    torch.manual_seed(recipe.seed)
    model = open_backbone(backbone, int(labels.max()) + 1).to(device)
    if device.type == "cpu":  # two Zen 4 cores in bf16: 34 to 36 images/s fused, 40 to 44 not
        model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), weight_decay=recipe.weight_decay, fused=True)
    state_file, log_file = output.with_suffix(".state"), output.with_suffix(".log.jsonl")
    step = resume(state_file, recipe, model, optimizer)
    if step == 0:
        log_file.write_text(json.dumps({"recipe": dataclasses.asdict(recipe)}) + "\n")
    steps = recipe.images // recipe.batch_size
    dropout = PatchDropout(model)
    model.train()
    started, seen_loss, seen_right, first = time.perf_counter(), 0.0, 0, step
    while step < steps:
        position = step * recipe.batch_size
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        chosen = epoch_order(count, recipe, position)
        pixels = augment(images[chosen], recipe.image_size, generator).to(device)
        dropout.keep = 1.0 if position >= recipe.full_from else recipe.keep
        rate = schedule(step, steps, recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        target = labels[chosen].to(device)
        with torch.autocast(device.type, getattr(torch, recipe.autocast or "bfloat16"), enabled=bool(recipe.autocast)):
            logits = model(pixels).logits.float()
        loss = F.cross_entropy(logits, target, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seen_loss, seen_right = seen_loss + loss.item(), seen_right + int((logits.argmax(-1) == target).sum())
        if step % REPORT_STEPS == 0 or step == steps:
            span = (step - 1) % REPORT_STEPS + 1
            report = {
                "step": step,
                "images": step * recipe.batch_size,
                "loss": round(seen_loss / span, 4),
                "train_top1": round(seen_right / (span * recipe.batch_size), 4),
                "images_per_s": round((step - first) * recipe.batch_size / (time.perf_counter() - started), 2),
            }
            with log_file.open("a") as log:
                log.write(json.dumps(report) + "\n")
            print(report, flush=True)
            seen_loss, seen_right = 0.0, 0
        if step % SAVE_STEPS == 0 or step == steps:
            save_state(state_file, step, recipe, model, optimizer)
    dropout.remove()
    model.eval()
    top1 = accuracy(model, images[count:], labels[count:], recipe.image_size, device)
    with log_file.open("a") as log:
        log.write(json.dumps({"held_out_top1": top1, "held_out_images": recipe.held_out}) + "\n")
    print({"held_out_top1": top1})
    model.save_pretrained(output)
    save_processor(output, recipe.image_size)
    state_file.unlink()


def load_images(path: str) -> tuple[Tensor, Tensor]:
    """All images of one size as uint8 (N, 3, H, W), and labels int64 (N,)."""
    batches = data.open_images(path, as_bytes, 1000)
    if not batches.labelled:
        raise ValueError(f"{path}: expected images with labels; got none")
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def as_bytes(images: list) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def open_backbone(folder: str, classes: int) -> nn.Module:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(
        folder, num_labels=classes, ignore_mismatched_sizes=True, local_files_only=True, dtype=torch.float32
    )


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Each block a group with its own peak rate; what lies before the blocks counts as the block before the first."""
    blocks = model.config.num_hidden_layers
    peaks: dict[float, list] = {}
    for name, parameter in model.named_parameters():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if not name.startswith(model.base_model_prefix):
            peak = recipe.head_learning_rate
        elif "embeddings" in name:
            peak = recipe.learning_rate * recipe.layer_decay**blocks
        else:
            depth = numbers[0] if numbers else blocks - 1
            peak = recipe.learning_rate * recipe.layer_decay ** (blocks - 1 - depth)
        peaks.setdefault(peak, []).append(parameter)
    return [{"params": parameters, "peak": peak, "lr": 0.0} for peak, parameters in peaks.items()]


class PatchDropout:
    """Let the embeddings of a transformers model pass on CLS and a random share `keep` of the patches, the same ones
    for all images of a batch.
    """

    def __init__(self, model: nn.Module):
        self.keep = 1.0
        self.handle = model.base_model.embeddings.register_forward_hook(self)

    def __call__(self, _module, _inputs, tokens: Tensor) -> Tensor:
        if self.keep == 1.0:
            return tokens
        patches = tokens.shape[1] - 1
        kept = torch.randperm(patches)[: max(1, round(patches * self.keep))].sort().values + 1
        return tokens[:, torch.cat([torch.zeros(1, dtype=kept.dtype), kept]).to(tokens.device)]

    def remove(self) -> None:
        self.handle.remove()


def epoch_order(count: int, recipe: Recipe, position: int) -> Tensor:
    """Indices of the batch that starts at `position` of the endless shuffled sequence of epochs."""
    chosen = []
    for index in range(position, position + recipe.batch_size):
        epoch, offset = divmod(index, count)
        chosen.append(_permutation(count, recipe.seed, epoch)[offset])
    return torch.stack(chosen)


_PERMUTATIONS: dict[tuple[int, int, int], Tensor] = {}


def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    key = (count, seed, epoch)
    if key not in _PERMUTATIONS:
        _PERMUTATIONS[key] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1009 + epoch))
    return _PERMUTATIONS[key]


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random mirror images and shifts at the images' own size, then `enlarge`."""
    batch, _, height, width = images.shape
    mirrored = torch.rand(batch, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images).float()
    padded = F.pad(images, (SHIFT_PIXELS,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2, batch), generator=generator).tolist()
    shifted = [padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(zip(*offsets, strict=True))]
    return enlarge(torch.stack(shifted), size)


def enlarge(images: Tensor, size: int) -> Tensor:
    """0..255 (B, 3, H, W) to the model's input: bicubic with a = -0.5 and ImageNet mean and std, as `data.Resize`."""
    large = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255) / 255
    mean, std = torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(data.IMAGENET_STD).view(3, 1, 1)
    return (large - mean) / std


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero."""
    ramp = max(1, round(steps * warmup))
    return min((step + 1) / ramp, 0.5 * (1 + math.cos(math.pi * max(0, step - ramp) / max(1, steps - ramp))))


def resume(file: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from: 0, or where `file` was saved."""
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    if state["recipe"] != dataclasses.asdict(recipe):
        raise ValueError(f"{file}: expected the state of recipe {dataclasses.asdict(recipe)}; got {state['recipe']}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def save_state(file: Path, step: int, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    temporary = file.with_suffix(".part")
    state = {"step": step, "recipe": dataclasses.asdict(recipe), "model": model.state_dict()}
    torch.save({**state, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, temporary)
    os.replace(temporary, file)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, size: int, device: torch.device) -> float:
    right = 0
    for pixels, target in zip(images.split(64), labels.split(64), strict=True):
        right += int((model(enlarge(pixels, size).to(device)).logits.argmax(-1).cpu() == target).sum())
    return right / len(images)


def save_processor(folder: Path, size: int) -> None:
    """What `data.transform_for` reads: bicubic to size x size, ImageNet mean and std."""
    from transformers import ViTImageProcessor

    square = {"height": size, "width": size}
    ViTImageProcessor(
        size=square, resample=3, image_mean=list(data.IMAGENET_MEAN), image_std=list(data.IMAGENET_STD)
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
