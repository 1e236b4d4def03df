"""What a batch of a loader may be, and loaders that are read more than once without keeping what they yield.

A batch is a tensor of images, a dict of model inputs, or a list or tuple that begins with one of these, as PyTorch's
own `DataLoader(TensorDataset(...))` yields them: (inputs,), (inputs, labels) or (inputs, None).
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

LABELS = ("labels", "label")
"""Entries of a dict of inputs that are labels and no inputs, under transformers' name and that of many datasets."""


IN_MEMORY = 1 << 20
"""Bytes that a `TensorFile` holds in memory before it makes a file: an image of ViT-B has 600,000."""


@dataclass(frozen=True)
class Batch:
    """One call of a model: `model(*args, **kwargs)`, and the labels (B,) int64 if the batch had any."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """The first input, (B, ...)."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            tuple(a.to(device) for a in self.args),
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()},
            None if self.labels is None else self.labels.to(device),
        )


class TensorFile:
    """Tuples of tensors outside of memory, in a temporary file without a name: read back one at a time, bit for bit,
    on the device that they came from. The first `IN_MEMORY` bytes take no file.
    """

    def __init__(self, rows: Iterable[tuple[Tensor, ...]] = ()):
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, prefix="vqvit-")
        self._rows: list[tuple[int, list[tuple[torch.Size, torch.dtype, torch.device]]]] = []
        self._end = 0
        for row in rows:
            self.append(row)

    def append(self, row: tuple[Tensor, ...]) -> None:
        """Raises `OSError` where the disk is full."""
        self._rows.append((self._end, [(t.shape, t.dtype, t.device) for t in row]))
        self._file.seek(self._end)
        for tensor in row:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._end += self._file.write(memoryview(flat.view(torch.uint8).numpy()))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for start, described in self._rows:
            self._file.seek(start)
            yield tuple(self._read(*description) for description in described)

    def _read(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        raw[:] = self._file.read(len(raw))
        return tensor.to(device)


class Batches:
    """The batches of a loader, read anew in each pass, so that memory does not grow with their number.

    A loader that can be iterated once only, such as a generator, goes to a temporary file in its first pass and is read
    from there, a batch at a time. What yields other batches in each pass (shuffled, augmented) is taken as it comes.
    Raises what `read_batch` raises, at the first pass, which is made here.

    Attributes: images, how many there are; `len`, how many batches.
    """

    def __init__(self, loader: Iterable):
        if not isinstance(loader, Iterable):
            raise TypeError(f"batches: expected a list or another iterable of batches; got {type(loader).__name__}")
        self._loader = loader
        self._file = TensorFile() if iter(loader) is loader else None
        self._forms: list[tuple[int, dict, frozenset[str], bool]] = []
        self.images = self._count = 0
        for batch in map(read_batch, loader):
            self.images, self._count = self.images + len(batch.images), self._count + 1
            if self._file is not None:
                self._store(batch)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        """Raises `ValueError` if this pass has another number of batches than the first."""
        count = 0
        for batch in self._stored() if self._file is not None else map(read_batch, self._loader):
            count += 1
            yield batch
        if count != self._count:
            raise ValueError(
                f"batches: expected {self._count} in every pass, as in the first; got {count}: pass a list, a "
                "DataLoader, or an object whose __iter__ begins anew"
            )

    def _store(self, batch: Batch) -> None:
        tensors = [*batch.args, *batch.kwargs.values(), batch.labels]
        self._file.append(tuple(t for t in tensors if isinstance(t, Tensor)))
        hollow = {name: None if isinstance(v, Tensor) else v for name, v in batch.kwargs.items()}
        taken = frozenset(name for name, v in batch.kwargs.items() if isinstance(v, Tensor))
        self._forms.append((len(batch.args), hollow, taken, batch.labels is not None))

    def _stored(self) -> Iterator[Batch]:
        for (count, kwargs, taken, labelled), row in zip(self._forms, self._file, strict=True):
            tensors = iter(row)
            args = tuple(islice(tensors, count))
            kwargs = {name: next(tensors) if name in taken else value for name, value in kwargs.items()}
            yield Batch(args, kwargs, next(tensors) if labelled else None)


class EveryOther:
    """The batches of a loader with even (`first` 0) or odd (1) numbers; read anew in each pass."""

    def __init__(self, loader: Iterable, first: int):
        self._loader, self._first = loader, first

    def __len__(self) -> int:
        return (len(self._loader) + 1 - self._first) // 2

    def __iter__(self) -> Iterator:
        return islice(self._loader, self._first, None, 2)


def read_batch(batch: object) -> Batch:
    """Understand a batch. Raises `TypeError` for another type, or for images of whole numbers (uint8), `ValueError` for
    one that is empty or holds NaN or Inf.
    """
    if isinstance(batch, Batch):
        return batch
    inputs, labels = batch, None
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise TypeError(f"batch: expected (inputs,) or (inputs, labels); got {len(batch)} elements")
        inputs, labels = (*batch, None)[:2]
    if isinstance(inputs, Tensor):
        args, kwargs = (inputs,), {}
    elif isinstance(inputs, Mapping) and set(inputs) - set(LABELS):
        args, kwargs = (), {k: v for k, v in inputs.items() if k not in LABELS}
        labels = next((inputs[name] for name in LABELS if inputs.get(name) is not None), labels)
    else:
        raise TypeError(
            f"batch: expected a tensor, a dict of model inputs, or (inputs, labels); got {type(batch).__name__}"
        )
    return _checked(Batch(args, kwargs, _read_labels(labels)))


def _read_labels(labels: object) -> Tensor | None:
    if labels is None or isinstance(labels, Tensor):
        return labels
    if isinstance(labels, Sequence) and labels and all(isinstance(label, int) for label in labels):
        return torch.tensor(labels)
    raise TypeError(f"batch: expected (inputs, labels) with labels a tensor; got {type(labels).__name__}")


def _checked(parsed: Batch) -> Batch:
    images = parsed.images
    if not isinstance(images, Tensor) or images.numel() == 0:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"batch: expected at least one image; got {shape}")
    if images.dtype == torch.uint8:
        raise TypeError(
            "batch: expected floating-point images, scaled and normalised as the model takes them; got uint8 (for a "
            "model that does so itself: images.float())"
        )
    if images.is_floating_point() and not torch.isfinite(images).all():
        raise ValueError("batch: expected finite images; got NaN or Inf")
    return parsed
