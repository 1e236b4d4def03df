"""Training modules compute on the codes of the integer modules, and freeze into them."""

import copy

import pytest
import torch
import transformers
from torch import nn

from vqvit import qat
from vqvit.plan import PlanError, QuantConfig
from vqvit.rewriter import make_plan

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


def prepared(model: nn.Module, config: QuantConfig, images: torch.Tensor, **options) -> nn.Module:
    qat.prepare_(model, make_plan(model, config)[0], [images], qat.QatOptions(**options))
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_blend_goes_from_float_to_codes(model, images, config):
    want = logits(model, images)
    prepared(model, CONFIGS[config], images)
    quantized = relative_error(logits(model, images), want)
    set_blend(model, 0.5)
    half = relative_error(logits(model, images), want)
    set_blend(model, 0.0)
    assert relative_error(logits(model, images), want) < 1e-6  # the same function, rounded in another order
    assert 0 < half < quantized < 0.05


def test_a_failure_leaves_the_model_as_it_was(model, images):
    modules, want = [type(m) for m in model.modules()], logits(model, images)
    plan, _ = make_plan(model, QuantConfig(activation="static"))
    with pytest.raises(ValueError, match="calibration"):
        qat.prepare_(model, plan, [torch.full((1, 3, 16, 16), torch.nan)])
    assert [type(m) for m in model.modules()] == modules
    assert torch.equal(logits(model, images), want)


def test_prepare_refuses(model, images):
    plan, _ = make_plan(model, QuantConfig())
    with pytest.raises(PlanError, match="expected float32 parameters for training"):
        qat.prepare_(copy.deepcopy(model).half(), plan)
    qat.prepare_(model, plan)
    with pytest.raises(PlanError, match="quantized or prepared already"):
        qat.prepare_(model, plan)
