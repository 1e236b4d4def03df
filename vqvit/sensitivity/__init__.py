"""Which layers of a float model quantization hurts: the scores of numerics §9, measured and kept."""

from vqvit.sensitivity.measure import concentration, measure
from vqvit.sensitivity.scores import OBJECTIVES, LayerScore, MatrixScore, Sensitivity, spearman

__all__ = ["OBJECTIVES", "LayerScore", "MatrixScore", "Sensitivity", "concentration", "measure", "spearman"]
