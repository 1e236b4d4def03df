"""A run log as a result document, for `vqvit.report`: pages and tables of what happened."""

from vqvit.progressive.judge import Judgement
from vqvit.progressive.runlog import RunLog, StageResult

JUDGED = (
    {"key": "top1", "label": "Accuracy (%)", "format": ".2f"},
    {"key": "losses", "label": "Lost", "format": "d"},
    {"key": "gains", "label": "Gained", "format": "d"},
    {"key": "p_value", "label": "p (McNemar)", "format": ".3f"},
    {"key": "agreement", "label": "Agreement (%)", "format": ".2f"},
    {"key": "kl", "label": "KL (nats)", "format": ".2e"},
)


def document(log: RunLog) -> dict:
    """The result document of a run (see `vqvit.report`), finished or not."""
    sections = [_stages(log), _tuning(log)]
    if log.promotions:
        sections += [_promotions(log), _sensitivity(log)]
    return {
        "title": f"Progressive quantization of {log.model}",
        "summary": [_summary(log)],
        "sections": sections,
        "environment": log.environment,
    }


def _summary(log: RunLog) -> str:
    images = f"Tuned on {log.tune_images} images, checked on {log.check_images} others."
    if not log.finished:
        return f"{images} The run is not finished."
    tiers = [layer.tier for layer in log.plan.layers]
    counts = ", ".join(f"{tiers.count(tier)} {tier}" for tier in dict.fromkeys(tiers))
    verdict = "accepted" if log.passed else "not accepted: " + "; ".join(log.final.judgement.failures)
    return f"{images} The integer model is {verdict}. Layers: {counts}."


def _stages(log: RunLog) -> dict:
    rows = []
    for stage in log.stages:
        for number, attempt in enumerate(stage.attempts, 1):
            if attempt.judgement is not None:
                passed = "passed" if attempt.judgement.passed else "; ".join(attempt.judgement.failures)
                rows.append({"step": _title(stage, number), **_cells(attempt.judgement), "outcome": passed})
    if log.finished:
        final = log.final
        other = "without the last tuning" if final.kept else "with the last tuning"
        rows.append({"step": "integer model", **_cells(final.judgement), "outcome": "the result"})
        rows.append({"step": f"integer model {other}", **_cells(final.other), "outcome": "not kept"})
    return {
        "heading": "After each stage, on the checking images",
        "columns": [{"key": "step", "label": "Stage"}, *JUDGED, {"key": "outcome", "label": "Outcome"}],
        "rows": rows,
        "notes": ["Lost and gained: images that only the float model, and only this one, classifies correctly."],
        "charts": [{"column": "kl", "title": "KL divergence from the float model (nats)"}],
    }


def _tuning(log: RunLog) -> dict:
    tunings = [
        (f"{_title(stage, number)}, λ = {tuned.blend:g}", tuned)
        for stage in log.stages
        for number, attempt in enumerate(stage.attempts, 1)
        for tuned in attempt.lambdas
    ]
    if log.final is not None:
        tunings.append(("everything together", log.final.tuned))
    rows = [
        {
            "step": title,
            "steps": len(tuned.losses),
            "first": tuned.losses[0] if tuned.losses else None,
            "last": tuned.losses[-1] if tuned.losses else None,
            "seconds": tuned.seconds,
        }
        for title, tuned in tunings
    ]
    columns = (("step", "Tuning", ""), ("steps", "Steps", "d"), ("first", "First loss", ".2e"))
    columns += (("last", "Last loss", ".2e"), ("seconds", "Seconds", ".1f"))
    return {
        "heading": "Tuning",
        "columns": [{"key": key, "label": label, "format": spec} for key, label, spec in columns],
        "rows": rows,
        "notes": ["A loss is of the batch of its step."],
    }


def _promotions(log: RunLog) -> dict:
    rows = [
        {
            "layer": promotion.layer,
            "stage": stage.name,
            "tiers": f"{promotion.before} to {promotion.after}",
            "sensitivity": promotion.sensitivity[promotion.layer],
            "reason": promotion.reason,
        }
        for stage in log.stages
        for promotion in stage.promotions
    ]
    columns = (("layer", "Layer", ""), ("stage", "Stage", ""), ("tiers", "Tier", ""))
    columns += (("sensitivity", "Sensitivity", ".2e"), ("reason", "Reason", ""))
    return {
        "heading": "Promoted layers",
        "columns": [{"key": key, "label": label, "format": spec} for key, label, spec in columns],
        "rows": rows,
        "notes": [],
    }


def _sensitivity(log: RunLog) -> dict:
    """The scores behind the first promotion of each stage: all of its layers in their first tier."""
    ranked = [stage.promotions[0].sensitivity for stage in log.stages if stage.promotions]
    rows = [{"layer": name, "sensitivity": score} for scores in ranked for name, score in scores.items()]
    return {
        "heading": "Sensitivity of the layers of stages with promotions",
        "columns": [
            {"key": "layer", "label": "Layer"},
            {"key": "sensitivity", "label": "Sensitivity", "format": ".2e"},
        ],
        "rows": rows,
        "notes": [
            "The KL divergence (nats) with only that layer of its stage quantized, or the scores that were given."
        ],
        "charts": [{"column": "sensitivity", "title": "Sensitivity"}],
    }


def _title(stage: StageResult, number: int) -> str:
    return stage.name if len(stage.attempts) == 1 else f"{stage.name}, attempt {number}"


def _cells(judgement: Judgement) -> dict:
    percent = {"agreement": 100 * judgement.agreement, "top1": None}
    if judgement.top1 is not None:
        percent["top1"] = 100 * judgement.top1
    return {
        "losses": judgement.losses,
        "gains": judgement.gains,
        "p_value": judgement.p_value,
        "kl": judgement.kl,
    } | percent
