"""The precision plan: which layer runs in which tier, as a frozen, printable, JSON-serialisable object.

A plan is a value: it holds names and options, no tensors, and knows nothing about models. `vqvit.rewriter` makes one
from a model and a `QuantConfig`, and applies it.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

FORMAT = 1

TIERS = ("int8", "int8_asym", "fp16")
"""Symmetric int8 weights · int8 weights with zero points · half precision (numerics §9)."""

ACTIVATIONS = ("per_token", "per_token_asym", "per_token_group", "static")
"""A scale for each token, symmetric or with a zero point · for each 128 columns of a token · one calibrated scale
(numerics §3).
"""

ATTENTION = ("int8", "float")

CLS_ONLY = ("auto", "on", "off")
"""Skip what the model's result does not depend on in its last block: where that is proved · or fail · or never."""

HALF_DTYPES = ("bfloat16", "float16")

WEIGHT_BITS = (8, 4, 3)
"""Bits in which a weight is stored; below 8 each group of 128 input columns has a step of its own. All run as int8."""

COMPENSATIONS = ("none", "paper", "activation", "weight", "full")
"""Terms of the residual codes that are added to the product (numerics §6)."""

ATTENTION_SCALES = ("dynamic", "static")
"""Scales of q, k and v: from each token's range, or learned once for each head (numerics §7)."""

OBSERVERS = ("ema", "max", "percentile", "mse", "output_error")
"""How calibration chooses a static range (`vqvit.calibration.observers`); a percentile may be named, as in
"percentile:99.9"."""

PERCENTILE = 99.99

ROUNDINGS = ("auto", "nearest", "error_aware")
"""Weights to the nearest code · by the error of the layer's output on calibration data (`vqvit.rounding`) · by that
where there are calibration data.
"""

ROLES = ("patch_embed", "qkv", "attn_out", "fc1", "fc2", "head", "linear")


class PlanError(ValueError):
    """A plan or configuration that is malformed or does not fit the model."""


def _one_of(what: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise PlanError(f"{what}: expected one of {', '.join(map(str, choices))}; got {value!r}")


def _require_name(what: str, name: object) -> None:
    if not isinstance(name, str):
        raise PlanError(f"{what}: expected a name; got {name!r}")


def read_observer(what: str, text: object) -> tuple[str, float]:
    """Kind, one of `OBSERVERS`, and percentile in (0, 100] of an observer's name. Raises `PlanError`."""
    kind, named, percentile = text.partition(":") if isinstance(text, str) else (text, "", "")
    _one_of(what, kind, OBSERVERS)
    if not named:
        return kind, PERCENTILE
    try:
        value = float(percentile)
    except ValueError:
        value = 0.0
    if kind != "percentile" or not 0.0 < value <= 100.0:
        raise PlanError(f"{what}: expected percentile:P with 0 < P <= 100, or a name alone; got {text!r}")
    return kind, value


def _build(cls: type, fields: object, what: str):
    """`cls(**fields)` with unknown and missing names reported."""
    if not isinstance(fields, dict):
        raise PlanError(f"{what}: expected a JSON object; got {type(fields).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if unknown := fields.keys() - known:
        raise PlanError(f"{what}: expected fields among {sorted(known)}; got {sorted(unknown)}")
    if missing := required - fields.keys():
        raise PlanError(f"{what}: expected the fields {sorted(required)}; {sorted(missing)} missing")
    return cls(**fields)


@dataclass(frozen=True)
class LayerPlan:
    """How one matrix is stored and fed.

    Attributes:
        name: the layer's path in the model; roles of a whole block are `block.role` (for example `...layers.0.qkv`).
        role: one of `ROLES`.
        tier: one of `TIERS`.
        per_channel: one weight scale per output channel, else one for the matrix.
        beta: weight of the standard deviation in the weight range (numerics §2).
        activation: one of `ACTIVATIONS`.
        delta: weight of the standard deviation in the per-token activation range (numerics §3).
        equalize: move per-channel input ranges into the weight where that is free (numerics §3).
        bits: one of `WEIGHT_BITS`.
        compensation: one of `COMPENSATIONS`; for tier int8 with symmetric activations, per token or static.
        mu: factor of the last term of the compensation.
        observer: how a static activation range is chosen, see `OBSERVERS`.
        factorized: of the patch embedding: move the ranges of its input, seen in calibration, into the weight
            (numerics §8).
    """

    name: str
    role: str
    tier: str = "int8"
    per_channel: bool = True
    beta: float = 0.0
    activation: str = "per_token"
    delta: float = 0.0
    equalize: bool = True
    bits: int = 8
    compensation: str = "none"
    mu: float = 1.0
    observer: str = "ema"
    factorized: bool = False

    def __post_init__(self):
        _require_name("layer", self.name)
        _one_of(f"role of {self.name}", self.role, ROLES)
        _one_of(f"tier of {self.name}", self.tier, TIERS)
        _one_of(f"activation of {self.name}", self.activation, ACTIVATIONS)
        _one_of(f"bits of {self.name}", self.bits, WEIGHT_BITS)
        _one_of(f"compensation of {self.name}", self.compensation, COMPENSATIONS)
        read_observer(f"observer of {self.name}", self.observer)
        for option in ("beta", "delta", "mu"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PlanError(f"{option} of {self.name}: expected a finite number; got {value!r}")
        if self.bits < 8 and (self.tier == "int8_asym" or not self.per_channel):
            received = f"tier {self.tier}, per_channel {self.per_channel}"
            raise PlanError(f"{self.name}: expected tier int8 and per_channel with {self.bits} bits; got {received}")
        if self.activation == "per_token_group" and (self.tier == "int8_asym" or self.delta != 0.0):
            received = f"tier {self.tier}, delta {self.delta}"
            raise PlanError(f"{self.name}: expected tier int8 or fp16 and delta 0 with per_token_group; got {received}")
        if self.factorized and (self.role != "patch_embed" or self.tier == "fp16"):
            received = f"role {self.role}, tier {self.tier}"
            raise PlanError(f"{self.name}: expected factorized for an integer patch_embed; got {received}")
        compensable = self.tier == "int8" and self.activation in ("per_token", "static") and self.bits == 8
        if self.compensation != "none" and not compensable:
            received = f"tier {self.tier}, activation {self.activation}, bits {self.bits}"
            expected = "tier int8, activation per_token or static and 8 bits with compensation"
            raise PlanError(f"{self.name}: expected {expected}; got {received}")


@dataclass(frozen=True)
class BlockPlan:
    """A transformer block replaced as a whole.

    Attributes:
        name: its path in the model.
        attention: one of `ATTENTION`.
        attention_scales: one of `ATTENTION_SCALES`.
        returns_tuple: whether it returns tuples.
        leading_tokens: the tokens that the model's result depends on, where that is proved (`vqvit.shortcut`): calls of
            the whole model compute no others behind the keys and values. None computes all.
    """

    name: str
    attention: str = "int8"
    returns_tuple: bool = False
    leading_tokens: int | None = None
    attention_scales: str = "dynamic"

    def __post_init__(self):
        _require_name("block", self.name)
        _one_of(f"attention of {self.name}", self.attention, ATTENTION)
        _one_of(f"attention_scales of {self.name}", self.attention_scales, ATTENTION_SCALES)
        if self.attention == "float" and self.attention_scales == "static":
            raise PlanError(f"{self.name}: expected dynamic attention_scales with float attention; got static")
        n = self.leading_tokens
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise PlanError(f"leading_tokens of {self.name}: expected a positive integer or null; got {n!r}")


@dataclass(frozen=True)
class Plan:
    """Every replaced block and quantized layer of a model, in model order."""

    blocks: tuple[BlockPlan, ...]
    layers: tuple[LayerPlan, ...]
    half_dtype: str = "bfloat16"

    def __post_init__(self):
        _one_of("half_dtype", self.half_dtype, HALF_DTYPES)
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            repeated = sorted({n for n in names if names.count(n) > 1})
            raise PlanError(f"plan: expected each layer once; got {', '.join(repeated)} repeated")
        shortened = [block for block in self.blocks if block.leading_tokens is not None]
        if len(shortened) > 1:
            raise PlanError(f"plan: expected leading_tokens in one block; got {', '.join(b.name for b in shortened)}")
        for block in shortened:
            if reason := self.inexact(block):
                raise PlanError(f"plan: expected {block.name} all int8 with leading_tokens; {reason}")

    @property
    def shortened(self) -> BlockPlan | None:
        """The block that computes only its leading tokens, or None."""
        return next((block for block in self.blocks if block.leading_tokens is not None), None)

    def inexact(self, block: BlockPlan) -> str | None:
        """Which part of `block` multiplies in float, where fewer rows may round differently; None if none does."""
        if block.attention == "float":
            return "its attention is float, which may round differently for fewer tokens"
        for layer in self.layers:
            if layer.tier == "fp16" and layer.name.rpartition(".")[0] == block.name:
                return f"its {layer.role} is fp16, which may round differently for fewer tokens"
        return None

    def layer(self, name: str) -> LayerPlan:
        """The plan of layer `name`; raises `PlanError` naming the layers there are."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PlanError(f"plan: expected a layer among {', '.join(p.name for p in self.layers)}; got {name!r}")

    def diff(self, other: "Plan") -> tuple["Change", ...]:
        """What differs in `other`: options of layers and blocks, and those that only one of the two has."""
        mine, theirs = ({entry.name: entry for entry in (*p.layers, *p.blocks)} for p in (self, other))
        changes = []
        if self.half_dtype != other.half_dtype:
            changes.append(Change("plan", "half_dtype", self.half_dtype, other.half_dtype))
        for name in dict.fromkeys((*mine, *theirs)):
            before, after = mine.get(name), theirs.get(name)
            if before is None or after is None:
                changes.append(Change(name, "tier", _kind(before), _kind(after)))
                continue
            before, after = dataclasses.asdict(before), dataclasses.asdict(after)
            options = (option for option in before if before[option] != after.get(option))
            changes += [Change(name, option, before[option], after.get(option)) for option in options]
        return tuple(changes)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Parse `to_json`'s text. Raises `PlanError` for anything else."""
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"plan: expected JSON; got text that fails to parse: {error}") from error
        if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
            raise PlanError(f"plan: expected a JSON object with format {FORMAT}; got another")
        for key, cls in (("blocks", BlockPlan), ("layers", LayerPlan)):
            if not isinstance(raw.get(key), list):
                raise PlanError(f"plan: expected a list under {key!r}; got {type(raw.get(key)).__name__}")
            raw[key] = tuple(_build(cls, item, f"plan, {key}[{i}]") for i, item in enumerate(raw[key]))
        return _build(Plan, raw, "plan")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n")

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan file. Raises `FileNotFoundError` or `PlanError`."""
        return Plan.from_json(Path(path).read_text())

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{p.name:{width}}  {p.role:11}  {p.tier:9}  {p.activation}"
            + (f"  {p.bits} bits" if p.bits < 8 else "")
            + (f"  β={p.beta:g}" if p.beta else "")
            + (f"  δ={p.delta:g}" if p.delta else "")
            + (f"  {p.compensation} compensation" if p.compensation != "none" else "")
            for p in self.layers
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Change:
    """One difference between two plans: `option` of the layer or block `name`. A layer that one plan lacks has no tier
    there (None), and a block is "replaced" or None.
    """

    name: str
    option: str
    before: object
    after: object

    def __str__(self) -> str:
        before, after = ("float" if v is None and self.option == "tier" else v for v in (self.before, self.after))
        return f"{self.name}: {self.option} {before} -> {after}"


def _kind(entry: LayerPlan | BlockPlan | None) -> str | None:
    return "replaced" if isinstance(entry, BlockPlan) else entry and entry.tier


@dataclass(frozen=True)
class QuantConfig:
    """What a user asks for; `vqvit.rewriter.make_plan` turns it into a `Plan` for one model.

    Attributes:
        tier: tier of every layer, one of `TIERS`.
        tiers: exceptions: role, or fnmatch pattern on the layer name, to tier or "skip" (leave the layer alone). The
            last match wins.
        activations: exceptions from `activation`, in the same form.
        bits: of every weight, one of `WEIGHT_BITS`; layers in tier fp16 have no such bits.
        bits_exceptions: exceptions from `bits`, in the same form.
        rounding: one of `ROUNDINGS`.
        activation, attention, per_channel, equalize, half_dtype: as in `LayerPlan`, `BlockPlan`, `Plan`.
        cls_only: one of `CLS_ONLY`: whether the last block may compute only the tokens that the head reads.
        observer: how static activation ranges are chosen, as in `LayerPlan`.
        attention_scales: as in `BlockPlan`.
        factorize_patches: factorised scales of the patch embedding, which need calibration data.
        compensations: compensation where it is not "none", in the form of `tiers`.
    """

    tier: str = "int8"
    tiers: dict[str, str] = field(default_factory=dict)
    activation: str = "per_token"
    activations: dict[str, str] = field(default_factory=dict)
    attention: str = "int8"
    per_channel: bool = True
    equalize: bool = True
    half_dtype: str = "bfloat16"
    cls_only: str = "auto"
    observer: str = "ema"
    attention_scales: str = "dynamic"
    factorize_patches: bool = False
    compensations: dict[str, str] = field(default_factory=dict)
    bits: int = 8
    bits_exceptions: dict[str, int] = field(default_factory=dict)
    rounding: str = "auto"

    def __post_init__(self):
        _one_of("tier", self.tier, TIERS)
        for pattern, tier in self.tiers.items():
            _one_of(f"tier of {pattern!r}", tier, (*TIERS, "skip"))
        _one_of("activation", self.activation, ACTIVATIONS)
        for pattern, activation in self.activations.items():
            _one_of(f"activation of {pattern!r}", activation, ACTIVATIONS)
        _one_of("attention", self.attention, ATTENTION)
        _one_of("half_dtype", self.half_dtype, HALF_DTYPES)
        _one_of("cls_only", self.cls_only, CLS_ONLY)
        read_observer("observer", self.observer)
        _one_of("attention_scales", self.attention_scales, ATTENTION_SCALES)
        for pattern, compensation in self.compensations.items():
            _one_of(f"compensation of {pattern!r}", compensation, COMPENSATIONS)
        _one_of("rounding", self.rounding, ROUNDINGS)
        _one_of("bits", self.bits, WEIGHT_BITS)
        for pattern, bits in self.bits_exceptions.items():
            _one_of(f"bits of {pattern!r}", bits, WEIGHT_BITS)

    def tier_of(self, name: str, role: str) -> str:
        """The tier, or "skip", of layer `name` with `role`."""
        return _last_match(self.tiers, name, role, self.tier)

    def activation_of(self, name: str, role: str) -> str:
        """The activation scale of layer `name` with `role`."""
        return _last_match(self.activations, name, role, self.activation)

    def compensation_of(self, name: str, role: str) -> str:
        """The compensation of layer `name` with `role`."""
        return _last_match(self.compensations, name, role, "none")

    def bits_of(self, name: str, role: str) -> int:
        """The bits of the weight of layer `name` with `role`."""
        return _last_match(self.bits_exceptions, name, role, self.bits)

    @staticmethod
    def vqvit(calibrated: bool = True, **options) -> "QuantConfig":
        """W8A8 at its most accurate: scales for each 128 columns of a token behind GELU and attention, and with
        calibration data error-aware rounding and measured equalisers. `options`: fields over these, such as bits=4.

        Raises `PlanError` for an unknown field or value.
        """
        grouped = {"attn_out": "per_token_group", "fc2": "per_token_group"}
        preset = {"activations": grouped, "rounding": "error_aware" if calibrated else "nearest"}
        return QuantConfig.from_dict({**preset, **options})

    @staticmethod
    def from_dict(fields: dict) -> "QuantConfig":
        """Raises `PlanError` for unknown fields or values."""
        return _build(QuantConfig, fields, "configuration")


def _last_match(exceptions: dict, name: str, role: str, default):
    for pattern, value in exceptions.items():
        if pattern == role or fnmatch(name, pattern):
            default = value
    return default
