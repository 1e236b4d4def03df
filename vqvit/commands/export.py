"""Export a quantized model for serving on CPUs without PyTorch.

MODEL is a vqvit checkpoint of a transformers model; OUT is a new folder, or an earlier export to replace. The exported
model runs any number of images of one size:

    from vqvit.serving import Session
    logits = Session(OUT)(pixel_values)["logits"]
"""

import argparse

from vqvit.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("output", metavar="OUT")
    parser.add_argument(
        "--image-size", type=common.positive_int, metavar="S", help="default: the model's configuration"
    )


def run(arguments: argparse.Namespace) -> dict:
    from vqvit import checkpoint, engines
    from vqvit.export import export
    from vqvit.serving.program import read

    common.require_kind("MODEL", arguments.model, "checkpoint")
    common.require_writable_folder(arguments.output)
    model = checkpoint.load(arguments.model)
    export(model, arguments.output, common.random_images(model, arguments.model, 2, arguments.image_size))
    program = read(arguments.output)
    return {
        "model": arguments.model,
        "output": arguments.output,
        "inputs": {description.name: list(description.shape) for description in program.inputs},
        "outputs": list(program.outputs),
        "steps": len(program.steps),
        "bytes": engines.folder_bytes(arguments.output),
    }


def to_text(result: dict) -> str:
    inputs = "; ".join(f"{name} ({', '.join(map(str, shape))})" for name, shape in result["inputs"].items())
    return (
        f"{result['output']}: {result['steps']} steps, {result['bytes'] / 1e6:.1f} MB\n"
        f"inputs: {inputs} float32\noutputs: {', '.join(result['outputs'])}"
    )
