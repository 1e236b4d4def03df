"""The steps of a run. Each takes the run as it was last saved to what is saved next, and depends on nothing else.

So a run that is taken up again repeats at most one step, with the same result: what is random is drawn from generators
that are seeded by the step's name.
"""

import dataclasses
import time
from dataclasses import dataclass

from torch import Tensor

from vqvit.progressive.config import ProgressiveConfig, Stage
from vqvit.progressive.judge import Judgement, divergence, judge, logits_of
from vqvit.progressive.ranking import choose, initial_promotions, measured
from vqvit.progressive.runlog import Attempt, FinalResult, Promotion, RunLog, StageResult, Tuned
from vqvit.progressive.samples import Samples
from vqvit.progressive.student import Student
from vqvit.progressive.tuning import Lesson, tune
from vqvit.progressive.workdir import SavedRun, Snapshot


@dataclass(frozen=True)
class Context:
    """What a run works with. `stages`: those of the configuration that have layers, with their layers' names."""

    config: ProgressiveConfig
    student: Student
    stages: tuple[tuple[Stage, tuple[str, ...]], ...]
    tune: Samples
    check: Samples
    tune_logits: Tensor  # (n, classes) fp32 of the float model
    check_logits: Tensor
    sensitivity: dict[str, float] | None
    progress: bool

    def blends(self, index: int, blend: float) -> dict[str, float]:
        """λ of each layer: stages before `index` are quantized, that one is at `blend`, later ones are float."""
        values = [1.0] * index + [blend] + [0.0] * len(self.stages)
        return {name: value for (_, names), value in zip(self.stages, values, strict=False) for name in names}


def advance(context: Context, run: SavedRun) -> tuple[str, SavedRun]:
    """Do the next step of a run that is not finished. Returns what was done, and the run after it."""
    log = run.log
    if log.final is not None:
        return "finish", _finish(context, run)
    if log.stages and log.stages[-1].passed is None:
        stage = log.stages[-1]
        if len(stage.attempts[-1].lambdas) < len(context.config.tuning.schedule):
            return "tune", _tune_stage(context, run, stage)
        return "check", _check_stage(context, run, stage)
    if len(log.stages) < len(context.stages):
        return "begin", _begin_stage(context, run)
    return "tune together", _tune_together(context, run)


def _begin_stage(context: Context, run: SavedRun) -> SavedRun:
    """Note what the stage starts from, and promote what mixed precision promotes."""
    index = len(run.log.stages)
    stage, names = context.stages[index]
    before = _judge(context, context.check_logits) if index == 0 else run.log.stages[-1].attempts[-1].judgement
    initial: tuple[Promotion, ...] = ()
    if stage.quantiles is not None:
        scores = _sensitivity(context, run, index, dict.fromkeys(names))
        initial = initial_promotions(run.current.plan, stage, scores, context.config.ladder)
    result = StageResult(stage.name, names, before, initial)
    log = dataclasses.replace(run.log, stages=(*run.log.stages, result))
    if not initial:
        return SavedRun(log, run.current, run.current)
    return _promoted(context, run.current, initial, log)


def _tune_stage(context: Context, run: SavedRun, stage: StageResult) -> SavedRun:
    index, attempt = len(run.log.stages) - 1, stage.attempts[-1]
    blend = context.config.tuning.schedule[len(attempt.lambdas)]
    label = f"{stage.name}, attempt {len(stage.attempts)}, λ = {blend:g}"
    context.student.blend(context.blends(index, blend))
    tuned, current = _tune(context, stage.layers, blend, context.config.tuning.steps, label)
    attempt = dataclasses.replace(attempt, lambdas=(*attempt.lambdas, tuned))
    stage = dataclasses.replace(stage, attempts=(*stage.attempts[:-1], attempt))
    return SavedRun(_with_stage(run.log, stage), run.entry, current)


def _check_stage(context: Context, run: SavedRun, stage: StageResult) -> SavedRun:
    """Pass the stage, or roll back and promote its most sensitive layer."""
    index = len(run.log.stages) - 1
    context.student.blend(context.blends(index, 1.0))
    logits = logits_of(context.student.model, context.check, context.config.evaluation_batch)
    judgement = _judge(context, logits)
    promotion = None
    if not judgement.passed:
        context.student.load(run.entry)
        scores = _sensitivity(context, run, index, _known_scores(stage))
        promotion = choose(run.entry.plan, scores, context.config.ladder, "; ".join(judgement.failures))
    attempt = dataclasses.replace(stage.attempts[-1], judgement=judgement, promotion=promotion)
    stage = dataclasses.replace(stage, attempts=(*stage.attempts[:-1], attempt))
    if promotion is not None:
        stage = dataclasses.replace(stage, attempts=(*stage.attempts, Attempt()))
        return _promoted(context, run.entry, (promotion,), _with_stage(run.log, stage))
    context.student.load(run.current)
    stage = dataclasses.replace(stage, passed=judgement.passed)
    return SavedRun(_with_stage(run.log, stage), run.current, run.current)


def _tune_together(context: Context, run: SavedRun) -> SavedRun:
    names = tuple(name for _, layers in context.stages for name in layers)
    context.student.blend(context.blends(len(context.stages), 1.0))
    tuned, current = _tune(context, names, 1.0, context.config.tuning.final_steps, "everything together")
    return SavedRun(dataclasses.replace(run.log, final=FinalResult(tuned)), run.entry, current)


def _finish(context: Context, run: SavedRun) -> SavedRun:
    """Judge the integer model with and without the last tuning, and keep the better one."""
    judged = []
    for snapshot in (run.current, run.entry):
        context.student.load(snapshot)
        integer = context.student.frozen_copy()
        judged.append(_judge(context, logits_of(integer, context.check, context.config.evaluation_batch)))
    tuned, untuned = judged
    kept = _cost(tuned, context.config) <= _cost(untuned, context.config)
    final = dataclasses.replace(
        run.log.final, kept=kept, judgement=tuned if kept else untuned, other=untuned if kept else tuned
    )
    chosen = run.current if kept else run.entry
    return SavedRun(dataclasses.replace(run.log, final=final, plan=chosen.plan), chosen, chosen)


def _cost(judgement: Judgement, config: ProgressiveConfig) -> tuple:
    """Lower is better: acceptable, then what the tuning minimised."""
    drop = judgement.drop if config.tuning.objective == "ce" and judgement.drop is not None else 0.0
    return (not judgement.passed, drop, judgement.kl)


def _tune(context: Context, names: tuple[str, ...], blend: float, steps: int, label: str) -> tuple[Tuned, Snapshot]:
    start, config = time.perf_counter(), context.config
    lesson = Lesson(names, context.tune, context.tune_logits)
    losses = tune(context.student, lesson, config.tuning, steps, f"{config.seed}: {label}", label, context.progress)
    return Tuned(blend, losses, time.perf_counter() - start), context.student.snapshot()


def _sensitivity(context: Context, run: SavedRun, index: int, known: dict[str, float | None]) -> dict[str, float]:
    """Scores of the stage's layers: those given by the caller, else measured where `known` has none yet."""
    names = context.stages[index][1]
    if context.sensitivity is not None:
        return {name: context.sensitivity[name] for name in names}
    count = context.config.ranking_images

    def damage(name: str) -> float:
        context.student.blend({**context.blends(index, 0.0), name: 1.0})
        logits = logits_of(context.student.model, context.tune, context.config.evaluation_batch, count)
        return divergence(context.tune_logits[:count], logits)

    return measured({name: known.get(name) for name in names}, damage, context.progress)


def _known_scores(stage: StageResult) -> dict[str, float]:
    """What was measured before, except of the layer that was promoted since: every attempt starts from one state."""
    if len(stage.attempts) == 1:
        return {}
    last = stage.attempts[-2].promotion
    return {name: score for name, score in last.sensitivity.items() if name != last.layer}


def _promoted(context: Context, entry: Snapshot, promotions: tuple[Promotion, ...], log: RunLog) -> SavedRun:
    context.student.load(entry)
    for promotion in promotions:
        context.student.retier(promotion.layer, promotion.after)
    snapshot = context.student.snapshot()
    return SavedRun(dataclasses.replace(log, plan=snapshot.plan), snapshot, snapshot)


def _judge(context: Context, logits: Tensor) -> Judgement:
    rules = context.config.acceptance
    return judge(logits, context.check_logits, context.check.labels, rules, context.config.seed)


def _with_stage(log: RunLog, stage: StageResult) -> RunLog:
    return dataclasses.replace(log, stages=(*log.stages[:-1], stage))
