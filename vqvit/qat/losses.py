"""What training minimises: the task, the float model, and the paper's two regularisers (numerics §10).

CE        mean over images of -log softmax(logits)[label]
KL        mean over images of Σ p (log p - log q), p the softmax of the float model's logits, q that of the model's
R_quant   "paper": Σ_l ‖α_l‖, the formula; "text": -Σ_l Σ_i log α_li, what the paper's words say (larger scales)
R_smooth  total variation: mean |difference| of neighbours on the P × P grid of the patch kernel, and on the grid of
          the position embedding
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvit.qat.linear import FakePatchEmbed
from vqvit.qat.prepare import fake_attentions, fake_layers

READINGS = ("paper", "text")


@dataclass(frozen=True)
class LossOptions:
    """Weights λ₁ of R_quant, in the reading `quant_reading` (one of `READINGS`), and λ₂ of R_smooth."""

    quant_weight: float = 0.0
    quant_reading: str = "paper"
    smooth_weight: float = 0.0

    def __post_init__(self):
        if self.quant_reading not in READINGS:
            expected = f"one of {', '.join(READINGS)}"
            raise ValueError(f"quant_reading: expected {expected}; got {self.quant_reading!r}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE of logits (B, C) and labels int (B,)."""
    return F.cross_entropy(logits.float(), labels)


def kl_to_float(logits: Tensor, float_logits: Tensor) -> Tensor:
    """KL of logits (B, C) from the float model's, which count as constants."""
    target = float_logits.detach().float().log_softmax(-1)
    return F.kl_div(logits.float().log_softmax(-1), target, reduction="batchmean", log_target=True)


def quant_regularizer(model: nn.Module, reading: str = "paper") -> Tensor:
    """R_quant over the scales of symmetric weights, static inputs and static q, k and v of a prepared model.

    On log α its gradient has LSQ's scale, 1 / sqrt(n Q), like every other. Raises `ValueError` for a model without such
    scales.
    """
    scales = _scales(model)
    if not scales:
        raise ValueError("quant_regularizer: expected a prepared model with scales to learn; got none")
    if reading == "paper":
        return torch.stack([scale.norm() for scale in scales]).sum()
    return -torch.stack([scale.log().sum() for scale in scales]).sum()


def smooth_regularizer(model: nn.Module) -> Tensor:
    """R_smooth of a prepared model's patch embedding and of its position embedding, if it finds one."""
    terms = []
    for layer in fake_layers(model).values():
        if isinstance(layer, FakePatchEmbed):
            weight = layer.weight if layer.equalizer is None else layer.weight * layer.equalizer
            terms.append(total_variation(weight.unflatten(1, (layer.channels, *layer.patch))))
    for name, parameter in model.named_parameters():
        if ("position" in name and parameter.dim() == 3) or name.rsplit(".", 1)[-1] == "pos_embed":
            terms.append(total_variation(position_grid(parameter)))
    if not terms:
        raise ValueError("smooth_regularizer: expected a patch or position embedding; got a model without")
    return torch.stack(terms).sum()


def total_variation(grid: Tensor) -> Tensor:
    """Mean |difference| of neighbours along each of the last two dimensions of (..., H, W), summed over the two."""
    directions = [grid.diff(dim=dim).abs().mean() for dim in (-2, -1) if grid.shape[dim] > 1]
    return torch.stack(directions).sum() if directions else grid.new_zeros(())


def position_grid(embedding: Tensor) -> Tensor:
    """(D, S, S) of a position embedding (1, E + S², D), whose first E tokens are no patches (CLS and the like).

    S is the largest with S² <= tokens: E of 0, 1 or 2 then have one reading for every S >= 2.
    """
    tokens = embedding.shape[1]
    side = int(tokens**0.5)
    return embedding[0, tokens - side * side :].t().unflatten(1, (side, side))


def _scales(model: nn.Module) -> list[Tensor]:
    layers = fake_layers(model).values()
    learned = [layer for layer in layers if layer.log_alpha is not None or layer.beta is not None]
    weights = [layer.weight_scale()[: None if layer.base_plan.per_channel else 1] for layer in learned]
    inputs = [layer.input_scale() for layer in layers if layer.log_input_alpha is not None]
    static = [attention for attention in fake_attentions(model).values() if attention.is_static]
    return [*weights, *inputs, *(scale for attention in static for scale in attention.static_scales())]
