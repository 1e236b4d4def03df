"""No quantized module claims a gradient that it does not have: its result requires none, and a warning says so."""

import warnings

import pytest
import torch
import transformers
from torch import nn

import vqvit

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}

CONFIGS = {
    "default": {},
    "asymmetric": {"tier": "int8_asym", "activation": "per_token_asym"},
    "compensated": {"compensations": {"*": "full"}},
    "float_attention": {"attention": "float"},
    "layers_alone": {"tiers": {"fc2": "skip"}},
}


def vit(**options) -> nn.Module:
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=128)).eval()
    vqvit.quantize_(model, vqvit.QuantConfig(**options))
    return model


@pytest.mark.parametrize("config", CONFIGS)
def test_the_result_requires_no_gradient_and_a_warning_says_so(config):
    model, pixels = vit(**CONFIGS[config]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        want = model(pixels).logits
    pixels.requires_grad_()
    with pytest.warns(UserWarning, match=r"a quantized module has no gradient, and its result requires none"):
        logits = model(pixels).logits
    assert not logits.requires_grad and torch.equal(logits, want)
    with pytest.raises(RuntimeError, match="does not require grad"):
        logits.sum().backward()


def test_training_mode_claims_no_gradient_either():
    model = vit().train()
    with pytest.warns(UserWarning, match="a quantized module has no gradient"):
        loss = model(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
    assert not loss.requires_grad


def test_a_float_head_still_trains():
    model = vit(tiers={"head": "skip"})
    with pytest.warns(UserWarning, match="a quantized module has no gradient"):
        model(torch.randn(2, 3, 32, 32)).logits.sum().backward()
    assert model.classifier.weight.grad.norm() > 0 and model.vit.embeddings.cls_token.grad is None


def test_inference_is_quiet():
    model = vit()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 32, 32))
