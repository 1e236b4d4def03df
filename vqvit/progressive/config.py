"""What a progressive run does: its stages, how it tunes, what it accepts; and the recipes with names.

Algorithm 1 (numerics §10): the layers are quantized stage by stage. In a stage the weights move from float to int8 as
W + λ (Ŵ - W) with λ rising to 1, and scales and weights are tuned at each λ. A stage that costs too much is undone, its
most sensitive layer promoted by a tier, and tried again.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from vqvit.plan import TIERS, LayerPlan, Plan, QuantConfig
from vqvit.qat import LossOptions
from vqvit.rewriter import make_plan

LEARNABLE = ("scales", "weights")

OBJECTIVES = ("kl", "ce")
"""KL divergence from the float model's classes · cross entropy with the labels."""

TESTS = ("exact", "bootstrap", "raw")
"""What of the lost accuracy counts: its exact lower bound (McNemar) · its bootstrapped lower bound · all of it."""


class ProgressiveError(ValueError):
    """A progressive run that is asked for something impossible, or that does not fit its model or data."""


@dataclass(frozen=True)
class Stage:
    """Layers that are quantized together; attention's own quantizers go with the QKV layers.

    Attributes:
        name: for the log.
        roles: roles of the layers, of `vqvit.plan.ROLES`.
        quantiles: None, or two quantiles of the layers' sensitivity: layers above the first start as int8_asym, above
            the second as fp16 (mixed precision, numerics §9).
    """

    name: str
    roles: tuple[str, ...]
    quantiles: tuple[float, float] | None = None

    def __post_init__(self):
        if self.quantiles is not None and not 0 <= self.quantiles[0] <= self.quantiles[1] <= 1:
            raise ProgressiveError(f"{self.name}: expected quantiles 0 <= low <= high <= 1; got {self.quantiles}")


STAGES = (
    Stage("MLP", ("fc1", "fc2")),
    Stage("attention output", ("attn_out",)),
    Stage("QKV", ("qkv",)),
    Stage("patch embedding and head", ("patch_embed", "head", "linear")),
)


@dataclass(frozen=True)
class Tuning:
    """How scales and weights are trained at each λ, with Adam and one cosine schedule for each λ.

    Attributes:
        schedule: the values of λ, rising to 1.
        steps: optimizer steps at each λ; 0 tunes nothing.
        final_steps: steps of the last tuning of everything together.
        batch_size: images a step.
        scale_rate: learning rate of log α, δ, β and μ at the start of the cosine.
        weight_rate: that of weights and biases, as a share of the layer's median absolute weight.
        learn: what is trained, of `LEARNABLE`.
        objective: one of `OBJECTIVES`.
        regularizers: factors λ₁ of R_quant and λ₂ of R_smooth (`vqvit.qat.losses`).
    """

    schedule: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    steps: int = 4
    final_steps: int = 16
    batch_size: int = 32
    scale_rate: float = 2e-4
    weight_rate: float = 3e-5
    learn: tuple[str, ...] = LEARNABLE
    objective: str = "kl"
    regularizers: LossOptions = field(default_factory=LossOptions)

    def __post_init__(self):
        if not self.schedule or self.schedule[-1] != 1.0 or list(self.schedule) != sorted(set(self.schedule)):
            raise ProgressiveError(f"schedule: expected values of λ that rise to 1; got {self.schedule}")
        if not 0 < self.schedule[0]:
            raise ProgressiveError(f"schedule: expected λ above 0; got {self.schedule}")
        for name, least in (("steps", 0), ("final_steps", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ProgressiveError(f"{name}: expected at least {least}; got {getattr(self, name)}")
        for name in ("scale_rate", "weight_rate"):
            if not getattr(self, name) >= 0:
                raise ProgressiveError(f"{name}: expected at least 0; got {getattr(self, name)}")
        _one_of("objective", self.objective, OBJECTIVES)
        for name in self.learn:
            _one_of("learn", name, LEARNABLE)


@dataclass(frozen=True)
class Acceptance:
    """When the state after a stage is good enough.

    Attributes:
        tolerance: τ, the share of images that may be lost against the float model.
        test: one of `TESTS`; the state fails where what counts of the loss exceeds `tolerance`.
        confidence: of the lower bound.
        resamples: of the bootstrap.
        kl_limit: the state fails, too, where the mean KL divergence from the float model exceeds this, nats; None
            allows any.
    """

    tolerance: float = 0.0
    test: str = "exact"
    confidence: float = 0.95
    resamples: int = 2000
    kl_limit: float | None = 0.005

    def __post_init__(self):
        _one_of("test", self.test, TESTS)
        if not 0 < self.confidence < 1:
            raise ProgressiveError(f"confidence: expected a number between 0 and 1; got {self.confidence}")
        if self.resamples < 1:
            raise ProgressiveError(f"resamples: expected at least 1; got {self.resamples}")
        for name in ("tolerance", "kl_limit"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ProgressiveError(f"{name}: expected at least 0; got {value}")


@dataclass(frozen=True)
class ProgressiveConfig:
    """A progressive run.

    Attributes:
        stages: in order; together they name each role of the model's plan once.
        tuning, acceptance: see there.
        ladder: the tiers through which a layer is promoted, first to last; a part of `vqvit.plan.TIERS` in its order.
        ranking_images: images of the tuning set on which the sensitivity of layers is measured.
        evaluation_batch: images at once where nothing is trained.
        seed: of the order of the images and of the bootstrap.
    """

    stages: tuple[Stage, ...] = STAGES
    tuning: Tuning = field(default_factory=Tuning)
    acceptance: Acceptance = field(default_factory=Acceptance)
    ladder: tuple[str, ...] = TIERS
    ranking_images: int = 64
    evaluation_batch: int = 64
    seed: int = 0

    def __post_init__(self):
        if tuple(t for t in TIERS if t in self.ladder) != self.ladder or len(self.ladder) < 2:
            raise ProgressiveError(f"ladder: expected two or more of {TIERS}, in this order; got {self.ladder}")
        roles = [role for stage in self.stages for role in stage.roles]
        if len(set(roles)) != len(roles):
            raise ProgressiveError(f"stages: expected each role once; got {', '.join(roles)}")
        for name in ("ranking_images", "evaluation_batch"):
            if getattr(self, name) < 1:
                raise ProgressiveError(f"{name}: expected at least 1; got {getattr(self, name)}")

    @staticmethod
    def from_dict(fields: Mapping) -> "ProgressiveConfig":
        """Of a JSON object with some of the fields. Raises `ProgressiveError` for unknown fields or values."""
        fields = dict(fields)
        if "stages" in fields:
            fields["stages"] = tuple(_build(Stage, stage) for stage in fields["stages"])
        if isinstance(tuning := fields.get("tuning"), Mapping) and "regularizers" in tuning:
            fields["tuning"] = {**tuning, "regularizers": _build(LossOptions, tuning["regularizers"])}
        for name, cls in (("tuning", Tuning), ("acceptance", Acceptance)):
            if name in fields:
                fields[name] = _build(cls, fields[name])
        return _build(ProgressiveConfig, fields)

    def stage_of(self, role: str) -> Stage | None:
        return next((stage for stage in self.stages if role in stage.roles), None)


@dataclass(frozen=True)
class Recipe:
    """A named way: the run, the quantization it aims at, and changes to the plan's layers by role."""

    config: ProgressiveConfig
    quantization: QuantConfig
    changes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def plan(self, model: nn.Module) -> Plan:
        """The plan that the recipe aims at for a float `model`. Raises `PlanError`."""
        plan, _ = make_plan(model, self.quantization)
        return dataclasses.replace(plan, layers=tuple(self._changed(layer) for layer in plan.layers))

    def _changed(self, layer: LayerPlan) -> LayerPlan:
        return dataclasses.replace(layer, **self.changes.get(layer.role, {}))


def recipe(name: str) -> Recipe:
    """The recipe of one of `PRESETS`. Raises `ProgressiveError` for another name."""
    _one_of("preset", name, PRESETS)
    return PRESETS[name]


def _one_of(what: str, value: object, choices: object) -> None:
    if value not in choices:
        raise ProgressiveError(f"{what}: expected one of {', '.join(map(str, choices))}; got {value!r}")


def _build(cls: type, fields: object):
    known = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(fields, Mapping) or fields.keys() - known:
        received = sorted(fields.keys() - known) if isinstance(fields, Mapping) else type(fields).__name__
        raise ProgressiveError(f"{cls.__name__}: expected an object with fields among {sorted(known)}; got {received}")
    try:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    except TypeError as error:
        raise ProgressiveError(f"{cls.__name__}: expected fields of the right kinds; {error}") from error


_PAPER_STAGES = tuple(
    dataclasses.replace(stage, quantiles=(0.6, 0.9)) if "qkv" in stage.roles else stage for stage in STAGES
)

PRESETS = {
    "default": Recipe(ProgressiveConfig(), QuantConfig()),
    "paper": Recipe(
        ProgressiveConfig(
            stages=_PAPER_STAGES,
            tuning=Tuning(objective="ce", regularizers=LossOptions(1e-4, "paper", 1e-4)),
            acceptance=Acceptance(tolerance=0.005, test="raw", kl_limit=None),
        ),
        QuantConfig(
            activation="static",
            equalize=False,
            attention_scales="static",
            factorize_patches=True,
            compensations={"*": "paper"},
        ),
        {"fc1": {"per_channel": False}, "fc2": {"per_channel": False}},
    ),
}
"""`default`: scales for each channel and token, small learning rates, close to the float model. `paper`: the paper's
literal recipe: one scale for an MLP matrix, running statistics for activations, its error compensation, mixed precision
for QKV, decided on the accuracy as measured; the tolerance is about what its own result loses (98.2 to 97.8 %)."""
