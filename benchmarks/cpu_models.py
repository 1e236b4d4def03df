"""The models of `cpu.py`: random weights whose layers, attention and outlier channels behave like a trained model's."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from vqvit import engines

REAL_WEIGHTS = "dinov2-s"
"""The architecture whose weights come from a folder."""

OUTLIER_CHANNELS, OUTLIER_GAIN = 6, 8.0
"""A trained ViT's LayerNorms amplify a few channels, which set the scales of its tokens."""

LOGIT_GAIN = 1.5
"""Of the q and k weights over 1 / sqrt(K): attention then prefers some tokens, as it does not with initial weights."""


def float_model(arch: str, folder: str | None) -> nn.Module:
    """The fp32 model of `arch`: with real weights from `folder` for `REAL_WEIGHTS`, else with random ones."""
    if arch != REAL_WEIGHTS:
        return with_realistic_weights(engines.random_model(arch))
    if folder is None:
        raise ValueError(f"{arch}: expected a Hugging Face folder with its weights (--dinov2); got none")
    return engines.open_model(folder).float()


@torch.no_grad()
def with_realistic_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Replace a model's initial weights in place; the same ones for the same `seed`. Returns the model.

    - Linear (N, K): normal, 1 / sqrt(K), rows of log-normal size; q and k times `LOGIT_GAIN`; biases of 0.1
    - LayerNorm: γ log-normal about 1 and `OUTLIER_CHANNELS` of them `OUTLIER_GAIN` times larger, β of 0.1

    The residual stream stays bounded, because what attention and MLP add is of the size of one LayerNorm's output.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            n, k = module.weight.shape
            gain = LOGIT_GAIN if name.rsplit(".", 1)[-1] in ("query", "key", "q_proj", "k_proj") else 1.0
            module.weight.copy_(normal(n, k) * (0.3 * normal(n, 1)).exp() * gain * k**-0.5)
            if module.bias is not None:
                module.bias.copy_(0.1 * normal(n))
        elif type(module) is nn.LayerNorm:
            weight = (0.2 * normal(*module.weight.shape)).exp()
            outliers = torch.randperm(len(weight), generator=generator)[:OUTLIER_CHANNELS]
            weight[outliers] *= OUTLIER_GAIN
            module.weight.copy_(weight)
            module.bias.copy_(0.1 * normal(*module.bias.shape))
    return model


def images(count: int, size: int, folder: str | None, model_folder: str | None, seed: int = 0) -> np.ndarray:
    """(count, 3, size, size) fp32: of `folder`, preprocessed as the model's folder says, else random and smooth.

    Raises `ValueError` if `folder` holds fewer.
    """
    if folder is None:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count, 3, 14, 14, generator=generator)
        fine = torch.randn(count, 3, size, size, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
        return (smooth + 0.2 * fine).numpy()
    from vqvit import data

    batches = data.open_images(folder, data.transform_for(model_folder, size), 16, count)
    found = torch.cat([batch[0] if batches.labelled else batch for batch in batches])
    if len(found) < count:
        raise ValueError(f"images: expected at least {count} in {Path(folder).name}; got {len(found)}")
    return found.numpy()
