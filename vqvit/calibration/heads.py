"""Static scales of q, k and v from data: the range of each head (numerics §7)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvit import numerics as nm
from vqvit.batches import Batch

DECAY = 0.99
"""Memory of the running maxima: the paper's running statistics, as for static activations."""


class HeadObserver:
    """Running max|x| of each head of q, k and v: an exponential moving average over batches, started by the first."""

    def __init__(self, name: str, num_heads: int):
        self.name, self.num_heads = name, num_heads
        self.maxima: Tensor | None = None  # (3, H) fp32

    def update(self, qkv: Tensor) -> None:
        """Take in packed projections (B, S, 3 H D). Raises `ValueError` for NaN or Inf."""
        maxima = qkv.detach().float().abs().unflatten(-1, (3, self.num_heads, -1)).amax((0, 1, 4))
        if not torch.isfinite(maxima).all():
            raise ValueError(f"calibration: expected finite q, k and v of {self.name}; got NaN or Inf")
        self.maxima = maxima if self.maxima is None else torch.lerp(maxima, self.maxima, DECAY)

    def scales(self) -> tuple[Tensor, Tensor, Tensor]:
        """max(1e-8, max|x| / 127), fp32 (H,), of q, k and v. Raises `ValueError` if nothing was observed."""
        if self.maxima is None:
            raise ValueError(f"calibration: expected {self.name} to run on the calibration data; it did not")
        return (self.maxima / nm.QMAX).clamp(min=nm.SCALE_MIN).unbind(0)


@contextmanager
def observed_heads(model: nn.Module, names: list[str]) -> Iterator[dict[str, HeadObserver]]:
    """Observers of the quantized blocks `names`, which use dynamic scales meanwhile."""
    blocks = {name: model.get_submodule(name) for name in names}
    for name, block in blocks.items():
        block.head_observer = HeadObserver(name, block.num_heads)
    try:
        yield {name: block.head_observer for name, block in blocks.items()}
    finally:
        for block in blocks.values():
            block.head_observer = None


@torch.no_grad()
def calibrate_heads(model: nn.Module, names: list[str], batches: Iterable[Batch], progress: bool = False) -> None:
    """Give the quantized blocks `names` their static scales, in one pass over the data."""
    if not names:
        return
    device = next(model.buffers()).device
    with observed_heads(model, names) as observers:
        for batch in tqdm(batches, desc="attention scales", unit="batch", disable=not progress):
            batch = batch.to(device)
            model(*batch.args, **batch.kwargs)
    for name, observer in observers.items():
        block = model.get_submodule(name)
        block.q_scale, block.k_scale, block.v_scale = (scale.clone() for scale in observer.scales())
