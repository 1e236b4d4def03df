"""Quantize a Hugging Face model folder and save the integer model.

SRC is a local folder with config.json and weights; OUT is a new folder, or a vqvit checkpoint to replace.
Without options: W8A8, per-token activation scales, int8 attention. `--config` reads the same options, or a
whole plan, from JSON. `--progressive` quantizes in stages, tuning scales and weights on images.
"""

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path

from vqvit.commands import common, progressive, tiers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument("--config", metavar="JSON", help="file with the fields of QuantConfig, or a plan")
    parser.add_argument("--tier", help="tier of every layer: int8, int8_asym or fp16")
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
    parser.add_argument("--rounding", help="weights: nearest, error_aware (needs --calibration), or auto")
    parser.add_argument("--bits", type=int, help="bits of the stored weights: 8, 4 or 3; all of them run as int8")
    parser.add_argument("--activation", help="activation scales: per_token, per_token_asym or static")
    parser.add_argument("--observer", help="static ranges: ema, max, percentile, percentile:P, mse or output_error")
    parser.add_argument(
        "--calibration-state", metavar="FILE", help="keep an interrupted calibration here, and go on from it"
    )
    parser.add_argument("--attention", help="int8 or float")
    parser.add_argument(
        "--cls-only", help="skip what the head does not read in the last block: auto (where proved), on (or fail), off"
    )
    parser.add_argument("--half-dtype", help="dtype of the fp16 tier: bfloat16 or float16")
    parser.add_argument(
        "--min-speedup",
        type=float,
        metavar="X",
        help="measure here, and leave float what is not X times as fast in int8 (default: quantize without measuring)",
    )
    parser.add_argument(
        "--serve-batch", type=common.positive_int, default=1, metavar="N", help="batch size that --min-speedup measures"
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
    device = common.use_device(arguments)
    _require_replaceable(Path(arguments.output))
    tiers.require_usable(arguments)
    config = _configuration(arguments)
    model = hf.load_float(arguments.source).to(device)
    if arguments.progressive:
        log = progressive.quantize(arguments, model, config)
        return {**_save(model, arguments), **progressive.write(arguments, log)}
    batches = None
    if arguments.calibration:
        batches = common.open_data(arguments.calibration, model, arguments.source, arguments)
    chosen = tiers.choose(model, config, batches, arguments)
    sample = None
    if arguments.min_speedup is not None:
        sample = common.random_images(model, arguments.source, arguments.serve_batch, arguments.image_size)
        sample = sample.to(next(model.parameters()).dtype)
    report = quantize_(
        model, chosen.config, batches, progress=True, min_speedup=arguments.min_speedup, sample=sample,
        calibration_state=arguments.calibration_state,
    )  # fmt: skip
    if not report.plan.layers:
        raise ValueError(f"--min-speedup {arguments.min_speedup:g}: nothing stays in int8\n{report}")
    return {**_save(model, arguments), "tiers_by": chosen.facts, **report.to_dict()}


def _save(model, arguments: argparse.Namespace) -> dict:
    """Write the checkpoint; returns where it is and its size."""
    from vqvit import checkpoint, engines, rewriter

    checkpoint.save(model, arguments.output)
    if arguments.save_plan:
        tiers.save_plan(rewriter.plan_of(model), arguments.save_plan)
    _copy_processor(Path(arguments.source), Path(arguments.output))
    before, after = engines.folder_bytes(arguments.source), engines.folder_bytes(arguments.output)
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
    return dataclasses.replace(config, **options, tiers={**config.tiers, **tiers})


def _require_replaceable(output: Path) -> None:
    """Before any work: OUT can be written, and holds nothing but perhaps a checkpoint."""
    from vqvit.checkpoint import MANIFEST

    common.require_writable_folder(output)
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise FileExistsError(f"{output}: expected a new folder or a vqvit checkpoint to replace; got other content")


def _copy_processor(source: Path, output: Path) -> None:
    """The image processor's configuration belongs to the model: `vqvit eval` reads it."""
    from vqvit.data import PROCESSOR_FILE

    if (source / PROCESSOR_FILE).is_file():
        temporary = output / f".{PROCESSOR_FILE}.part"
        shutil.copyfile(source / PROCESSOR_FILE, temporary)
        os.replace(temporary, output / PROCESSOR_FILE)
