"""Factorised scales of a patch embedding from data (numerics §8, input side)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vqvit.batches import Batch
from vqvit.evaluate import eval_mode, forward
from vqvit.factorize import input_factors
from vqvit.nn.patch_embed import cut_patches


class PatchObserver:
    """max|X_k| over all patches (K,), as a forward pre-hook of the module that takes the images."""

    def __init__(self, name: str, channels: int, patch: tuple[int, int]):
        self.name, self.channels, self.patch = name, channels, patch
        self.reach: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple) -> None:
        patches = cut_patches(self.name, args[0].detach(), self.channels, self.patch)
        reach = patches.abs().flatten(0, -2).amax(0).float()
        self.reach = reach if self.reach is None else torch.maximum(self.reach, reach)

    def factors(self, weight: Tensor) -> Tensor:
        """c_k (K,) for a float weight (N, K). Raises `ValueError` if nothing was observed."""
        if self.reach is None:
            raise ValueError(f"calibration: expected {self.name} to run on the calibration data; it did not")
        return input_factors(self.reach, weight)


@torch.no_grad()
def patch_factors(model: nn.Module, names: list[str], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """c_k (K,) of the convolutions `names` of a float model, in one pass over the data."""
    if not names:
        return {}
    layers = {name: model.get_submodule(name) for name in names}
    observers = {name: PatchObserver(name, layer.in_channels, layer.kernel_size) for name, layer in layers.items()}
    hooks = [layers[name].register_forward_pre_hook(observer) for name, observer in observers.items()]
    try:
        with eval_mode(model):
            for batch in batches:
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: observer.factors(layers[name].weight.flatten(1)) for name, observer in observers.items()}


@torch.no_grad()
def factorize_(model: nn.Module, factors: dict[str, Tensor]) -> None:
    """Divide the patches that quantized patch embeddings see by c_k, and multiply their weights, which must still be
    there in float, by it.
    """
    for name, c in factors.items():
        layer = model.get_submodule(name)
        original = layer.original[0]
        scaled = original.weight * c.view(original.weight.shape[1:])
        folded = type(layer)(layer.plan, scaled, original.bias, layer.dtype)
        folded.equalizer = 1.0 / c
        layer.unpack_()
        layer._buffers.update(folded._buffers)
        layer.pack_()
