"""Training modules compute on the codes of the integer modules, and freeze into them."""

import copy
import dataclasses
import math

import pytest
import torch
import transformers
from test_model import FAMILIES, output
from torch import nn
from torch.nn import functional as F

import vqvit
from vqvit import ops, qat
from vqvit.nn import HalfLinear, QuantLinear
from vqvit.nn.linear import UncalibratedError
from vqvit.nn.patch_embed import cut_patches
from vqvit.plan import Plan, PlanError, QuantConfig
from vqvit.rewriter import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}

CONFIGS = {
    "default": QuantConfig(),
    "asymmetric": QuantConfig(tier="int8_asym", activation="per_token_asym"),
    "static": QuantConfig(activation="static"),
    "grouped": QuantConfig(activation="per_token_group"),
    "per_tensor": QuantConfig(per_channel=False, equalize=False),
    "mixed": QuantConfig(tiers={"fc2": "fp16", "*.0.qkv": "int8_asym"}, attention="float"),
    "static_everything": QuantConfig(activation="static", attention_scales="static", factorize_patches=True),
    "compensated": QuantConfig(compensations={"*": "full"}),
    "paper": QuantConfig(compensations={"*": "paper"}, activation="static"),
}


@pytest.fixture
def model() -> nn.Module:
    """A small ViT whose norms and biases are not the constants of initialisation."""
    built = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "token" not in name:
                parameter.mul_(2)
    return built


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 16, 16)


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def set_blend(model: nn.Module, blend: float) -> None:
    for layer in qat.fake_layers(model).values():
        layer.blend = blend


def prepared(model: nn.Module, config: QuantConfig | Plan, images: torch.Tensor, **options) -> None:
    plan = config if isinstance(config, Plan) else make_plan(model, config)[0]
    qat.prepare_(model, plan, [images], qat.QatOptions(**options))


class Recorder:
    """Keeps what a layer is fed; an observer, so that producers hand over floats."""

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        self.seen.append(x.clone())


def integer_inputs(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float inputs (M, K) of every int8 layer of an integer model, patches for the patch embedding."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for layer in layers.values():
        layer.observer = Recorder()
    logits(model, images)
    inputs = {name: layer.observer.seen[0] for name, layer in layers.items() if layer.observer.seen}
    for layer in layers.values():
        layer.observer = None
    for name, layer in layers.items():
        if layer.plan.role == "patch_embed":
            patches = cut_patches(name, images, layer.channels, layer.patch).flatten(0, -2)
            inputs[name] = patches if layer.equalizer is None else patches * layer.equalizer
    assert inputs.keys() == layers.keys()
    return inputs


@pytest.mark.parametrize("config", CONFIGS)
def test_blend_goes_from_float_to_codes(model, images, config):
    want = logits(model, images)
    prepared(model, CONFIGS[config], images)
    quantized = relative_error(logits(model, images), want)
    set_blend(model, 0.0)
    assert relative_error(logits(model, images), want) < 1e-6  # the same function, rounded in another order
    set_blend(model, 0.5)
    assert 0 < relative_error(logits(model, images), want) < 0.05
    assert 0 < quantized < 0.05


def perturb(model: nn.Module) -> None:
    """Stand in for training: move every parameter of a prepared model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


@pytest.mark.parametrize("learn", ["alpha", "beta"])
@pytest.mark.parametrize("config", CONFIGS)
def test_codes_are_those_of_the_integer_modules(model, images, config, learn):
    prepared(model, CONFIGS[config], images, learn=learn)
    perturb(model)
    fakes = qat.fake_layers(copy.deepcopy(model))
    qat.freeze_(model)
    for name, x in integer_inputs(model, images).items():
        layer, fake = model.get_submodule(name), fakes[name]
        weight, plain = fake.quantize_weight(), layer.codes
        plain = ops.unpack_weight(plain, *fake.weight.shape) if layer.packed else plain
        assert torch.equal(weight.codes, plain)
        assert torch.equal(weight.scale, layer.scale)
        assert same(weight.zero_point, layer.zero_point)
        got, want = fake.quantize_input(x), layer.quantize_input(x)
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scale, want.scale)
        assert same(got.zero_point, want.zero_point)
        assert layer.plan == fake.plan
    for name, fake in fakes.items():
        if isinstance(layer := model.get_submodule(name), HalfLinear):
            assert torch.equal(fake.quantize_weight().codes, layer.half_weight)


def test_spread_terms_of_the_plan_are_kept(model, images):
    """δ of fc2 too, which has none by default."""
    plan, _ = make_plan(model, QuantConfig())
    layers = [dataclasses.replace(p, delta=0.3, beta=-0.2) for p in plan.layers]
    prepared(model, dataclasses.replace(plan, layers=tuple(layers)), images)
    fakes = qat.fake_layers(copy.deepcopy(model))
    assert fakes["vit.layers.0.fc2"].delta.item() == pytest.approx(0.3)
    qat.freeze_(model)
    for name, x in integer_inputs(model, images).items():
        if model.get_submodule(name).plan.role != "patch_embed":
            assert torch.equal(fakes[name].quantize_input(x).codes, model.get_submodule(name).quantize_input(x).codes)


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("config", CONFIGS)
def test_products_are_those_of_the_integer_modules(model, images, config):
    """The accumulator is exact on both sides. What follows rounds at most six times in either, each by 2^-24 of
    Σ |terms|: scales, residual terms, μ, bias.
    """
    prepared(model, CONFIGS[config], images)
    fakes = qat.fake_layers(copy.deepcopy(model))
    qat.freeze_(model)
    for name, x in integer_inputs(model, images).items():
        layer, fake = model.get_submodule(name), fakes[name]
        with torch.no_grad():
            got = qat.FakeQuantLinear.forward(fake, x)
            want = type(layer).__mro__[1].forward(layer, x) if fake.base_plan.role == "patch_embed" else layer(x)
            magnitude = fake.quantize_input(x).values.abs() @ fake.quantize_weight().values.abs().t() + fake.bias.abs()
        assert ((got - want).abs() <= 12 * 2**-24 * magnitude * (1 + 2 / 254)).all(), name


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen_model_stays_within_quantization_error(model, images, config):
    """LayerNorm, softmax and activation round differently in the last bit; where that flips a code the result moves by
    a quantization step, never by more than quantization itself costs.
    """
    exact = logits(model, images)
    prepared(model, CONFIGS[config], images)
    trained = logits(model, images)
    report = qat.freeze_(model)
    assert report.plan == vqvit.rewriter.plan_of(model)
    assert relative_error(logits(model, images), trained) < 2 * relative_error(trained, exact)


@pytest.mark.parametrize("family", ["deit", "dinov2"])
def test_other_families(family):
    """Two heads on two tokens; layer scales and a backbone without a head."""
    model = FAMILIES[family]().eval()
    images = torch.randn(2, 3, 32, 32)
    exact = output(model, images)
    prepared(model, QuantConfig(), images)
    trained = output(model, images)
    assert len(model(images, output_hidden_states=True).hidden_states) == 3
    gradients = torch.autograd.grad(model(images)[0].square().sum(), qat_parameters(model))
    assert all(g.isfinite().all() for g in gradients)
    qat.freeze_(model)
    assert relative_error(output(model, images), trained) < 2 * relative_error(trained, exact)


def test_beta_form_starts_from_post_training_quantization(model, images):
    """Without calibration, β is the plan's, and the frozen model is the one that `quantize_` makes, to the last bit."""
    other = copy.deepcopy(model)
    plan, _ = make_plan(model, QuantConfig())
    qat.prepare_(model, plan, options=qat.QatOptions(learn="beta"))
    qat.freeze_(model)
    vqvit.quantize_(other, plan)
    assert torch.equal(logits(model, images), logits(other, images))


def test_calibration_chooses_scales_of_less_output_error(model, images):
    plan, _ = make_plan(model, QuantConfig())
    plain = copy.deepcopy(model)
    qat.prepare_(plain, plan)
    qat.prepare_(model, plan, [images])
    set_blend(plain, 0.0)
    for layer in qat.fake_layers(plain).values():
        layer.observer = Recorder()
    logits(plain, images)
    for name, start in qat.fake_layers(plain).items():
        start.blend, x = 1.0, start.observer.seen[0]
        start.observer = None
        exact = F.linear(x, start.weight, start.bias)
        with torch.no_grad():
            chosen = qat.FakeQuantLinear.forward(qat.fake_layers(model)[name], x)
            assert relative_error(chosen, exact) < relative_error(qat.FakeQuantLinear.forward(start, x), exact)


def test_retier_keeps_the_weight(model, images):
    prepared(model, QuantConfig(factorize_patches=True, compensations={"fc1": "full"}), images)
    name = "vit.layers.0.fc1"
    layer = qat.fake_layers(model)[name]
    weight = layer.weight.detach().clone()
    for tier, learned in (("int8_asym", 1), ("fp16", 0), ("int8", 2)):  # δ; nothing; log α and δ
        qat.retier_(model, name, tier)
        assert torch.equal(layer.weight, weight)
        assert len(layer.scale_parameters()) == learned
        assert qat.plan_of(model).layer(name).tier == tier
        assert qat.plan_of(model).layer(name).compensation == "none"
        assert layer(torch.randn(3, 32)).isfinite().all()
    patches = next(name for name in qat.fake_layers(model) if "patch" in name)
    original = model.get_submodule(patches).original[0]
    qat.retier_(model, patches, "fp16")
    assert torch.allclose(qat.fake_layers(model)[patches].weight, original.weight.flatten(1), rtol=1e-6, atol=0)
    with pytest.raises(PlanError, match="expected a layer among"):
        qat.retier_(model, "vit.layers.7.fc1", "fp16")
    trained = logits(model, images)
    qat.freeze_(model)
    assert isinstance(model.get_submodule(patches), HalfLinear)
    assert relative_error(logits(model, images), trained) < 0.01


def test_retier_refuses_what_has_no_kernel(model, images):
    prepared(model, QuantConfig(activation="per_token_group"), images)
    with pytest.raises(PlanError, match="per_token_group"):
        qat.retier_(model, "vit.layers.0.fc1", "int8_asym")
    assert qat.plan_of(model).layer("vit.layers.0.fc1").tier == "int8"


@pytest.mark.parametrize("config", ["default", "static_everything", "compensated"])
def test_a_snapshot_is_a_plan_and_a_state(model, images, config):
    original = copy.deepcopy(model)
    prepared(model, CONFIGS[config], images)
    perturb(model)
    qat.retier_(model, "vit.layers.1.fc2", "fp16")
    plan, state, want = qat.plan_of(model), model.state_dict(), logits(model, images)
    qat.prepare_(original, vqvit.Plan.from_json(plan.to_json()))
    if config == "static_everything":
        with pytest.raises(UncalibratedError, match="or load a state dict"):
            logits(original, images)
    original.load_state_dict(state)
    assert torch.equal(logits(original, images), want)
    assert qat.plan_of(original) == plan


@pytest.mark.parametrize("config", ["default", "static_everything", "compensated"])
def test_snapshots_load_into_the_model_they_are_of(model, images, config):
    prepared(model, CONFIGS[config], images)
    perturb(model)
    plan, want = qat.plan_of(model), logits(model, images)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in qat.fake_layers(model):
        qat.retier_(model, name, "fp16")
    perturb(model)
    other, trained = qat.plan_of(model), logits(model, images)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        qat.load_snapshot_(model, plan, {**state, "more": torch.zeros(1)})
    assert qat.plan_of(model) == other
    assert torch.equal(logits(model, images), trained)
    with pytest.raises(PlanError, match="expected a plan of 10 layers"):
        qat.load_snapshot_(model, dataclasses.replace(plan, layers=plan.layers[1:]), state)
    qat.load_snapshot_(model, plan, state)
    assert qat.plan_of(model) == plan
    assert torch.equal(logits(model, images), want)


@pytest.mark.parametrize("config", ["default", "static_everything", "compensated"])
def test_saved_models_keep_what_was_learned(model, images, config, tmp_path):
    prepared(model, CONFIGS[config], images)
    perturb(model)
    qat.freeze_(model)
    vqvit.save(model, tmp_path / "checkpoint")
    loaded = vqvit.load(tmp_path / "checkpoint")
    assert torch.equal(logits(loaded, images), logits(model, images))
    assert vqvit.rewriter.plan_of(loaded) == vqvit.rewriter.plan_of(model)


def test_learned_scales_recover(model, images):
    """From weight scales four times too large, LSQ on the scales alone finds back."""
    target = logits(model, images)
    prepared(model, QuantConfig(), images)
    parameters = [p for layer in qat.fake_layers(model).values() for p in layer.scale_parameters()]
    with torch.no_grad():
        for layer in qat.fake_layers(model).values():
            layer.log_alpha.add_(math.log(4))
    optimizer = torch.optim.Adam(parameters, 0.1)
    losses = []
    for _ in range(25):
        loss = qat.kl_to_float(model(images).logits, target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


def test_training_lowers_the_task_loss(model, images):
    labels = torch.arange(8) % 5
    prepared(model, CONFIGS["static_everything"], images)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    losses = []
    for _ in range(8):
        loss = qat.cross_entropy(model(images).logits, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in qat_parameters(model))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def qat_parameters(model: nn.Module) -> list[nn.Parameter]:
    layers, attentions = qat.fake_layers(model).values(), qat.fake_attentions(model).values()
    weights = [p for layer in layers for p in layer.weight_parameters()]
    return weights + [p for module in (*layers, *attentions) for p in module.scale_parameters()]


def test_failures_leave_the_model_as_it_was(model, images):
    modules, want = [type(m) for m in model.modules()], logits(model, images)
    plan, _ = make_plan(model, QuantConfig(activation="static"))
    with pytest.raises(ValueError, match="calibration"):
        qat.prepare_(model, plan, [torch.full((1, 3, 16, 16), torch.nan)])
    assert [type(m) for m in model.modules()] == modules
    assert torch.equal(logits(model, images), want)
    qat.prepare_(model, plan, [images])
    with torch.no_grad():
        qat.fake_layers(model)["vit.layers.1.fc2"].weight[0, 0] = torch.inf
    modules = list(model.modules())
    with pytest.raises(ValueError, match="expected finite weights"):
        qat.freeze_(model)
    assert list(model.modules()) == modules
    qat.unprepare_(model)
    assert torch.equal(logits(model, images), want)


def test_prepare_refuses(model):
    plan, _ = make_plan(model, QuantConfig())
    with pytest.raises(PlanError, match="expected float32 parameters for training"):
        qat.prepare_(copy.deepcopy(model).half(), plan)
    with pytest.raises(PlanError, match="expected a model prepared for training"):
        qat.freeze_(model)
    qat.prepare_(model, plan)
    with pytest.raises(PlanError, match="quantized or prepared already"):
        qat.prepare_(model, plan)
    with pytest.raises(ValueError, match="learn: expected one of alpha, beta"):
        qat.QatOptions(learn="gamma")
