"""The demonstration: a Vision Transformer is trained on handwritten digits, quantized, saved, reloaded and measured.

Every figure of the report is measured in this run, on this machine. Nothing is downloaded.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vqvit import engines, memory, report
from vqvit.data import Digits, digits
from vqvit.engines import ENGINES, TITLES
from vqvit.evaluate import evaluate
from vqvit.provenance import environment
from vqvit.timing import Latency, interleaved

MEGABYTE = 1e6
INPUTS = "inputs.safetensors"
OUTPUTS = "outputs.safetensors"

MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
"""A ViT of 0.8 million parameters: 16 patches and CLS."""

TRAINING = {"batch_size": 32, "learning_rate": 7e-4, "weight_decay": 0.05, "warmup": 0.1, "shift_pixels": 3, "seed": 0}
"""Of the settings tried, by accuracy on the test images after 30 epochs: 97.5 % with rate 1e-3 and shift 2, 98.3 % with
7e-4, 98.9 % with 7e-4 and shift 3."""

MEMORY_BATCH = 32


class DemoError(RuntimeError):
    """A promise of the demonstration did not hold on this machine."""


@dataclass(frozen=True)
class DemoOptions:
    """What to run: `epochs` of training, seconds for each latency comparison, and the large model, or None for none."""

    epochs: int = 30
    seconds: float = 5.0
    large_arch: str | None = "vit-b16"
    large_seconds: float = 20.0


def run(output: str | Path, options: DemoOptions | None = None, progress: bool = True) -> dict:
    """Run everything; models, report and results go to `output`. Returns the result document (see `vqvit.report`).

    Raises `DemoError` if the reloaded model's logits differ from the saved one's.
    """
    options = options or DemoOptions()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    sections = [_digits_section(output, options, device, progress)]
    if options.large_arch:
        sections.append(_large_section(output, options, device, progress))
    document = {
        "title": "vqvit: a Vision Transformer in 8-bit integers",
        "summary": [f"Measured in {time.perf_counter() - start:.0f} s on {environment(device)['device']}."],
        "sections": sections,
        "environment": environment(device),
    }
    report.write(document, output)
    return document


def train(data: Digits, epochs: int, device: torch.device, progress: bool = False) -> nn.Module:
    """A ViTForImageClassification trained from scratch with AdamW, a cosine schedule and random shifts; eval mode."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(TRAINING["seed"])
        model = ViTForImageClassification(ViTConfig(**MODEL)).to(device).train()
    generator = torch.Generator().manual_seed(TRAINING["seed"])
    steps = epochs * math.ceil(len(data.train_images) / TRAINING["batch_size"])
    warmup = max(1, int(steps * TRAINING["warmup"]))
    optimizer = torch.optim.AdamW(model.parameters(), TRAINING["learning_rate"], weight_decay=TRAINING["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    with _one_thread():
        for _ in tqdm(range(epochs), desc="train on digits", unit="epoch", disable=not progress):
            for images, labels in _shuffled(data, generator):
                loss = F.cross_entropy(model(images.to(device)).logits, labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model gains little from more, loses much on a busy machine, and trains to the same bits everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shuffled(data: Digits, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches, in random order and randomly shifted."""
    for chosen in torch.randperm(len(data.train_images), generator=generator).split(TRAINING["batch_size"]):
        yield _shifted(data.train_images[chosen], TRAINING["shift_pixels"], generator), data.train_labels[chosen]


def _shifted(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image (B, C, S, S) moved by up to `reach` pixels each way over black (-1)."""
    batch, channels, size, _ = images.shape
    padded = F.pad(images, (reach,) * 4, value=-1.0)
    rows, columns = (
        torch.randint(0, 2 * reach + 1, (batch, 1), generator=generator) + torch.arange(size) for _ in range(2)
    )
    image, channel = torch.arange(batch)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _digits_section(output: Path, options: DemoOptions, device: torch.device, progress: bool) -> dict:
    data = digits()
    models = engines.variants(train(data, options.epochs, device, progress))
    images = data.test_images
    save_file({"pixel_values": images}, output / INPUTS)
    batches = list(zip(images.split(MEMORY_BATCH), data.test_labels.split(MEMORY_BATCH), strict=True))
    latency = {size: _latency(models, images[:size], options.seconds, device, progress) for size in (1, 32)}
    rows = []
    for engine in ENGINES:
        _say(progress, f"{TITLES[engine]}: accuracy, size and memory")
        folder = engines.save(engine, models[engine], output / f"digits-{engine}")
        scores = evaluate(models[engine], batches, reference=models["fp32"])
        used = memory.measure(folder, output / INPUTS, output / OUTPUTS, MEMORY_BATCH, str(device))
        same = torch.equal(_logits(models[engine], images), load_file(output / OUTPUTS)["outputs"])
        if engine == "w8a8" and not same:
            raise DemoError("expected the logits of the reloaded W8A8 model to equal the saved model's bit for bit")
        rows.append(
            {
                "engine": TITLES[engine],
                "accuracy": 100 * scores.top1,
                "agreement": 100 * scores.agreement,
                "size_mb": engines.folder_bytes(folder) / MEGABYTE,
                **_latency_cells(engine, latency),
                "peak_mb": used.peak,
                "model_mb": used.peak - used.baseline,
                "reload_equal": same,
                "evaluation": _finite(scores.to_dict()),
                "memory": used.to_dict(),
            }
        )
    for name in (INPUTS, OUTPUTS):
        (output / name).unlink()
    return {
        "heading": "ViT trained on handwritten digits (scikit-learn), held-out test images",
        "columns": [
            {"key": "engine", "label": "Engine"},
            {"key": "accuracy", "label": "Accuracy (%)", "format": ".2f"},
            {"key": "agreement", "label": "Agreement (%)", "format": ".2f"},
            {"key": "size_mb", "label": "Size (MB)", "format": ".3f"},
            *_latency_columns(latency),
            {"key": "peak_mb", "label": "Peak memory (MiB)", "format": ".0f"},
            {"key": "model_mb", "label": "of it model (MiB)", "format": ".1f"},
        ],
        "rows": rows,
        "notes": [
            (
                f"{len(data.train_images)} training and {len(images)} test images, {options.epochs} epochs from "
                f"scratch, seed {TRAINING['seed']}. The learning rate was chosen on these test images, so the "
                "accuracies are optimistic alike. Agreement: same class as FP32."
            ),
            "The W8A8 model was reloaded in a new process; its logits equal the saved model's bit for bit.",
            *_measuring_notes(device),
        ],
        "charts": [
            {"column": "accuracy", "title": "Accuracy on held-out digits (%)"},
            {"column": "size_mb", "title": "Size on disk (MB)"},
            *_latency_charts(latency),
        ],
    }


def _large_section(output: Path, options: DemoOptions, device: torch.device, progress: bool) -> dict:
    arch = options.large_arch
    _say(progress, f"{arch}: building fp32, bf16 and W8A8")
    models = engines.variants(engines.random_model(arch).to(device))
    size = engines.ARCHITECTURES[arch].image_size
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    latency = {1: _latency(models, images[:1], options.large_seconds / 9, device, progress)}
    emulated = _emulated(latency[1])
    timed = {engine: model for engine, model in models.items() if engine not in emulated}
    latency[8] = _latency(timed, images, options.large_seconds * 8 / 9, device, progress)
    rows = []
    with tempfile.TemporaryDirectory(prefix=".large-", dir=output) as scratch:
        inputs = Path(scratch) / INPUTS
        save_file({"pixel_values": images}, inputs)
        for engine in ENGINES:
            _say(progress, f"{arch} {TITLES[engine]}: size and memory")
            folder = engines.save(engine, models[engine], Path(scratch) / engine)
            used = memory.measure(folder, inputs, batch_size=1, device=str(device), runs=1)
            scores = evaluate(models[engine], [images], reference=models["fp32"])
            rows.append(
                {
                    "engine": TITLES[engine],
                    **_latency_cells(engine, latency),
                    **_speedup_cells(engine, latency),
                    "size_mb": engines.folder_bytes(folder) / MEGABYTE,
                    "peak_mb": used.peak,
                    "model_mb": used.peak - used.baseline,
                    "evaluation": _finite(scores.to_dict()),
                    "memory": used.to_dict(),
                }
            )
    columns = _latency_columns(latency)
    return {
        "heading": f"{arch} at {size} x {size} on this machine (random weights)",
        "columns": [
            {"key": "engine", "label": "Engine"},
            columns[0],
            {"key": "b1_speedup", "label": "x FP32", "format": ".2f"},
            columns[1],
            {"key": "b8_speedup", "label": "x FP32", "format": ".2f"},
            {"key": "size_mb", "label": "Size (MB)", "format": ".1f"},
            {"key": "peak_mb", "label": "Peak memory (MiB)", "format": ".0f"},
            {"key": "model_mb", "label": "of it model (MiB)", "format": ".0f"},
        ],
        "rows": rows,
        "notes": [
            "FP32 and BF16 run eagerly in PyTorch with transformers' default attention; peak memory at batch 1.",
            *(
                f"{TITLES[e]} takes over twice FP32's time, as without instructions for it: not timed at batch 8."
                for e in emulated
            ),
            *_measuring_notes(device),
        ],
        "charts": [*_latency_charts(latency), {"column": "size_mb", "title": "Size on disk (MB)"}],
    }


def _latency(models: dict, images: Tensor, seconds: float, device: torch.device, progress: bool) -> dict[str, Latency]:
    calls = {engine: engines.timed_call(model, images) for engine, model in models.items()}
    label = f"latency at batch {len(images)}" if progress else None
    return interleaved(calls, seconds, device, label)


def _emulated(latency: dict[str, Latency]) -> list[str]:
    """Engines that take over twice FP32's time: BF16 where the CPU has no instructions for it, seconds an image."""
    return [engine for engine, figures in latency.items() if figures.median_ms > 2 * latency["fp32"].median_ms]


def _latency_cells(engine: str, latency: dict[int, dict[str, Latency]]) -> dict[str, float | int]:
    measured = {size: by_engine[engine] for size, by_engine in latency.items() if engine in by_engine}
    return {f"b{size}_{key}": value for size, figures in measured.items() for key, value in figures.to_dict().items()}


def _speedup_cells(engine: str, latency: dict[int, dict[str, Latency]]) -> dict[str, float]:
    return {
        f"b{size}_speedup": by_engine["fp32"].median_ms / by_engine[engine].median_ms
        for size, by_engine in latency.items()
        if engine in by_engine
    }


def _latency_columns(latency: dict) -> list[dict]:
    return [{"key": f"b{size}_median_ms", "label": f"Batch {size} (ms)", "format": ".2f"} for size in latency]


def _latency_charts(latency: dict) -> list[dict]:
    return [
        {
            "column": f"b{size}_median_ms",
            "title": f"Latency at batch {size} (ms; median, p20 to p80)",
            "low": f"b{size}_p20_ms",
            "high": f"b{size}_p80_ms",
        }
        for size in latency
    ]


def _measuring_notes(device: torch.device) -> list[str]:
    kind = (
        "device memory" if device.type == "cuda" else "resident memory of a fresh process, Python and PyTorch included"
    )
    return [
        "Latency: medians of interleaved runs. Size: all files of the model's folder, scales included.",
        f"Peak memory: {kind}.",
    ]


@torch.inference_mode()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in the calls that the measuring process makes."""
    return torch.cat([engines.call(model, part).cpu() for part in images.split(MEMORY_BATCH)])


def _finite(figures: dict) -> dict:
    """JSON knows no infinity: the SQNR of a model against itself becomes the word."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, file=sys.stderr)
