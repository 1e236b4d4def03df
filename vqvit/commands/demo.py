"""Train a small ViT on handwritten digits, quantize, save, reload and measure it; then time ViT-B/16 here.

Nothing is downloaded. The report (HTML, Markdown, JSON) and the models go to the output folder.
"""

import argparse

from vqvit.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="demo-output", metavar="DIR", help="default: demo-output")
    parser.add_argument("--quick", action="store_true", help="little training, no large model: to see that it works")
    parser.add_argument("--threads", type=common.positive_int, help="CPU threads (default: PyTorch's choice)")


def run(arguments: argparse.Namespace) -> dict:
    common.require_writable_folder(arguments.output)
    import torch

    from vqvit import demo

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    options = demo.DemoOptions(epochs=2, seconds=0.2, large_arch=None) if arguments.quick else demo.DemoOptions()
    return {"output": arguments.output, **demo.run(arguments.output, options)}


def to_text(result: dict) -> str:
    from vqvit.report import to_text as document_to_text

    return document_to_text(result) + f"\n\nReport and models: {result['output']}"
