"""Images as batches for models: a folder, a picture, a parquet file in the Hub's layout, or scikit-learn's digits.

Everything here ends in float tensors (B, 3, H, W), with int64 labels (B,) where the data has them. Pictures are turned
as their EXIF data say, and 16 bits a channel become 8. One that cannot be read, or of which it is not clear what it
shows (several frames), is named and skipped, or an error on request.
"""

import json
import logging
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels")

PARQUET_SUFFIX, PARQUET_MAGIC = ".parquet", b"PAR1"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PROCESSOR_FILE = "preprocessor_config.json"

MANIFEST, UNSETTLED = "vqvit.json", ".vqvit-*/committed"
"""Of a checkpoint: the file that holds the processor too, and what tells that a save replaced it alone (`files`)."""

DAMAGED = (
    OSError, ValueError, TypeError, AttributeError, SyntaxError, EOFError, LookupError, ArithmeticError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise for files that are cut off, damaged, or made to harm."""

ROWS_AT_ONCE = 256
"""Rows of a parquet file that are in memory at once."""

SKIPPED_SHOWN = 5
"""Skipped images that a message names."""

logger = logging.getLogger("vqvit")

DIGITS_SIZE = 32
DIGITS_TEST_IMAGES = 360
DIGITS_SPLIT_SEED = 0

Transform = Callable[[list], Tensor]
"""PIL images in RGB to (B, 3, H, W) fp32."""

Item = tuple[str, "bytes | Path", int | None]
"""Name for messages, encoded image or its file, class."""


class DataError(ValueError):
    """Images that cannot be found or read."""


@dataclass(frozen=True)
class Resize:
    """Cut the largest centred square, resize it bicubically, scale to 0..1, subtract `mean`, divide by `std`."""

    size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __str__(self) -> str:
        return f"{self.size} x {self.size}, mean {_figures(self.mean)}, std {_figures(self.std)}"

    def __call__(self, images: list) -> Tensor:
        from PIL import Image, ImageOps

        square = (self.size, self.size)
        pixels = np.stack([np.asarray(ImageOps.fit(image, square, Image.Resampling.BICUBIC)) for image in images])
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return (scaled - mean) / std


@dataclass(frozen=True)
class Source:
    """Encoded images in a fixed order: `read()` starts over at the first of `total`; `labelled` if all have a class."""

    read: Callable[[], Iterator[Item]]
    total: int
    labelled: bool


class ImageBatches:
    """A re-iterable loader over images on disk: yields (pixel_values, labels), or pixel_values if there are no labels.

    Images that cannot be read are skipped, named once with a count to `report` (default: the log), and gathered in
    `skipped`; with `strict` the first is an error.

    Attributes: images, how many it yields if all can be read; indices, which; labelled; transform; batch_size; strict;
        skipped, the reason by name, of those that were met so far.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        limit: int | None = None,
        indices: Sequence[int] | None = None,
        strict: bool = False,
    ):
        for name, value in (("batch_size", batch_size), ("images", limit)):
            if value is not None and value < 1:
                raise DataError(f"{name}: expected at least 1; got {value}")
        if indices is not None and not _ascending(indices, source.total):
            raise DataError(f"indices: expected ascending numbers from 0 to {source.total - 1}; got {_shown(indices)}")
        self._source, self.transform, self.batch_size = source, transform, batch_size
        chosen = range(source.total) if indices is None else indices
        count = len(chosen) if limit is None else min(limit, len(chosen))
        self.indices = [chosen[i * len(chosen) // count] for i in range(count)]
        self.images = count
        self.labelled = source.labelled
        self.strict = strict
        self.skipped: dict[str, str] = {}
        self.report: Callable[[str], object] = _warn

    def __len__(self) -> int:
        return (self.images + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        images, labels, known, read = [], [], len(self.skipped), 0
        for name, encoded, label in self._selected():
            try:
                image = _decode(name, encoded)
                if self.labelled and label is None:
                    raise DataError(f"image {name}: expected a label as the others have; got none")
            except DataError as error:
                if self.strict:
                    raise
                self.skipped[name] = str(error)
                continue
            read += 1
            images.append(image)
            labels.append(label)
            if len(images) == self.batch_size:
                yield self._batch(images, labels)
                images, labels = [], []
        if images:
            yield self._batch(images, labels)
        if not read:
            raise DataError(f"images: expected at least one that can be read; got {skipped_text(self)}")
        if len(self.skipped) > known:
            self.report(skipped_text(self))

    def _selected(self) -> Iterator[Item]:
        wanted = iter(self.indices)
        following = next(wanted, None)
        for index, item in enumerate(self._source.read()):
            if index == following:
                yield item
                following = next(wanted, None)
                if following is None:
                    return

    def _batch(self, images: list, labels: list) -> Tensor | tuple[Tensor, Tensor]:
        pixels = self.transform(images)
        return (pixels, torch.tensor(labels)) if self.labelled else pixels


def open_images(
    path: str | Path,
    transform: Transform,
    batch_size: int = 32,
    limit: int | None = None,
    label2id: Mapping[str, int] | None = None,
    indices: Sequence[int] | None = None,
    strict: bool = False,
) -> ImageBatches:
    """Batches of the images at `path`.

    Args:
        path: a folder searched recursively for images, whose class is the first sub-folder on the way to them; one
            picture; or a parquet file, or a folder of them, with a column `img` or `image` of encoded images (binary,
            or a struct with `bytes`; paths in it are never opened) and perhaps an integer column `label`.
        transform: see `transform_for`.
        limit: use at most this many images, at even steps through the data.
        label2id: class of each sub-folder name. Used if it knows all of them; else names that are numbers count as
            themselves, and other names are numbered in sorted order.
        indices: use only the images with these numbers, ascending, counted from 0 in the order of the data.
        strict: an image that cannot be read is an error, when its turn comes, instead of being skipped.

    Raises `FileNotFoundError` if there is no such path and `DataError` for one without images that can be read, or a
    parquet file without the columns.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"images: expected a folder, a picture or a parquet file; there is no {path}")
    return ImageBatches(_open(path, label2id or {}), transform, batch_size, limit, indices, strict)


def _warn(text: str) -> None:
    logger.warning("%s", text)


def skipped_text(batches: ImageBatches) -> str:
    """How many images were skipped, and the first of them with the reasons."""
    shown = "; ".join(list(batches.skipped.values())[:SKIPPED_SHOWN])
    more = len(batches.skipped) - SKIPPED_SHOWN
    return f"{len(batches.skipped)} of {batches.images} images skipped: {shown}" + (f"; {more} more" * (more > 0))


def _ascending(indices: Sequence[int], total: int) -> bool:
    inside = len(indices) > 0 and 0 <= indices[0] and indices[-1] < total
    return inside and all(a < b for a, b in pairwise(indices))


def _shown(indices: Sequence[int]) -> str:
    return f"{len(indices)} numbers" + (f" from {indices[0]} to {indices[-1]}" if len(indices) else "")


def transform_for(
    model_folder: str | Path | None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Transform:
    """How to turn PIL images into a model's input.

    With a Hugging Face image-processor file in `model_folder` its processor is used; a `size` given besides keeps only
    the processor's mean and std. Without one, images are resized to `size` with `mean` and `std`, by default
    ImageNet's. `str` of the result says what is done.

    Raises `DataError` if there is neither a processor file nor a size, or if the file is not usable.
    """
    if size is not None and size < 1:
        raise DataError(f"image size: expected at least 1; got {size}")
    processor = None
    if model_folder is not None and (Path(model_folder) / PROCESSOR_FILE).is_file():
        with _processor_folder(Path(model_folder)) as folder:
            processor = _image_processor(folder)
    if processor is None and size is None:
        raise DataError(f"image size: expected a size, or a model folder with {PROCESSOR_FILE}; got neither")
    if processor is None:
        return Resize(size, tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD))
    if size is not None:
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        return Resize(size, tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD))
    return Processor(processor)


@dataclass(frozen=True)
class Processor:
    """An image processor of transformers as a transform."""

    processor: object

    def __str__(self) -> str:
        return type(self.processor).__name__

    def __call__(self, images: list) -> Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"].float()


@contextmanager
def _processor_folder(folder: Path) -> Iterator[Path]:
    """`folder`; of a checkpoint whose save was killed before it wrote the processor's file, one with the new file."""
    fields = None
    if any(folder.glob(UNSETTLED)) and (folder / MANIFEST).is_file():
        fields = json.loads((folder / MANIFEST).read_text()).get("processor")
    if fields is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vqvit-") as scratch:
        (Path(scratch) / PROCESSOR_FILE).write_text(json.dumps(fields))
        yield Path(scratch)


def _figures(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 scans enlarged: fp32 (N, 3, 32, 32) in [-1, 1]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """The digits with a fixed test split of 360 images, stratified by class; the other 1,437 are for training.

    Raises `DataError` without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise DataError(_missing("scikit-learn", "for its handwritten digits")) from error

    raw = load_digits()
    grey = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    large = torch.nn.functional.interpolate(grey, size=(DIGITS_SIZE,) * 2, mode="bicubic", align_corners=False)
    images = (2 * large.clamp(0, 1) - 1).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(raw.target, dtype=torch.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST_IMAGES, random_state=DIGITS_SPLIT_SEED, stratify=raw.target
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def _missing(package: str, purpose: str) -> str:
    return f"expected the package {package}, {purpose}; it is not installed: pip install 'vqvit[demo]', or {package}"


def _open(path: Path, label2id: Mapping[str, int]) -> Source:
    if path.is_file():
        with open(path, "rb") as file:
            parquet = path.suffix.lower() == PARQUET_SUFFIX or file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
        return _open_parquet(path, [path]) if parquet else Source(lambda: iter([(str(path), path, None)]), 1, False)
    files = sorted(path.rglob(f"*{PARQUET_SUFFIX}"))
    return _open_parquet(path, files) if files else _open_folder(path, label2id)


def _open_folder(path: Path, label2id: Mapping[str, int]) -> Source:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"images: expected a folder with {', '.join(IMAGE_SUFFIXES)} or parquet files; {path} has none")
    folders = [p.relative_to(path).parts[0] if p.parent != path else None for p in files]
    labelled = None not in folders
    classes = _number_classes(sorted(set(folders)), label2id) if labelled else {None: None}
    items = [(str(p), p, classes.get(folder)) for p, folder in zip(files, folders, strict=True)]
    return Source(lambda: iter(items), len(items), labelled)


def _number_classes(names: list[str], label2id: Mapping[str, int]) -> dict[str, int]:
    if all(name in label2id for name in names):
        return {name: label2id[name] for name in names}
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}
    return {name: index for index, name in enumerate(names)}


def _open_parquet(path: Path, files: list[Path]) -> Source:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow import parquet as pq
    except ModuleNotFoundError as error:
        raise DataError(_missing("pyarrow", "to read parquet files")) from error
    total, labelled = 0, True
    for file in files:
        try:
            opened = pq.ParquetFile(file)
        except (ArrowInvalid, OSError) as error:
            raise DataError(f"images: expected a folder or a parquet file; cannot read {file}: {error}") from error
        _, label_column = _columns(file, opened.schema_arrow)
        labelled = labelled and label_column is not None
        total += opened.metadata.num_rows
    if total == 0:
        raise DataError(f"images: expected parquet files with rows; {path} has none")

    def read() -> Iterator[Item]:
        for file in files:
            opened = pq.ParquetFile(file)
            image_column, label_column = _columns(file, opened.schema_arrow)
            row = 0
            for batch in opened.iter_batches(ROWS_AT_ONCE, columns=[c for c in (image_column, label_column) if c]):
                images = batch.column(image_column).to_pylist()
                labels = batch.column(label_column).to_pylist() if labelled else [None] * len(images)
                for image, label in zip(images, labels, strict=True):
                    encoded = image.get("bytes") if isinstance(image, dict) else image
                    yield f"{file}, row {row}", encoded, label
                    row += 1

    return Source(read, total, labelled)


def _columns(file: Path, schema) -> tuple[str, str | None]:
    """Names of the image column and of the label column, if any, of an Arrow schema."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise DataError(
            f"images: expected a column {' or '.join(IMAGE_COLUMNS)} in {file}; got {', '.join(schema.names) or 'none'}"
        )
    kind = str(schema.field(image).type)
    if not kind.startswith(("binary", "large_binary", "fixed_size_binary")) and "bytes: binary" not in kind:
        expected = "encoded images (binary, or a struct with bytes; a path is never opened)"
        raise DataError(f"images: expected {expected} in column {image} of {file}; got {kind}")
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if label is not None and not str(schema.field(label).type).startswith(("int", "uint")):
        raise DataError(f"images: expected integers in column {label} of {file}; got {schema.field(label).type}")
    return image, label


def _decode(name: str, encoded: bytes | Path):
    """A picture in RGB, 8 bits a channel, upright. Raises `DataError` with its name."""
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ImportError(_missing("pillow", "to read images")) from error
    if not isinstance(encoded, bytes | Path):
        raise DataError(f"image {name}: expected an encoded image; got {type(encoded).__name__}")
    try:
        with Image.open(BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a photograph with a preview, or with its other eye
                raise ValueError(f"it has {frames} frames")
            return _in_rgb(ImageOps.exif_transpose(image), image.format)
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise DataError(f"image {name}: expected a readable image; {error}") from error


def _in_rgb(image, file_format: str | None):
    """8 bits a channel. Pillow clips what has more: 16 bits would be white almost everywhere."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and file_format == "PNG"):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its values have no known range (mode {image.mode})")
    return image.convert("RGB")


def _image_processor(folder: Path):
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{folder / PROCESSOR_FILE}: expected an image processor's configuration; {error}") from error
