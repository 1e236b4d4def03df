"""Compare precision plans, or check one against a model.

vqvit plan diff A B     the layers and options that differ
vqvit plan check A SRC  whether the plan fits the float model in folder SRC
A and B are plan files, or vqvit checkpoints.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from vqvit.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("diff", "check"))
    parser.add_argument("plan", metavar="A", help="a plan file, or a vqvit checkpoint")
    parser.add_argument("other", metavar="B", help="another one to compare with, or a float model folder to check")


def run(arguments: argparse.Namespace) -> dict:
    plan = read_plan(arguments.plan)
    result = {"action": arguments.action, "plan": arguments.plan, "other": arguments.other}
    if arguments.action == "diff":
        changes = plan.diff(read_plan(arguments.other))
        return {**result, "changes": [dataclasses.asdict(change) for change in changes]}
    common.require_kind("B", arguments.other, "float")
    from vqvit import hf
    from vqvit.rewriter import apply_plan

    reports = apply_plan(hf.load_float(arguments.other).to("meta"), plan)
    return {**result, "layers": [dataclasses.asdict(report) for report in reports]}


def to_text(result: dict) -> str:
    from vqvit.plan import Change

    if result["action"] == "check":
        return f"{result['plan']} fits {result['other']}: {len(result['layers'])} layers"
    lines = [str(Change(**change)) for change in result["changes"]]
    return "\n".join(lines) or f"{result['plan']} and {result['other']} are the same plan"


def read_plan(path: str | Path):
    """The plan in a file, or of a checkpoint. Raises `FileNotFoundError`, `CheckpointError` or `PlanError`."""
    from vqvit.checkpoint import read_manifest
    from vqvit.plan import Plan, PlanError

    path = Path(path)
    if path.is_dir():
        return Plan.from_json(json.dumps(read_manifest(path)["plan"]))
    if not path.is_file():
        raise FileNotFoundError(f"plan: expected a plan file or a vqvit checkpoint; there is no {path}")
    try:
        return Plan.load(path)
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: expected a plan file; got one that is no text") from error
