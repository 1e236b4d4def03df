"""A fixed set of model inputs in memory: what a progressive run tunes on, or checks with."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqvit.batches import Batch, read_batch
from vqvit.progressive.config import ProgressiveError

HOLD_OUT = 5
"""One image in this many is held out for checking where there is no set of its own."""


@dataclass(frozen=True)
class Samples:
    """n inputs of a model: `args` and `kwargs` (n, ...), labels int64 (n,) or None, SHA-256 of each first input."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    labels: Tensor | None
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, index: Tensor) -> Batch:
        """The inputs at `index` int64 (B,), as one batch."""
        labels = None if self.labels is None else self.labels[index]
        return Batch(tuple(a[index] for a in self.args), {k: v[index] for k, v in self.kwargs.items()}, labels)

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """In order, `size` at once, the first `limit` of them."""
        for index in torch.arange(len(self) if limit is None else min(limit, len(self))).split(size):
            yield self.take(index)

    def digest(self) -> str:
        """SHA-256 over inputs and labels in their order."""
        digest = hashlib.sha256()
        for tensor in (*self.args, *(self.kwargs[name] for name in sorted(self.kwargs)), self.labels):
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(_bytes(tensor))
        return digest.hexdigest()


def read_samples(name: str, loader: Iterable) -> Samples:
    """Every batch of `loader` (see `vqvit.batches`), on the CPU. Raises `ProgressiveError` with `name` for no images,
    or for batches that do not fit together.
    """
    try:
        batches = [read_batch(batch) for batch in loader]
    except (TypeError, ValueError) as error:
        raise ProgressiveError(f"{name}: {error}") from error
    if not batches:
        raise ProgressiveError(f"{name}: expected at least one batch; got none")
    first = batches[0]
    for index, batch in enumerate(batches):
        tensors = (*batch.args, *batch.kwargs.values(), *(() if batch.labels is None else (batch.labels,)))
        count = len(batch.images)
        alike = len(batch.args) == len(first.args) and batch.kwargs.keys() == first.kwargs.keys()
        alike = alike and (batch.labels is None) == (first.labels is None)
        if not alike or any(not isinstance(t, Tensor) or t.dim() == 0 or len(t) != count for t in tensors):
            raise ProgressiveError(f"{name}: expected batches of one form, a row for each image; batch {index} differs")
    labels = None if first.labels is None else torch.cat([b.labels.cpu() for b in batches])
    args = tuple(torch.cat([b.args[i].cpu() for b in batches]) for i in range(len(first.args)))
    kwargs = {key: torch.cat([b.kwargs[key].cpu() for b in batches]) for key in first.kwargs}
    images = args[0] if args else next(iter(kwargs.values()))
    return Samples(args, kwargs, labels, tuple(hashlib.sha256(_bytes(image)).hexdigest() for image in images))


def hold_out(samples: Samples) -> tuple[Samples, Samples]:
    """Tuning and checking part of one set: every `HOLD_OUT`-th image by its hash, so that copies stay together.

    Raises `ProgressiveError` if one of the parts would be empty.
    """
    checked = torch.tensor([int(digest, 16) % HOLD_OUT == 0 for digest in samples.hashes])
    if not 0 < int(checked.sum()) < len(samples):
        raise ProgressiveError(f"check: expected enough images to hold some out of; got {len(samples)}")
    return _part(samples, ~checked), _part(samples, checked)


def require_disjoint(tune: Samples, check: Samples) -> None:
    """Raise `ProgressiveError` if an image of `check` is one of `tune`: it would be no check."""
    seen = set(tune.hashes)
    if shared := [index for index, digest in enumerate(check.hashes) if digest in seen]:
        raise ProgressiveError(
            f"check: expected images that are not tuned on; {len(shared)} of {len(check)} are, the first at {shared[0]}"
        )


def _part(samples: Samples, mask: Tensor) -> Samples:
    index = mask.nonzero().squeeze(1)
    batch = samples.take(index)
    return Samples(batch.args, batch.kwargs, batch.labels, tuple(samples.hashes[i] for i in index))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
