"""Plans are values: JSON round trip, and errors for everything else."""

import dataclasses
import json

import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit.plan import BlockPlan, LayerPlan, Plan, PlanError, QuantConfig

PLAN = Plan(
    (BlockPlan("layers.0"),),
    (
        *(LayerPlan(f"layers.0.{role}", role) for role in ("qkv", "attn_out", "fc1", "fc2")),
        LayerPlan("head", "head", "int8_asym", beta=-0.25, activation="static", delta=0.5),
    ),
)


def test_json_round_trip(tmp_path):
    assert Plan.from_json(PLAN.to_json()) == PLAN
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_a_plan_prints_a_line_a_layer():
    assert len(str(PLAN).splitlines()) == 5 and "β=-0.25" in str(PLAN)


def edited(**changes) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


LAYER = {"name": "x", "role": "fc1"}

BAD_PLANS = {
    "not_json": ("{", "expected JSON"),
    "format": (edited(format=99), "format 1"),
    "list": ("[]", "expected a JSON object"),
    "layers": (edited(layers=3), "expected a list under 'layers'; got int"),
    "tier": (
        edited(layers=[{**LAYER, "tier": "int2"}]),
        "tier of x: expected one of int8, int8_asym, fp16; got 'int2'",
    ),
    "role": (edited(layers=[{**LAYER, "role": "mlp"}]), "role of x: expected one of"),
    "field": (edited(layers=[{**LAYER, "gamma": 1}]), r"plan, layers\[0\]: expected fields among .*; got \['gamma'\]"),
    "missing": (edited(layers=[{"name": "x"}]), r"\['role'\] missing"),
    "beta": (edited(layers=[{**LAYER, "beta": "big"}]), "beta of x: expected a finite number; got 'big'"),
    "group_zero_point": (
        edited(layers=[{**LAYER, "tier": "int8_asym", "activation": "per_token_group"}]),
        "x: expected tier int8 or fp16 and delta 0 with per_token_group; got tier int8_asym",
    ),
    "group_delta": (
        edited(layers=[{**LAYER, "activation": "per_token_group", "delta": 0.5}]),
        "got tier int8, delta 0.5",
    ),
    "twice": (edited(layers=[LAYER, LAYER]), "expected each layer once; got x repeated"),
    "half": (edited(half_dtype="float8"), "half_dtype: expected one of bfloat16, float16"),
    "unknown": (edited(extra=1), "got \\['extra'\\]"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plans(case):
    text, message = BAD_PLANS[case]
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


def test_unknown_layer_lists_the_known_ones():
    with pytest.raises(PlanError, match=r"expected a layer among layers\.0\.qkv.*got 'layers\.7\.qkv'"):
        PLAN.layer("layers.7.qkv")


def test_config_patterns_last_match_wins():
    config = QuantConfig(tiers={"fc2": "fp16", "*.0.*": "int8_asym", "head": "skip"})
    tiers = [
        config.tier_of(n, r) for n, r in (("a.1.fc2", "fc2"), ("a.0.fc2", "fc2"), ("b", "head"), ("a.1.qkv", "qkv"))
    ]
    assert tiers == ["fp16", "int8_asym", "skip", "int8"]


@pytest.mark.parametrize(
    "fields", [{"tier": "int4"}, {"tiers": {"fc1": "int4"}}, {"activation": "dynamic"}, {"attention": 8}, {"color": 1}]
)
def test_bad_configurations(fields):
    with pytest.raises(PlanError, match="expected"):
        QuantConfig.from_dict(fields)


def test_diff_names_what_changed():
    tier = dataclasses.replace(PLAN.layers[0], tier="fp16", beta=0.5)
    other = Plan(
        (BlockPlan("layers.0", "float"), BlockPlan("layers.1")),
        (tier, *PLAN.layers[1:-1], LayerPlan("pooler", "linear")),
        "float16",
    )
    assert PLAN.diff(PLAN) == ()
    assert [str(change) for change in PLAN.diff(other)] == [
        "plan: half_dtype bfloat16 -> float16",
        "layers.0.qkv: tier int8 -> fp16",
        "layers.0.qkv: beta 0.0 -> 0.5",
        "head: tier int8_asym -> float",
        "layers.0: attention int8 -> float",
        "pooler: tier float -> int8",
        "layers.1: tier float -> replaced",
    ]
    back = {(c.name, c.option, c.after, c.before) for c in other.diff(PLAN)}
    assert back == {(c.name, c.option, c.before, c.after) for c in PLAN.diff(other)}


def small_vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False)


def test_a_plan_is_applied_exactly():
    plan = vqvit.quantize_(small_vit()).plan
    assert vqvit.quantize_(small_vit(), plan).plan == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [{"name": "layers.4"}]}, r"expected a block of this model \(layers\.0\); got 'layers.4'"),
        ({"blocks": [{"name": "layernorm"}]}, "expected layernorm to be a transformer block; it is not: no"),
        ({"layers": []}, r"expected every layer of block layers\.0; layers\.0\.qkv"),
        (
            {"layers": [{"name": "layers.0.qvk", "role": "qkv"}]},
            r"a layer of this model \(layers\.0\.qkv, .*, embeddings.*projection\); got 'layers\.0\.qvk'",
        ),
        (
            {"layers": [{"name": f"layers.0.{r}", "role": "fc1"} for r in ("qkv", "attn_out", "fc1", "fc2")]},
            r"expected role qkv of layers\.0\.qkv; got 'fc1'",
        ),
        ({"blocks": []}, r"expected a layer of this model .*layers\.0\.mlp\.fc1.*; got 'layers\.0\.qkv'"),
    ],
)
def test_plans_that_do_not_fit(change, message):
    model = small_vit()
    plan = json.loads(vqvit.quantize_(small_vit()).plan.to_json())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PlanError, match=message):
        vqvit.quantize_(model, Plan.from_json(json.dumps({**plan, **change})))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
