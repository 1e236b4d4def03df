"""Quantize a Hugging Face model folder and save the integer model.

SRC is a local folder with config.json and weights; OUT is a new folder, or a vqvit checkpoint to replace.
Without options: W8A8, per-token activation scales, int8 attention. `--config` reads the same options, or a
whole plan, from JSON. `--progressive` quantizes in stages, tuning scales and weights on images.
"""

import argparse
import dataclasses
import json
from fnmatch import fnmatch
from pathlib import Path

from vqvit import plan as plans
from vqvit.commands import common, progressive, tiers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--config", metavar="JSON", help="file with the fields of QuantConfig, or a plan")
    parser.add_argument("--tier", help=f"tier of every layer: {_any(plans.TIERS)}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="LAYER=TIER",
        help="tier of one role or of layers whose name matches a pattern; may be repeated; skip leaves them float",
    )
    parser.add_argument(
        "--preset",
        choices=["vqvit", "paper"],
        help="options to start from: vqvit, the most accurate in int8; with --progressive: paper, its literal recipe",
    )
    parser.add_argument("--rounding", help=f"weights: {_any(plans.ROUNDINGS)}; error_aware needs --calibration")
    parser.add_argument(
        "--bits", type=int, help=f"bits of the stored weights: {_any(plans.WEIGHT_BITS)}; all of them run as int8"
    )
    parser.add_argument("--activation", help=f"activation scales: {_any(plans.ACTIVATIONS)}")
    parser.add_argument("--observer", help=f"static ranges: {_any(plans.OBSERVERS)}; percentile:P names one")
    parser.add_argument(
        "--calibration-state", metavar="FILE", help="keep an interrupted calibration here, and go on from it"
    )
    parser.add_argument("--attention", help=_any(plans.ATTENTION))
    parser.add_argument(
        "--cls-only", help="skip what the head does not read in the last block: auto (where proved), on (or fail), off"
    )
    parser.add_argument("--half-dtype", help=f"dtype of the fp16 tier: {_any(plans.HALF_DTYPES)}")
    parser.add_argument(
        "--min-speedup",
        type=float,
        metavar="X",
        help="measure here, and leave float what is not X times as fast in int8 (default: quantize without measuring)",
    )
    parser.add_argument(
        "--serve-batch", type=common.positive_int, metavar="N", help="batch size of --min-speedup (default: 1)"
    )
    tiers.add_arguments(parser)
    common.add_data_arguments(
        parser, "--calibration", False, "images for static activation scales and error-aware rounding"
    )
    common.add_device_arguments(parser)
    progressive.add_arguments(parser)


def run(arguments: argparse.Namespace) -> dict:
    from vqvit import hf
    from vqvit.quantize import quantize_

    progressive.require_consistent(arguments)
    _require_applicable(arguments)
    device = common.use_device(arguments)
    _require_replaceable(Path(arguments.output))
    common.require_kind("SRC", arguments.source, "float")
    tiers.require_usable(arguments)
    config = _configuration(arguments)
    model = hf.load_float(arguments.source).to(device)
    _require_matches(model, config, arguments)
    if arguments.progressive:
        log = progressive.quantize(arguments, model, config)
        return {**_save(model, arguments), **progressive.write(arguments, log)}
    batches = None
    if arguments.calibration:
        batches = common.open_data(arguments.calibration, model, arguments.source, arguments)
    chosen = tiers.choose(model, config, batches, arguments)
    sample = None
    if arguments.min_speedup is not None:
        sample = common.random_images(model, arguments.source, arguments.serve_batch or 1, arguments.image_size)
        sample = sample.to(next(model.parameters()).dtype)
    report = quantize_(
        model, chosen.config, batches, progress=True, min_speedup=arguments.min_speedup, sample=sample,
        calibration_state=arguments.calibration_state,
    )  # fmt: skip
    if not report.plan.layers:
        raise ValueError(f"--min-speedup {arguments.min_speedup:g}: nothing stays in int8\n{report}")
    result = _save(model, arguments)
    (Path(arguments.output) / progressive.LOG_FILE).unlink(missing_ok=True)  # of the model that was there
    facts = {"tiers_by": chosen.facts, "skipped_images": common.skipped(batches)}
    return {**result, **facts, **report.to_dict()}


def _save(model, arguments: argparse.Namespace) -> dict:
    """Write the checkpoint; returns where it is and its size."""
    from vqvit import checkpoint, engines, rewriter

    checkpoint.save(model, arguments.output)  # with the processor of SRC, where the model came from
    if arguments.save_plan:
        tiers.save_plan(rewriter.plan_of(model), arguments.save_plan)
    before, after = engines.folder_bytes(arguments.source), checkpoint.stored_bytes(arguments.output)
    return {"output": str(arguments.output), "bytes": after, "source_bytes": before, "ratio": after / before}


def to_text(result: dict) -> str:
    from vqvit.report import text_table

    size = f"{result['source_bytes'] / 1e6:.2f} MB -> {result['bytes'] / 1e6:.2f} MB ({result['ratio']:.3f})"
    if "log" in result:
        return f"{progressive.to_text(result)}\n\n{result['output']}: {size}"
    rows = [
        [layer["name"], layer["role"], layer["status"], "x".join(map(str, layer["shape"])), layer["reason"]]
        for layer in result["layers"]
    ]
    table = text_table(["layer", "role", "status", "shape", "reason"], rows)
    facts = "".join(f"{key}: {value}\n" for key, value in (result["tiers_by"] or {}).items())
    return f"{table}\n\n{facts}CLS shortcut: {result['cls_only']}\n{result['output']}: {size}"


def _configuration(arguments: argparse.Namespace):
    """The `QuantConfig`, or the `Plan`, that file and options ask for."""
    from vqvit.plan import Plan, PlanError, QuantConfig

    names = (
        "tier", "activation", "attention", "half_dtype", "cls_only", "observer", "rounding", "bits",
    )  # fmt: skip
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    tiers = {}
    for setting in arguments.set:
        pattern, separator, tier = setting.partition("=")
        if not separator:
            raise PlanError(f"--set: expected LAYER=TIER; got {setting!r}")
        tiers[pattern] = tier
    fields = {}
    if arguments.config:
        path = Path(arguments.config)
        if not path.is_file():
            raise FileNotFoundError(f"--config: expected a JSON file; there is no {path}")
        text = path.read_text()
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{path}: expected JSON; got text that fails to parse: {error}") from error
        if isinstance(fields, dict) and "layers" in fields:
            if options or tiers or arguments.preset:
                raise PlanError(f"--config: expected a plan alone; got {path} with options besides")
            return Plan.from_json(text)
    if arguments.preset == "vqvit":
        fields = {**dataclasses.asdict(QuantConfig.vqvit(bool(arguments.calibration))), **fields}
    config = QuantConfig.from_dict(fields)
    config = dataclasses.replace(config, **options, tiers={**config.tiers, **tiers})
    if arguments.observer and not _is_static(config):
        raise PlanError("--observer: expected --activation static with it, whose ranges it chooses; got none")
    if arguments.half_dtype and "fp16" not in (config.tier, *config.tiers.values()) and not _chooses_tiers(arguments):
        raise PlanError("--half-dtype: expected a layer in tier fp16; got none")
    return config


def _chooses_tiers(arguments: argparse.Namespace) -> bool:
    return arguments.tiers_by is not None or arguments.progressive


def _require_replaceable(output: Path) -> None:
    """Before any work: OUT can be written, and holds nothing or a checkpoint, perhaps with other files beside it."""
    from vqvit import checkpoint, files

    common.require_writable_folder(output)
    files.require_replaceable(output, checkpoint.MANIFEST, "a vqvit checkpoint", checkpoint.WEIGHTS)


def _require_applicable(arguments: argparse.Namespace) -> None:
    """Options that would change nothing in this mode are errors."""
    images = ("--calibration", "--sensitivity-data", "--data")
    common.require_with(arguments, "--serve-batch", "--min-speedup")
    common.require_with(arguments, "--calibration-state", "--calibration")
    for option in ("--images", "--batch-size", "--strict"):
        common.require_with(arguments, option, *images)
    common.require_with(arguments, "--image-size", *images, "--min-speedup")
    if arguments.progressive:
        return
    if arguments.calibration_state and not _is_static(_configuration(arguments)):
        raise ValueError("--calibration-state: expected static activation scales, whose ranges it keeps; got none")


def _is_static(config) -> bool:
    if isinstance(config, plans.Plan):
        return any(layer.activation == "static" for layer in config.layers)
    return "static" in (config.activation, *config.activations.values())


def _require_matches(model, config, arguments: argparse.Namespace) -> None:
    """Every layer that --set and --config name is there: a role, or a pattern of names, that fits none is an error."""
    from vqvit.rewriter import make_plan

    if isinstance(config, plans.Plan):
        return
    asked = {pattern: "--set" for pattern in (setting.partition("=")[0] for setting in arguments.set)}
    if arguments.config:
        fields = json.loads(Path(arguments.config).read_text())
        tables = ("tiers", "activations", "compensations", "bits_exceptions")
        asked |= {pattern: f"--config, {table}" for table in tables for pattern in fields.get(table, {})}
    if not asked:
        return
    found = [
        entry for options in (plans.QuantConfig(), config) for part in make_plan(model, options) for entry in _of(part)
    ]
    for pattern, option in asked.items():
        if not any(pattern == entry.role or fnmatch(entry.name, pattern) for entry in found):
            roles, names = sorted({entry.role for entry in found}), ", ".join([entry.name for entry in found][:3])
            raise plans.PlanError(
                f"{option}: expected a role among {', '.join(roles)}, or a pattern that fits a name such as {names}; "
                f"{pattern!r} fits none"
            )


def _of(part) -> tuple:
    """The layers of a plan, or of a report."""
    return part.layers if isinstance(part, plans.Plan) else part


def _any(choices: tuple) -> str:
    """The choices as words: "a, b or c"."""
    return f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
