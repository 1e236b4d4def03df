"""Layers that add terms of the residual codes: formula, place in a block, checkpoints, refusals (numerics §6)."""

import copy

import pytest
import torch
from test_qat import logits, relative_error
from test_qat import model as model

import vqvit
from vqvit import backends, families, ops, reference
from vqvit.nn import Codes, CompensatedLinear
from vqvit.nn.block import make_linear
from vqvit.nn.fused_block import runs_in_one_call
from vqvit.plan import LayerPlan, PlanError, QuantConfig

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ("paper", "activation", "weight", "full")
BACKENDS = [name for name in ("reference", "cpu", "triton") if backends.unavailable(name) is None]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 16, 16)


def layer_of(mode: str, **options) -> tuple[CompensatedLinear, torch.Tensor, torch.Tensor]:
    """A layer of 70 inputs and 9 outputs, its float weight and bias."""
    weight, bias = torch.randn(9, 70), torch.randn(9)
    layer = make_linear(LayerPlan("layer", "fc1", compensation=mode, **options), weight, bias, torch.bfloat16)
    if options.get("activation") == "static":
        layer.input_scale = torch.tensor(0.03)
    layer.pack_()
    return layer, weight, bias


@pytest.mark.parametrize("activation", ["per_token", "static"])
@pytest.mark.parametrize("mode", MODES)
def test_formula(mode, activation):
    """A B^T ≈ α_A α_B (Aq Bq + [R_A Bq + Aq R_B] / 254 + μ R_A R_B / 254²) in fp64, then the epilogue."""
    layer, weight, bias = layer_of(mode, activation=activation, mu=0.7)
    x, residual, scale = torch.randn(5, 70), torch.randn(5, 9), torch.randn(9)
    a = layer.quantize_input(x)
    rest = ops.quantize_residual(x, a.codes, a.scale)
    codes = layer.plain_codes()
    rest_b = reference.quantize_residual(weight, codes, layer.scale)
    ra_b, a_rb, ra_rb = reference.COMPENSATION_TERMS[mode]
    p, q, r, s = (t.double() for t in (a.codes, codes, rest, rest_b))
    acc = p @ q.t() + ra_b * (r @ q.t()) / 254 + a_rb * (p @ s.t()) / 254 + 0.7 * ra_rb * (r @ s.t()) / 254**2
    want = acc * a.scale.double()[:, None] * layer.scale.double() + bias.double()
    want = families.ACTIVATION_FUNCTIONS["relu"](want) * scale.double() + residual.double()
    got = layer(x, "relu", scale, residual)
    magnitude = (p.abs() @ q.t().abs()) * a.scale[:, None] * layer.scale + bias.abs()
    assert ((got - want).abs() <= 8 * 2**-24 * (magnitude * scale.abs() + residual.abs())).all()
    for name in BACKENDS:
        with vqvit.backend(name):
            assert torch.equal(layer(x, "relu", scale, residual), got)


def test_errors_fall_as_terms_are_added():
    x = torch.randn(64, 70)
    errors = {}
    for mode in ("none", *MODES):
        torch.manual_seed(1)
        layer, weight, bias = layer_of(mode)
        errors[mode] = relative_error(layer(x), torch.nn.functional.linear(x, weight, bias))
    assert errors["paper"] == pytest.approx(errors["none"], rel=0.05)  # second order
    assert max(errors["activation"], errors["weight"]) < 0.9 * errors["none"]
    assert errors["full"] < errors["none"] / 100


def test_what_the_modes_keep():
    for mode, holds, fuses in (
        ("paper", True, False),
        ("activation", False, False),
        ("weight", True, True),
        ("full", True, False),
    ):
        layer, weight, _ = layer_of(mode)
        assert (layer.residual is not None) == holds
        assert layer.fuses_input == fuses
        exact = mode in ("weight", "full")
        assert (relative_error(layer.float_weight(), weight) < 1e-4) == exact


def test_codes_are_enough_for_the_weight_term():
    layer, _, _ = layer_of("weight")
    x = torch.randn(5, 70)
    assert torch.equal(layer(layer.quantize_input(x)), layer(x))
    consumer = make_linear(LayerPlan("next", "fc2"), torch.randn(4, 9), None, torch.bfloat16)
    got = layer.forward_codes(layer.quantize_input(x), "gelu", consumer)
    assert isinstance(got, Codes)
    assert torch.equal(got.codes, consumer.quantize_input(layer(x, "gelu")).codes)


def test_other_codes_come_with_their_residual():
    layer, weight, bias = layer_of("full")
    scale = layer.scale * 1.5
    codes = torch.round(weight / scale[:, None]).to(torch.int8)
    with pytest.raises(ValueError, match="expected the residual codes of the new codes"):
        layer.assign_(codes, scale)
    layer.assign_(codes, scale, residual=reference.quantize_residual(weight, codes, scale))
    x = torch.randn(5, 70)
    assert relative_error(layer(x), torch.nn.functional.linear(x, weight, bias)) < 1e-4
    other, *_ = layer_of("activation")
    with pytest.raises(ValueError, match="expected no residual codes"):
        other.assign_(codes, scale, residual=codes)


def test_shapes():
    layer, _, _ = layer_of("full")
    assert layer(torch.randn(2, 3, 70)).shape == (2, 3, 9)
    assert layer(torch.randn(0, 70)).shape == (0, 9)
    with pytest.raises(ValueError, match="expected input"):
        layer(torch.randn(2, 71))


@pytest.mark.parametrize("mode", MODES)
def test_whole_model(model, images, mode, tmp_path):
    want = logits(model, images)
    plain = copy.deepcopy(model)
    vqvit.quantize_(plain)
    vqvit.quantize_(model, QuantConfig(compensations={"*": mode}))
    got = logits(model, images)
    linears = [m for m in model.modules() if isinstance(m, CompensatedLinear)]
    assert len(linears) == 10  # 2 blocks of 4, patch embedding, head
    assert not any(runs_in_one_call(m) for m in model.modules() if hasattr(m, "attn_out"))
    vqvit.save(model, tmp_path / "checkpoint")
    assert torch.equal(logits(vqvit.load(tmp_path / "checkpoint"), images), got)
    with vqvit.backend("reference"):
        assert torch.equal(logits(model, images), got)
    if mode == "full":
        assert relative_error(got, want) < relative_error(logits(plain, images), want) / 5
    else:
        assert 0 < relative_error(got, want) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"tier": "int8_asym"},
        {"tier": "fp16"},
        {"activation": "per_token_asym"},
        {"activation": "per_token_group"},
        {"bits": 4},
    ],
)
def test_refused(options):
    with pytest.raises(PlanError, match="expected tier int8, activation per_token or static and 8 bits"):
        LayerPlan("layer", "fc1", compensation="full", **options)


def test_exceptions_by_role():
    config = QuantConfig(compensations={"*": "weight", "head": "none"})
    assert config.compensation_of("encoder.0.fc1", "fc1") == "weight"
    assert config.compensation_of("classifier", "head") == "none"
    with pytest.raises(PlanError, match="compensation of 'fc1'"):
        QuantConfig(compensations={"fc1": "half"})
