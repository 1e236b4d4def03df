"""Show what a model folder holds: layers, tiers, and where its bytes go.

For a vqvit checkpoint: the plan and the sizes of codes, scales, zero points and what is left in float.
For a float Hugging Face model: what `vqvit quantize` would do with it.
"""

import argparse
import dataclasses
import json
import struct
from pathlib import Path

from vqvit.commands import common

KINDS = ("int8 codes", "codes of 4 and 3 bits", "scales", "zero points and sums", "float")

SCALES = ("scale", "input_scale", "residual_scale", "multipliers", "q_scale", "k_scale", "v_scale")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")


def run(arguments: argparse.Namespace) -> dict:
    from vqvit import checkpoint, engines

    folder = Path(arguments.model)
    quantized = common.require_kind("MODEL", folder, "float", "checkpoint") == "checkpoint"
    if quantized:
        weights = [checkpoint.weights_of(folder, checkpoint.read_manifest(folder))]
    else:
        weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder}: expected weights in safetensors files; got none")
    sizes = dict.fromkeys(KINDS, 0)
    for path in weights:
        for name, tensor in _header(path).items():
            sizes[_kind(name, tensor["dtype"]) if quantized else "float"] += _bytes(tensor)
    described = _plan_of_checkpoint(folder) if quantized else _plan_for(folder)
    total = checkpoint.stored_bytes(folder) if quantized else engines.folder_bytes(folder)
    return {
        "model": str(folder),
        "quantized": quantized,
        **described,
        "bytes": sizes,
        "other_bytes": total - sum(sizes.values()),
        "total_bytes": total,
    }


def to_text(result: dict) -> str:
    from vqvit.report import text_table

    layers = [[p["name"], p["role"], _tier(p), p["activation"], p.get("reason", "")] for p in result["layers"]]
    sizes = [
        *result["bytes"].items(),
        ("headers, plan, configuration", result["other_bytes"]),
        ("total", result["total_bytes"]),
    ]
    total = max(1, result["total_bytes"])
    heading = "quantized" if result["quantized"] else "float; vqvit quantize would make of it:"
    return "\n".join(
        [
            f"{result['model']}: {result['class']}, {heading}",
            text_table(["layer", "role", "tier", "activation", ""], layers),
            "",
            text_table(["content", "bytes", "share"], [[k, f"{v:,}", f"{100 * v / total:.2f} %"] for k, v in sizes]),
        ]
    )


def _tier(layer: dict) -> str:
    bits = layer.get("bits", 8)
    return f"{layer['tier']}, {bits} bits" if bits < 8 and layer["tier"] == "int8" else layer["tier"]


def _plan_of_checkpoint(folder: Path) -> dict:
    from vqvit import checkpoint
    from vqvit.plan import Plan

    manifest = checkpoint.read_manifest(folder)
    plan = Plan.from_json(json.dumps(manifest["plan"]))
    return {
        "class": manifest["class"],
        "blocks": [dataclasses.asdict(block) for block in plan.blocks],
        "layers": [dataclasses.asdict(layer) for layer in plan.layers],
    }


def _plan_for(folder: Path) -> dict:
    from vqvit import hf
    from vqvit.plan import QuantConfig
    from vqvit.rewriter import make_plan

    model = hf.load_float(folder)
    plan, skipped = make_plan(model, QuantConfig())
    kept = [{"name": s.name, "role": s.role, "tier": s.status, "activation": "", "reason": s.reason} for s in skipped]
    return {
        "class": type(model).__name__,
        "blocks": [dataclasses.asdict(block) for block in plan.blocks],
        "layers": [*(dataclasses.asdict(layer) for layer in plan.layers), *kept],
    }


def _header(path: Path) -> dict[str, dict]:
    """Names, dtypes and shapes in a safetensors file, without reading the tensors. Raises `ValueError`."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError as error:
            raise ValueError(f"{path}: expected a safetensors file; its header cannot be read") from error
    header.pop("__metadata__", None)
    return header


def _kind(name: str, dtype: str) -> str:
    leaf = name.rsplit(".", 1)[-1]
    if dtype == "I8":
        return "int8 codes"
    if dtype == "U8" and leaf == "codes":
        return "codes of 4 and 3 bits"
    if leaf in SCALES:
        return "scales"
    return "zero points and sums" if dtype == "I32" else "float"


def _bytes(tensor: dict) -> int:
    first, last = tensor["data_offsets"]
    return last - first
