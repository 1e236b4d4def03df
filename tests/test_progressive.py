"""Progressive quantization of small models: whole runs, roll back and promotion, tuning."""

import copy
import dataclasses
import math

import pytest
import torch
from progressive_cases import IMAGES, QUICK, classifier, sets, without_times

import vqvit
from vqvit import qat, report
from vqvit.progressive import (
    Acceptance,
    ProgressiveConfig,
    ProgressiveError,
    RunLog,
    Stage,
    Tuning,
    document,
    quantize_progressively_,
    recipe,
)
from vqvit.progressive.judge import divergence, judge, logits_of
from vqvit.progressive.samples import read_samples
from vqvit.progressive.student import Student
from vqvit.progressive.tuning import Lesson, batches_of, tune
from vqvit.qat import LossOptions
from vqvit.rewriter import make_plan

pytest.importorskip("sklearn")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained():
    return classifier()


@pytest.fixture
def model(trained):
    return copy.deepcopy(trained)


@pytest.fixture(scope="module")
def finished(trained):
    """A run with default decisions: the integer model and its log."""
    model, done = copy.deepcopy(trained), []
    log = quantize_progressively_(model, *sets(), QUICK, watcher=lambda what, _: done.append(what))
    return model, log, done


def test_the_stages_of_a_run(finished):
    _, log, done = finished
    names = ["MLP", "attention output", "QKV", "patch embedding and head"]
    assert [stage.name for stage in log.stages] == names
    assert done == ["begin", "tune", "tune", "check"] * 4 + ["tune together", "finish"]
    for stage in log.stages:
        assert [t.blend for t in stage.attempts[0].lambdas] == [0.5, 1.0]
        assert all(len(t.losses) == 1 for t in stage.attempts[0].lambdas)
    assert log.passed and log.finished and not log.promotions
    assert {log.plan.layer(name).role for name in log.stages[0].layers} == {"fc1", "fc2"}
    assert log.stages[0].before.kl == 0.0 and log.stages[1].before == log.stages[0].attempts[-1].judgement


def test_the_log_judges_the_integer_model_itself(finished, trained):
    model, log, _ = finished
    check = read_samples("check", sets()[1])
    logits = logits_of(model, check, 64)
    again = judge(logits, logits_of(trained, check, 64), check.labels, QUICK.acceptance, QUICK.seed)
    assert again == log.final.judgement
    assert {layer.tier for layer in vqvit.rewriter.plan_of(model).layers} == {"int8"}
    assert vqvit.rewriter.plan_of(model) == log.plan


def test_the_integer_model_reloads_bit_for_bit(finished, tmp_path):
    model, _, _ = finished
    vqvit.save(model, tmp_path / "checkpoint")
    images = sets()[1][0][0][:16]
    with torch.inference_mode():
        assert torch.equal(vqvit.load(tmp_path / "checkpoint")(images).logits, model(images).logits)


def test_the_log_survives_json_and_becomes_a_report(finished, tmp_path):
    _, log, _ = finished
    log.save(tmp_path / "log.json")
    assert RunLog.load(tmp_path / "log.json") == log
    report.write(document(log), tmp_path / "report")
    for damaged in ({}, {"format": 2}, {"format": 1, "plan": {"blocks": [], "layers": []}}, []):
        with pytest.raises(ProgressiveError, match="run log: expected"):
            RunLog.from_dict(damaged)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| QKV |" in text and f"Tuned on {IMAGES} images" in text and "accepted" in text


def test_a_run_is_reproducible_and_depends_on_its_seed(model, finished, trained):
    log = quantize_progressively_(model, *sets(), QUICK)
    assert without_times(log) == without_times(finished[1])
    for name, tensor in finished[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    other = copy.deepcopy(trained)
    assert without_times(quantize_progressively_(other, *sets(), dataclasses.replace(QUICK, seed=1))) != without_times(
        log
    )


def unquantizable(model, layer: int) -> None:
    """Wreck the int8 form of one fc2, without changing the function: a hidden channel that is always 0 gets a column of
    weights a thousand times as large as the others, which then all round to 0.
    """
    mlp = model.vit.layers[layer].mlp
    with torch.no_grad():
        mlp.fc1.weight[3], mlp.fc1.bias[3] = 0.0, 0.0
        mlp.fc2.weight[:, 3] = 0.0
    fit = mlp.fc2.weight.abs().amax()
    with torch.no_grad():
        mlp.fc2.weight[:, 3] = 1000 * fit


def test_a_layer_that_cannot_be_quantized_is_promoted_and_nothing_else(model):
    unquantizable(model, 1)
    float_model = copy.deepcopy(model)
    log = quantize_progressively_(model, *sets(), QUICK)
    name = "vit.layers.1.fc2"
    assert [(p.layer, p.before, p.after) for p in log.promotions] == [
        (name, "int8", "int8_asym"),
        (name, "int8_asym", "fp16"),
    ]
    assert {x.name: x.tier for x in log.plan.layers if x.tier != "int8"} == {name: "fp16"}
    attempts = log.stages[0].attempts
    assert [a.judgement.passed for a in attempts] == [False, False, True] and log.stages[0].passed
    scores = attempts[0].promotion.sensitivity
    text = report.to_markdown(document(log))
    assert f"| {name} | MLP | int8 to int8_asym |" in text and f"| {name} | {scores[name]:.2e} |" in text
    assert scores[name] > 5 * max(score for other, score in scores.items() if other != name)
    assert all(len(stage.attempts) == 1 for stage in log.stages[1:])
    check = read_samples("check", sets()[1])
    assert log.passed and divergence(logits_of(float_model, check, 64), logits_of(model, check, 64)) <= 0.05


def test_scores_of_the_caller_decide_who_is_promoted(model):
    unquantizable(model, 1)
    plan, _ = make_plan(model, vqvit.QuantConfig())
    scores = {layer.name: 1.0 + 10 * (layer.name == "vit.layers.0.fc1") for layer in plan.layers}
    ladder = dataclasses.replace(QUICK, ladder=("int8", "fp16"))
    log = quantize_progressively_(model, *sets(), ladder, sensitivity=scores)
    assert log.promotions[0].layer == "vit.layers.0.fc1" and log.promotions[0].sensitivity["vit.layers.0.fc1"] == 11.0
    assert "vit.layers.1.fc2" in {p.layer for p in log.promotions} and log.passed


def test_a_stage_ends_when_all_its_layers_are_at_the_last_tier(model):
    impossible = dataclasses.replace(QUICK, acceptance=Acceptance(kl_limit=0.0), ladder=("int8", "fp16"))
    log = quantize_progressively_(model, *sets(), impossible)
    assert not log.passed and all(stage.passed is False for stage in log.stages)
    assert {layer.tier for layer in log.plan.layers} == {"fp16"}
    assert [len(stage.attempts) for stage in log.stages] == [5, 3, 3, 3]
    assert "not accepted: KL" in document(log)["summary"][0]


def test_a_roll_back_restores_every_bit(model):
    """What an attempt trained, and a promotion, are gone."""
    plan, _ = make_plan(model, vqvit.QuantConfig())
    samples = read_samples("tune", sets()[0])
    student = Student(model, plan, samples, 64)
    before = student.snapshot()
    student.retier("vit.layers.0.fc1", "fp16")
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(1.0)
    student.load(before)
    after = student.snapshot()
    assert after.plan == before.plan and after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())


def test_tuning_finds_scales_again(model):
    """Static input scales that are six times too large come back: the divergence falls to less than a third."""
    plan, _ = make_plan(model, vqvit.QuantConfig(activation="static"))
    samples = read_samples("tune", [sets()[0][0][0][:32]])
    logits, student = logits_of(model, samples, 32), Student(model, plan, samples, 32)
    student.blend(dict.fromkeys(student.layers, 1.0))
    with torch.no_grad():
        for layer in student.layers.values():
            if layer.log_input_alpha is not None:
                layer.log_input_alpha += math.log(6)
    wanted = {name: parameter.requires_grad for name, parameter in student.model.named_parameters()}
    config = Tuning(learn=("scales",), scale_rate=0.1)
    losses = tune(student, Lesson(tuple(student.layers), samples, logits), config, 24, "seed", "test", False)
    assert len(losses) == 24
    assert divergence(logits, logits_of(student.model, samples, 32)) < losses[0] / 3
    assert {name: parameter.requires_grad for name, parameter in student.model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in student.model.parameters())


def test_regularizers_are_part_of_the_loss(model):
    plan, _ = make_plan(model, vqvit.QuantConfig())
    samples = read_samples("tune", [sets()[0][0]])
    student = Student(model, plan, samples, 64)
    lesson = Lesson(tuple(student.layers), samples, logits_of(model, samples, 64))
    found = {}
    for name, options in {
        "none": LossOptions(),
        "paper": LossOptions(quant_weight=0.5),
        "text": LossOptions(quant_weight=0.5, quant_reading="text"),
        "smooth": LossOptions(smooth_weight=0.5),
    }.items():
        before = student.snapshot()
        (found[name],) = tune(student, lesson, Tuning(regularizers=options), 1, "seed", "test", False)
        student.load(before)
    with torch.no_grad():
        terms = {
            "paper": qat.quant_regularizer(student.model),
            "text": qat.quant_regularizer(student.model, "text"),
            "smooth": qat.smooth_regularizer(student.model),
        }
    for name, term in terms.items():
        assert found[name] == pytest.approx(found["none"] + 0.5 * float(term), rel=1e-5)


def test_every_image_is_seen_once_an_epoch():
    order = torch.cat(list(batches_of(10, 4, 5, "seed")))
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert torch.equal(order, torch.cat(list(batches_of(10, 4, 5, "seed"))))
    assert not torch.equal(order, torch.cat(list(batches_of(10, 4, 5, "other"))))
    assert [len(index) for index in batches_of(3, 8, 2, "seed")] == [3, 3]


def test_what_is_not_learned_stays(model):
    """With scales alone the weights of the integer model are the float model's to half a step."""
    float_model = copy.deepcopy(model)
    tuning = Tuning((1.0,), steps=2, final_steps=2, learn=("scales",), scale_rate=1e-3)
    quantize_progressively_(model, *sets(), dataclasses.replace(QUICK, tuning=tuning))
    for got, want in zip(model.vit.layers, float_model.vit.layers, strict=True):
        step = got.fc2.scale[:, None]
        inside = want.mlp.fc2.weight.abs() <= 127 * step
        error = (got.fc2.float_weight() - want.mlp.fc2.weight).abs()
        assert inside.float().mean() > 0.9 and bool((error <= 0.5001 * step)[inside].all())


def test_the_paper_recipe(model):
    chosen = recipe("paper")
    tuning = dataclasses.replace(chosen.config.tuning, schedule=(1.0,), steps=1, final_steps=1)
    quick = dataclasses.replace(chosen.config, tuning=tuning, ranking_images=32)
    log = quantize_progressively_(model, *sets(), dataclasses.replace(chosen, config=quick))
    plan = {layer.name: layer for layer in log.plan.layers}
    assert not plan["vit.layers.0.fc1"].per_channel and plan["vit.layers.0.attn_out"].per_channel
    assert {layer.compensation for layer in plan.values() if layer.tier == "int8"} == {"paper"}
    assert {block.attention_scales for block in log.plan.blocks} == {"static"}
    assert [layer.factorized for layer in plan.values() if layer.role == "patch_embed"] == [True]
    assert {layer.activation for layer in plan.values() if layer.role == "fc2"} == {"static"}
    mixed = next(stage for stage in log.stages if stage.name == "QKV")
    assert [p.after for p in mixed.initial] == ["fp16"]  # of two layers, the one above the quantile 0.9
    assert log.stages[0].attempts[-1].judgement.counted == log.stages[0].attempts[-1].judgement.drop


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": "best"}, "expected one of default, paper"),
        ({"check": sets()[0]}, f"{IMAGES} of {IMAGES} are"),
        ({"tune": [sets()[0][0][0]], "config": "paper"}, "expected labels for the objective ce"),
        ({"check": [sets()[1][0][0]], "config": "paper"}, "expected labels, or a limit"),
        ({"sensitivity": {}}, "expected a score for every layer"),
        ({"config": ProgressiveConfig(stages=(Stage("MLP", ("fc1", "fc2")),))}, "none has attn_out, head, patch_embed"),
    ],
)
def test_impossible_requests_leave_the_model_alone(model, change, message):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tune, check = sets()
    with pytest.raises(ProgressiveError, match=message):
        quantize_progressively_(model, **{"tune": tune, "check": check, **change})
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loss_that_diverges_is_an_error_and_leaves_the_model_alone(model):
    tuning = Tuning((1.0,), steps=6, scale_rate=1e4, weight_rate=1e20)
    with pytest.raises(ProgressiveError, match="MLP, attempt 1, λ = 1: expected a finite loss"):
        quantize_progressively_(model, *sets(), dataclasses.replace(QUICK, tuning=tuning))
    assert type(model.vit.layers[0]).__name__ == "ViTLayer"


def test_features_are_refused():
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).eval()
    with pytest.raises(ProgressiveError, match="expected a classifier"):
        quantize_progressively_(model, *sets(), QUICK)
