"""Time fp32, bf16 and W8A8 of one model side by side: medians of interleaved runs.

MODEL is a local folder: a float Hugging Face model, or a vqvit checkpoint (whose float engines then have
random weights of the same architecture). `--arch` builds a known architecture with random weights instead.

`--profile` tells instead where the time of one engine goes, on the CPU and at the first batch size: calls, time and
rate of every op, and how close it comes to its roofline (peaks measured in the same run).
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from vqvit.commands import common

SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--arch", help="vit-ti, deit-s, dinov2-s, vit-b16 (default) or vit-l16")
    parser.add_argument("--batch", type=common.int_list, default=[1, 8], metavar="1,8", help="batch sizes")
    parser.add_argument("--image-size", type=common.positive_int, metavar="S", help="default: the configuration's")
    parser.add_argument("--seconds", type=float, help=f"time for each batch size (default: {SECONDS:g})")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in a new process per engine")
    parser.add_argument("--profile", action="store_true", help="time each op of one engine at the first batch size")
    parser.add_argument("--engine", help="of --profile: fp32, bf16 or w8a8 (default)")
    common.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> dict:
    from vqvit import engines, provenance
    from vqvit.timing import interleaved

    if arguments.model and arguments.arch:
        raise ValueError("bench: expected a MODEL folder or --arch; got both")
    if arguments.model:
        common.require_kind("MODEL", arguments.model, "float", "checkpoint")
    common.require_with(arguments, "--engine", "--profile")
    device = common.use_device(arguments)
    if arguments.profile:
        return _profile(arguments, device)
    name, models = _engines(arguments, device)
    images = common.random_images(models["fp32"], name, max(arguments.batch), arguments.image_size)
    rows = []
    for batch in arguments.batch:
        calls = {engine: engines.timed_call(model, images[:batch]) for engine, model in models.items()}
        latency = interleaved(calls, arguments.seconds or SECONDS, device, f"batch {batch}")
        for engine, measured in latency.items():
            speedup = latency["fp32"].median_ms / measured.median_ms
            rows.append({"engine": engine, "batch": batch, **measured.to_dict(), "speedup": speedup})
    memory = _memory(models, images[: min(arguments.batch)], device) if arguments.memory else {}
    return {
        "model": name,
        "image_size": images.shape[-1],
        "rows": rows,
        "memory_batch": min(arguments.batch),
        "memory": memory,
        "environment": provenance.environment(device),
    }


def to_text(result: dict) -> str:
    from vqvit.report import cells, text_table

    if "profile" in result:
        return _profile_text(result)
    columns = [
        {"key": "engine", "label": "engine"},
        {"key": "batch", "label": "batch"},
        {"key": "median_ms", "label": "median ms", "format": ".2f"},
        {"key": "p20_ms", "label": "p20", "format": ".2f"},
        {"key": "p80_ms", "label": "p80", "format": ".2f"},
        {"key": "speedup", "label": "x fp32", "format": ".2f"},
        {"key": "runs", "label": "runs"},
    ]
    facts = result["environment"]
    images = f"{result['image_size']} x {result['image_size']}"
    where = f"{facts['device']}, {facts['threads']} threads, backend {facts['backend']}"
    table = text_table(*cells({"columns": columns, "rows": result["rows"]}))
    lines = [f"{result['model']} at {images} on {where}", table]
    if result["memory"]:
        rows = [
            [engine, f"{m['bytes'] / 1e6:.1f}", f"{m['peak']:.0f}", f"{m['peak'] - m['baseline']:.0f}"]
            for engine, m in result["memory"].items()
        ]
        labels = ["engine", "size MB", f"peak MiB at batch {result['memory_batch']}", "of it model"]
        lines += ["", text_table(labels, rows)]
    return "\n".join(lines)


def _engines(arguments: argparse.Namespace, device) -> tuple[str, dict]:
    """A name to show, and the three engines on `device`."""
    from vqvit import engines

    if not arguments.model:
        arch = arguments.arch or "vit-b16"
        common.say(f"building {arch} with random weights")
        return arch, engines.variants(engines.random_model(arch).to(device))
    if not engines.is_quantized_folder(arguments.model):
        return Path(arguments.model).name, engines.variants(engines.open_model(arguments.model, device).float())
    quantized = engines.open_model(arguments.model, device)
    models = engines.variants(engines.random_like(arguments.model).to(device))
    return Path(arguments.model).name, {**models, "w8a8": quantized}


def _profile(arguments: argparse.Namespace, device) -> dict:
    """Profile one engine at the first batch size. Raises `ValueError` for a GPU, --memory or an unknown engine."""
    import torch

    from vqvit import engines, profiling, provenance

    if device.type != "cpu":
        raise ValueError(f"--profile: expected --device cpu, whose clock times each op; got {device}")
    if arguments.memory:
        raise ValueError("--profile: expected no --memory beside it; got both")
    if arguments.seconds is not None:
        raise ValueError("--profile: expected no --seconds beside it; got both")
    engine = arguments.engine or "w8a8"
    if engine not in engines.ENGINES:
        raise ValueError(f"--engine: expected one of {', '.join(engines.ENGINES)}; got {engine!r}")
    name, models = _engines(arguments, device)
    batch = arguments.batch[0]
    images = common.random_images(models["fp32"], name, batch, arguments.image_size)
    dtypes = {"fp32": [torch.float32], "bf16": [torch.bfloat16], "w8a8": [torch.float32]}[engine]
    common.say("measuring peaks")
    peaks = profiling.measure_peaks(dtypes)
    common.say(f"profiling {engine} at batch {batch}")
    profile = profiling.profile(engines.timed_call(models[engine], images), peaks)
    return {
        "model": name,
        "engine": engine,
        "batch": batch,
        "image_size": images.shape[-1],
        "profile": dataclasses.asdict(profile),
        "environment": provenance.environment(device),
    }


def _profile_text(result: dict) -> str:
    from vqvit.report import cells, text_table

    columns = [
        {"key": "op", "label": "op"},
        {"key": "sizes", "label": "M x N x K"},
        {"key": "calls", "label": "calls"},
        {"key": "ms", "label": "ms", "format": ".3f"},
        {"key": "share", "label": "share", "format": ".1%"},
        {"key": "gops", "label": "GOP/s", "format": ".0f"},
        {"key": "gbs", "label": "GB/s", "format": ".1f"},
        {"key": "of_roofline", "label": "of roofline", "format": ".0%"},
    ]
    profile, facts = result["profile"], result["environment"]
    rates = ", ".join(f"{name} {rate:.0f} GOP/s" for name, rate in profile["peaks"]["gops"].items())
    copies = profile["peaks"]["copy_gbs"].values()
    images = f"{result['image_size']} x {result['image_size']}, batch {result['batch']}"
    where = f"{facts['device']}, {facts['threads']} threads, backend {facts['backend']}"
    return "\n".join(
        [
            f"{result['engine']} of {result['model']} at {images} on {where}",
            text_table(*cells({"columns": columns, "rows": profile["ops"]})),
            f"total {profile['total_ms']:.2f} ms, of it outside of ops {profile['outside_ms']:.2f}; "
            f"without the profiler {profile['plain_ms']:.2f}",
            f"peaks: {rates}; copies {min(copies):.0f} to {max(copies):.0f} GB/s by size",
        ]
    )


def _memory(models: dict, images, device) -> dict[str, dict]:
    """Size on disk and memory of each engine, stored in a temporary folder and loaded by a new process."""
    from safetensors.torch import save_file

    from vqvit import engines, memory

    measured = {}
    with tempfile.TemporaryDirectory(prefix="vqvit-") as scratch:
        inputs = Path(scratch) / "inputs.safetensors"
        save_file({"pixel_values": images.contiguous()}, inputs)
        for engine, model in models.items():
            common.say(f"memory of {engine}")
            folder = engines.save(engine, model, Path(scratch) / engine)
            used = memory.measure(folder, inputs, device=str(device))
            measured[engine] = {**used.to_dict(), "bytes": engines.folder_bytes(folder)}
    return measured
