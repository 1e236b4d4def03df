"""Whether a partly quantized model is still good enough: the same images through it and through the float model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqvit import statistics
from vqvit.evaluate import eval_mode, forward, pick_output
from vqvit.progressive.config import Acceptance, ProgressiveError
from vqvit.progressive.samples import Samples


@dataclass(frozen=True)
class Judgement:
    """A model against the float model on the checking images.

    Attributes:
        images: how many.
        kl: mean KL divergence from the float model's classes, nats.
        agreement: share of images with the float model's class.
        top1, top1_low, top1_high, reference_top1: accuracy with its 95 % interval (Wilson), and the float model's; None
            without labels.
        losses, gains: images that only the float model, and only this one, classifies correctly.
        drop: (losses - gains) / images.
        counted: what of the drop counts by the test of the `Acceptance`.
        p_value: of McNemar's exact test, two-sided.
        failures: what is not acceptable, in words; empty if the model passes.
    """

    images: int
    kl: float
    agreement: float
    top1: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    reference_top1: float | None = None
    losses: int | None = None
    gains: int | None = None
    drop: float | None = None
    counted: float | None = None
    p_value: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures


def logits_of(model: nn.Module, samples: Samples, batch_size: int, limit: int | None = None) -> Tensor:
    """(n, classes) fp32 on the CPU, of the first `limit` images. Raises `ProgressiveError` for features or NaN."""
    with eval_mode(model), torch.no_grad():
        parts = [pick_output(forward(model, batch)) for batch in samples.batches(batch_size, limit)]
    if not all(is_logits for _, is_logits in parts):
        raise ProgressiveError(f"{type(model).__name__}: expected a classifier, which returns logits; got features")
    logits = torch.cat([out.float().cpu() for out, _ in parts])
    if not bool(torch.isfinite(logits).all()):
        raise ProgressiveError(f"{type(model).__name__}: expected finite logits; got NaN or Inf")
    return logits


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean over images of Σ p (log p - log q), nats; p of `reference`, q of `logits`, both (n, classes)."""
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def judge(logits: Tensor, reference: Tensor, labels: Tensor | None, rules: Acceptance, seed: int) -> Judgement:
    """Compare logits (n, classes) with the float model's by `rules`; labels int64 (n,) or None."""
    kl = divergence(reference, logits)
    agreement = float((logits.argmax(-1) == reference.argmax(-1)).double().mean())
    failures = []
    if rules.kl_limit is not None and not kl <= rules.kl_limit:
        failures.append(f"KL {kl:.2e} exceeds {rules.kl_limit:.2e}")
    if labels is None:
        return Judgement(len(logits), kl, agreement, failures=tuple(failures))
    right, reference_right = logits.argmax(-1) == labels, reference.argmax(-1) == labels
    losses, gains = int((reference_right & ~right).sum()), int((right & ~reference_right).sum())
    drop, counted = (losses - gains) / len(labels), _counted(right, reference_right, rules, seed)
    if not counted <= rules.tolerance:
        what = "drop" if rules.test == "raw" else f"lower bound of the drop ({losses} lost, {gains} gained)"
        failures.append(f"{what} {counted:.4f} exceeds {rules.tolerance:.4f}")
    low, high = statistics.wilson_interval(int(right.sum()), len(labels))
    return Judgement(
        len(labels), kl, agreement, float(right.double().mean()), low, high, float(reference_right.double().mean()),
        losses, gains, drop, counted, statistics.mcnemar(losses, gains), tuple(failures),
    )  # fmt: skip


def require_decidable(check: Samples, rules: Acceptance) -> None:
    """Raise `ProgressiveError` if nothing could ever fail: without labels only the KL divergence is left."""
    if check.labels is None and rules.kl_limit is None:
        raise ProgressiveError("check: expected labels, or a limit of the KL divergence (kl_limit); got neither")


def _counted(right: Tensor, reference_right: Tensor, rules: Acceptance, seed: int) -> float:
    difference = reference_right.int() - right.int()
    losses, gains = int((difference > 0).sum()), int((difference < 0).sum())
    if rules.test == "raw":
        return (losses - gains) / len(right)
    if rules.test == "exact":
        return statistics.drop_lower_bound(losses, gains, len(right), rules.confidence)
    return statistics.bootstrap_lower_bound(difference, rules.confidence, rules.resamples, seed)
