"""The options of `vqvit quantize --progressive`, and what they do."""

import argparse
import dataclasses
from pathlib import Path

from vqvit.commands import common

LOG_FILE = "progressive.json"
"""The run log, in the checkpoint's folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("progressive quantization", "stage by stage, tuning what is quantized")
    group.add_argument("--progressive", action="store_true", help="tune on --data, decide by --check")
    group.add_argument("--data", metavar="TUNE", help="images to tune on; see --calibration, or the word digits-train")
    group.add_argument(
        "--check", metavar="PATH", help="images, none of them in --data, to decide by (default: a fifth of --data)"
    )
    group.add_argument("--check-images", type=common.positive_int, metavar="N", help="use at most N images of --check")
    group.add_argument("--recipe", metavar="JSON", help="file with fields of ProgressiveConfig, over the recipe's")
    group.add_argument("--steps", type=int, metavar="N", help="optimizer steps at each λ (default: the recipe's)")
    group.add_argument("--tolerance", type=float, metavar="T", help="share of images that may be lost")
    group.add_argument("--kl-limit", type=float, metavar="NATS", help="mean KL divergence that is acceptable")
    group.add_argument("--seed", type=int, metavar="N", help="of the order of the images")
    group.add_argument("--workdir", metavar="DIR", help="keep snapshots there, to go on after an interruption")
    group.add_argument("--resume", action="store_true", help="take up the run in --workdir")
    group.add_argument("--report", metavar="DIR", help="write the run's report there: JSON, Markdown, HTML")


def require_consistent(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` for options without --progressive, or --progressive without what it needs."""
    names = ("data", "check", "check_images", "recipe", "steps", "tolerance", "kl_limit", "seed")
    given = [name for name in (*names, "workdir", "resume", "report") if getattr(arguments, name) not in (None, False)]
    if not arguments.progressive:
        if arguments.preset == "paper":
            raise ValueError("--preset paper: expected --progressive with it; it is missing")
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: expected --progressive with it; it is missing")
        return
    for name in ("calibration", "calibration_state", "min_speedup", "tiers_by", "scores", "sensitivity_data"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--progressive: expected no --{name.replace('_', '-')}; --data serves for everything")
    if arguments.data is None:
        raise ValueError("--progressive: expected --data, images to tune on; got none")
    if arguments.resume and arguments.workdir is None:
        raise ValueError("--resume: expected --workdir, which holds the run; got none")
    for name in ("workdir", "report"):
        if getattr(arguments, name) is not None:
            common.require_writable_folder(getattr(arguments, name))


def quantize(arguments: argparse.Namespace, model, config):
    """Quantize `model` in place towards `config`, a `Plan` or `QuantConfig`; the default one means the preset's.

    Returns the `RunLog`.
    """
    from vqvit.plan import QuantConfig
    from vqvit.progressive import quantize_progressively_

    checking = argparse.Namespace(**{**vars(arguments), "images": arguments.check_images})
    tune = common.open_data(arguments.data, model, arguments.source, arguments)
    check = arguments.check and common.open_data(arguments.check, model, arguments.source, checking)
    recipe = _recipe(arguments)
    if config == QuantConfig():
        config = None
    return quantize_progressively_(
        model, tune, check, recipe, config,
        workdir=arguments.workdir, resume=arguments.resume, progress=True,
    )  # fmt: skip


def write(arguments: argparse.Namespace, log) -> dict:
    """The log beside the checkpoint, and the report where it was asked for. Returns the log for the result."""
    from vqvit import report
    from vqvit.progressive import document

    log.save(Path(arguments.output) / LOG_FILE)
    if arguments.report:
        report.write(document(log), arguments.report)
    return {"log": log.to_dict()}


def to_text(result: dict) -> str:
    from vqvit import report
    from vqvit.progressive import RunLog, document

    return report.to_text(document(RunLog.from_dict(result["log"])))


def _recipe(arguments: argparse.Namespace):
    """The preset with the file's and the options' changes."""
    from vqvit.progressive import ProgressiveConfig, read_json, recipe

    chosen = recipe("paper" if arguments.preset == "paper" else "default")
    fields = dataclasses.asdict(chosen.config)
    if arguments.recipe:
        fields = _merged(fields, read_json(Path(arguments.recipe)))
    options = {
        "tuning": {"steps": arguments.steps},
        "acceptance": {"tolerance": arguments.tolerance, "kl_limit": arguments.kl_limit},
        "seed": arguments.seed,
    }
    return dataclasses.replace(chosen, config=ProgressiveConfig.from_dict(_merged(fields, options)))


def _merged(fields: dict, changes: dict) -> dict:
    """`changes` over `fields`, object by object; None changes nothing."""
    merged = dict(fields)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            merged[name] = _merged(fields[name], value)
        elif value is not None:
            merged[name] = value
    return merged
