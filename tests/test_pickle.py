"""A quantized model goes through pickle, `torch.save` and `copy.deepcopy` with every bit."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit.rewriter import plan_of

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}

MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, intermediate_size=128)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2)),
    "beit": lambda: transformers.BeitModel(transformers.BeitConfig(**SMALL, intermediate_size=128)),
}


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("keep_float", [False, True])
@pytest.mark.parametrize("way", [pickled, saved, copy.deepcopy])
@pytest.mark.parametrize("name", MODELS)
def test_every_bit_survives(name, way, keep_float):
    model, pixels = MODELS[name]().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        in_float = model(pixels)[0]
        vqvit.quantize_(model, keep_float=keep_float)
        want = model(pixels)[0]
        back = way(model)
        assert torch.equal(back(pixels)[0], want) and plan_of(back) == plan_of(model)
        assert [type(module) for module in back.modules()] == [type(module) for module in model.modules()]
        if keep_float:
            assert torch.equal(vqvit.restore(back)(pixels)[0], in_float)
            assert torch.equal(model(pixels)[0], want)
