"""Measure a model on images: accuracy where they have labels, and the difference from a reference model.

MODEL and the reference are local folders, each a vqvit checkpoint or a float Hugging Face model. Labels are used if the
model returns logits; `--no-labels` ignores them, for data whose classes are not the model's.
"""

import argparse

from vqvit.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--reference", metavar="SRC", help="float model to compare with")
    parser.add_argument("--no-labels", action="store_true", help="ignore the labels of the data")
    common.add_data_arguments(parser, "--data", True, "images to run")
    common.add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> dict:
    from vqvit import engines
    from vqvit.evaluate import evaluate

    common.require_kind("MODEL", arguments.model, "float", "checkpoint")
    if arguments.reference:
        common.require_kind("--reference", arguments.reference, "float", "checkpoint")
    device = common.use_device(arguments)
    model = engines.open_model(arguments.model, device)
    reference = arguments.reference and engines.open_model(arguments.reference, device)
    batches = common.open_data(arguments.data, model, arguments.model, arguments)
    read = _Unlabelled(batches) if arguments.no_labels else batches
    scores = evaluate(model, read, reference or None, progress=True)
    return {
        "model": arguments.model,
        "reference": arguments.reference,
        "data": arguments.data,
        "input": str(getattr(batches, "transform", "as it is")),
        "skipped": common.skipped(batches),
        **scores.to_dict(),
    }


def to_text(result: dict) -> str:
    from vqvit.report import text_table

    measured = [(label, result[key], spec) for key, label, spec in common.EVALUATION_FIELDS if result[key] is not None]
    rows = [[label, format(value, spec)] for label, value, spec in measured]
    rows += [["images skipped", str(len(result["skipped"]))]] if result["skipped"] else []
    return text_table([result["model"], ""], rows) + f"\nInput: {result['input']}"


class _Unlabelled:
    """The same batches without labels."""

    def __init__(self, batches):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self):
        return (batch[0] if isinstance(batch, tuple) else batch for batch in self._batches)
