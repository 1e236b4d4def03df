"""vqvit: integer inference for Vision Transformers.

Where PyTorch is not installed, or VQVIT_TORCH=0 is set, this is `vqvit.serving` alone, which does without it.
"""

import importlib.util as _importlib
import os as _os
from pathlib import Path as _Path

__version__ = "0.1.0"

_checkout = _Path(__file__).resolve().parents[1]
if (_checkout / "kernels" / "quantize.py").is_file() and not (_Path(__path__[0]) / "kernels").is_dir():
    __path__.append(str(_checkout))  # a source checkout keeps vqvit.kernels beside the package, see setup.py

if _os.environ.get("VQVIT_TORCH") != "0" and _importlib.find_spec("torch") is not None:
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
else:
    __all__ = ["serving"]
