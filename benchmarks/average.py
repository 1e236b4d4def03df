"""Average the weights of fine-tuned models with the same classes: a "model soup" (Wortsman et al. 2022).

    python benchmarks/average.py TRAIN OUT MODEL MODEL ... [--image-size 98] [--held-out 2000]

MODELs are folders that `benchmarks/finetune.py` wrote from one backbone, with the same `--held-out`. OUT becomes the
average, and OUT.log.jsonl gets its accuracy and each model's on the held-out images of TRAIN.
"""

import argparse
import json
from pathlib import Path

import torch
from finetune import accuracy, load_images, open_backbone, save_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("output", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    average(arguments.train, arguments.output, arguments.models, arguments.image_size, arguments.held_out)


def average(train: str, output: Path, folders: list[str], image_size: int, held_out: int) -> None:
    """Write the average and the log. Raises `ValueError` if the models have different tensors."""
    images, labels = load_images(train)
    images, labels = images[-held_out:], labels[-held_out:]
    classes = int(labels.max()) + 1
    total: dict[str, torch.Tensor] = {}
    log = []
    for folder in folders:
        model = open_backbone(folder, classes).eval()
        state = {name: tensor.double() for name, tensor in model.state_dict().items()}
        if total and {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in total.items()}:
            raise ValueError(f"{folder}: expected the tensors of {folders[0]}; got others")
        total = {name: total.get(name, 0) + tensor for name, tensor in state.items()}
        log.append({"model": Path(folder).name, "held_out_top1": _top1(model, images, labels, image_size)})
        print(log[-1], flush=True)
    model.load_state_dict({name: (tensor / len(folders)).float() for name, tensor in total.items()})
    log.append({"average_of": len(folders), "held_out_top1": _top1(model, images, labels, image_size)})
    print(log[-1])
    model.save_pretrained(output)
    save_processor(output, image_size)
    output.with_suffix(".log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def _top1(model, images: torch.Tensor, labels: torch.Tensor, image_size: int) -> float:
    return accuracy(model, images, labels, image_size, torch.device("cpu"))


if __name__ == "__main__":
    main()
