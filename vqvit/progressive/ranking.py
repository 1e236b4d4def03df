"""Which layer of a stage is the most sensitive, and which tier comes next for it."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from vqvit.plan import LayerPlan, Plan
from vqvit.progressive.config import Stage
from vqvit.progressive.runlog import Promotion


def next_tier(layer: LayerPlan, ladder: tuple[str, ...]) -> str | None:
    """The tier after the layer's in `ladder`, None at its end. Group scales have no zero points: they go past
    int8_asym.
    """
    order = ("int8", "int8_asym", "fp16")
    later = [tier for tier in ladder if order.index(tier) > order.index(layer.tier)]
    if layer.activation == "per_token_group":
        later = [tier for tier in later if tier != "int8_asym"]
    return later[0] if later else None


def measured(
    known: dict[str, float | None], damage: Callable[[str], float], progress: bool = False
) -> dict[str, float]:
    """`known`, with None replaced by `damage(layer)`."""
    missing = [name for name, score in known.items() if score is None]
    found = {name: damage(name) for name in tqdm(missing, desc="rank layers", unit="layer", disable=not progress)}
    return {name: found.get(name, score) for name, score in known.items()}


def choose(plan: Plan, scores: dict[str, float], ladder: tuple[str, ...], failure: str) -> Promotion | None:
    """The promotion of the most sensitive layer of `scores` that can be promoted; None if none can."""
    candidates = {name: tier for name in scores if (tier := next_tier(plan.layer(name), ladder)) is not None}
    if not candidates:
        return None
    layer = max(candidates, key=lambda name: scores[name])
    reason = f"{failure}; most sensitive of {len(candidates)} layers"
    return Promotion(layer, plan.layer(layer).tier, candidates[layer], reason, scores)


def initial_promotions(
    plan: Plan, stage: Stage, scores: dict[str, float], ladder: tuple[str, ...]
) -> tuple[Promotion, ...]:
    """Mixed precision: layers above the stage's quantiles of sensitivity (numerics §9)."""
    low, high = stage.quantiles
    quantiles = torch.tensor([low, high], dtype=torch.float64)
    limits = torch.tensor(list(scores.values()), dtype=torch.float64).quantile(quantiles)
    promotions = []
    for name, score in scores.items():
        layer, tier = plan.layer(name), None
        if score > limits[1]:
            tier, quantile = "fp16", high
        elif score > limits[0]:
            tier, quantile = next_tier(layer, ladder), low
        if tier is not None and tier in ladder and tier != layer.tier:
            reason = f"sensitivity above the quantile {quantile:g} of the stage"
            promotions.append(Promotion(name, layer.tier, tier, reason, scores))
    return tuple(promotions)
