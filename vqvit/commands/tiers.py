"""The options of `vqvit quantize` that choose tiers by sensitivity (`vqvit.budget`)."""

import argparse
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vqvit.commands import common

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "": 1.0}

RANKINGS = {"sensitivity": "score", "fisher": "fisher", "damage": "damage"}
"""Kinds of request that are quantiles of a ranking of `vqvit.budget`."""

HELP = (
    "choose tiers by: sensitivity, fisher or damage, a ranking of the layers, perhaps with =LOW,HIGH, the quantiles "
    "up to which they are int8 and int8_asym (default 0.6,0.9); bytes=N, NKB or NMB for the tensors of all quantized "
    "layers; kl=NATS, top1=POINTS or feature_error=E: promote until the integer model's measured loss is within it"
)


@dataclass(frozen=True)
class Request:
    """What `--tiers-by` asks for: kind, of `RANKINGS`, "bytes" or one of `vqvit.budget.LOSSES`, and its figures."""

    kind: str
    figures: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """What to quantize with, a `QuantConfig` or `Plan`, and facts for the report."""

    config: object
    facts: dict | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiers-by", metavar="WHAT", help=HELP)
    parser.add_argument("--scores", metavar="JSON", help="sensitivity.json of vqvit sensitivity, instead of measuring")
    parser.add_argument(
        "--sensitivity-data", metavar="PATH", help="images for --tiers-by (default: those of --calibration)"
    )
    parser.add_argument("--save-plan", metavar="JSON", help="also write the plan to this file")


def require_usable(arguments: argparse.Namespace) -> None:
    """Before any work: the request is understood, has what it needs, and the plan's file can be written."""
    from vqvit.plan import PlanError

    if arguments.save_plan:
        path = Path(arguments.save_plan)
        if path.is_dir():
            raise IsADirectoryError(f"--save-plan: expected a file; {path} is a folder")
        if not path.exists() or path.is_file():
            common.require_writable_folder(path.absolute().parent)
    if arguments.tiers_by is None:
        if arguments.scores or arguments.sensitivity_data:
            raise PlanError("--scores, --sensitivity-data: expected --tiers-by with them; got none")
        return
    request = read_request(arguments.tiers_by)
    data = arguments.sensitivity_data or arguments.calibration
    if not data and (arguments.scores is None or _measured(request)):
        raise PlanError(f"--tiers-by {request.kind}: expected --sensitivity-data or --calibration; got neither")
    if arguments.scores and not Path(arguments.scores).is_file():
        raise FileNotFoundError(f"--scores: expected a JSON file; there is no {arguments.scores}")


def read_request(text: str) -> Request:
    """Parse `--tiers-by`. Raises `PlanError`."""
    from vqvit.budget import LOSSES
    from vqvit.plan import PlanError

    kind, named, value = text.partition("=")
    kinds = (*RANKINGS, "bytes", *LOSSES)
    if kind not in kinds:
        raise PlanError(f"--tiers-by: expected one of {', '.join(kinds)}; got {kind!r}")
    if kind in RANKINGS and not named:
        return Request(kind, ())
    unit = next(unit for unit in UNITS if value.upper().endswith(unit)) if kind == "bytes" else ""
    try:
        figures = tuple(float(part) * UNITS[unit] for part in value[: len(value) - len(unit)].split(","))
    except ValueError:
        figures = ()
    if len(figures) != (2 if kind in RANKINGS else 1) or not all(0 <= figure < float("inf") for figure in figures):
        expected = "LOW,HIGH" if kind in RANKINGS else "N, NKB or NMB" if kind == "bytes" else "a number"
        raise PlanError(f"--tiers-by {kind}: expected {expected}, not negative; got {value!r}")
    return Request(kind, figures)


def choose(model, config, calibration: Iterable | None, arguments: argparse.Namespace) -> Choice:
    """The configuration or plan with the tiers that `--tiers-by` asks for; `config` itself without it."""
    if arguments.tiers_by is None:
        return Choice(config)
    from vqvit import budget, sensitivity
    from vqvit.plan import ROLES, TIERS, Plan
    from vqvit.rewriter import make_plan
    from vqvit.sensitivity import Sensitivity

    request = read_request(arguments.tiers_by)
    plan = config if isinstance(config, Plan) else make_plan(model, config)[0]
    scoring, checking = _data(model, calibration, request, arguments)
    _require_possible(model, plan, request, checking)
    if arguments.scores:
        scores = Sensitivity.load(arguments.scores)
    else:
        damage_tiers = () if request.kind in ("sensitivity", "fisher") else ("int8",)
        scores = sensitivity.measure(model, scoring, plan, damage_tiers=damage_tiers, progress=True)
    facts = {"tiers by": arguments.tiers_by}
    if request.kind in RANKINGS:
        plan = budget.by_quantile(plan, scores, *request.figures, ranking=RANKINGS[request.kind])
    elif request.kind == "bytes":
        plan = budget.by_bytes(plan, scores, int(request.figures[0]))
    else:
        loss = budget.integer_loss(model, checking, request.kind, calibration, progress=True)
        found = budget.by_accuracy(plan, scores, request.figures[0], loss)
        plan = found.plan
        facts |= {request.kind: found.loss, "before": found.first_loss, "evaluations": found.evaluations}
    facts["bytes of the layers"] = budget.layer_bytes(plan, scores)
    facts |= {tier: sum(layer.tier == tier for layer in plan.layers) for tier in TIERS}
    if isinstance(config, Plan):
        return Choice(plan, facts)
    ordered = sorted(plan.layers, key=lambda layer: layer.name not in ROLES)  # as patterns, those names match a role
    tiers = {layer.name: layer.tier for layer in ordered}
    return Choice(dataclasses.replace(config, tiers={**config.tiers, **tiers}), facts)


def save_plan(plan, path: str | Path) -> None:
    """Write a plan file, all of it or nothing; through links, and into FIFOs and devices."""
    from vqvit import files

    files.write_file(path, plan.to_json() + "\n")


def _measured(request: Request) -> bool:
    return request.kind not in (*RANKINGS, "bytes")


def _require_possible(model, plan, request: Request, checking: Iterable) -> None:
    """Before minutes of measuring: a budget of bytes that the plan itself exceeds, or a loss that cannot be measured,
    is refused.
    """
    from vqvit import budget

    if request.kind == "bytes":
        budget.require_bytes(budget.least_bytes(model, plan), int(request.figures[0]))
    elif _measured(request):
        budget.require_metric(model, checking, request.kind)


def _data(model, calibration: Iterable | None, request: Request, arguments: argparse.Namespace) -> tuple:
    """Batches to score on, and others to check the loss on: every second one each where both are needed."""
    from vqvit.batches import EveryOther

    source = arguments.sensitivity_data
    batches = common.open_data(source, model, arguments.source, arguments) if source else calibration or ()
    if arguments.scores:
        return (), batches
    if not _measured(request):
        return batches, ()
    if len(batches) < 2:
        raise ValueError(
            f"--tiers-by {request.kind}: expected at least 2 batches, for scores and for the check; got {len(batches)}"
        )
    return EveryOther(batches, 0), EveryOther(batches, 1)
