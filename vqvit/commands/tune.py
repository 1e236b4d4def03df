"""Measure which tiles the GPU kernels should use here, and write the table that they then read.

Every config that ships is timed for every GEMM and attention shape of MODEL, or of known architectures, and its results
are compared bit for bit. The table goes where later runs find it; $VQVIT_TUNED can name another. Without a GPU,
`--predict` writes what the model of tiles says for a part, to compare with.
"""

import argparse
from pathlib import Path

from vqvit.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--arch", metavar="vit-b16,...", help="architectures with random weights (default: all known)")
    parser.add_argument("--batch", type=common.int_list, default=[1, 8, 64, 256], metavar="1,8", help="batch sizes")
    parser.add_argument("--image-size", type=common.positive_int, metavar="S", help="default: the configuration's")
    parser.add_argument("--output", metavar="FILE", help="default: a file of the cache, named after the device")
    parser.add_argument("--predict", metavar="PART", help="do not measure: a100, a40, l40s or h100; needs --output")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, ...")


def run(arguments: argparse.Namespace) -> dict:
    import torch

    from vqvit import precompile, tuning

    if arguments.model and arguments.arch:
        raise ValueError("tune: expected a MODEL folder or --arch; got both")
    if arguments.model:
        common.require_kind("MODEL", arguments.model, "float", "checkpoint")
    if arguments.predict:
        return _predict(arguments)
    device = _cuda_device(arguments)
    from vqvit.kernels import launch

    gpu = launch.cuda_device(device.index)
    output = Path(arguments.output) if arguments.output else _default_output(gpu)
    common.require_writable_folder(output.parent)
    major, minor = torch.cuda.get_device_capability(device)
    compilations = list(tuning.compilations(_calls(arguments, torch.device("meta")), gpu))
    common.say(f"compiling {len(compilations)} kernels side by side")
    precompile.warm(compilations, precompile.Part(10 * major + minor, gpu.arch, gpu.sms))
    choices = []
    for choice in tuning.measure(_calls(arguments, device), gpu, device, tuning.medians):
        choices.append(choice)
        common.say(_progress(choice))
    if broken := [choice for choice in choices if choice.problem]:
        lines = "\n".join(f"{choice.launch}: {choice.problem}" for choice in broken)
        raise tuning.TuningError(f"tune: expected every config to compute the same; no table is written\n{lines}")
    facts = tuning.facts(torch.cuda.get_device_name(device), (major, minor))
    return _written(output, choices, gpu, "measured", facts)


def to_text(result: dict) -> str:
    from vqvit.report import text_table

    changed = [row for row in result["rows"] if row["chosen"] != row["predicted"]]
    lines = [f"{result['output']}: {len(result['rows'])} {result['source']} choices for {result['device']}"]
    if result["source"] == "measured":
        lines.append(f"{len(changed)} differ from the predicted ones")
    if changed:
        labels = ["launch", "M", "shape", "predicted", "us", "chosen", "us", "gain"]
        lines.append(text_table(labels, [_changed(row) for row in changed]))
    for kind, configs in result["configs"].items():
        lines += [f"{kind} {index}: {config}" for index, config in enumerate(configs)]
    return "\n".join(lines)


def _progress(choice) -> str:
    launch = choice.launch
    times = ", ".join(f"{index}: {us:.2f} us" for index, us in enumerate(choice.us))
    return f"{launch.kind} {launch.m} {'x'.join(map(str, launch.shape))}  {choice.problem or times}"


def _changed(row: dict) -> list[str]:
    predicted, chosen = row["predicted"], row["chosen"]
    times = row["us"]
    gain = f"{times[predicted] / times[chosen]:.2f}x"
    return [
        row["kind"], str(row["m"]), "x".join(map(str, row["shape"])), str(predicted), f"{times[predicted]:.2f}",
        str(chosen), f"{times[chosen]:.2f}", gain,
    ]  # fmt: skip


def _predict(arguments: argparse.Namespace) -> dict:
    import torch

    from vqvit import tuning
    from vqvit.kernels import devices, launch

    if arguments.predict not in tuning.PARTS:
        raise ValueError(f"--predict: expected one of {', '.join(tuning.PARTS)}; got {arguments.predict!r}")
    if arguments.device != "auto":
        raise ValueError("--predict: expected no --device beside it, for nothing is measured; got both")
    if not arguments.output:
        raise ValueError("--predict: expected --output FILE, for a prediction is for another device")
    output = Path(arguments.output)
    common.require_writable_folder(output.parent)
    part = tuning.PARTS[arguments.predict]
    gpu = launch.Device(devices.config_row(part.capability), part.multiprocessors)
    choices = list(tuning.predict(_calls(arguments, torch.device("meta")), gpu))
    return _written(output, choices, gpu, "predicted", tuning.facts(arguments.predict, part.capability))


def _cuda_device(arguments: argparse.Namespace):
    import torch

    from vqvit import backends

    if not torch.cuda.is_available():
        raise ValueError("tune: expected a CUDA device; PyTorch finds none here. --predict PART needs none")
    arguments.threads = arguments.backend = None
    device = common.use_device(arguments)
    if device.type != "cuda":
        raise ValueError(f"--device: expected a CUDA device; got {arguments.device!r}")
    if reason := backends.unavailable("triton"):
        raise backends.BackendUnavailableError(f"tune: expected the Triton kernels to run here: {reason}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _default_output(gpu) -> Path:
    from vqvit import native
    from vqvit.backends import triton
    from vqvit.kernels import tuned

    return native.cache_directory() / triton.TABLES / tuned.file_name(gpu)


def _calls(arguments: argparse.Namespace, device):
    """Every call to measure; on the meta device, models are quantized on the CPU first."""
    import torch

    from vqvit import engines, tuning

    here = torch.device("cpu") if device.type == "meta" else device
    if arguments.model:
        model = engines.open_model(arguments.model, here)
        quantized = engines.is_quantized_folder(arguments.model)
        named = {Path(arguments.model).name: [model] if quantized else tuning.quantized(model)}
    else:
        archs = arguments.arch.split(",") if arguments.arch else list(engines.ARCHITECTURES)
        named = {arch: None for arch in archs}
    for name, models in named.items():
        models = models or tuning.models_of(name, here)
        dtype = next(models[0].parameters()).dtype
        images = common.random_images(models[0], name, 1, arguments.image_size).to(device, dtype)
        batches = [images.expand(batch, *images.shape[1:]) for batch in arguments.batch]
        yield from tuning.record([model.to(device) for model in models], batches)


def _written(output: Path, choices: list, gpu, source: str, facts: dict) -> dict:
    from vqvit import tuning

    document = tuning.table(choices, gpu, source, facts)
    tuning.write(output, document)
    rows = [tuning.row(choice) for choice in choices]
    configs = {choice.launch.kind: [str(config) for config in choice.configs] for choice in choices}
    return {
        "output": str(output),
        "source": source,
        "device": facts["device"],
        "rows": rows,
        "configs": configs,
        "provenance": facts,
    }
