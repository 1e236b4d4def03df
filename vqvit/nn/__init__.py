"""Modules of a quantized model: they hold int8 codes and call `vqvit.ops`."""

from vqvit.nn.block import EncoderBlock
from vqvit.nn.compensated import CompensatedLinear, CompensatedPatchEmbed
from vqvit.nn.linear import Codes, HalfLinear, QuantLinear
from vqvit.nn.module import QuantModule
from vqvit.nn.patch_embed import HalfPatchEmbed, QuantPatchEmbed

__all__ = [
    "Codes",
    "CompensatedLinear",
    "CompensatedPatchEmbed",
    "EncoderBlock",
    "HalfLinear",
    "HalfPatchEmbed",
    "QuantLinear",
    "QuantModule",
    "QuantPatchEmbed",
]
