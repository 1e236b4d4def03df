"""Quantizing leaves nothing behind: no inference tensors in caches, no modes, no drawn random numbers."""

import functools

import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit.rewriter import make_plan

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=10))


@functools.lru_cache(maxsize=4)
def table(size: int) -> torch.Tensor:
    """As model code does it: whoever asks first decides what kind of tensor all later callers get."""
    return torch.linspace(0.5, 1.5, size)


class Scaled(transformers.ViTForImageClassification):
    """Multiplies its pixels by a table that all models of the process share."""

    def forward(self, pixel_values, **kwargs):
        return super().forward(pixel_values * table(pixel_values.shape[-1]) * self.factor, **kwargs)


def scaled() -> nn.Module:
    model = Scaled(transformers.ViTConfig(**SMALL, num_labels=10))
    model.factor = nn.Parameter(torch.ones(32))
    return model


def hooked_table() -> nn.Module:
    """A block whose attention keeps a table of its own."""
    model = vit()
    for layer in model.vit.layers:
        attention = layer.attention
        forward = type(attention).forward

        def kept(x, *args, attention=attention, forward=forward, **kwargs):
            if not hasattr(attention, "kept"):
                attention.kept = torch.ones(x.shape[-1])
            return forward(attention, x * attention.kept, *args, **kwargs)

        attention.forward = kept
    return model


def trains(model: nn.Module) -> bool:
    pixels = torch.randn(2, 3, 32, 32, requires_grad=True)
    model.train()(pixels).logits.sum().backward()
    return bool(pixels.grad.norm() > 0)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_cached_table_serves_models_that_train(calibrated):
    table.cache_clear()
    calibration = [torch.randn(8, 3, 32, 32)] if calibrated else None
    vqvit.quantize_(scaled().eval(), calibration=calibration)
    assert table.cache_info().currsize == 1 and not table(32).is_inference()
    assert trains(scaled())


def test_a_module_that_keeps_a_table_still_trains():
    model = hooked_table().eval()
    make_plan(model, vqvit.QuantConfig())
    assert not model.vit.layers[0].attention.kept.is_inference() and trains(model)


@pytest.mark.parametrize("name", ["beit", "swin"])
def test_other_models_of_the_process_train(name):
    if name == "beit":
        config = transformers.BeitConfig(**SMALL, use_relative_position_bias=True)
        kind = transformers.BeitForImageClassification
    else:
        config = transformers.SwinConfig(
            image_size=32, patch_size=2, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4
        )
        kind = transformers.SwinForImageClassification
    vqvit.quantize_(kind(config).eval(), min_speedup=1e-9, sample=torch.randn(2, 3, 32, 32))
    assert trains(kind(config))


def test_modes_of_each_module_survive_a_plan_and_a_failure():
    model = vit().train()
    model.vit.layers[1].eval()
    model.vit.layers[0].mlp.fc1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    make_plan(model, vqvit.QuantConfig())
    assert {name: module.training for name, module in model.named_modules()} == modes
    batch = torch.randn(8, 3, 48, 48)  # of another size than the model's
    with pytest.raises(ValueError, match="Input image size"):
        vqvit.quantize_(model, vqvit.QuantConfig(activation="static", cls_only="off"), calibration=[batch])
    assert {name: module.training for name, module in model.named_modules()} == modes
    vqvit.quantize_(model)
    assert not any(module.training for module in model.modules())


class Drawing(transformers.ViTForImageClassification):
    """Draws a random number at each call, as models that sample patches do."""

    def forward(self, pixel_values, **kwargs):
        return super().forward(pixel_values + 0 * torch.rand(1), **kwargs)


@pytest.mark.parametrize("calibrated", [False, True])
def test_no_random_number_is_drawn(calibrated):
    model = Drawing(transformers.ViTConfig(**SMALL, num_labels=10)).eval()
    calibration = [torch.randn(8, 3, 32, 32)] if calibrated else None
    before = torch.get_rng_state()
    vqvit.quantize_(model, calibration=calibration)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_stay_as_they_were():
    model = vit()
    assert torch.is_grad_enabled()
    vqvit.quantize_(model)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
