"""The log of a progressive run: a value with everything that happened, and so the position of a run that goes on.

A stage without `passed` is under way; so is its last attempt, which has no judgement yet. The values of λ it has been
tuned at are its `lambdas`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vqvit.plan import Plan
from vqvit.progressive.config import ProgressiveError
from vqvit.progressive.judge import Judgement

FORMAT = 1


@dataclass(frozen=True)
class Tuned:
    """One tuning: λ, the loss of every step, seconds."""

    blend: float
    losses: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Promotion:
    """A layer that got a better tier, why, and how sensitive each layer of the stage was (KL in nats, or as given)."""

    layer: str
    before: str
    after: str
    reason: str
    sensitivity: dict[str, float]


@dataclass(frozen=True)
class Attempt:
    """One pass through the schedule of λ. `promotion` follows an attempt that failed, unless nothing was left."""

    lambdas: tuple[Tuned, ...] = ()
    judgement: Judgement | None = None
    promotion: Promotion | None = None


@dataclass(frozen=True)
class StageResult:
    """One stage: its layers, the promotions it began with (mixed precision), the model before it, its attempts.

    `passed` is None while it runs, and False where it failed with every layer at the last tier.
    """

    name: str
    layers: tuple[str, ...]
    before: Judgement
    initial: tuple[Promotion, ...] = ()
    attempts: tuple[Attempt, ...] = (Attempt(),)
    passed: bool | None = None

    @property
    def promotions(self) -> tuple[Promotion, ...]:
        return (*self.initial, *(a.promotion for a in self.attempts if a.promotion is not None))

    @property
    def seconds(self) -> float:
        return sum(tuned.seconds for attempt in self.attempts for tuned in attempt.lambdas)


@dataclass(frozen=True)
class FinalResult:
    """The end: the last tuning, and the integer models with and without it.

    `kept` says whether the tuned model is the result; `judgement` is of the result, `other` of the other model.
    """

    tuned: Tuned
    kept: bool | None = None
    judgement: Judgement | None = None
    other: Judgement | None = None


@dataclass(frozen=True)
class RunLog:
    """A progressive run, finished where `final.judgement` is there.

    Attributes:
        model: class of the model.
        config: fields of the `ProgressiveConfig`.
        tune_images, check_images: sizes of the disjoint sets.
        environment: versions and device (`vqvit.provenance`).
        stages, final: what happened.
        plan: the plan of the result.
        cls_only: what became of the CLS shortcut (`vqvit.shortcut`), None before the end.
        resumed: how often the run was taken up again.
    """

    model: str
    config: dict
    tune_images: int
    check_images: int
    environment: dict
    plan: Plan
    stages: tuple[StageResult, ...] = ()
    final: FinalResult | None = None
    cls_only: str | None = None
    resumed: int = 0

    @property
    def finished(self) -> bool:
        return self.final is not None and self.final.judgement is not None

    @property
    def passed(self) -> bool:
        """Whether the integer model is acceptable."""
        return self.finished and self.final.judgement.passed

    @property
    def promotions(self) -> tuple[Promotion, ...]:
        return tuple(p for stage in self.stages for p in stage.promotions)

    def to_dict(self) -> dict:
        """JSON-ready, with `format` and `passed` besides the fields."""
        return {"format": FORMAT, "passed": self.passed, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(raw: Mapping) -> "RunLog":
        """Of `to_dict`'s result after JSON. Raises `ProgressiveError` for another object."""
        if not isinstance(raw, Mapping) or raw.get("format") != FORMAT:
            raise ProgressiveError(f"run log: expected an object with format {FORMAT}; got another")
        fields = {key: value for key, value in raw.items() if key not in ("format", "passed")}
        try:
            fields["plan"] = Plan.from_json(json.dumps({"format": 1, **fields["plan"]}))
            fields["stages"] = tuple(_stage(stage) for stage in fields["stages"])
            fields["final"] = None if fields["final"] is None else _final(fields["final"])
            return RunLog(**fields)
        except (KeyError, TypeError) as error:
            raise ProgressiveError(f"run log: expected the fields of a run log; {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the log as JSON, whole or not at all."""
        write_json(self.to_dict(), Path(path))

    @staticmethod
    def load(path: str | Path) -> "RunLog":
        """Read a saved log. Raises `FileNotFoundError` or `ProgressiveError`."""
        return RunLog.from_dict(read_json(Path(path)))


def write_json(document: dict, path: Path) -> None:
    """Under a temporary name, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "w") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """Raises `FileNotFoundError`, or `ProgressiveError` for text that fails to parse."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ProgressiveError(f"{path}: expected JSON; got text that fails to parse: {error}") from error


def _judgement(raw: Mapping | None) -> Judgement | None:
    return None if raw is None else Judgement(**{**raw, "failures": tuple(raw["failures"])})


def _tuned(raw: Mapping) -> Tuned:
    return Tuned(**{**raw, "losses": tuple(raw["losses"])})


def _attempt(raw: Mapping) -> Attempt:
    promotion = None if raw["promotion"] is None else Promotion(**raw["promotion"])
    return Attempt(tuple(map(_tuned, raw["lambdas"])), _judgement(raw["judgement"]), promotion)


def _stage(raw: Mapping) -> StageResult:
    initial = tuple(Promotion(**promotion) for promotion in raw["initial"])
    changed = {"layers": tuple(raw["layers"]), "before": _judgement(raw["before"]), "initial": initial}
    return StageResult(**{**raw, **changed, "attempts": tuple(map(_attempt, raw["attempts"]))})


def _final(raw: Mapping) -> FinalResult:
    changed = {key: _judgement(raw[key]) for key in ("judgement", "other")}
    return FinalResult(**{**raw, **changed, "tuned": _tuned(raw["tuned"])})
