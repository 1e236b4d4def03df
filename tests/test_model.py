"""Whole models: quantize, run, save, load, restore, on the families of transformers and on plain modules."""

import copy

import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit import families
from vqvit.nn import EncoderBlock, QuantLinear, QuantModule
from vqvit.nn.block import fold_equalizer
from vqvit.nn.linear import UncalibratedError
from vqvit.rewriter import apply_plan, make_plan, quantized_modules

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


def deit() -> nn.Module:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL, num_labels=10))


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**{**SMALL, "mlp_ratio": 2}, layerscale_value=0.3)
    return transformers.Dinov2Model(config)


FAMILIES = {"vit": vit, "deit": deit, "dinov2": dinov2}

CONFIGS = {
    "default": vqvit.QuantConfig(),
    "asymmetric": vqvit.QuantConfig(tier="int8_asym", activation="per_token_asym"),
    "static": vqvit.QuantConfig(activation="static"),
    "grouped": vqvit.QuantConfig(activations={"attn_out": "per_token_group", "fc2": "per_token_group"}),
    "grouped_everywhere": vqvit.QuantConfig(activation="per_token_group"),
    "per_tensor": vqvit.QuantConfig(per_channel=False, equalize=False),
    "mixed": vqvit.QuantConfig(tiers={"fc2": "fp16", "patch_embed": "fp16", "*.0.qkv": "int8_asym"}, attention="float"),
    "static_mixed": vqvit.QuantConfig(activation="static", tiers={"fc1": "int8_asym", "fc2": "fp16", "head": "skip"}),
}


@pytest.fixture(params=FAMILIES)
def model(request) -> nn.Module:
    """A float model whose norms, biases and layer scales are not the constants of initialisation."""
    torch.manual_seed(0)
    built = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "token" not in name:
                parameter.mul_(2)
    return built


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32)


def output(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result = model(images)
    return result.logits if "logits" in result else result.last_hidden_state


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("config", CONFIGS)
def test_quantized_model_is_close_and_reloads_bit_for_bit(model, images, config, tmp_path):
    want = output(model, images)
    vqvit.quantize_(model, CONFIGS[config], calibration=[images])
    got = output(model, images)
    assert 0 < relative_error(got, want) < 0.06
    vqvit.save(model, tmp_path / "checkpoint")
    loaded = vqvit.load(tmp_path / "checkpoint")
    assert torch.equal(output(loaded, images), got)


def test_every_block_is_replaced_and_no_float_weight_stays(model):
    report = vqvit.quantize_(model)
    assert {r.status for r in report.layers} == {"int8"}
    blocks = [m for m in model.modules() if isinstance(m, EncoderBlock)]
    assert len(blocks) == 2
    matrices = [t for t in (*model.parameters(), *model.buffers()) if t.dim() >= 2 and t.dtype != torch.int8]
    assert all("token" in n or "position" in n for n, p in model.named_parameters() if p.dim() >= 2)
    assert sum(t.numel() for t in matrices) < 3 * 64 * 40  # position and class tokens
    assert all(p.is_meta for _, m in quantized_modules(model) for p in m.original[0].parameters())


def test_backends_agree_on_a_whole_model(model, images):
    vqvit.quantize_(model)
    chosen = output(model, images)
    with vqvit.backend("reference"):
        assert torch.equal(output(model, images), chosen)


def test_restore_with_weights_is_exact(model, images):
    original, want = copy.deepcopy(model), output(model, images)
    vqvit.quantize_(model)
    vqvit.restore(model, original.state_dict())
    assert torch.equal(output(model, images), want)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_restore_keeps_float(model, images):
    want = output(model, images)
    vqvit.quantize_(model, keep_float=True)
    assert torch.equal(output(vqvit.restore(model), images), want)


def test_restore_dequantizes(model, images):
    want = output(model, images)
    vqvit.quantize_(model)
    error = relative_error(output(vqvit.restore(model), images), want)
    assert 0 < error < 0.05
    with pytest.raises(vqvit.PlanError, match="expected a quantized model"):
        vqvit.restore(model)


def test_restore_without_a_weight(model):
    vqvit.quantize_(model)
    with pytest.raises(ValueError, match="restore: expected weights for"):
        vqvit.restore(model, {})


def test_hidden_states_are_still_collected(model, images):
    with torch.inference_mode():
        want = model(images, output_hidden_states=True).hidden_states
        vqvit.quantize_(model)
        got = model(images, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 3
    assert all(relative_error(g, w) < 0.05 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation, images):
    model = vit().eval()
    model.set_attn_implementation(implementation)
    want = output(model, images)
    vqvit.quantize_(model)
    assert relative_error(output(model, images), want) < 0.05


def test_attention_mask_and_probabilities_are_refused(images):
    model = vit().eval()
    vqvit.quantize_(model)
    block = next(m for m in model.modules() if isinstance(m, EncoderBlock))
    with pytest.raises(ValueError, match="expected no attention or head mask"):
        block(torch.randn(1, 5, 64), torch.zeros(1, 1, 5, 5))
    with pytest.raises(ValueError, match="expected output_attentions=False"):
        block(torch.randn(1, 5, 64), output_attentions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, images):
    model = vit().eval()
    want = output(model, images)
    model.to(dtype)
    vqvit.quantize_(model)
    got = output(model, images.to(dtype))
    assert got.dtype == dtype and relative_error(got.float(), want) < 0.1


def test_casting_a_quantized_model_keeps_scales(images):
    model = vit().eval()
    vqvit.quantize_(model)
    want = output(model, images)
    scales = {n: b.clone() for n, b in model.named_buffers() if n.endswith("scale") and b is not None}
    model.bfloat16()
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in scales.items())
    assert relative_error(output(model, images.bfloat16()).float(), want) < 0.1


def test_deepcopy_and_state_dict(model, images):
    vqvit.quantize_(model)
    want = output(model, images)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, images), want)
    state = model.state_dict()
    assert all(t.dim() == 2 for n, t in state.items() if n.endswith("codes"))
    twin.load_state_dict(state)
    assert torch.equal(output(twin, images), want)


class TimmBlock(nn.Module):
    """A block with timm's names: fused qkv, `proj`, `ls1` that may be Identity."""

    def __init__(self, dim: int, heads: int, post_norm: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.attn.num_heads = heads
        self.attn.q_norm = nn.Identity()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()
        self.post_norm = post_norm

    def attend(self, x):
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.attn.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        if self.post_norm:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp.fc2(self.mlp.act(self.mlp.fc1(x))))
        x = x + self.ls1(self.attend(self.norm1(x)))
        return x + self.ls2(self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x)))))


def test_timm_names(tmp_path):
    model = nn.Sequential(TimmBlock(48, 3), TimmBlock(48, 3)).eval()
    x = torch.randn(2, 10, 48)
    want = model(x)
    vqvit.quantize_(model)
    assert all(isinstance(m, EncoderBlock) for m in model)
    got = model(x)
    assert relative_error(got, want) < 0.03
    vqvit.save(model, tmp_path / "ck")
    with pytest.raises(vqvit.CheckpointError, match=r"expected load\(\.\.\., model=\.\.\.\) for the class Sequential"):
        vqvit.load(tmp_path / "ck")
    with torch.device("meta"):
        skeleton = nn.Sequential(TimmBlock(48, 3), TimmBlock(48, 3))
    assert torch.equal(vqvit.load(tmp_path / "ck", skeleton)(x), got)


def test_a_block_of_another_order_keeps_its_structure():
    model = nn.Sequential(TimmBlock(48, 3, post_norm=True)).eval()
    x = torch.randn(2, 10, 48)
    want = model(x)
    report = vqvit.quantize_(model)
    skipped = [r for r in report.layers if r.status == "skipped"]
    assert [r.name for r in skipped] == ["0"] and "not a pre-LayerNorm block" in skipped[0].reason
    assert type(model[0]) is TimmBlock and sum(isinstance(m, QuantLinear) for m in model.modules()) == 4
    assert relative_error(model(x), want) < 0.05


def test_a_block_with_query_key_norm_keeps_its_structure():
    block = TimmBlock(48, 3)
    block.attn.q_norm = nn.LayerNorm(16)
    report = vqvit.quantize_(nn.Sequential(block))
    assert any("query-key normalisation (attn.q_norm)" in r.reason for r in report.layers)


def test_shared_weights_stay_float():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    report = vqvit.quantize_(nn.Sequential(first, second, nn.Linear(8, 4)))
    reasons = {r.name: r.reason for r in report.layers}
    assert reasons["0"] == reasons["1"] == "its weight is shared with another layer" and reasons["2"] == ""


def test_overlapping_convolution_is_no_patch_embedding():
    model = nn.Sequential(nn.Conv2d(3, 8, 7, stride=4, padding=3), nn.Flatten(), nn.Linear(8, 2))
    report = vqvit.quantize_(model)
    assert "stride is not its kernel" in {r.name: r.reason for r in report.layers}["0"]


@pytest.mark.parametrize("name", families.ACTIVATION_FUNCTIONS)
def test_activations_are_identified_by_value(name):
    assert families.identify_activation(families.ACTIVATION_FUNCTIONS[name]) == name


def test_unknown_activation():
    with pytest.raises(families.NotABlock, match=r"activation Tanh .known: gelu"):
        families.identify_activation(nn.Tanh())


def test_equalizer_keeps_the_function():
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 50, bias=False)
    nn.init.normal_(norm.weight)
    norm.weight.data[3] *= 30
    gamma, beta, weight = fold_equalizer(norm.weight.data, norm.bias.data, linear.weight.data)
    folded = copy.deepcopy(norm)
    folded.weight.data, folded.bias.data = gamma, beta
    x = torch.randn(9, 32)
    torch.testing.assert_close(folded(x) @ weight.t(), linear(norm(x)), rtol=1e-5, atol=1e-5)
    assert gamma.abs().max() / gamma.abs().median() < norm.weight.abs().max() / norm.weight.abs().median()


def test_equalizer_saves_a_model_with_outlier_channels(images):
    """LayerNorm channels x30 with the next weight's columns divided: same function, naive INT8 suffers."""
    model = vit().eval()
    with torch.no_grad():
        for layer in model.vit.layers:
            for norm, linears in (
                (layer.layernorm_before, [layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj]),
                (layer.layernorm_after, [layer.mlp.fc1]),
            ):
                norm.weight[:3] *= 30
                norm.bias[:3] *= 30
                for linear in linears:
                    linear.weight[:, :3] /= 30
    want = output(model, images)
    errors = {}
    for equalize in (False, True):
        quantized = copy.deepcopy(model)
        vqvit.quantize_(quantized, vqvit.QuantConfig(equalize=equalize))
        errors[equalize] = relative_error(output(quantized, images), want)
    assert errors[True] < 0.5 * errors[False]


def test_static_scales_need_calibration(images):
    model = vit().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vqvit.CalibrationError, match="expected batches for the static activation scales of 9 layers"):
        vqvit.quantize_(model, vqvit.QuantConfig(activation="static"))
    bad = {
        "expected at least one batch; got none": [],
        "expected a tensor, a dict of model inputs": ["images"],
        "expected finite images; got NaN or Inf": [torch.full((1, 3, 32, 32), torch.nan)],
        "Input image size": [torch.randn(8, 3, 48, 48)],
    }
    for message, batches in bad.items():
        with pytest.raises(ValueError, match=message):
            vqvit.quantize_(model, vqvit.QuantConfig(activation="static"), calibration=batches)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_uncalibrated_layer_says_so(images):
    model = vit().eval()
    plan, _ = make_plan(model, vqvit.QuantConfig(activation="static"))
    apply_plan(model, plan)
    with pytest.raises(
        UncalibratedError, match=r"layers\.0\.qkv: expected a calibrated static activation scale; got none"
    ):
        output(model, images)


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: {"pixel_values": x}, lambda x: (x, torch.zeros(8, dtype=torch.long))]
)
def test_calibration_batches(images, make):
    model = vit().eval()
    vqvit.quantize_(model, vqvit.QuantConfig(activation="static"), calibration=iter([make(images)]))
    assert all(
        m.input_scale is not None
        for m in model.modules()
        if isinstance(m, QuantLinear) and m.plan.activation == "static"
    )


def test_weights_with_nan_leave_the_model_unchanged():
    model = vit().eval()
    model.vit.layers[1].mlp.fc2.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.fc2: expected finite weights; got NaN or Inf"):
        vqvit.quantize_(model)
    assert not any(isinstance(m, QuantModule) for m in model.modules())


def test_quantizing_twice_and_nothing_to_quantize():
    model = vit().eval()
    vqvit.quantize_(model)
    with pytest.raises(vqvit.PlanError, match=r"expected a float model; .* is quantized already"):
        vqvit.quantize_(model)
    with pytest.raises(vqvit.PlanError, match="expected a model with layers to quantize; got none"):
        vqvit.quantize_(nn.Sequential(nn.ReLU()))


def test_inner_dimension_over_the_accumulator_bound():
    with pytest.raises(
        ValueError, match=r"0: expected at most 133144 input features \(int32 accumulator\); got 133145"
    ):
        vqvit.quantize_(nn.Sequential(nn.Linear(133145, 1)))
