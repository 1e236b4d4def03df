"""Rank a float model's layers by what quantization does to them.

MODEL is a local folder with a float Hugging Face model. For each weight matrix: S, the share of the largest singular
value times the gradient's norm; the diagonal Fisher's prediction; and the damage measured with that matrix alone in
int8 (KL of the logits, or the squared relative error of the feature). With labels gradients are of the cross entropy;
without them of labels drawn from the model's own softmax, or of random products of its feature.
--output writes sensitivity.json, which `vqvit quantize --scores` reads, and a report with charts.
"""

import argparse
from pathlib import Path

from vqvit.commands import common

SCORES = "sensitivity.json"

CHARTED = 20
"""Matrices in a chart: the first ones in the ranking."""

COLUMNS = (
    {"key": "name", "label": "Matrix"},
    {"key": "shape", "label": "Shape"},
    {"key": "damage", "label": "Damage", "format": ".2e"},
    {"key": "score", "label": "S", "format": ".2e"},
    {"key": "fisher", "label": "S_F", "format": ".2e"},
    {"key": "concentration", "label": "σ₁ / ‖W‖", "format": ".3f"},
    {"key": "gradient", "label": "‖∂L/∂W‖", "format": ".2e"},
)

METRICS = {"kl": "KL of the logits from the float model's (nats)", "feature_error": "squared relative feature error"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--plan", metavar="JSON", help="score the layers of this plan (default: vqvit quantize's)")
    parser.add_argument("--objective", help="gradients of: labels, sampled or features (default: the first that can)")
    parser.add_argument(
        "--damage", default="int8", metavar="TIERS", help="tiers whose damage is measured, such as int8,fp16, or none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampled labels and random products")
    parser.add_argument("--output", metavar="FOLDER", help=f"write {SCORES} and a report here")
    common.add_data_arguments(parser, "--data", True, "images to score on")
    common.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> dict:
    from vqvit import engines, files, report, sensitivity
    from vqvit.plan import Plan

    common.require_kind("MODEL", arguments.model, "float")
    device = common.use_device(arguments)
    if arguments.output:
        common.require_writable_folder(arguments.output)
    plan = None if arguments.plan is None else Plan.load(arguments.plan)
    model = engines.open_model(arguments.model, device)
    batches = common.open_data(arguments.data, model, arguments.model, arguments)
    tiers = () if arguments.damage == "none" else tuple(arguments.damage.split(","))
    scores = sensitivity.measure(model, batches, plan, arguments.objective, tiers, arguments.seed, progress=True)
    result = {**describe(scores, arguments.model, arguments.data), "skipped": common.skipped(batches)}
    if arguments.output:
        report.write(document(result, device), arguments.output)
        files.write_file(Path(arguments.output) / SCORES, scores.to_json() + "\n")
    return result


def to_text(result: dict) -> str:
    from vqvit.report import cells, text_table

    lines = [text_table(*cells({"columns": COLUMNS, "rows": result["matrices"]})), "", *_summary(result)]
    return "\n".join(lines)


def describe(scores, model: str, data: str) -> dict:
    """Matrices with their scores, the most sensitive first: by damage where it was measured, else by S_F."""
    order = "fisher" if any(matrix.damage is None for matrix in scores.matrices) else "damage"
    rows = [
        {
            "name": m.name,
            "shape": "x".join(map(str, m.shape)),
            "damage": m.damage,
            "score": m.score,
            "fisher": m.fisher,
            "concentration": m.concentration,
            "gradient": m.gradient,
        }
        for m in scores.matrices
    ]
    return {
        "model": model,
        "data": data,
        "images": scores.images,
        "objective": scores.objective,
        "metric": scores.metric,
        "correlations": scores.correlations,
        "matrices": sorted(rows, key=lambda row: row[order], reverse=True),
    }


def document(result: dict, device) -> dict:
    """The result document of `vqvit.report`: the first of the ranking with charts, and all of it."""
    from vqvit.provenance import environment

    damage = "KL (nats)" if result["metric"] == "kl" else "feature error"
    charts = [
        {"column": "damage", "title": f"Damage: {damage}"},
        {"column": "score", "title": "S"},
        {"column": "fisher", "title": "S_F, diagonal Fisher"},
    ]
    measured = [chart for chart in charts if result["matrices"][0][chart["column"]] is not None]
    columns = list(COLUMNS)
    return {
        "title": f"Sensitivity of {Path(result['model']).name}",
        "summary": _summary(result),
        "sections": [
            {
                "heading": f"The {min(CHARTED, len(result['matrices']))} most sensitive matrices",
                "columns": columns,
                "rows": result["matrices"][:CHARTED],
                "charts": measured,
            },
            {"heading": "All matrices", "columns": columns, "rows": result["matrices"]},
        ],
        "environment": environment(device),
    }


def _summary(result: dict) -> list[str]:
    names = {"score_fisher": "S and S_F", "score_damage": "S and damage", "fisher_damage": "S_F and damage"}
    found = [f"{names[key]} {value:.2f}" for key, value in result["correlations"].items() if value is not None]
    return [
        f"{result['images']} images of {Path(result['data']).name}; gradients of: {result['objective']}; "
        f"damage: {METRICS[result['metric']]}.",
        f"Spearman's rank correlation: {', '.join(found) or 'none, for the scores do not vary'}.",
    ]
