"""`vqvit.evaluate`: figures against formulas written out, every kind of batch and output, and clear errors."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vqvit.evaluate import evaluate, pick_output

IMAGES, WIDTH, CLASSES = 24, 12, 5
EXACT = dict(rel=1e-12, abs=1e-12)


class Answer(nn.Module):
    """Linear map of the input, wrapped as asked: the simplest model whose outputs a test can compute."""

    def __init__(self, wrap=lambda y: y, seed=0):
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(seed)))
        self.wrap = wrap

    def forward(self, pixel_values):
        return self.wrap(self.linear(pixel_values))


@pytest.fixture
def images():
    return torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(7))


def logits(y):
    return SimpleNamespace(logits=y)


def feature(y):
    return SimpleNamespace(pooler_output=y)


@pytest.mark.parametrize("batch_size", [1, 7, IMAGES])
def test_figures_match_formulas(images, batch_size):
    model, reference = Answer(logits, seed=0), Answer(logits, seed=1)
    labels = torch.arange(IMAGES) % CLASSES
    loader = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    scores = evaluate(model, loader, reference)
    with torch.inference_mode():
        q, p = model(images).logits.double(), reference(images).logits.double()
    assert scores.images == IMAGES
    assert scores.top1 == (q.argmax(-1) == labels).double().mean().item()
    assert scores.reference_top1 == (p.argmax(-1) == labels).double().mean().item()
    assert scores.agreement == (q.argmax(-1) == p.argmax(-1)).double().mean().item()
    assert scores.sqnr_db == pytest.approx(10 * math.log10((p**2).sum() / ((q - p) ** 2).sum()), rel=1e-6)
    divergence = (p.softmax(-1) * (p.softmax(-1) / q.softmax(-1)).log()).sum(-1).mean().item()
    assert scores.kl == pytest.approx(divergence, rel=1e-6)
    cosine = (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))
    assert scores.cosine_mean == pytest.approx(cosine.mean().item(), rel=1e-6)
    assert scores.cosine_min == pytest.approx(cosine.min().item(), rel=1e-6)


def test_a_model_against_itself(images):
    model = Answer(logits)
    scores = evaluate(model, [images], model)
    assert (scores.agreement, scores.sqnr_db, scores.kl) == (1.0, math.inf, 0.0)
    assert scores.cosine_min == pytest.approx(1.0, **EXACT)
    assert scores.top1 is None


BATCHES = {
    "tensor": lambda x, y: x,
    "dict": lambda x, y: {"pixel_values": x},
    "dict with labels": lambda x, y: {"pixel_values": x, "labels": y},
    "pair": lambda x, y: (x, y),
    "list pair": lambda x, y: [x, y],
    "pair of dict and labels": lambda x, y: ({"pixel_values": x}, y),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_kinds_of_batches(images, kind):
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    scores = evaluate(Answer(logits), [BATCHES[kind](images, labels)], Answer(logits, seed=3))
    assert scores.images == IMAGES
    assert (scores.top1 is not None) == ("labels" in kind or "pair" in kind)


OUTPUTS = {
    "tensor": (lambda y: y, True),
    "tokens": (lambda y: torch.stack([y, y + 1], 1), False),
    "logits first": (lambda y: SimpleNamespace(logits=y, pooler_output=y + 1), True),
    "dict": (lambda y: {"logits": y}, True),
    "image_embeds": (lambda y: SimpleNamespace(logits=None, image_embeds=y), False),
    "pooler_output": (feature, False),
    "no pooler": (lambda y: SimpleNamespace(pooler_output=None, last_hidden_state=torch.stack([y, y + 1], 1)), False),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_pick_output(kind):
    wrap, is_logits = OUTPUTS[kind]
    y = torch.randn(3, 4)
    picked, found_logits = pick_output(wrap(y))
    assert torch.equal(picked, y) and found_logits == is_logits


def test_features_have_no_classes(images):
    scores = evaluate(Answer(feature), [(images, torch.zeros(IMAGES, dtype=torch.int64))], Answer(feature, seed=1))
    assert scores.top1 is scores.reference_top1 is scores.agreement is scores.kl is None
    assert scores.sqnr_db is not None and scores.cosine_min is not None


def test_half_precision_model_gets_its_dtype(images):
    scores = evaluate(Answer(logits).bfloat16(), [images], Answer(logits))
    assert scores.sqnr_db > 35


def test_modes_are_restored(images):
    model = Answer(logits).train()
    model.linear.eval()
    evaluate(model, [(images, torch.zeros(IMAGES, dtype=torch.int64))])
    assert model.training and not model.linear.training
    with pytest.raises(ValueError):
        evaluate(model, [])
    assert model.training


LABELS = torch.zeros(IMAGES, dtype=torch.int64)

ERRORS = {
    "empty loader": (lambda x: [], ValueError, "at least one image; got none"),
    "unknown batch": (lambda x: ["text"], TypeError, "got str"),
    "empty batch": (lambda x: [(x[:0], LABELS[:0])], ValueError, "at least one image"),
    "NaN input": (lambda x: [(x * float("nan"), LABELS)], ValueError, "NaN or Inf"),
    "nothing to compare with": (lambda x: [x], ValueError, "got no labels"),
    "labels only at first": (lambda x: [(x, LABELS), x], ValueError, "in every batch or in none"),
    "too few labels": (lambda x: [(x, LABELS[:3])], ValueError, f"expected {IMAGES} integers"),
    "float labels": (lambda x: [(x, LABELS.float())], ValueError, "torch.float32"),
    "class beyond the head": (lambda x: [(x, LABELS + CLASSES)], ValueError, f"classes 0 to {CLASSES - 1}"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_data(images, kind):
    batches, error, message = ERRORS[kind]
    with pytest.raises(error, match=message):
        evaluate(Answer(logits), batches(images))


def test_errors_of_outputs(images):
    with pytest.raises(ValueError, match="the model's output for batch 0"):
        evaluate(Answer(lambda y: y * float("nan")), [images], Answer())
    with pytest.raises(ValueError, match="the reference's output for batch 1"):
        poisoned = Answer(lambda y: y if len(y) > 4 else y * float("nan"))
        evaluate(Answer(), images.split(20), poisoned)
    with pytest.raises(ValueError, match=r"\(24, 5\) from the model and \(24, 4\) from the reference"):
        evaluate(Answer(), [images], Answer(lambda y: y[:, :4]))
    with pytest.raises(TypeError, match="got NoneType"):
        evaluate(Answer(lambda y: None), [images], Answer())
    with pytest.raises(ValueError, match="model that returns features"):
        evaluate(Answer(feature), [(images, LABELS)])
