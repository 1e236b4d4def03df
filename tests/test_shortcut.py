"""The CLS shortcut: the same bits with and without it, refused where other tokens can be seen, and never in the way."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit import guard, shortcut
from vqvit.nn import EncoderBlock
from vqvit.nn.leading import REQUEST, request_leading_tokens
from vqvit.plan import Plan, PlanError, QuantConfig
from vqvit.rewriter import make_plan, plan_of

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 136,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}
DINO = {**SMALL, "mlp_ratio": 2}

SHORTENED = {
    "vit": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)), 1),
    "deit": (lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL)), 1),
    "deit_teacher": (lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL)), 2),
}
"""Models, and the leading tokens that their heads read."""

CONFIGS = {
    "default": {},
    "asymmetric": {"tier": "int8_asym", "activation": "per_token_asym"},
    "asymmetric_weights": {"tier": "int8_asym"},
    "static": {"activation": "static"},
    "grouped": {"activation": "per_token_group"},
    "per_tensor": {"per_channel": False, "equalize": False},
    "float_elsewhere": {"tiers": {"*.0.fc2": "fp16", "head": "skip", "patch_embed": "fp16"}},
}


def build(name: str) -> nn.Module:
    """The same float model at every call, with norms and biases that are not the constants of initialisation."""
    torch.manual_seed(0)
    model = SHORTENED[name][0]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "token" not in key:
                parameter.copy_(parameter * 2 + torch.randn_like(parameter) * 0.02)
    return model


def quantized(model: nn.Module, cls_only: str, **options) -> tuple[nn.Module, vqvit.Report]:
    calibration = [torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))]
    report = vqvit.quantize_(model, QuantConfig(cls_only=cls_only, **options), calibration.copy())
    return model, report


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32)


def call(model: nn.Module, *args, **kwargs):
    with torch.inference_mode():
        return model(*args, **kwargs)


def last_block(model: nn.Module) -> EncoderBlock:
    return [m for m in model.modules() if isinstance(m, EncoderBlock)][-1]


def computed_tokens(model: nn.Module, *args, **kwargs) -> int:
    """Tokens that the last block computes in a call: the rest of its output is NaN."""
    block, seen = last_block(model), []
    forward = block.forward

    def watch(*a, **kw):
        output = forward(*a, **kw)
        seen.append(output[0] if isinstance(output, tuple) else output)
        return output

    block.forward = watch
    try:
        call(model, *args, **kwargs)
    finally:
        del block.forward
    finite = seen[0].isfinite()
    assert torch.equal(finite, finite.all(-1, keepdim=True).all(0).expand_as(finite))
    count = int(finite[0, :, 0].sum())
    assert finite[0, :count, 0].all()
    return count


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SHORTENED)
def test_equal_bits(name, config, images):
    short, report = quantized(build(name), "auto", **CONFIGS[config])
    whole, off = quantized(build(name), "off", **CONFIGS[config])
    tokens = SHORTENED[name][1]
    assert computed_tokens(short, images) == tokens < computed_tokens(whole, images)
    got, want = call(short, images), call(whole, images)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert report.plan.shortened.leading_tokens == tokens and off.plan.shortened is None
    assert "behind its keys and values" in report.cls_only and off.cls_only == "not used: off on request"
    assert report.cls_only in str(report) and report.to_dict()["cls_only"] == report.cls_only


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_bits_in_half_precision_streams(dtype, images):
    short, _ = quantized(build("vit").to(dtype), "auto")
    whole, _ = quantized(build("vit").to(dtype), "off")
    assert computed_tokens(short, images.to(dtype)) == 1
    assert torch.equal(call(short, images.to(dtype)).logits, call(whole, images.to(dtype)).logits)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equal_bits_on_each_backend(backend, images):
    short, whole = quantized(build("deit_teacher"), "auto")[0], quantized(build("deit_teacher"), "off")[0]
    with vqvit.backend(backend):
        assert torch.equal(call(short, images).logits, call(whole, images).logits)


def test_an_image_that_poisons_its_tokens_does_so_with_the_shortcut(images):
    images[1, 0, 20, 20] = torch.nan
    short, whole = quantized(build("vit"), "auto")[0], quantized(build("vit"), "off")[0]
    got, want = call(short, images).logits, call(whole, images).logits
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], want[[0, 2]]) and got[[0, 2]].isfinite().all()


class MaxOfTokens(transformers.ViTForImageClassification):
    """A head in which NaN vanishes."""

    def forward(self, pixel_values, **kwargs):
        tokens = self.vit(pixel_values, **kwargs).last_hidden_state
        return {"logits": self.classifier(tokens.nan_to_num(-torch.inf).amax(1))}


class KeepsKeywords(transformers.ViTForImageClassification):
    def forward(self, pixel_values, **kwargs):
        return {"logits": self.classifier(self.vit(pixel_values).last_hidden_state[:, 0])}


class NoKeywords(transformers.ViTForImageClassification):
    def forward(self, pixel_values):
        return {"logits": self.classifier(self.vit(pixel_values).last_hidden_state[:, 0])}


class RunsTwice(transformers.ViTForImageClassification):
    def forward(self, pixel_values, **kwargs):
        first = self.vit(pixel_values, **kwargs).last_hidden_state[:, 0]
        return {"logits": self.classifier(first + self.vit(pixel_values, **kwargs).last_hidden_state[:, 0])}


class OwnOutput(transformers.ViTForImageClassification):
    def forward(self, pixel_values, **kwargs):
        return {"logits": {1, 2}}


class UsesNoBlock(transformers.ViTForImageClassification):
    def forward(self, pixel_values, **kwargs):
        return {"logits": self.classifier(self.vit.embeddings(pixel_values)[:, 0])}


class Fails(transformers.ViTForImageClassification):
    def forward(self, pixel_values, **kwargs):
        raise ValueError("expected two images")


def vit_config(**changes) -> transformers.ViTConfig:
    return transformers.ViTConfig(**{**SMALL, **changes})


REFUSED = {
    "sequence": (lambda: transformers.ViTModel(vit_config()), {}, "last_hidden_state depends on more than the first 2"),
    "mask_modelling": (
        lambda: transformers.ViTForMaskedImageModeling(vit_config(encoder_stride=8)), {}, "reconstruction depends on",
    ),
    "feature": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)), {}, "last_hidden_state depends"),
    "mean_of_patches": (
        lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINO)), {}, "logits depends on",
    ),
    "no_nan": (lambda: MaxOfTokens(vit_config()), {}, "logits depends on"),
    "keeps_keywords": (lambda: KeepsKeywords(vit_config()), {}, r"passes no keyword arguments on to vit\.layers\.1"),
    "no_keywords": (lambda: NoKeywords(vit_config()), {}, "NoKeywords takes no keyword arguments"),
    "twice": (lambda: RunsTwice(vit_config()), {}, r"vit\.layers\.1 runs more than once"),
    "output": (lambda: OwnOutput(vit_config()), {}, "logits is a set"),
    "idle": (lambda: UsesNoBlock(vit_config()), {}, "no replaced block runs"),
    "fails": (lambda: Fails(vit_config()), {}, "cannot be run on a random image .ValueError: expected two images"),
    "half": (lambda: build("vit"), {"tiers": {"*.1.fc1": "fp16"}}, r"vit\.layers\.1: its fc1 is fp16"),
    "float_attention": (lambda: build("vit"), {"attention": "float"}, r"vit\.layers\.1: its attention is float"),
    "no_block": (lambda: build("vit"), {"tiers": {"fc2": "skip"}}, "no block is replaced as a whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    make, options, reason = REFUSED[case]
    torch.manual_seed(0)
    model = make().eval()
    with pytest.raises(PlanError, match=f"cls_only: expected .* whose result needs leading tokens alone; .*{reason}"):
        vqvit.quantize_(model, QuantConfig(cls_only="on", **options))
    report = vqvit.quantize_(model, QuantConfig(**options))
    assert report.plan.shortened is None and report.cls_only.startswith("not used: ")
    assert re.search(reason, report.cls_only)
    assert request_leading_tokens not in model._forward_pre_hooks.values()


def test_a_hook_that_is_there_already_refuses():
    model = build("vit")
    handle = model.vit.layernorm.register_forward_hook(lambda *_: None)
    _, report = quantized(model, "auto")
    assert report.cls_only == "not used: a forward hook on vit.layernorm sees what the model computes"
    handle.remove()


def test_the_proof_leaves_the_float_model_as_it_was():
    model = build("vit").train()
    before = copy.deepcopy(model.state_dict())
    plan, _ = make_plan(model, QuantConfig())
    assert shortcut.prove(model, plan, None, (1,))[1] == 1
    assert model.training and all("forward" not in vars(m) for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Backbone(nn.Module):
    """A model without a configuration: only a sample says what it takes."""

    def __init__(self):
        super().__init__()
        self.classifier = build("vit")

    def forward(self, x, **kwargs):
        return self.classifier(x, **kwargs).logits


def test_a_sample_stands_in_for_a_configuration(images):
    report = vqvit.quantize_(Backbone().eval())
    assert "there is no sample to run it on" in report.cls_only
    model = Backbone().eval()
    report = vqvit.quantize_(model, calibration=[images])
    assert report.plan.shortened.name == "classifier.vit.layers.1" and computed_tokens(model, images) == 1


def test_weights_on_the_meta_device():
    plan, _ = make_plan(build("vit"), QuantConfig())
    with pytest.raises(shortcut.NotProven, match="on the meta device"):
        shortcut.prove(build("vit").to("meta"), plan, None, (1,))


@pytest.mark.parametrize("name", SHORTENED)
def test_hidden_states_are_complete_on_request(name, images):
    short, whole = quantized(build(name), "auto")[0], quantized(build(name), "off")[0]
    for _ in range(2):
        assert computed_tokens(short, images) == SHORTENED[name][1]  # also after hooks that collect hidden states came
        got = call(short, images, output_hidden_states=True).hidden_states
        want = call(whole, images, output_hidden_states=True).hidden_states
        assert len(got) == len(want) == 3 and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    short.config.output_hidden_states = True
    assert torch.equal(call(short, images).hidden_states[-1], want[-1])
    short.config.output_hidden_states = False
    assert computed_tokens(short, images) == SHORTENED[name][1]


def test_calls_that_do_not_come_through_the_whole_model_are_complete(images):
    model, _ = quantized(build("vit"), "auto")
    whole, _ = quantized(build("vit"), "off")
    assert torch.equal(call(model.vit, images).last_hidden_state, call(whole.vit, images).last_hidden_state)
    x = torch.randn(2, 17, 64)
    assert torch.equal(call(last_block(model), x), call(last_block(whole), x))
    assert torch.equal(call(last_block(model), x, **{REQUEST: True})[:, :1], call(last_block(whole), x)[:, :1])
    assert torch.equal(call(last_block(model), x[:, :1], **{REQUEST: True}), call(last_block(whole), x[:, :1]))


def test_arguments_that_could_ask_for_more_turn_it_off(images):
    model, _ = quantized(build("vit"), "auto")
    labels = torch.tensor([1, 2, 3])
    for kwargs in ({"labels": labels}, {"return_dict": True}, {"output_hidden_states": None}):
        assert computed_tokens(model, images, **kwargs) == 1
    assert computed_tokens(model, torch.randn(1, 3, 48, 48), interpolate_pos_encoding=True) == 1
    assert computed_tokens(model, images, None, True) == 17  # a positional True may be anything
    assert computed_tokens(model, images, use_cache=True) == 17
    with pytest.raises(TypeError, match=r"expected hidden states alone; got debug= \(str\)"):
        call(model, images, debug="all")


@pytest.mark.parametrize("part", ["vit", "vit.layernorm", "vit.layers.1", "vit.layers.1.fc2", "classifier"])
def test_hooks_of_a_user_see_what_they_would_without_it(part, images):
    short, whole = quantized(build("vit"), "auto")[0], quantized(build("vit"), "off")[0]
    seen = []
    handles = [m.get_submodule(part).register_forward_hook(lambda *a: seen.append(a[-1])) for m in (short, whole)]
    call(short, images), call(whole, images)
    got, want = (x if isinstance(x, torch.Tensor) else x[0] for x in seen)
    assert torch.equal(got, want)
    for handle in handles:
        handle.remove()
    assert computed_tokens(short, images) == 1


def test_a_hook_on_every_module_and_one_on_the_whole_model(images):
    model, _ = quantized(build("vit"), "auto")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert computed_tokens(model, images) == 17
    finally:
        handle.remove()
    model.register_forward_hook(lambda *_: None)  # sees the result, which is the same
    assert computed_tokens(model, images) == 1


def test_save_and_load_keep_the_choice(images, tmp_path):
    for mode, tokens in (("auto", 1), ("off", 17)):
        model, report = quantized(build("vit"), mode)
        loaded = vqvit.load(vqvit.save(model, tmp_path / mode))
        assert plan_of(loaded) == report.plan == Plan.from_json(report.plan.to_json())
        assert computed_tokens(loaded, images) == tokens
        assert torch.equal(call(loaded, images).logits, call(model, images).logits)
        assert call(loaded, images, output_hidden_states=True).hidden_states[-1].isfinite().all()


def test_copies_and_pickles_keep_it(images):
    model, _ = quantized(build("vit"), "auto")
    twin = copy.deepcopy(model)
    assert computed_tokens(twin, images) == computed_tokens(model, images) == 1
    assert pickle.loads(pickle.dumps(request_leading_tokens)) is request_leading_tokens


def test_restore_takes_it_away(images):
    model = build("vit")
    want = call(model, images).logits
    vqvit.quantize_(model, keep_float=True)
    assert request_leading_tokens in model._forward_pre_hooks.values()
    vqvit.restore(model)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    assert torch.equal(call(model, images).logits, want)


def test_a_plan_is_proved_again():
    plan = vqvit.quantize_(build("vit")).plan
    first, last = plan.blocks
    report = vqvit.quantize_(build("vit"), plan)
    assert report.plan == plan and "vit.layers.1 computes token 0 alone" in report.cls_only

    def refused(model: nn.Module, *blocks) -> str:
        with pytest.raises(PlanError) as error:
            vqvit.quantize_(model, dataclasses.replace(plan, blocks=blocks))
        return str(error.value)

    early = dataclasses.replace(first, leading_tokens=1), dataclasses.replace(last, leading_tokens=None)
    assert "leading_tokens in the last block, vit.layers.1; got vit.layers.0" in refused(build("vit"), *early)
    sequence = transformers.ViTForMaskedImageModeling(vit_config(encoder_stride=8))
    assert "reconstruction depends on more than the first token of vit.layers.1" in refused(sequence, first, last)
    whole = dataclasses.replace(plan, blocks=(first, dataclasses.replace(last, leading_tokens=None)))
    assert vqvit.quantize_(build("vit"), whole).cls_only == "not used: the plan has none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leading_tokens": 0}, "expected a positive integer or null; got 0"),
        ({"leading_tokens": True}, "expected a positive integer or null; got True"),
        ({"attention": "float"}, "expected vit.layers.1 all int8 with leading_tokens; its attention is float"),
    ],
)
def test_plans_that_cannot_be(change, message):
    plan = vqvit.quantize_(build("vit")).plan
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, blocks=(plan.blocks[0], dataclasses.replace(plan.blocks[1], **change)))


def test_plans_with_two_short_blocks_or_a_half_layer():
    plan = vqvit.quantize_(build("vit")).plan
    with pytest.raises(PlanError, match=r"leading_tokens in one block; got vit\.layers\.0, vit\.layers\.1"):
        dataclasses.replace(plan, blocks=tuple(dataclasses.replace(b, leading_tokens=1) for b in plan.blocks))
    half = tuple(dataclasses.replace(p, tier="fp16") if p.name.endswith("1.fc2") else p for p in plan.layers)
    with pytest.raises(PlanError, match="its fc2 is fp16"):
        dataclasses.replace(plan, layers=half)


def test_a_last_block_that_goes_back_to_float_takes_it_along(monkeypatch, images):
    model = build("vit")
    names = [name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer"]
    keep_faster = guard.keep_faster

    def speeds(model, replaced, sample, timer):
        return {name: guard.Speed(1.0, 2.0 if name == names[-1] else 0.5) for name in replaced}

    monkeypatch.setattr(guard, "_module_speeds", speeds)
    monkeypatch.setattr(guard, "keep_faster", lambda *a: keep_faster(*a, timer=lambda *_: {"float": 1.0, "int8": 0.5}))
    report = vqvit.quantize_(model, min_speedup=1.0, sample=images)
    assert report.cls_only == "not used: the last block stays float" and report.plan.shortened is None
    assert not model._forward_pre_hooks and call(model, images).logits.isfinite().all()


def test_the_float_side_of_a_comparison_is_not_asked(images):
    model = build("vit")
    vqvit.quantize_(model, keep_float=True)
    skeleton = guard.float_skeleton(model)
    assert not skeleton._forward_pre_hooks and request_leading_tokens in model._forward_pre_hooks.values()
    assert torch.equal(call(skeleton, images).logits, call(build("vit"), images).logits)


def test_compiled_in_one_graph(images):
    model, _ = quantized(build("vit"), "auto")
    want = call(model, images, output_hidden_states=True)  # transformers' hooks come before the compiler does
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(call(compiled, images).logits, want.logits)
    got = call(compiled, images, output_hidden_states=True).hidden_states
    assert all(torch.equal(g, w) for g, w in zip(got, want.hidden_states, strict=True))


def test_exported(images):
    model, _ = quantized(build("vit"), "auto")
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        assert torch.equal(program.module()(images).logits, model(images).logits)
    rows = {
        node.meta["val"].shape[0]
        for node in program.graph.nodes
        if str(node.target).startswith("vqvit.int8_linear.") and node.meta["val"].shape[-1] == 64
    }
    blocks = [node.meta["val"] for node in program.graph.nodes if "int8_encoder_block" in str(node.target)]
    if blocks:  # on CPU kernels
        assert rows == {3 * 16}  # patches
        assert [stream.shape[1] for stream in blocks] == [17] * (len(blocks) - 1) + [1]
    else:
        assert rows == {3 * 16, 3, 3 * 17}  # patches, the last block's CLS tokens, all
