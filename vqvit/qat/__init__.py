"""Quantization-aware training: modules whose codes equal those of the integer modules, with learnable scales."""

from vqvit.qat.freeze import freeze_
from vqvit.qat.linear import FakePatchEmbed, FakeQuantLinear
from vqvit.qat.options import QatOptions
from vqvit.qat.prepare import fake_layers, plan_of, prepare_, retier_, unprepare_

__all__ = [
    "FakePatchEmbed",
    "FakeQuantLinear",
    "QatOptions",
    "fake_layers",
    "freeze_",
    "plan_of",
    "prepare_",
    "retier_",
    "unprepare_",
]
