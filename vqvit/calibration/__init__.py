"""Ranges from data: of static activations, attention heads and factorised patches (numerics §3, §7, §8)."""

from vqvit.calibration.activations import calibrate_activations, ranges_of
from vqvit.calibration.heads import HeadObserver, calibrate_heads, observed_heads
from vqvit.calibration.observers import CalibrationError, LayerRange, Ranges, make_observer
from vqvit.calibration.patches import factorize_, patch_factors

__all__ = [
    "CalibrationError",
    "HeadObserver",
    "LayerRange",
    "Ranges",
    "calibrate_activations",
    "calibrate_heads",
    "factorize_",
    "make_observer",
    "observed_heads",
    "patch_factors",
    "ranges_of",
]
