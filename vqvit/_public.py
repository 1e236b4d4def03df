"""The public names of the package, which need PyTorch; `vqvit/__init__.py` takes them from here."""

from vqvit import ops
from vqvit.backends import BackendUnavailableError, backend
from vqvit.calibration import CalibrationError
from vqvit.checkpoint import CheckpointError, load, save
from vqvit.evaluate import Evaluation, evaluate
from vqvit.export import export
from vqvit.plan import LayerPlan, Plan, PlanError, QuantConfig
from vqvit.progressive import quantize_progressively_
from vqvit.quantize import quantize_
from vqvit.rewriter import LayerReport, Report, restore

__all__ = [
    "BackendUnavailableError",
    "CalibrationError",
    "CheckpointError",
    "Evaluation",
    "LayerPlan",
    "LayerReport",
    "Plan",
    "PlanError",
    "QuantConfig",
    "Report",
    "backend",
    "evaluate",
    "export",
    "load",
    "ops",
    "quantize_",
    "quantize_progressively_",
    "restore",
    "save",
]
