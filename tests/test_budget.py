"""Precision plans from scores: quantiles, bytes, accuracy."""

import itertools

import pytest
import torch
import transformers

import vqvit
from vqvit import budget
from vqvit.budget import BudgetError, by_accuracy, by_bytes, by_quantile, integer_loss, layer_bytes, with_tiers
from vqvit.plan import TIERS, BlockPlan, LayerPlan, Plan, PlanError, QuantConfig
from vqvit.rewriter import make_plan
from vqvit.sensitivity import LayerScore, Sensitivity, measure

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 16, "patch_size": 8}


pytestmark = pytest.mark.usefixtures("one_thread")


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token" not in name:
                parameter.mul_(4)
    return model


def labelled(count: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return list(zip(images.split(4), torch.randint(0, 5, (count,), generator=generator).split(4), strict=True))


def scores(*layers: tuple[float, dict, dict]) -> tuple[Plan, Sensitivity]:
    """A plan and its scores from (S, damage by tier, bytes by tier) of layers a, b, c, ..."""
    names = [chr(ord("a") + index) for index in range(len(layers))]
    plan = Plan((), tuple(LayerPlan(name, "linear") for name in names))
    scored = tuple(
        LayerScore(name, "linear", s, {}, damage, size) for name, (s, damage, size) in zip(names, layers, strict=True)
    )
    return plan, Sensitivity("labels", "kl", 8, 0.5, (), scored)


def tiers(plan: Plan) -> str:
    """Tiers of a plan's layers: 0, 1, 2 for int8, int8_asym, fp16."""
    return "".join(str(TIERS.index(layer.tier)) for layer in plan.layers)


def sizes(int8: int = 100, asym: int = 104, fp16: int = 200) -> dict[str, int]:
    return {"int8": int8, "int8_asym": asym, "fp16": fp16}


def damage(int8: float, asym: float, fp16: float = 0.0) -> dict[str, float]:
    return {"int8": int8, "int8_asym": asym, "fp16": fp16}


def test_quantiles_split_the_ranking():
    plan, found = scores(*((float(s), {}, sizes()) for s in (3, 1, 4, 10, 5, 9, 2, 6, 8, 7)))
    assert tiers(by_quantile(plan, found)) == "0002010011"
    assert tiers(by_quantile(plan, found, 1.0, 1.0)) == "0" * 10
    assert tiers(by_quantile(plan, found, 0.0, 0.0)) == "2022222222"
    assert tiers(by_quantile(plan, found, 0.5, 0.5)) == "0002020222"


def test_quantiles_of_other_rankings():
    plan = Plan((), tuple(LayerPlan(name, "linear") for name in "abc"))
    figures = ((1.0, 3.0, 2.0), (2.0, 1.0, 3.0), (3.0, 2.0, 1.0))
    layers = (
        LayerScore(n, "linear", s, {"int8": f}, {"int8": d}, sizes())
        for n, (s, f, d) in zip("abc", figures, strict=True)
    )
    found = Sensitivity("labels", "kl", 8, 0.5, (), tuple(layers))
    for ranking, want in (("score", "012"), ("fisher", "201"), ("damage", "120")):
        assert tiers(by_quantile(plan, found, 0.3, 0.6, ranking)) == want
    with pytest.raises(PlanError, match="ranking: expected one of score, fisher, damage; got 'size'"):
        by_quantile(plan, found, ranking="size")
    unmeasured = scores((1.0, {}, sizes()))
    with pytest.raises(PlanError, match="sensitivity of a: expected a figure for tier int8; got none"):
        by_quantile(*unmeasured, ranking="damage")


def test_quantiles_pass_over_a_tier_that_a_layer_cannot_have():
    only = {"int8": 100, "fp16": 200}
    plan, found = scores(*((float(s), {}, only if s == 8 else sizes()) for s in range(1, 11)))
    assert tiers(by_quantile(plan, found)) == "0000001012"


@pytest.mark.parametrize(("low", "high"), [(0.9, 0.6), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.9)])
def test_bad_quantiles(low, high):
    plan, found = scores((1.0, {}, sizes()))
    with pytest.raises(PlanError, match="expected 0 <= low <= high <= 1"):
        by_quantile(plan, found, low, high)


def test_bytes_go_to_the_largest_drop_per_byte():
    plan, found = scores(
        (1.0, damage(10, 9), sizes(100, 104, 200)),  # 0.25 a byte, then 0.09
        (1.0, damage(5, 4.9), sizes(10, 11, 20)),  # 0.5 a byte straight to fp16
        (1.0, damage(1, 2), sizes(1000, 1004, 2000)),  # int8_asym makes it worse; 0.001 a byte
    )
    want = {1110: "000", 1111: "010", 1114: "100", 1115: "110", 1119: "110", 1120: "020", 1124: "120", 1219: "120"}
    want |= {1220: "220", 2219: "220", 2220: "222"}
    assert {limit: tiers(by_bytes(plan, found, limit)) for limit in want} == want


def test_bytes_pass_over_what_does_not_fit():
    plan, found = scores((1.0, damage(100, 100), sizes(100, 104, 1000)), (1.0, damage(1, 1), sizes(100, 104, 150)))
    assert tiers(by_bytes(plan, found, 300)) == "02"


def test_a_promotion_that_saves_bytes_comes_first():
    plan, found = scores((1.0, damage(1, 1), sizes(100, 104, 90)))
    assert tiers(by_bytes(plan, found, 100)) == "2"


def test_promotions_start_from_the_plan():
    plan, found = scores((1.0, damage(4, 2), sizes()), (1.0, damage(4, 2), sizes()))
    started = with_tiers(plan, {"a": "fp16"})
    assert tiers(by_bytes(started, found, 304)) == "21"
    with pytest.raises(BudgetError, match="expected at least 300 bytes, which the plan's layers take; got 299"):
        by_bytes(started, found, 299)


def test_greedy_is_near_the_best_plan_of_all():
    """Against every assignment of tiers to five layers, at each budget: within the gain of one promotion."""
    generator = torch.Generator().manual_seed(4)
    figures = torch.rand(5, 3, generator=generator)
    drops = [damage(*sorted((2 * row).tolist(), reverse=True)) for row in figures]
    room = [sizes(100, 100 + int(10 * row[0]) + 1, 200 + int(50 * row[1])) for row in figures]
    plan, found = scores(*((1.0, d, s) for d, s in zip(drops, room, strict=True)))
    largest = max(d["int8"] - d["fp16"] for d in drops)
    for limit in range(500, 1200, 25):
        chosen = by_bytes(plan, found, limit)
        assert layer_bytes(chosen, found) <= limit

        def total(assigned) -> float:
            return sum(d[t] for d, t in zip(drops, assigned, strict=True))

        best = min(
            total(assigned)
            for assigned in itertools.product(TIERS, repeat=5)
            if sum(s[t] for s, t in zip(room, assigned, strict=True)) <= limit
        )
        assert best <= total(layer.tier for layer in chosen.layers) < best + largest


@pytest.mark.parametrize(
    ("measured", "want"),
    [
        ({}, damage(4.0, 3.0, 0.5)),  # the weight's rounding alone, curvature · S_F
        ({"int8": 7.0}, damage(7.0, 6.0, 0.5)),  # 3 of it are the activation's codes, which int8_asym has too
        ({"int8": 2.0}, damage(2.0, 3.0, 0.5)),
        ({"int8": 7.0, "fp16": 0.1}, damage(7.0, 6.0, 0.1)),
        (damage(7.0, 6.5, 0.1), damage(7.0, 6.5, 0.1)),
    ],
)
def test_damage_that_was_not_measured_is_predicted(measured, want):
    layer = LayerScore("a", "head", 1.0, damage(8, 6, 1), measured, sizes())
    assert budget.damages(Sensitivity("labels", "kl", 8, 0.5, (), (layer,))) == {"a": want}


def test_figures_that_are_missing_are_named():
    plan, found = scores((1.0, {"int8": 1.0, "fp16": 0.0}, sizes()))
    with pytest.raises(PlanError, match="sensitivity of a: expected a figure for tier int8_asym; got int8, fp16"):
        by_bytes(with_tiers(plan, {"a": "int8_asym"}), found, 1000)
    other = Plan((), (LayerPlan("z", "head"),))
    for make in (by_quantile, lambda p, s: by_bytes(p, s, 1000), lambda p, s: by_accuracy(p, s, 0.1, lambda _: 1.0)):
        with pytest.raises(PlanError, match="sensitivity: expected a layer among a; got 'z'"):
            make(other, found)


def ten() -> tuple[Plan, Sensitivity]:
    return scores(*((1.0, {"int8": 1.0 + index, "fp16": 0.0}, sizes()) for index in range(10)))


def measured_damage(found: Sensitivity, calls: list):
    def measure_plan(plan: Plan) -> float:
        calls.append(tiers(plan))
        return sum(found.layer(layer.name).damage[layer.tier] for layer in plan.layers)

    return measure_plan


@pytest.mark.parametrize("limit", [60, 54.9, 30, 7.5, 1, 0])
def test_accuracy_takes_the_fewest_promotions_that_pass(limit):
    plan, found = ten()
    calls: list[str] = []
    verified = by_accuracy(plan, found, limit, measured_damage(found, calls))
    want = next(n for n in range(11) if sum(range(1, 11 - n)) <= limit)
    assert tiers(verified.plan) == "0" * (10 - want) + "2" * want
    assert verified.loss == sum(range(1, 11 - want)) <= limit and verified.first_loss == 55
    assert tiers(verified.plan) in calls and verified.evaluations == len(calls) <= 6


def test_accuracy_returns_only_what_was_measured_to_pass():
    """A loss that does not fall steadily: whatever comes back was measured within the limit."""
    plan, found = ten()
    losses: dict[str, float] = {}

    def erratic(candidate: Plan) -> float:
        count = tiers(candidate).count("2")
        return losses.setdefault(tiers(candidate), {3: 0.1, 4: 9.0}.get(count, 0.0 if count > 6 else 5.0))

    verified = by_accuracy(plan, found, 0.5, erratic)
    assert losses[tiers(verified.plan)] == verified.loss <= 0.5


def test_accuracy_out_of_reach_says_how_far():
    plan, found = ten()
    with pytest.raises(BudgetError, match="promotions bring to 1; got 3 with all promotions, 7 with none"):
        by_accuracy(plan, found, 1.0, lambda p: 7.0 if tiers(p).count("2") == 0 else 3.0)


def test_tiers_that_end_the_shortcut_take_it_along():
    block = tuple(LayerPlan(f"b.{role}", role) for role in ("qkv", "attn_out", "fc1", "fc2"))
    plan = Plan((BlockPlan("b", leading_tokens=1),), (*block, LayerPlan("head", "head")))
    assert with_tiers(plan, {"head": "fp16", "b.fc1": "int8_asym"}).blocks == plan.blocks
    assert with_tiers(plan, {"b.fc1": "fp16"}).blocks == (BlockPlan("b"),)


def test_unknown_layers_and_tiers_list_the_valid_ones():
    plan, _ = scores((1.0, {}, sizes()), (1.0, {}, sizes()))
    with pytest.raises(PlanError, match="expected a layer among a, b; got 'c'"):
        with_tiers(plan, {"c": "fp16"})
    with pytest.raises(PlanError, match="tier of a: expected one of int8, int8_asym, fp16; got 'int2'"):
        with_tiers(plan, {"a": "int2"})


def test_accuracy_budget_on_a_real_model():
    """The loss that comes back is the integer model's, measured by another route."""
    model, batches = vit(), labelled()
    plan = make_plan(model, QuantConfig(attention="float", cls_only="off"))[0]
    found = measure(model, batches[::2], plan, damage_tiers=TIERS)
    loss = integer_loss(model, batches[1::2], "kl")
    first, last = loss(plan), loss(with_tiers(plan, {layer.name: "fp16" for layer in plan.layers}))
    assert last < first
    limit = (first * last) ** 0.5
    verified = by_accuracy(plan, found, limit, loss)
    quantized = vit()
    vqvit.quantize_(quantized, verified.plan)
    assert vqvit.evaluate(quantized, batches[1::2], model).kl == verified.loss <= limit
    assert 0 < sum(layer.tier != "int8" for layer in verified.plan.layers) < len(plan.layers)
    assert verified.first_loss == first


def test_losses_of_the_integer_model():
    model, batches = vit(), labelled()
    plan = make_plan(model, QuantConfig(activation="static", cls_only="off"))[0]
    calibration = [images for images, _ in batches]
    quantized = vit()
    vqvit.quantize_(quantized, plan, calibration)
    want = vqvit.evaluate(quantized, batches, model)
    assert integer_loss(model, batches, "kl", calibration)(plan) == want.kl
    assert integer_loss(model, batches, "top1", calibration)(plan) == pytest.approx(
        100 * (want.reference_top1 - want.top1)
    )
    error = integer_loss(model, batches, "feature_error", calibration)(plan)
    assert 10 * torch.tensor(error).log10().item() == pytest.approx(-want.sqnr_db, rel=1e-5)
    with pytest.raises(ValueError, match="loss top1: expected labels and logits; there are none"):
        integer_loss(model, calibration, "top1", calibration)(plan)
    with pytest.raises(PlanError, match="loss: expected one of kl, top1, feature_error; got 'mse'"):
        integer_loss(model, batches, "mse")
