"""Progressive quantization: Algorithm 1 of VQ-ViT (numerics §10)."""

from vqvit.progressive.config import (
    PRESETS,
    STAGES,
    Acceptance,
    ProgressiveConfig,
    ProgressiveError,
    Recipe,
    Stage,
    Tuning,
    recipe,
)
from vqvit.progressive.document import document
from vqvit.progressive.run import quantize_progressively_
from vqvit.progressive.runlog import RunLog, read_json

__all__ = [
    "PRESETS",
    "STAGES",
    "Acceptance",
    "ProgressiveConfig",
    "ProgressiveError",
    "Recipe",
    "RunLog",
    "Stage",
    "Tuning",
    "document",
    "quantize_progressively_",
    "read_json",
    "recipe",
]
