"""How much a quantized model differs from its float original, and how often it is right.

    top-1      share of images whose largest logit is their label
    agreement  share of images whose largest logit is the reference's
    SQNR       10 log10(Σ ref² / Σ (out - ref)²) over all images and outputs, dB
    KL         mean over images of Σ p (log p - log q), p and q the softmax of reference and model, nats
    cosine     out · ref / (|out| |ref|) for each image: mean and minimum

Sums are fp64 and streaming: memory does not grow with the number of images.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vqvit.batches import Batch, read_batch

OUTPUT_FIELDS = ("logits", "image_embeds", "pooler_output")
"""Fields of a model's output that hold one vector per image, in the order in which `pick_output` looks for them."""


@dataclass(frozen=True)
class Evaluation:
    """Measured figures; None where one does not apply (no labels, no reference, or no logits)."""

    images: int
    top1: float | None = None
    reference_top1: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    kl: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def evaluate(
    model: nn.Module, loader: Iterable, reference: nn.Module | None = None, progress: bool = False
) -> Evaluation:
    """Run `model`, and `reference` if given, over every batch of `loader` and compare.

    Args:
        model, reference: modules that take images and return what `pick_output` understands. They are switched to eval
            mode and back. Each may live on its own device and in its own floating-point dtype.
        loader: batches, each a tensor (B, ...), a dict of model inputs (which may hold `labels`), or (inputs, labels)
            with labels int (B,).
        progress: show a progress bar on stderr.

    Raises:
        TypeError: a batch or an output of unknown type.
        ValueError: an empty loader or batch; nothing to compare with (no reference, and no labels or no logits); labels
            in some batches only, or that do not fit the logits; outputs with NaN; outputs of model and reference of
            different shape.
    """
    sums = _Sums()
    with eval_mode(model), eval_mode(reference), torch.inference_mode():
        for index, batch in enumerate(tqdm(loader, desc="evaluate", unit="batch", disable=not progress)):
            batch = read_batch(batch)
            out, is_logits = _run(model, batch, f"the model's output for batch {index}")
            ref = None if reference is None else _run(reference, batch, f"the reference's output for batch {index}")[0]
            sums.add(index, out, ref, batch.labels, is_logits)
    return sums.result()


def pick_output(output: object) -> tuple[Tensor, bool]:
    """The one vector per image (B, D) to compare, and whether it holds logits.

    A model's output object gives the first of: `logits`, `image_embeds` (CLIP's projection), `pooler_output`, and the
    first token of `last_hidden_state` (CLS). A bare tensor (B, D) counts as logits; of (B, S, D) the first token is
    taken, which is a feature.

    Raises `TypeError` if the output holds none of these.
    """
    if isinstance(output, Tensor):
        return (output, True) if output.dim() == 2 else (_first_token(output), False)
    for name in OUTPUT_FIELDS:
        if (value := _field(output, name)) is not None:
            return value, name == "logits"
    if (hidden := _field(output, "last_hidden_state")) is not None:
        return _first_token(hidden), False
    raise TypeError(
        f"output: expected a tensor or an object with {', '.join(OUTPUT_FIELDS)} or last_hidden_state; "
        f"got {type(output).__name__}"
    )


def forward(model: nn.Module, batch: Batch) -> object:
    """Call `model` on a batch moved to its device, with floating-point inputs in its parameters' dtype."""
    tensors = chain(model.parameters(), model.buffers())
    anchor = next((t for t in tensors if t.is_floating_point()), None)

    def place(value: object) -> object:
        if anchor is None or not isinstance(value, Tensor):
            return value
        return value.to(anchor.device, anchor.dtype if value.is_floating_point() else None)

    return model(*map(place, batch.args), **{name: place(value) for name, value in batch.kwargs.items()})


@contextmanager
def eval_mode(model: nn.Module | None) -> Iterator[None]:
    """Every module of `model` in eval mode, then each back in the mode it was in."""
    modules = [] if model is None else list(model.modules())
    training = [m.training for m in modules]
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


class _Sums:
    """Streaming sums over images, one `add` a batch."""

    def __init__(self) -> None:
        self.images = 0
        self.logits = True
        self.labelled: bool | None = None
        self.compared = False
        self.correct = self.reference_correct = self.agree = 0
        self.signal = self.noise = self.kl = self.cosine = 0.0
        self.cosine_min = math.inf

    def add(self, index: int, out: Tensor, ref: Tensor | None, labels: Tensor | None, is_logits: bool) -> None:
        if self.labelled is not None and self.labelled != (labels is not None):
            raise ValueError(f"loader: expected labels in every batch or in none; batch {index} differs from the first")
        self.labelled = labels is not None
        self.compared = ref is not None
        self.logits = is_logits
        if ref is None and (labels is None or not is_logits):
            given = "no labels" if labels is None else "labels, but a model that returns features"
            raise ValueError(f"evaluate: expected a reference model, or labels and logits to score; got {given}")
        self.images += out.shape[0]
        if labels is not None and is_logits:
            labels = checked_labels(index, labels, out)
            self.correct += int((out.argmax(-1) == labels).sum())
            if ref is not None:
                self.reference_correct += int((ref.argmax(-1) == labels).sum())
        if ref is not None:
            self._compare(index, out, ref)

    def _compare(self, index: int, out: Tensor, ref: Tensor) -> None:
        if out.shape != ref.shape:
            raise ValueError(
                f"evaluate: expected outputs of one shape; batch {index} gives {tuple(out.shape)} "
                f"from the model and {tuple(ref.shape)} from the reference"
            )
        self.signal += float(ref.square().sum())
        self.noise += float((out - ref).square().sum())
        cosine = torch.nn.functional.cosine_similarity(out, ref, dim=-1)
        self.cosine += float(cosine.sum())
        self.cosine_min = min(self.cosine_min, float(cosine.min()))
        if self.logits:
            log_p, log_q = ref.log_softmax(-1), out.log_softmax(-1)
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())
            self.agree += int((out.argmax(-1) == ref.argmax(-1)).sum())

    def result(self) -> Evaluation:
        if self.images == 0:
            raise ValueError("loader: expected at least one image; got none")
        n, classified = self.images, self.labelled and self.logits
        return Evaluation(
            images=n,
            top1=self.correct / n if classified else None,
            reference_top1=self.reference_correct / n if classified and self.compared else None,
            agreement=self.agree / n if self.compared and self.logits else None,
            sqnr_db=_decibel(self.signal, self.noise) if self.compared else None,
            kl=self.kl / n if self.compared and self.logits else None,
            cosine_mean=self.cosine / n if self.compared else None,
            cosine_min=self.cosine_min if self.compared else None,
        )


def _run(model: nn.Module, batch: Batch, what: str) -> tuple[Tensor, bool]:
    """Forward, pick, to fp64 on the CPU; (B, D)."""
    out, is_logits = pick_output(forward(model, batch))
    out = out.double().cpu()
    if not bool(torch.isfinite(out).all()):
        raise ValueError(f"evaluate: expected finite numbers in {what}; got NaN or Inf")
    return out.flatten(1), is_logits


def checked_labels(index: int, labels: Tensor, out: Tensor) -> Tensor:
    """Labels int (B,) of batch `index` on the CPU. Raises `ValueError` unless they are classes of logits (B, D)."""
    labels = labels.cpu()
    if labels.shape != (out.shape[0],) or labels.is_floating_point():
        raise ValueError(
            f"labels of batch {index}: expected {out.shape[0]} integers, one per image; "
            f"got shape {tuple(labels.shape)}, {labels.dtype}"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < out.shape[1]:
        raise ValueError(
            f"labels of batch {index}: expected classes 0 to {out.shape[1] - 1}, as many as the model has; "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def _decibel(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _first_token(hidden: Tensor) -> Tensor:
    if hidden.dim() != 3:
        raise TypeError(f"output: expected (images, outputs) or (images, tokens, channels); got {tuple(hidden.shape)}")
    return hidden[:, 0]


def _field(output: object, name: str) -> Tensor | None:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
