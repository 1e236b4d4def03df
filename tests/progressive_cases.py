"""A small classifier for runs of progressive quantization, without training: random features, a fitted head."""

import dataclasses

import torch
from torch import nn

from vqvit.data import Digits, digits
from vqvit.progressive import Acceptance, ProgressiveConfig, RunLog, Tuning

IMAGES = 160
"""Of each set: enough for the decisions, few enough for seconds."""

QUICK = ProgressiveConfig(
    tuning=Tuning(schedule=(0.5, 1.0), steps=1, final_steps=1, batch_size=16),
    acceptance=Acceptance(kl_limit=0.05),
    ranking_images=32,
)


def classifier(seed: int = 0, layers: int = 2) -> nn.Module:
    """A ViT with random weights whose head is a ridge regression on the digits, in eval mode."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=10,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    model, data = ViTForImageClassification(config).eval(), digits()
    with torch.no_grad():
        features = model.vit(data.train_images).last_hidden_state[:, 0].double()
        centred = features - features.mean(0)
        targets = 20 * (nn.functional.one_hot(data.train_labels, 10).double() - 0.1)
        gram = centred.t() @ centred + 1e-3 * len(features) * torch.eye(features.shape[1])
        weight = torch.linalg.solve(gram, centred.t() @ targets).t()
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(-(weight @ features.mean(0)))
    return model


def sets(data: Digits | None = None) -> tuple[list, list]:
    """Disjoint loaders for tuning and checking, with labels."""
    data = data or digits()
    tune, check = slice(0, IMAGES), slice(IMAGES, 2 * IMAGES)
    return tuple([(data.train_images[part], data.train_labels[part])] for part in (tune, check))


def without_times(log: RunLog) -> dict:
    """What must be the same in every run of one task."""
    fields = dataclasses.asdict(log)
    for name in ("environment", "resumed"):
        del fields[name]
    for tuned in [t for stage in fields["stages"] for a in stage["attempts"] for t in a["lambdas"]]:
        del tuned["seconds"]
    if fields["final"] is not None:
        del fields["final"]["tuned"]["seconds"]
    return fields
