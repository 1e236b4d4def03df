"""What a batch of a loader may be: a tensor, a dict of model inputs, or (inputs, labels)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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
            {k: v.to(device) for k, v in self.kwargs.items()},
            None if self.labels is None else self.labels.to(device),
        )


def read_batch(batch: object) -> Batch:
    """Understand a batch. Raises `TypeError` for another type, `ValueError` for one that is empty or holds NaN or
    Inf.
    """
    labels = None
    inputs = batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
        if not isinstance(labels, Tensor):
            raise TypeError(f"batch: expected (inputs, labels) with labels a tensor; got {type(labels).__name__}")
    if isinstance(inputs, Tensor):
        parsed = Batch((inputs,), {}, labels)
    elif isinstance(inputs, Mapping) and inputs:
        kwargs = {k: v for k, v in inputs.items() if k != "labels"}
        parsed = Batch((), kwargs, inputs.get("labels", labels))
    else:
        raise TypeError(
            f"batch: expected a tensor, a dict of model inputs, or (inputs, labels); got {type(batch).__name__}"
        )
    images = parsed.images
    if not isinstance(images, Tensor) or images.numel() == 0:
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"batch: expected at least one image; got {shape}")
    if images.is_floating_point() and not torch.isfinite(images).all():
        raise ValueError("batch: expected finite images; got NaN or Inf")
    return parsed
