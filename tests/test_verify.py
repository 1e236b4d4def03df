"""`quantize_` ends with a run beside float: what breaks the model is undone by name, and nothing else is."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import vqvit
from vqvit.nn import EncoderBlock, QuantModule
from vqvit.plan import BlockPlan, LayerPlan, Plan

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {key: value for key, value in SMALL.items() if key not in ("image_size", "patch_size")} | {"vocab_size": 99}


class Net(nn.Module):
    """A patch embedding, a hidden layer and a head; subclasses read their parts in other ways."""

    image_size = 16

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.hidden, self.head = nn.Linear(32, 32), nn.Linear(32, 10)

    def features(self, pixels):
        return self.hidden(self.embed(pixels).flatten(2).mean(-1)).relu()

    def forward(self, pixels):
        return self.head(self.features(pixels))


class ReadsWeight(Net):
    def forward(self, pixels):
        return F.linear(self.features(pixels), self.head.weight, self.head.bias)


class ReadsKernelSize(Net):
    def forward(self, pixels):
        assert pixels.shape[-1] % self.embed.kernel_size[-1] == 0
        return super().forward(pixels)


class ReadsNormOfWeight(Net):
    """Of the replacement's empty weight it is zero, and nothing raises."""

    def forward(self, pixels):
        return super().forward(pixels) + self.head.weight.norm()


class RegisteredTwice(Net):
    def __init__(self):
        super().__init__()
        self.again = self.hidden

    def forward(self, pixels):
        return self.head(self.again(self.features(pixels)))


class HeldElsewhere(Net):
    """Calls a layer through a list, which is no place for a replacement."""

    def __init__(self):
        super().__init__()
        self.listed = [self.hidden]

    def forward(self, pixels):
        return self.head(self.listed[0](self.features(pixels)))


NETS = {
    "reads_weight": (ReadsWeight, "head", "the model fails with it: "),
    "reads_kernel_size": (ReadsKernelSize, "embed", "the model fails with it: "),
    "reads_norm_of_weight": (
        ReadsNormOfWeight,
        "head",
        r"the model's result differs from float by [\d.e+]+, more than",
    ),
    "registered_twice": (RegisteredTwice, "hidden", "the model fails with it: .*meta"),
    "held_elsewhere": (HeldElsewhere, "hidden", "the model fails with it: .*meta"),
}


def call(model: nn.Module, *args, **kwargs):
    torch.manual_seed(0)  # ViLT draws its patches
    with torch.no_grad():
        return model(*args, **kwargs)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", NETS)
def test_a_layer_that_its_model_reads_directly_is_undone(name):
    kind, culprit, why = NETS[name]
    model, pixels = kind().eval(), torch.randn(4, 3, 16, 16)
    want = call(model, pixels)
    report = vqvit.quantize_(model)
    undone = [r for r in report.layers if r.status == "skipped"]
    assert [r.name for r in undone] == [culprit] and re.match(f"undone: {why}", undone[0].reason)
    assert {r.name for r in report.layers if r.status == "int8"} == {"embed", "hidden", "head"} - {culprit}
    assert {layer.name for layer in report.plan.layers} == {"embed", "hidden", "head"} - {culprit}
    assert relative_error(call(model, pixels), want) < 0.05
    left = [m for m in model.modules() if isinstance(m, QuantModule)]
    assert len(left) == 2 and all(p.is_meta for m in left for p in m.original[0].parameters())
    assert re.search(r"relative error \S+ on a sample, 1 undone \(\d+\.\d s\)", str(report))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_fused_path_of_torch_transformer_encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 9, 32)
    want = call(model, x)
    with pytest.raises(vqvit.PlanError, match=r"expected layers that can be replaced; got none .*linear1: the"):
        vqvit.quantize_(model)
    assert torch.equal(call(model, x), want)
    whole = nn.Sequential(nn.Linear(32, 32), model).eval()
    want = call(whole, x)
    report = vqvit.quantize_(whole)
    assert [layer.name for layer in report.plan.layers] == ["0"]
    assert relative_error(call(whole, x), want) < 0.05


def mask2former() -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32, decoder_layers=2, encoder_layers=1,
        num_queries=5, num_attention_heads=4, dim_feedforward=64, encoder_feedforward_dim=64,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def swin_fields(patch: int) -> dict:
    return {
        "image_size": 32, "patch_size": patch, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    }  # fmt: skip


def flava() -> nn.Module:
    config = transformers.FlavaConfig(
        image_config=SMALL, text_config=TEXT, multimodal_config=TEXT, hidden_size=64, projection_dim=64
    )
    return transformers.FlavaModel(config)


def hiera() -> nn.Module:
    config = transformers.HieraConfig(image_size=[64, 64], embed_dim=32, depths=[1, 1, 2, 1])
    return transformers.HieraForImageClassification(config)


def beit() -> nn.Module:
    return transformers.BeitModel(transformers.BeitConfig(**SMALL, use_shared_relative_position_bias=True))


IMAGES = {"pixel_values": (2, 3, 32, 32)}
LARGER = {"pixel_values": (2, 3, 64, 64)}
WITH_TEXT = {**IMAGES, "input_ids": (2, 8), "attention_mask": (2, 8)}

MODELS = {
    "swin": (lambda: transformers.SwinModel(transformers.SwinConfig(**swin_fields(2))), IMAGES),
    "swinv2": (lambda: transformers.Swinv2Model(transformers.Swinv2Config(**swin_fields(2))), IMAGES),
    "hiera": (hiera, LARGER),
    "beit": (beit, IMAGES),
    "vilt": (lambda: transformers.ViltModel(transformers.ViltConfig(**SMALL, vocab_size=99)), WITH_TEXT),
    "flava": (flava, WITH_TEXT),
    "mask2former": (mask2former, LARGER),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_that_run_in_float_run_after_it(name):
    build, shapes = MODELS[name]
    model = build().eval()
    inputs = {key: torch.randn(shape) for key, shape in shapes.items() if key == "pixel_values"}
    if "input_ids" in shapes:
        inputs["input_ids"] = torch.randint(1, 99, shapes["input_ids"])
        inputs["attention_mask"] = torch.ones(shapes["attention_mask"], dtype=torch.long)
        inputs["attention_mask"][1, 5:] = 0
    want = call(model, **inputs)
    report = vqvit.quantize_(model)
    got = call(model, **inputs)
    bound = 0.3 if name == "mask2former" else 0.1  # its masks are thresholded between layers
    compared = [key for key, value in want.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert compared and all(relative_error(got[key], want[key]) < bound for key in compared)
    assert report.plan.layers and report.verified.startswith("relative error 0.")


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=10))


def deit() -> nn.Module:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL, num_labels=10))


def dinov2() -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**{**SMALL, "mlp_ratio": 2}))


@pytest.mark.parametrize("build", [vit, deit, dinov2])
def test_healthy_models_keep_every_layer_and_every_bit(build):
    model, pixels = build().eval(), torch.randn(2, 3, 32, 32)
    twin = copy.deepcopy(model)
    checked, unchecked = vqvit.quantize_(model), vqvit.quantize_(twin, verify=False)
    assert checked.plan == unchecked.plan and checked.layers == unchecked.layers
    assert checked.verified.startswith("relative error 0.0") and "undone" not in checked.verified
    assert unchecked.verified == "off on request" == unchecked.to_dict()["verified"]
    assert torch.equal(call(model, pixels)[0], call(twin, pixels)[0])


class Local(nn.Module):
    """A pre-LayerNorm block in which each token attends to itself alone: what a plan says is not probed."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj, self.attn.num_heads = nn.Linear(32, 96), nn.Linear(32, 32), 2
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        for linear in (self.attn.qkv, self.attn.proj):
            nn.init.normal_(linear.weight)

    def forward(self, x):
        x = x + self.attn.proj(self.attn.qkv(self.norm1(x))[..., 64:])
        return x + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm2(x))))


def test_a_plan_for_a_block_that_is_none_is_undone():
    model, x = nn.Sequential(Local(), nn.Linear(32, 32)).eval(), torch.randn(2, 9, 32)
    want = call(model, x)
    roles = [LayerPlan(f"0.{role}", role) for role in ("qkv", "attn_out", "fc1", "fc2")]
    report = vqvit.quantize_(model, Plan((BlockPlan("0"),), (*roles, LayerPlan("1", "linear"))))
    assert [layer.name for layer in report.plan.layers] == ["1"] and report.plan.blocks == ()
    undone = next(r for r in report.layers if r.status == "skipped")
    assert undone.name == "0" and "its result differs from float by" in undone.reason
    assert relative_error(call(model, x), want) < 0.05 and not isinstance(model[0], EncoderBlock)


def test_without_it_such_a_model_fails():
    model = ReadsWeight().eval()
    report = vqvit.quantize_(model, verify=False)
    assert report.verified == "off on request" and len(report.plan.layers) == 3
    with pytest.raises(RuntimeError):
        call(model, torch.randn(1, 3, 16, 16))


class Pair(nn.Module):
    """Takes what no sample can be made for."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a, b):
        return F.linear(self.first(a) + self.second(b), self.second.weight)


def test_where_no_sample_can_be_made_the_report_says_so():
    report = vqvit.quantize_(Pair().eval())
    assert report.verified.startswith("not possible: it cannot be run on a sample (TypeError: ")
    assert "Comparison with float: not possible" in str(report)


@pytest.mark.parametrize("activation", ["per_token", "static"])
def test_the_users_batch_is_the_sample_where_there_is_one(activation):
    model = Pair().eval()
    batch = {"a": torch.randn(8, 8), "b": torch.randn(8, 8)}
    want = call(model, **batch)
    report = vqvit.quantize_(model, vqvit.QuantConfig(activation=activation), calibration=[batch])
    assert [r.name for r in report.layers if r.reason.startswith("undone: ")] == ["second"]
    assert relative_error(call(model, **batch), want) < 0.05


def test_when_nothing_can_stay_the_model_is_as_it_was():
    model = ReadsWeight()
    model.embed, model.hidden = nn.Flatten(), nn.Identity()
    model.features, model.head = lambda pixels: pixels.flatten(1), nn.Linear(768, 10)
    model.default_cfg = {"input_size": (3, 16, 16)}
    before = dict(model.named_modules())
    with pytest.raises(vqvit.PlanError, match=r"expected layers that can be replaced; got none \(head: the"):
        vqvit.quantize_(model)
    assert dict(model.named_modules()) == before and all(module.training for module in model.modules())
    assert not any(parameter.is_meta for parameter in model.parameters())
