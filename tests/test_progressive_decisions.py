"""Progressive quantization: its configuration, its data, its decisions."""

import dataclasses
import json

import pytest
import torch

import vqvit
from vqvit import statistics
from vqvit.plan import LayerPlan
from vqvit.progressive import Acceptance, ProgressiveConfig, ProgressiveError, Stage, Tuning, recipe
from vqvit.progressive.judge import divergence, judge
from vqvit.progressive.ranking import choose, initial_promotions, next_tier
from vqvit.progressive.samples import hold_out, read_samples, require_disjoint

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
