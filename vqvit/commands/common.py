"""Options and checks that several commands share."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

EVALUATION_FIELDS = (
    ("images", "images", "d"),
    ("top1", "top-1", ".4f"),
    ("reference_top1", "top-1 of the reference", ".4f"),
    ("agreement", "agreement with the reference", ".4f"),
    ("sqnr_db", "SQNR (dB)", ".2f"),
    ("kl", "KL from the reference (nats)", ".3e"),
    ("cosine_mean", "cosine, mean", ".6f"),
    ("cosine_min", "cosine, minimum", ".6f"),
)
"""Field of `vqvit.evaluate.Evaluation`, its label and format."""


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def int_list(text: str) -> list[int]:
    """Positive integers between commas."""
    return [positive_int(part) for part in text.split(",")]


positive_int.__name__ = "positive integer"
int_list.__name__ = "list of positive integers, such as 1,8,"


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is any), cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--backend", help="force a backend: reference, cpu or triton")


def add_data_arguments(parser: argparse.ArgumentParser, option: str, required: bool, purpose: str) -> None:
    parser.add_argument(
        option,
        required=required,
        metavar="PATH",
        help=f"{purpose}: a folder of images, a parquet file or folder of them, or digits, digits-train",
    )
    parser.add_argument("--images", type=positive_int, metavar="N", help="use at most N images, at even steps")
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="N")
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="S",
        help="resize images to S x S (default: the model's preprocessor_config.json, else its config's image_size)",
    )


def use_device(arguments: argparse.Namespace):
    """Apply --threads, --backend and --device; returns the torch device. Raises `ValueError` if it cannot be had."""
    import torch

    import vqvit

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.backend:
        vqvit.backend(arguments.backend)
    if arguments.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(arguments.device)
    except RuntimeError as error:
        raise ValueError(f"--device: expected auto, cpu or cuda; got {arguments.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda; got {arguments.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected a CUDA device for {arguments.device!r}; PyTorch finds none here")
    return device


def open_data(source: str, model, folder: str | Path, arguments: argparse.Namespace) -> Iterable:
    """Batches for `model`, which came from `folder`; see `vqvit.data`."""
    from vqvit import data

    config = getattr(model, "config", None)
    if source in ("digits", "digits-train"):
        digits, part = data.digits(), "test" if source == "digits" else "train"
        images, labels = (getattr(digits, f"{part}_{what}")[: arguments.images] for what in ("images", "labels"))
        return list(zip(images.split(arguments.batch_size), labels.split(arguments.batch_size), strict=True))
    size = arguments.image_size
    if size is None and not (Path(folder) / data.PROCESSOR_FILE).is_file():
        size = image_size_of(model)
    transform = data.transform_for(folder, size)
    label2id = getattr(config, "label2id", None)
    return data.open_images(source, transform, arguments.batch_size, arguments.images, label2id)


def image_size_of(model) -> int | None:
    """Side of the square images that a transformers configuration names, or None."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    return size[0] if isinstance(size, list | tuple) else size


def random_images(model, name: str, batch: int, size: int | None):
    """(batch, C, size, size) fp32, the same at every call: latency does not depend on values.

    Without `size` it is the model's. Raises `ValueError` with the model's `name` if there is none.
    """
    import torch

    size = size or image_size_of(model)
    if size is None:
        raise ValueError(f"{name}: expected --image-size, for the model's configuration names none")
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def require_writable_folder(path: str | Path) -> None:
    """Raise unless a folder `path` can be made, or is a folder that can be written to. Leaves no trace."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output: expected a folder; {path} is a file")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"output: expected a folder that can be made; {parent} is a file")
    try:
        with tempfile.TemporaryDirectory(prefix=".vqvit-", dir=parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"output: expected a folder that can be written to; {parent}: {os.strerror(error.errno)}"
        ) from error


def say(line: str) -> None:
    """A line of progress, on stderr."""
    print(line, file=sys.stderr)
