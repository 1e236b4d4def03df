"""Precision plans from sensitivity scores (numerics §9): tiers by quantiles, by a budget of bytes, or of accuracy.

No threshold of S transfers between models, so layers are ranked within one; and a layer that costs few bytes may be
worth promoting before one that hurts more. A promotion moves a layer to a higher tier of `vqvit.plan.TIERS`.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vqvit.batches import Batches, read_batch
from vqvit.evaluate import eval_mode, evaluate, forward, pick_output
from vqvit.plan import TIERS, Plan, PlanError
from vqvit.quantize import quantize_
from vqvit.sensitivity import LayerScore, Sensitivity
from vqvit.sensitivity.targets import find_targets

LOW_QUANTILE, HIGH_QUANTILE = 0.6, 0.9
"""Shares of layers up to which they stay int8, and int8_asym."""

RANKINGS = ("score", "fisher", "damage")
"""What quantiles may rank layers by: S · S_F in int8 · damage measured in int8."""

LOSSES = ("kl", "top1", "feature_error")
"""What an accuracy budget limits: mean KL from the float model, nats · accuracy lost, percentage points · relative
squared error of the feature."""


class BudgetError(ValueError):
    """A budget that no plan of these layers meets."""


@dataclass(frozen=True)
class Promotion:
    """One layer's move to a higher tier: the damage it removes, and the bytes it adds to a checkpoint."""

    name: str
    tier: str
    drop: float
    bytes: int

    @property
    def worth(self) -> float:
        """Damage removed per byte."""
        return self.drop / self.bytes if self.bytes > 0 else float("inf")


@dataclass(frozen=True)
class Verified:
    """A plan whose loss was measured on the integer model.

    Attributes: plan; loss, measured; first_loss, before any promotion; evaluations it took.
    """

    plan: Plan
    loss: float
    first_loss: float
    evaluations: int


def by_quantile(
    plan: Plan,
    sensitivity: Sensitivity,
    low: float = LOW_QUANTILE,
    high: float = HIGH_QUANTILE,
    ranking: str = "score",
) -> Plan:
    """Tier int8 where S <= its `low` quantile over the layers, int8_asym where S <= its `high` quantile, else fp16.

    A layer whose other options rule int8_asym out stays int8 there. `ranking`: one of `RANKINGS`, in place of S.

    Raises `PlanError` for quantiles that are none, or layers that were not scored.
    """
    if not 0.0 <= low <= high <= 1.0:
        raise PlanError(f"quantiles: expected 0 <= low <= high <= 1; got {low:g}, {high:g}")
    if ranking not in RANKINGS:
        raise PlanError(f"ranking: expected one of {', '.join(RANKINGS)}; got {ranking!r}")
    scores = {layer.name: sensitivity.layer(layer.name) for layer in plan.layers}
    values = {name: _rank_value(score, ranking) for name, score in scores.items()}
    ordered = torch.tensor(list(values.values()), dtype=torch.float64)
    first, second = (ordered.quantile(q).item() for q in (low, high))
    tiers = {}
    for name, score in scores.items():
        middle = "int8_asym" if "int8_asym" in score.bytes else "int8"
        tiers[name] = "int8" if values[name] <= first else middle if values[name] <= second else "fp16"
    return with_tiers(plan, tiers)


def by_bytes(plan: Plan, sensitivity: Sensitivity, limit: int) -> Plan:
    """Promote from the plan's tiers, by the largest drop of damage per byte added, whatever still fits in `limit` bytes
    for the tensors of all its layers.

    Raises `BudgetError` if the plan itself does not fit, `PlanError` for layers that were not scored.
    """
    least = layer_bytes(plan, sensitivity)
    require_bytes(least, limit)
    for promotion in _promotions(plan, sensitivity, limit - least):
        plan = with_tiers(plan, {promotion.name: promotion.tier})
    return plan


def require_bytes(least: int, limit: int) -> None:
    """Raise `BudgetError` if a plan whose layers take `least` bytes does not fit in `limit`."""
    if least > limit:
        raise BudgetError(f"budget: expected at least {least:,} bytes, which the plan's layers take; got {limit:,}")


def least_bytes(model: nn.Module, plan: Plan) -> int:
    """`layer_bytes` of the plan's own tiers, from the float `model` alone. Raises `PlanError` if it does not fit."""
    half = getattr(torch, plan.half_dtype)
    modules = (target.quantized(target.plan.tier, half) for target in find_targets(model, plan))
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def require_metric(model: nn.Module, batches: Iterable, metric: str) -> None:
    """Raise `ValueError` if the loss `metric` of `LOSSES` cannot be measured with this model and the first batch."""
    batch = next((read_batch(batch) for batch in batches), None)
    if batch is None or metric == "feature_error":
        return
    with eval_mode(model), torch.no_grad():
        logits = pick_output(forward(model, batch))[1]
    if not logits or (metric == "top1" and batch.labels is None):
        raise ValueError(_NO_METRIC.format(metric, "labels and " * (metric == "top1")))


_NO_METRIC = "loss {}: expected {}logits; there are none"


def by_accuracy(plan: Plan, sensitivity: Sensitivity, limit: float, measure: Callable[[Plan], float]) -> Verified:
    """Promote, by the largest drop of damage per byte, until the loss that `measure` finds is at most `limit`.

    The number of promotions is bisected, so that it takes few measurements; the plan that is returned was measured
    itself. It has the fewest promotions if the loss falls with every one of them.

    Args: measure: plan -> loss, such as `integer_loss` makes.

    Raises `BudgetError` if the loss exceeds `limit` with every layer promoted, `PlanError` for unscored layers.
    """
    steps = tuple(_promotions(plan, sensitivity, None))
    losses: dict[int, float] = {}

    def passes(count: int) -> bool:
        losses[count] = measure(_promoted(plan, steps[:count]))
        return losses[count] <= limit

    if passes(0):
        return Verified(plan, losses[0], losses[0], 1)
    if not passes(len(steps)):
        reached = f"{losses[len(steps)]:.3g} with all promotions, {losses[0]:.3g} with none"
        raise BudgetError(f"budget: expected a loss that promotions bring to {limit:g}; got {reached}")
    failed, passed = 0, len(steps)
    while passed - failed > 1:
        middle = (failed + passed) // 2
        failed, passed = (failed, middle) if passes(middle) else (middle, passed)
    return Verified(_promoted(plan, steps[:passed]), losses[passed], losses[0], len(losses))


def integer_loss(
    model: nn.Module,
    batches: Iterable,
    metric: str,
    calibration: Iterable | None = None,
    progress: bool = False,
) -> Callable[[Plan], float]:
    """Plan -> loss of the integer model that it makes of a copy of the float `model`, on `batches`.

    Args: metric: one of `LOSSES`; calibration: for plans with static scales.

    Raises `PlanError` for another metric; its result raises `ValueError` where data or model do not allow the metric.
    """
    if metric not in LOSSES:
        raise PlanError(f"loss: expected one of {', '.join(LOSSES)}; got {metric!r}")
    batches, calibration = Batches(batches), None if calibration is None else Batches(calibration)

    def loss(plan: Plan) -> float:
        quantized = copy.deepcopy(model)
        quantize_(quantized, plan, calibration, progress)
        found = evaluate(quantized, batches, model, progress)
        value = {
            "kl": found.kl,
            "top1": None if found.top1 is None else 100 * (found.reference_top1 - found.top1),
            "feature_error": 10 ** (-found.sqnr_db / 10),
        }[metric]
        if value is None:
            raise ValueError(_NO_METRIC.format(metric, "labels and " * (metric == "top1")))
        return value

    return loss


def layer_bytes(plan: Plan, sensitivity: Sensitivity) -> int:
    """Bytes in a checkpoint of the tensors of all layers of the plan. Raises `PlanError` for an unscored one."""
    return sum(_at(sensitivity.layer(layer.name).bytes, layer.tier, layer.name) for layer in plan.layers)


def with_tiers(plan: Plan, tiers: Mapping[str, str]) -> Plan:
    """The plan with other tiers for some layers. Where they end the proof of `leading_tokens`, those go too.

    Raises `PlanError` naming the valid ones for an unknown layer or tier.
    """
    for name in tiers:
        plan.layer(name)
    layers = tuple(dataclasses.replace(p, tier=tiers.get(p.name, p.tier)) for p in plan.layers)
    whole = tuple(dataclasses.replace(block, leading_tokens=None) for block in plan.blocks)
    changed = dataclasses.replace(plan, layers=layers, blocks=whole)
    pairs = zip(plan.blocks, whole, strict=True)
    return dataclasses.replace(changed, blocks=tuple(new if changed.inexact(new) else old for old, new in pairs))


def damages(sensitivity: Sensitivity) -> dict[str, dict[str, float]]:
    """Layer -> tier -> damage: measured where it was, else what int8 was measured to do and Fisher predicts.

    curvature · S_F is what the weight's rounding does. The rest of the damage in int8 is that of the activation's
    codes, which int8_asym has as well, and fp16 has not.
    """
    return {layer.name: _damages(layer, sensitivity.curvature) for layer in sensitivity.layers}


def _damages(layer: LayerScore, curvature: float) -> dict[str, float]:
    rounding = {tier: curvature * fisher for tier, fisher in layer.fisher.items()}
    codes = max(0.0, layer.damage["int8"] - rounding["int8"]) if rounding and "int8" in layer.damage else 0.0
    predicted = {tier: lost + (0.0 if tier == "fp16" else codes) for tier, lost in rounding.items()}
    return {**predicted, **layer.damage}


def _promotions(plan: Plan, sensitivity: Sensitivity, spare: int | None) -> Iterator[Promotion]:
    """Promotions in the order of their worth, each from where earlier ones left its layer; of at most `spare` bytes."""
    tiers = {layer.name: layer.tier for layer in plan.layers}
    sizes = {name: sensitivity.layer(name).bytes for name in tiers}
    expected = damages(sensitivity)
    while True:
        moves = [
            move
            for name, tier in tiers.items()
            for move in _moves(name, tier, expected[name], sizes[name])
            if spare is None or move.bytes <= spare
        ]
        if not moves:
            return
        best = max(moves, key=lambda move: move.worth)
        tiers[best.name] = best.tier
        spare = None if spare is None else spare - best.bytes
        yield best


def _moves(name: str, tier: str, damage: Mapping[str, float], size: Mapping[str, int]) -> Iterator[Promotion]:
    """The promotions of one layer that lessen its damage."""
    for higher in TIERS[TIERS.index(tier) + 1 :]:
        if higher in damage and higher in size:
            drop = _at(damage, tier, name) - damage[higher]
            if drop > 0:
                yield Promotion(name, higher, drop, size[higher] - _at(size, tier, name))


def _rank_value(score: LayerScore, ranking: str) -> float:
    return score.score if ranking == "score" else _at(getattr(score, ranking), "int8", score.name)


def _at(figures: Mapping, tier: str, name: str):
    if tier not in figures:
        raise PlanError(f"sensitivity of {name}: expected a figure for tier {tier}; got {', '.join(figures) or 'none'}")
    return figures[tier]


def _promoted(plan: Plan, steps: Iterable[Promotion]) -> Plan:
    return with_tiers(plan, {step.name: step.tier for step in steps})
