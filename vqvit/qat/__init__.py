"""Quantization-aware training: modules whose codes equal those of the integer modules, with learnable scales."""

from vqvit.qat.freeze import freeze_
from vqvit.qat.linear import FakePatchEmbed, FakeQuantLinear
from vqvit.qat.losses import LossOptions, cross_entropy, kl_to_float, quant_regularizer, smooth_regularizer
from vqvit.qat.options import QatOptions
from vqvit.qat.prepare import fake_attentions, fake_layers, load_snapshot_, plan_of, prepare_, retier_, unprepare_

__all__ = [
    "FakePatchEmbed",
    "FakeQuantLinear",
    "LossOptions",
    "QatOptions",
    "cross_entropy",
    "fake_attentions",
    "fake_layers",
    "freeze_",
    "kl_to_float",
    "load_snapshot_",
    "plan_of",
    "prepare_",
    "quant_regularizer",
    "retier_",
    "smooth_regularizer",
    "unprepare_",
]
