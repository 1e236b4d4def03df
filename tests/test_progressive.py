"""Progressive quantization: its configuration and data, its decisions, and whole runs on small models."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from progressive_cases import IMAGES, QUICK, classifier, sets, without_times

import vqvit
from vqvit import qat, report, statistics
from vqvit.plan import LayerPlan
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
from vqvit.progressive.ranking import choose, initial_promotions, next_tier
from vqvit.progressive.samples import hold_out, read_samples, require_disjoint
from vqvit.progressive.student import Student
from vqvit.progressive.tuning import Lesson, batches_of, tune
from vqvit.qat import LossOptions
from vqvit.rewriter import make_plan

pytest.importorskip("sklearn")

# ---- configuration


def test_a_configuration_survives_json():
    config = recipe("paper").config
    again = ProgressiveConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config != ProgressiveConfig()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Tuning(schedule=(0.5,)), "rise to 1"),
        (lambda: Tuning(schedule=(0.5, 0.25, 1.0)), "rise to 1"),
        (lambda: Tuning(schedule=(0.0, 1.0)), "above 0"),
        (lambda: Tuning(steps=-1), "steps: expected at least 0; got -1"),
        (lambda: Tuning(batch_size=0), "batch_size"),
        (lambda: Tuning(scale_rate=float("nan")), "scale_rate"),
        (lambda: Tuning(learn=("bias",)), "got 'bias'"),
        (lambda: Tuning(objective="mse"), "got 'mse'"),
        (lambda: Acceptance(test="t"), "got 't'"),
        (lambda: Acceptance(confidence=1.0), "between 0 and 1"),
        (lambda: Acceptance(kl_limit=-1.0), "kl_limit"),
        (lambda: Stage("QKV", ("qkv",), quantiles=(0.9, 0.6)), "low <= high"),
        (lambda: ProgressiveConfig(ladder=("fp16", "int8")), "in this order"),
        (lambda: ProgressiveConfig(stages=(Stage("a", ("fc1",)), Stage("b", ("fc1",)))), "each role once"),
        (lambda: ProgressiveConfig.from_dict({"epochs": 3}), r"got \['epochs'\]"),
        (lambda: ProgressiveConfig.from_dict({"tuning": 3}), "got int"),
        (lambda: ProgressiveConfig.from_dict({"tuning": {"steps": "x"}}), "Tuning: expected fields of the right kinds"),
        (lambda: recipe("best"), "expected one of default, paper; got 'best'"),
    ],
)
def test_impossible_configurations_are_refused(build, message):
    with pytest.raises(ProgressiveError, match=message):
        build()


# ---- data


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_samples_are_all_batches_in_order():
    pixels, labels = images(7), torch.arange(7)
    loaders = {
        "args": [(pixels[:4], labels[:4]), (pixels[4:], labels[4:])],
        "kwargs": [
            {"pixel_values": pixels[:5], "labels": labels[:5]},
            {"pixel_values": pixels[5:], "labels": labels[5:]},
        ],
    }
    for loader in loaders.values():
        samples = read_samples("tune", loader)
        batches = list(samples.batches(3, limit=5))
        assert [len(b.labels) for b in batches] == [3, 2]
        assert torch.equal(torch.cat([b.images for b in batches]), pixels[:5])
        assert torch.equal(samples.take(torch.tensor([6, 0])).labels, torch.tensor([6, 0]))
    one = read_samples("tune", [(pixels, labels)])
    assert one.digest() == read_samples("tune", loaders["args"]).digest()
    assert one.digest() != read_samples("tune", [(pixels, labels.flip(0))]).digest()


@pytest.mark.parametrize(
    "loader, message",
    [
        ([], "expected at least one batch"),
        ([images(2), (images(2), torch.arange(2))], "batch 1 differs"),
        ([(images(2), torch.arange(3))], "batch 0 differs"),
        ([images(2) * torch.nan], "finite"),
        (["x"], "got str"),
    ],
)
def test_unusable_data_is_refused(loader, message):
    with pytest.raises(ProgressiveError, match=message):
        read_samples("tune", loader)


def test_overlap_is_refused_by_content():
    tune, check = read_samples("tune", [images(6)]), read_samples("check", [images(4, seed=1)])
    require_disjoint(tune, check)
    mixed = read_samples("check", [torch.cat([images(4, seed=1), images(6)[3:5]])])
    with pytest.raises(ProgressiveError, match="2 of 6 are, the first at 4"):
        require_disjoint(tune, mixed)


def test_hold_out_keeps_copies_together_and_loses_nothing():
    twice = torch.cat([images(40), images(40)])
    tune, check = hold_out(read_samples("tune", [(twice, torch.arange(80))]))
    require_disjoint(tune, check)
    assert sorted(torch.cat([tune.labels, check.labels]).tolist()) == list(range(80))
    assert 0 < len(check) < len(tune)
    with pytest.raises(ProgressiveError, match="got 1"):
        hold_out(read_samples("tune", [images(1)]))


# ---- decisions


def logits_for(classes: list[int]) -> torch.Tensor:
    return 8 * torch.nn.functional.one_hot(torch.tensor(classes), 3).float()


def test_divergence_of_two_bernoullis():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.6, 0.4]])
    want = 0.9 * torch.tensor(0.9 / 0.6).log() + 0.1 * torch.tensor(0.1 / 0.4).log()
    assert divergence(p.log(), q.log()) == pytest.approx(float(want), rel=1e-6)
    assert divergence(p.log(), p.log()) == 0.0


@pytest.mark.parametrize(
    "losses, gains, test, tolerance, passes",
    [
        (3, 0, "raw", 0.02, False),
        (3, 0, "raw", 0.03, True),
        (4, 0, "exact", 0.0, True),  # p = 1/16
        (5, 0, "exact", 0.0, False),  # p = 1/32
        (10, 0, "exact", 0.045, False),
        (10, 3, "exact", 0.045, True),
        (9, 0, "bootstrap", 0.0, False),
        (9, 0, "bootstrap", 0.06, True),
    ],
)
def test_what_fails(losses, gains, test, tolerance, passes):
    """Of 100 images of class 0 the float model gets the last `gains` wrong, and the other one the first `losses`."""
    reference = logits_for([0] * (100 - gains) + [1] * gains)
    other = logits_for([2] * losses + [0] * (100 - losses))
    rules = Acceptance(tolerance, test, kl_limit=None)
    verdict = judge(other, reference, torch.zeros(100, dtype=torch.int64), rules, seed=0)
    assert (verdict.losses, verdict.gains, verdict.drop) == (losses, gains, (losses - gains) / 100)
    assert verdict.p_value == statistics.mcnemar(losses, gains)
    assert verdict.passed == passes, verdict.failures


def test_the_kl_limit_decides_without_labels():
    reference, other = logits_for([0, 1]), logits_for([0, 1]) * 0.5
    kl = divergence(reference, other)
    assert judge(other, reference, None, Acceptance(kl_limit=kl), 0).passed
    failed = judge(other, reference, None, Acceptance(kl_limit=kl / 2), 0)
    assert not failed.passed and "KL" in failed.failures[0]
    assert failed.top1 is None and failed.agreement == 1.0


# ---- which layer is promoted


def planned(tier: str = "int8", activation: str = "per_token", name: str = "a") -> LayerPlan:
    return LayerPlan(name, "fc1", tier, activation=activation)


def test_the_ladder():
    ladder = ("int8", "int8_asym", "fp16")
    assert [next_tier(planned(tier), ladder) for tier in ladder] == ["int8_asym", "fp16", None]
    assert next_tier(planned(), ("int8", "fp16")) == "fp16"
    assert next_tier(planned(activation="per_token_group"), ladder) == "fp16"  # group scales have no zero points


def test_the_most_sensitive_layer_that_can_be_promoted():
    tiers = {"a": "fp16", "b": "int8", "c": "int8_asym"}
    plan = vqvit.Plan((), tuple(planned(tier, name=name) for name, tier in tiers.items()))
    ladder = recipe("default").config.ladder
    promotion = choose(plan, {"a": 3.0, "b": 1.0, "c": 2.0}, ladder, "KL too high")
    assert (promotion.layer, promotion.before, promotion.after) == ("c", "int8_asym", "fp16")
    assert promotion.reason == "KL too high; most sensitive of 2 layers"
    assert choose(plan, {"a": 3.0}, ladder, "") is None


def test_mixed_precision_begins_above_the_quantiles():
    names = [f"layer{i}" for i in range(11)]
    plan = vqvit.Plan((), tuple(planned(name=name) for name in names))
    scores = {name: float(i) for i, name in enumerate(names)}
    stage = Stage("QKV", ("qkv",), quantiles=(0.6, 0.9))
    promotions = initial_promotions(plan, stage, scores, recipe("default").config.ladder)
    assert {p.layer: p.after for p in promotions} == {
        "layer7": "int8_asym",
        "layer8": "int8_asym",
        "layer9": "int8_asym",
        "layer10": "fp16",
    }


# ---- whole runs


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Such small models gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert found["paper"] == pytest.approx(found["none"] + 0.5 * float(qat.quant_regularizer(student.model)), rel=1e-5)
    text = float(qat.quant_regularizer(student.model, "text"))
    assert found["text"] == pytest.approx(found["none"] + 0.5 * text, rel=1e-5)
    assert found["smooth"] == pytest.approx(
        found["none"] + 0.5 * float(qat.smooth_regularizer(student.model)), rel=1e-5
    )


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
