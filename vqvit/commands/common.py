"""Options and checks that several commands share."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""`vqvit.backends.NAMES`, which imports PyTorch."""

BATCH_SIZE = 16

FOLDERS = {
    "export": ("program.json", "a model exported for vqvit.serving"),
    "checkpoint": ("vqvit.json", "a vqvit checkpoint"),
    "float": ("config.json", "a float Hugging Face model"),
}
"""Kinds of model folders: the file that tells, and what to call it. The first that fits counts."""

HINTS = {
    ("checkpoint", "float"): ", which is quantized already: pass the float model that it was made from",
    ("float", "checkpoint"): ": vqvit quantize makes a checkpoint of it",
    ("export", "checkpoint"): ": pass the checkpoint that it was made from",
    ("export", "float"): ": pass the float model that it was made from",
}
"""What helps, by the kind that was given and one that was expected."""

DIGITS = {"digits": "test", "digits-train": "train"}
"""Words for scikit-learn's digits, in place of a path, and the part that each means."""

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
    parser.add_argument("--backend", help=f"force a backend: {', '.join(BACKENDS)}")


def add_data_arguments(parser: argparse.ArgumentParser, option: str, required: bool, purpose: str) -> None:
    parser.add_argument(
        option,
        required=required,
        metavar="PATH",
        help=f"{purpose}: a folder of images, a picture, a parquet file or folder of them, or digits, digits-train",
    )
    parser.add_argument("--images", type=positive_int, metavar="N", help="use at most N images, at even steps")
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help=f"default: {BATCH_SIZE}")
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="S",
        help="resize images to S x S (default: the model's preprocessor_config.json, else its config's image_size)",
    )
    parser.add_argument("--strict", action="store_true", help="an image that cannot be read is an error, not skipped")


def require_kind(what: str, folder: str | Path, *kinds: str) -> str:
    """The kind of a model folder, one of `FOLDERS`. Raises `FileNotFoundError` or `ValueError` with what it is instead
    unless it is one of `kinds`.
    """
    folder = Path(folder)
    expected = " or ".join(f"{name} ({file})" for file, name in map(FOLDERS.get, kinds))
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise FileNotFoundError(f"{what}: expected a folder with {expected}; there is no folder {folder}, it {found}")
    found = next((kind for kind, (file, _) in FOLDERS.items() if (folder / file).is_file()), None)
    if found in kinds:
        return found
    if found is None:
        raise FileNotFoundError(f"{what}: expected a folder with {expected}; got {folder}, which is none")
    hint = next((HINTS[found, kind] for kind in kinds if (found, kind) in HINTS), "")
    raise ValueError(f"{what}: expected {expected}; {folder} is {FOLDERS[found][1]}{hint}")


def require_with(arguments: argparse.Namespace, option: str, *needed: str) -> None:
    """Raise `ValueError` if `option` is given and none of the options `needed` is: it would do nothing."""
    if _given(arguments, option) and not any(_given(arguments, name) for name in needed):
        expected = " or ".join(needed)
        raise ValueError(f"{option}: expected {expected} with it, for else it changes nothing; got none")


def _given(arguments: argparse.Namespace, option: str) -> bool:
    return getattr(arguments, option.lstrip("-").replace("-", "_")) not in (None, False, [])


def use_device(arguments: argparse.Namespace):
    """Apply --threads, --backend and --device; returns the torch device. Raises `ValueError` if it cannot be had."""
    import torch

    from vqvit import backends

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.backend:
        backends.backend(arguments.backend)
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
    """Batches for `model`, which came from `folder`; see `vqvit.data`. Says on stderr how images become its input where
    no processor's file does.
    """
    from vqvit import data

    config = getattr(model, "config", None)
    batch_size = arguments.batch_size or BATCH_SIZE
    if source in DIGITS:
        if arguments.image_size:
            raise ValueError(f"--image-size: expected none for {source}, which are {data.DIGITS_SIZE} pixels wide")
        digits, part = data.digits(), DIGITS[source]
        images, labels = (getattr(digits, f"{part}_{what}")[: arguments.images] for what in ("images", "labels"))
        return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    transform = _transform(model, folder, arguments.image_size)
    label2id = getattr(config, "label2id", None)
    batches = data.open_images(source, transform, batch_size, arguments.images, label2id, strict=arguments.strict)
    batches.report = say
    return batches


def _transform(model, folder: str | Path, size: int | None):
    from vqvit import data

    if (Path(folder) / data.PROCESSOR_FILE).is_file():
        return data.transform_for(folder, size)
    trained = getattr(getattr(model, "config", None), "pretrained_cfg", None) or {}  # timm's, of models on the Hub
    shape = trained.get("input_size")
    named = shape[-1] if shape else image_size_of(model)
    transform = data.transform_for(folder, size or named, trained.get("mean"), trained.get("std"))
    reason = "--image-size" if size else "the size in config.json"
    values = "those of its pretrained_cfg" if trained.get("mean") else "ImageNet's mean and std"
    say(f"{folder}: no {data.PROCESSOR_FILE}; images are resized to {transform} ({reason}, {values})")
    return transform


def skipped(batches: Iterable | None) -> list[str]:
    """Names of the images that `batches` skipped, which it has said on stderr."""
    return list(getattr(batches, "skipped", ()))


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
