"""Calibrated quantization of whole models: closer to the float model, deterministic, and whole or not at all."""

import copy

import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit import reconstruction
from vqvit.evaluate import evaluate
from vqvit.nn import EncoderBlock, QuantLinear
from vqvit.rewriter import quantized_modules

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 144,
    "image_size": 32,
    "patch_size": 8,
}
OUTLIERS, FACTOR = 3, 30.0


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=10))


def dinov2() -> nn.Module:
    fields = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
    return transformers.Dinov2Model(transformers.Dinov2Config(**fields, mlp_ratio=3, layerscale_value=0.5))


def plain() -> nn.Module:
    """No transformer blocks: a patch embedding, linears of which one runs on another's output, and an unused one."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.unused = nn.Conv2d(3, 24, 8, 8), nn.Linear(24, 24)
            self.up, self.down, self.head = nn.Linear(24, 96), nn.Linear(96, 24, bias=False), nn.Linear(24, 5)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))

    return Plain()


MODELS = {"vit": vit, "dinov2": dinov2, "plain": plain}


def spread(model: nn.Module) -> nn.Module:
    """Weights large enough that attention and GELU do something, norms and layer scales unlike their constants."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embeddings.pos" not in name:
                parameter.copy_(1.5 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return spread(MODELS[request.param]())


@pytest.fixture
def images() -> list[torch.Tensor]:
    """Smooth images: patches with few directions, as natural ones have."""
    coarse = torch.randn(48, 3, 8, 8)
    return list(nn.functional.interpolate(coarse, size=32, mode="bicubic").split(12))


def quantized(model, images=None, **options) -> nn.Module:
    result = copy.deepcopy(model)
    vqvit.quantize_(result, vqvit.QuantConfig(**options), images)
    return result


def sqnr(model, reference, batches) -> float:
    return evaluate(model, batches, reference=reference).sqnr_db


CONFIGS = {
    "per_token": {},
    "grouped": {"activations": {"attn_out": "per_token_group", "fc2": "per_token_group"}},
    "asymmetric": {"activation": "per_token_asym", "tier": "int8_asym"},
    "static": {"activation": "static"},
    "four_bits": {"bits": 4},
    "three_bits": {"bits": 3},
    "mixed": {"tiers": {"fc1": "fp16", "*.1.qkv": "fp16"}},
    "per_tensor": {"per_channel": False, "equalize": False},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_calibration_brings_a_vit_closer(images, config):
    """On images that were not used."""
    model = spread(vit())
    options, (test, *calibration) = CONFIGS[config], images
    nearest = quantized(model, calibration, rounding="nearest", **options)
    calibrated = quantized(model, calibration, **options)
    gain = sqnr(calibrated, model, [test]) - sqnr(nearest, model, [test])
    assert gain > (2.0 if options.get("bits") else 0.3), gain


def test_every_model_gains_on_its_calibration_images(model, images):
    nearest = quantized(model, images, rounding="nearest")
    calibrated = quantized(model, images, rounding="error_aware")
    assert sqnr(calibrated, model, images) > sqnr(nearest, model, images) + 0.3


def test_auto_means_error_aware_exactly_with_calibration_data(images):
    model = spread(vit())
    states = {
        name: quantized(model, data, rounding=rounding).state_dict()
        for name, data, rounding in (
            ("auto with", images, "auto"),
            ("error_aware", images, "error_aware"),
            ("auto without", None, "auto"),
            ("nearest with", images, "nearest"),
        )
    }

    def same(a, b):
        return all(torch.equal(tensor, states[b][name]) for name, tensor in states[a].items())

    assert same("auto with", "error_aware") and same("auto without", "nearest with")
    assert not same("error_aware", "nearest with")
    with pytest.raises(vqvit.CalibrationError, match="expected batches for rounding='error_aware'; got calibration"):
        vqvit.quantize_(model, vqvit.QuantConfig(rounding="error_aware"))


def test_outlier_channels_cost_nothing(images):
    """Channels of each LayerNorm thirty times larger, the next weight's columns as much smaller: numerics §3."""
    model, (test, *calibration) = spread(vit()), images
    worse = copy.deepcopy(model)
    with torch.no_grad():
        for block in worse.vit.layers:
            attention = block.attention
            pairs = (
                (block.layernorm_before, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.layernorm_after, (block.mlp.fc1,)),
            )
            for norm, linears in pairs:
                norm.weight[:OUTLIERS] *= FACTOR
                norm.bias[:OUTLIERS] *= FACTOR
                for linear in linears:
                    linear.weight[:, :OUTLIERS] /= FACTOR
    clean = sqnr(quantized(model), model, [test])
    assert sqnr(quantized(worse, equalize=False), model, [test]) < clean - 5
    assert abs(sqnr(quantized(worse), model, [test]) - clean) < 1
    calibrated = sqnr(quantized(model, calibration), model, [test])
    assert abs(sqnr(quantized(worse, calibration), model, [test]) - calibrated) < 1


def test_an_equaliser_changes_no_float_function(images):
    """Norms, the rows of v and the columns they meet change together: the float model that the codes stand for stays
    as near to the original as codes are.
    """
    model = spread(vit())
    calibrated = quantized(model, images, tiers={"head": "skip"})
    folded = [m for _, m in quantized_modules(calibrated) if isinstance(m, EncoderBlock)]
    norms = [block.layernorm_before.weight for block in model.vit.layers]
    assert any(not torch.equal(b.norm1_weight, norm) for b, norm in zip(folded, norms, strict=True))
    vqvit.restore(calibrated)
    assert sqnr(calibrated, model, images) > 35


def test_it_is_deterministic(model, images):
    first, second = (quantized(model, images).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_failure_leaves_the_model_as_it_was(images, monkeypatch):
    model = spread(vit())
    before = copy.deepcopy(model.state_dict())
    calls = []
    original = reconstruction.solve

    def fails_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("singular")
        return original(*args, **kwargs)

    monkeypatch.setattr(reconstruction, "solve", fails_at_the_third)
    with pytest.raises(RuntimeError, match="singular"):
        vqvit.quantize_(model, None, images)
    assert not list(quantized_modules(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_hook_and_no_observer_stays(model, images):
    calibrated = quantized(model, images)
    for name, module in calibrated.named_modules():
        assert not name or not (module._forward_pre_hooks or module._forward_hooks)
        assert not isinstance(module, QuantLinear) or module.observer is None


def test_a_layer_that_never_runs_keeps_its_codes(images):
    model = spread(plain())
    nearest, calibrated = quantized(model), quantized(model, images)
    assert torch.equal(calibrated.unused.plain_codes(), nearest.unused.plain_codes())
    assert not torch.equal(calibrated.up.plain_codes(), nearest.up.plain_codes())


def test_a_layer_that_runs_on_some_batches_only_is_refused(images):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.embed(x).mean((2, 3))
            return self.head(x) if len(x) > 4 else x

    with pytest.raises(vqvit.CalibrationError, match="expected head to run on every batch"):
        vqvit.quantize_(Sometimes(), None, [images[0], images[1][:2]])


def test_blocks_that_do_not_follow_each_other(images):
    """Something between two blocks: their inputs come from runs of the whole model."""
    model = spread(vit())
    inner = model.vit.layers[1]

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states, *args, **kwargs):
            return self.inner(hidden_states * 1.25, *args, **kwargs)

    model.vit.layers[1] = Between()
    test, *calibration = images
    gain = sqnr(quantized(model, calibration), model, [test]) - sqnr(quantized(model), model, [test])
    assert gain > 0.3


def test_the_preset_is_the_most_accurate(images):
    model, (test, *calibration) = spread(vit()), images
    preset = vqvit.QuantConfig.vqvit()
    best = copy.deepcopy(model)
    vqvit.quantize_(best, preset, calibration)
    assert sqnr(best, model, [test]) > sqnr(quantized(model), model, [test]) + 1
    assert vqvit.QuantConfig.vqvit(calibrated=False).rounding == "nearest"
