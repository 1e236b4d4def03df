"""Train what is quantized: scales and weights of some layers, on the difference from the float model or on labels."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvit import qat
from vqvit.evaluate import forward, pick_output
from vqvit.progressive.config import ProgressiveError, Tuning
from vqvit.progressive.samples import Samples
from vqvit.progressive.student import Student


@dataclass(frozen=True)
class Lesson:
    """What is trained on what: layers' names, inputs, and the float model's logits for them (n, classes)."""

    layers: tuple[str, ...]
    samples: Samples
    logits: Tensor


def tune(
    student: Student, lesson: Lesson, config: Tuning, steps: int, seed: str, label: str, progress: bool
) -> tuple[float, ...]:
    """Adam for some steps, the learning rates on a cosine from their start to 0. Returns the loss of each step.

    Images come in an order that depends on `seed` alone; the model stays in eval mode, so that nothing else is random.
    Raises `ProgressiveError` for a loss that is not finite.
    """
    groups = _parameters(student, lesson.layers, config)
    if steps == 0 or not groups:
        return ()
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    order = tqdm(
        batches_of(len(lesson.samples), config.batch_size, steps, seed), label, steps, unit="step", disable=not progress
    )
    found = []
    with _trainable(student.model, trained):
        for index in order:
            loss = _loss(student, lesson, index, config)
            if not math.isfinite(loss.item()):
                raise ProgressiveError(
                    f"{label}: expected a finite loss; got {loss.item()} at step {len(found) + 1}. Learning rates "
                    f"{config.scale_rate:g} (scales) and {config.weight_rate:g} (weights) are too high for this model."
                )
            found.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return tuple(found)


def _loss(student: Student, lesson: Lesson, index: Tensor, config: Tuning) -> Tensor:
    batch = lesson.samples.take(index)
    logits, _ = pick_output(forward(student.model, batch))
    if config.objective == "ce":
        loss = qat.cross_entropy(logits, batch.labels.to(logits.device))
    else:
        loss = qat.kl_to_float(logits, lesson.logits[index].to(logits.device))
    chosen = config.regularizers
    if chosen.quant_weight and student.has_scales:
        loss = loss + chosen.quant_weight * qat.quant_regularizer(student.model, chosen.quant_reading)
    if chosen.smooth_weight:
        loss = loss + chosen.smooth_weight * qat.smooth_regularizer(student.model)
    return loss


def _parameters(student: Student, layers: tuple[str, ...], config: Tuning) -> list[dict]:
    """Groups for the optimizer, those with a learning rate: all scales; weight and bias of each layer, whose rate is
    relative to the median absolute weight: outliers must not speed up the others.
    """
    groups = []
    if "scales" in config.learn and config.scale_rate > 0:
        groups.append({"params": student.scale_parameters(layers), "lr": config.scale_rate})
    if "weights" in config.learn and config.weight_rate > 0:
        for module in (student.layers[name] for name in layers):
            size = float(module.weight.detach().abs().median())
            groups.append({"params": module.weight_parameters(), "lr": config.weight_rate * size})
    return [group for group in groups if group["params"]]


def batches_of(images: int, batch_size: int, steps: int, seed: str) -> Iterator[Tensor]:
    """Indices int64 (B,) of each step's images: epoch after epoch in new orders."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(number)
    size = min(batch_size, images)
    drawn = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(drawn) < size:
            drawn = torch.cat([drawn, torch.randperm(images, generator=generator)])
        yield drawn[:size]
        drawn = drawn[size:]


@contextmanager
def _trainable(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for `trained` alone, then for each parameter as before."""
    wanted = {id(parameter) for parameter in trained}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, requires_grad in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
