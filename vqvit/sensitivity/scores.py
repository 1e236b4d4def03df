"""Sensitivity scores of a model's matrices and layers: values without a model, JSON-serialisable.

`vqvit.sensitivity` measures them; `vqvit.budget` makes a precision plan of them.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqvit.plan import TIERS, PlanError

FORMAT = 1

METRICS = ("kl", "feature_error")
"""Damage of quantization: mean KL of the logits from the float model's, nats · Σ‖f̂ - f‖² / Σ‖f‖² of features. Both
are quadratic in small errors, so that damages of single layers add up where their errors are independent."""

OBJECTIVES = ("labels", "sampled", "features")
"""What gradients are of: cross entropy with labels · with labels drawn from the model's own softmax, whose squared
gradients are the Hessian of the KL · the feature's product with random ±1, whose squared gradients are the Gauss-Newton
Hessian of half the squared feature error."""


@dataclass(frozen=True)
class MatrixScore:
    """Scores of one weight matrix (N, K): a layer, or the q, k or v rows of one (numerics §9).

    Attributes:
        name: the layer's name in the plan; `.q`, `.k` or `.v` after it for the rows of a qkv projection.
        layer: the layer's name in the plan.
        shape: (N, K).
        concentration: σ₁(W) / ‖W‖_F, which is 1 / √(stable rank).
        gradient: E_batch ‖∂L/∂W‖_F of the mean loss of a batch.
        fisher: S_F = Σ mean(g²) ∘ (W - Ŵ)² with int8 Ŵ, g the gradient of one image's loss.
        damage: measured with this matrix alone quantized, in the first of the tiers measured; None if there was none.
    """

    name: str
    layer: str
    shape: tuple[int, int]
    concentration: float
    gradient: float
    fisher: float
    damage: float | None

    @property
    def score(self) -> float:
        """S(W) = σ₁(W) / ‖W‖_F · E_batch ‖∂L/∂W‖_F."""
        return self.concentration * self.gradient


@dataclass(frozen=True)
class LayerScore:
    """Scores of a plan's layer in each tier that it can have.

    Attributes:
        score: the largest S of its matrices: a fused projection has one tier.
        fisher: tier -> Σ of its matrices' S_F.
        damage: tier -> measured with this layer alone quantized; only tiers that were measured.
        bytes: tier -> bytes of its tensors in a checkpoint.
    """

    name: str
    role: str
    score: float
    fisher: dict[str, float]
    damage: dict[str, float]
    bytes: dict[str, int]


@dataclass(frozen=True)
class Sensitivity:
    """Scores of every matrix and layer of a plan, in its order.

    Attributes:
        objective: one of `OBJECTIVES`.
        metric: of the damage, one of `METRICS`.
        images: that they were measured on.
        curvature: the damage that rounding a weight does to second order is curvature · S_F: 1/2 for the KL, the
            reciprocal of the features' mean square for their relative error.
    """

    objective: str
    metric: str
    images: int
    curvature: float
    matrices: tuple[MatrixScore, ...]
    layers: tuple[LayerScore, ...]

    def layer(self, name: str) -> LayerScore:
        """The scores of layer `name`; raises `PlanError` naming the layers there are."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PlanError(f"sensitivity: expected a layer among {', '.join(s.name for s in self.layers)}; got {name!r}")

    @property
    def correlations(self) -> dict[str, float | None]:
        """Spearman's rank correlation over the matrices of S, S_F and damage in pairs; None without measured damage."""
        series: dict[str, list] = {
            measure: [getattr(matrix, measure) for matrix in self.matrices] for measure in ("score", "fisher", "damage")
        }
        pairs = (("score", "fisher"), ("score", "damage"), ("fisher", "damage"))
        return {f"{a}_{b}": None if None in series[b] else spearman(series[a], series[b]) for a, b in pairs}

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "Sensitivity":
        """Parse `to_json`'s text. Raises `PlanError` for anything else."""
        try:
            raw = json.loads(text)
            if raw.pop("format") != FORMAT:
                raise PlanError(f"sensitivity: expected format {FORMAT}; got another")
            raw["matrices"] = tuple(MatrixScore(**{**m, "shape": tuple(m["shape"])}) for m in raw["matrices"])
            raw["layers"] = tuple(LayerScore(**layer) for layer in raw["layers"])
            found = Sensitivity(**raw)
        except json.JSONDecodeError as error:
            raise PlanError(f"sensitivity: expected JSON; got text that fails to parse: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"sensitivity: expected the document of vqvit sensitivity; got another: {error}") from error
        for layer in found.layers:
            if unknown := {*layer.fisher, *layer.damage, *layer.bytes} - set(TIERS):
                raise PlanError(
                    f"sensitivity of {layer.name}: expected tiers {', '.join(TIERS)}; got {sorted(unknown)}"
                )
        return found

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    @staticmethod
    def load(path: str | Path) -> "Sensitivity":
        """Read a file of `save`. Raises `FileNotFoundError` or `PlanError`."""
        return Sensitivity.from_json(Path(path).read_text())


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties sharing their mean rank; None if either does not vary."""
    x, y = _ranks(a), _ranks(b)
    middle = (len(a) - 1) / 2
    covariance = sum((i - middle) * (j - middle) for i, j in zip(x, y, strict=True))
    spread = math.sqrt(sum((i - middle) ** 2 for i in x) * sum((j - middle) ** 2 for j in y))
    return covariance / spread if spread > 0 else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for position in order[start:end]:
            ranks[position] = (start + end - 1) / 2
        start = end
    return ranks
