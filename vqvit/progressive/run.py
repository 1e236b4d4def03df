"""Quantize a model progressively: Algorithm 1 of VQ-ViT, from a float model to an integer one (numerics §10)."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vqvit.plan import Plan, QuantConfig
from vqvit.progressive.config import ProgressiveConfig, ProgressiveError, Recipe, Stage, recipe
from vqvit.progressive.judge import logits_of, require_decidable
from vqvit.progressive.runlog import RunLog
from vqvit.progressive.samples import Samples, hold_out, read_samples, require_disjoint
from vqvit.progressive.steps import Context, advance
from vqvit.progressive.student import Student, become_integer, without_shortcut
from vqvit.progressive.workdir import SavedRun, Workdir
from vqvit.provenance import environment
from vqvit.shortcut import plan_shortcut

Watcher = Callable[[str, RunLog], None]
"""Called after each step with what was done and the log so far."""


def quantize_progressively_(
    model: nn.Module,
    tune: Iterable,
    check: Iterable | None = None,
    config: ProgressiveConfig | Recipe | str = "default",
    plan: Plan | QuantConfig | None = None,
    sensitivity: Mapping[str, float] | None = None,
    workdir: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    watcher: Watcher | None = None,
) -> RunLog:
    """Turn a float classifier into an integer one in place, stage by stage, tuning what is quantized.

    Args:
        model: a float Vision Transformer that returns logits, on the device it will run on.
        tune: batches to tune on, as `vqvit.quantize_` takes them; held in memory.
        check: batches that decide about each stage, none of them in `tune`; None holds a fifth of `tune` out.
        config: what to do, with what to aim at in a `Recipe`, or the name of one of `vqvit.progressive.PRESETS`.
        plan: what to aim at instead of the recipe's quantization, which for a `ProgressiveConfig` is the default one. A
            `QuantConfig` keeps the recipe's changes by role.
        sensitivity: for each layer of the plan a score, larger for more sensitive. None measures, where a stage fails,
            the KL divergence with only that layer of the stage quantized.
        workdir: folder for snapshots. A run that was killed goes on from there with `resume`, to the same result: to
            the bit where the device and its number of threads compute reproducibly.
        resume: take up the run in `workdir`; begins one where there is none.
        progress: show progress bars on stderr.
        watcher: called after each step, once it is in `workdir`.

    Returns: the log, with the plan. A run whose result is not acceptable says so: `log.passed` is False, the model is
    the best that was found.

    Raises `ProgressiveError` for impossible requests, data that overlaps, or the `workdir` of another run;
    `PlanError`, `ValueError` and `CalibrationError` as `vqvit.quantize_` does. After an error the model is unchanged.
    """
    task = _read(model, tune, check, config, plan, sensitivity)
    folder = None if workdir is None else Workdir(workdir, _identity(model, task), resume)
    run = None if folder is None else folder.load()
    context = _prepare(model, task, run is None, progress)
    if run is None:
        start = context.student.snapshot()
        run = SavedRun(_empty_log(model, context), start, start)
    else:
        run = dataclasses.replace(run, log=dataclasses.replace(run.log, resumed=run.log.resumed + 1))
        context.student.load(run.current)
    while not run.log.finished:
        done, run = advance(context, run)
        if folder is not None:
            run = folder.save(run)
        if watcher is not None:
            watcher(done, run.log)
    plan, cls_only = become_integer(model, run.current, task.tune, task.cls_only)
    return dataclasses.replace(run.log, plan=plan, cls_only=cls_only)


@dataclass(frozen=True)
class Task:
    """A validated request. `plan` has no CLS shortcut; `cls_only`, of `vqvit.plan.CLS_ONLY`, is for the result."""

    config: ProgressiveConfig
    plan: Plan
    cls_only: str
    tune: Samples
    check: Samples
    sensitivity: dict[str, float] | None

    @property
    def stages(self) -> tuple[tuple[Stage, tuple[str, ...]], ...]:
        """The stages that have layers, with their layers' names."""
        layers = self.plan.layers
        stages = [(stage, tuple(x.name for x in layers if x.role in stage.roles)) for stage in self.config.stages]
        return tuple((stage, names) for stage, names in stages if names)


def _read(model, tune, check, config, plan, sensitivity) -> Task:
    """Validate everything. Leaves the model as it is."""
    named = recipe(config) if isinstance(config, str) else config
    named = Recipe(named, QuantConfig()) if isinstance(named, ProgressiveConfig) else named
    tuning = read_samples("tune", tune)
    if check is None:
        tuning, checking = hold_out(tuning)
    else:
        checking = read_samples("check", check)
        require_disjoint(tuning, checking)
    require_decidable(checking, named.config.acceptance)
    if named.config.tuning.objective == "ce" and tuning.labels is None:
        raise ProgressiveError("tune: expected labels for the objective ce; got none")
    if isinstance(plan, Plan):
        cls_only, plan = "on" if plan.shortened else "off", without_shortcut(plan)
    else:
        named = named if plan is None else dataclasses.replace(named, quantization=plan)
        if named.quantization.rounding == "error_aware":
            raise ProgressiveError("rounding: expected nearest or auto, for weights are trained; got error_aware")
        cls_only, plan = named.quantization.cls_only, named.plan(model)
    plan_shortcut(model, plan, cls_only, tuning.take(torch.arange(1)))  # fails now rather than after hours
    if missing := sorted({x.role for x in plan.layers if named.config.stage_of(x.role) is None}):
        raise ProgressiveError(f"stages: expected a stage for every role of the plan; none has {', '.join(missing)}")
    if sensitivity is not None and (missing := [x.name for x in plan.layers if x.name not in sensitivity]):
        raise ProgressiveError(f"sensitivity: expected a score for every layer; {', '.join(missing)} missing")
    scores = None if sensitivity is None else {x.name: float(sensitivity[x.name]) for x in plan.layers}
    return Task(named.config, plan, "auto" if cls_only == "on" else cls_only, tuning, checking, scores)


def _prepare(model: nn.Module, task: Task, calibrate: bool, progress: bool) -> Context:
    """Run the float model over the data, and copy it into a trainable one."""
    batch = task.config.evaluation_batch
    logits = [logits_of(model, samples, batch) for samples in (task.tune, task.check)]
    student = Student(model, task.plan, task.tune if calibrate else None, batch)
    return Context(task.config, student, task.stages, task.tune, task.check, *logits, task.sensitivity, progress)


def _empty_log(model: nn.Module, context: Context) -> RunLog:
    return RunLog(
        type(model).__name__,
        json.loads(json.dumps(dataclasses.asdict(context.config))),
        len(context.tune),
        len(context.check),
        environment(next(model.parameters()).device),
        context.student.plan,
    )


def _identity(model: nn.Module, task: Task) -> dict[str, str]:
    """Fingerprints of all that the result depends on."""
    described = {
        "configuration": json.dumps(dataclasses.asdict(task.config), sort_keys=True),
        "plan": task.plan.to_json(),
        "sensitivity scores": json.dumps(task.sensitivity, sort_keys=True),
    }
    fingerprints = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in described.items()}
    data = {"tuning data": task.tune.digest(), "checking data": task.check.digest()}
    return {"model": _model_digest(model), **data, **fingerprints}


def _model_digest(model: nn.Module) -> str:
    state = model.state_dict()
    tensors = tuple(state[name] for name in sorted(state))
    digest = hashlib.sha256(f"{type(model).__name__} {sorted(state)}".encode())
    digest.update(Samples(tuple(t.cpu() for t in tensors), {}, None, ()).digest().encode())
    return digest.hexdigest()
