"""A block as one op: used where its configuration is the common one, and then with the bits of its ops one by one."""

import copy
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vqvit
from vqvit.backends import cpu
from vqvit.nn import EncoderBlock, fused_block
from vqvit.nn import block as block_module

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def vit(**fields) -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, intermediate_size=128, **fields))


def dinov2(**fields) -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2, layerscale_value=0.3, **fields))


MODELS = {
    "gelu": vit,
    "gelu_tanh": lambda: vit(hidden_act="gelu_pytorch_tanh"),
    "quick_gelu": lambda: vit(hidden_act="quick_gelu"),
    "no_bias": lambda: vit(qkv_bias=False),
    "layer_scale": dinov2,
}

CONFIGURATIONS = {
    "plain": vqvit.QuantConfig(),
    "grouped": vqvit.QuantConfig.vqvit(calibrated=False),
    "grouped_fc2": vqvit.QuantConfig(activations={"fc2": "per_token_group"}),
}

OTHERS = {
    "asymmetric_weight": vqvit.QuantConfig(tiers={"fc1": "int8_asym"}),
    "asymmetric_input": vqvit.QuantConfig(activations={"fc2": "per_token_asym"}),
    "grouped_projection": vqvit.QuantConfig(activations={"qkv": "per_token_group"}),
    "half": vqvit.QuantConfig(tiers={"qkv": "fp16"}),
    "float_attention": vqvit.QuantConfig(attention="float"),
}


def quantized(name: str, config: vqvit.QuantConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose norms, biases and layer scales are not the constants of initialisation."""
    built = MODELS[name]().eval().to(dtype)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    vqvit.quantize_(built, config, verify=False)  # calls are counted
    return built


def blocks(model: nn.Module) -> list[EncoderBlock]:
    return [module for module in model.modules() if isinstance(module, EncoderBlock)]


def run(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images).last_hidden_state


@pytest.fixture
def calls(monkeypatch) -> list:
    """The blocks that ran as one op, in order."""
    seen, original = [], block_module.run_in_one_call

    def counted(block, x, leading_tokens):
        seen.append(block)
        return original(block, x, leading_tokens)

    monkeypatch.setattr(block_module, "run_in_one_call", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, "plain") for name in MODELS), *(("layer_scale", name) for name in CONFIGURATIONS if name != "plain")],
)
def test_same_bits_as_its_ops(name, config, dtype, calls, monkeypatch):
    model = quantized(name, CONFIGURATIONS[config], dtype)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32).to(dtype)
        fused = run(model, images)
        assert calls == blocks(model)
        with monkeypatch.context() as patch:
            patch.setattr(block_module, "runs_in_one_call", lambda block: False)
            assert torch.equal(fused, run(model, images))
        with vqvit.backend("reference"):
            calls.clear()
            assert torch.equal(fused, run(model, images))
        assert calls == blocks(model)
        calls.clear()


def test_ranges_with_deviations(calls, monkeypatch):
    model, images = quantized("layer_scale", vqvit.QuantConfig(per_channel=False)), torch.randn(2, 3, 32, 32)
    plain = run(model, images)
    for block in blocks(model):
        for delta, layer in ((0.3, block.qkv), (0.5, block.attn_out), (0.7, block.fc1)):
            layer.plan = replace(layer.plan, delta=delta)
    fused = run(model, images)
    assert calls == 2 * blocks(model) and not torch.equal(fused, plain)
    with monkeypatch.context() as patch:
        patch.setattr(block_module, "runs_in_one_call", lambda block: False)
        assert torch.equal(fused, run(model, images))
    calls.clear()
    for block in blocks(model):  # fc1's epilogue quantizes without a deviation
        block.fc2.plan = replace(block.fc2.plan, delta=0.2)
    run(model, images)
    assert calls == []


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_other_configurations_run_op_by_op(config, calls):
    run(quantized("layer_scale", config), torch.randn(2, 3, 32, 32))
    assert calls == []


def test_an_observed_block_runs_op_by_op(calls):
    model = quantized("gelu", vqvit.QuantConfig())
    seen = []

    class Observer:
        def update(self, x):
            seen.append(x.shape)

    blocks(model)[1].fc2.observer = Observer()
    run(model, torch.randn(1, 3, 32, 32))
    assert calls == blocks(model)[:1] and seen == [(17, 128)]


def test_unpacked_weights_run_op_by_op(calls):
    model, images = quantized("gelu", vqvit.QuantConfig()), torch.randn(1, 3, 32, 32)
    fused = run(model, images)
    calls.clear()
    for block in blocks(model):
        block.fc1.unpack_()
    assert torch.equal(run(model, images), fused) and calls == []


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_leading_tokens_are_those_of_the_whole_block(config):
    block, x = blocks(quantized("layer_scale", config))[0], torch.randn(3, 9, 64)
    whole = block_module.run_in_one_call(block, x)
    for tokens in (1, 5, 9):
        assert torch.equal(block_module.run_in_one_call(block, x, tokens), whole[:, :tokens])


def test_errors_name_the_operand():
    model = quantized("gelu", vqvit.QuantConfig())
    block = blocks(model)[0]
    for tokens in (0, 5):
        with pytest.raises(ValueError, match=f"expected leading_tokens between 1 and 4; got {tokens}"):
            block_module.run_in_one_call(block, torch.randn(1, 4, 64), tokens)
    with pytest.raises(ValueError, match=r"int8_encoder_block: expected norm1_weight of shape \(60\); got \(64,\)"):
        block(torch.randn(1, 4, 60))
    grouped = vars(block.attn_out.plan) | {
        "activation": "per_token_group",
        "delta": 0.5,
    }  # more than a plan may ask for
    block.attn_out.plan = SimpleNamespace(**grouped)
    with pytest.raises(ValueError, match=r"int8_encoder_block: expected attn_out_delta = 0 with .*groups; got 0\.5"):
        block(torch.randn(1, 4, 64))
    with pytest.raises(TypeError, match="int8_encoder_block: expected x of dtype float32 or float16 or bfloat16"):
        block(torch.zeros(1, 4, 64, dtype=torch.float64))


# From the second call on a block goes to the kernel at once


@pytest.fixture
def ops_called(monkeypatch) -> list:
    """Inputs of the calls that went through the op."""
    seen, original = [], fused_block.ops.int8_encoder_block

    def counted(x, *arguments):
        seen.append(x)
        return original(x, *arguments)

    monkeypatch.setattr(fused_block.ops, "int8_encoder_block", counted)
    return seen


@pytest.fixture
def warm() -> EncoderBlock:
    """A block that was called before."""
    block = blocks(quantized("layer_scale", vqvit.QuantConfig()))[0]
    block(torch.randn(1, 4, 64))
    return block


def by_op(block: EncoderBlock, x: torch.Tensor) -> torch.Tensor:
    fresh = copy.deepcopy(block)
    return fresh(x)


def test_later_calls_need_no_op(warm, ops_called):
    for shape in ((1, 4, 64), (3, 17, 64), (2, 1, 64), (0, 4, 64)):
        x = torch.randn(shape)
        got = warm(x)
        assert ops_called == []
        assert torch.equal(got, by_op(warm, x)) and len(ops_called) == 1
        ops_called.clear()
    strided = torch.randn(9, 2, 64).transpose(0, 1)
    assert torch.equal(warm(strided), warm(strided.contiguous()))
    assert torch.equal(warm(x.bfloat16()), by_op(warm, x.bfloat16()))


CHANGES = {
    "in_place": lambda block: block.fc1.scale.mul_(2),
    "assigned": lambda block: block.fc2.assign_(block.fc2.plain_codes(), block.fc2.scale * 2),
    "replaced": lambda block: setattr(block, "norm1_weight", block.norm1_weight * 2),
    "removed": lambda block: setattr(block, "layer_scale1", None),
    "moved": lambda block: setattr(block.qkv.bias, "data", block.qkv.bias.data * 2),
    "option": lambda block: setattr(block, "softmax_scale", block.softmax_scale * 2),
    "loaded": lambda block: block.load_state_dict({k: v.clone() for k, v in block.state_dict().items()}),
    "half": lambda block: block.half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change, warm):
    x = torch.randn(2, 5, 64)
    warm(x)
    change(warm)
    expected = by_op(warm, x)
    assert torch.equal(warm(x), expected) and torch.equal(warm(x), expected)


def test_a_copy_is_its_own(warm, ops_called):
    x = torch.randn(2, 5, 64)
    expected, other = warm(x), copy.deepcopy(warm)
    for tensor in warm.buffers():
        tensor.zero_()
    assert torch.equal(other(x), expected) and len(ops_called) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of torch.jit.trace
def test_whoever_watches_sees_the_op(warm):
    x, seen = torch.randn(1, 4, 64), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watching():
        warm(x)
    assert "vqvit::int8_encoder_block" in seen
    with torch.profiler.profile() as profile:
        warm(x)
    assert "vqvit::int8_encoder_block" in {event.name for event in profile.events()}
    traced = torch.jit.trace(warm, x, check_trace=False)
    assert "vqvit::int8_encoder_block" in str(traced.graph)
    with vqvit.backend("reference"):
        assert torch.equal(warm(x), by_op(warm, x))


def test_inputs_are_checked_every_time(warm):
    for x, error, message in (
        (torch.randn(1, 4, 60), ValueError, r"expected norm1_weight of shape \(60\)"),
        (torch.randn(4, 64), ValueError, r"expected x of shape \(\*, \*, \*\); got \(4, 64\)"),
        (torch.zeros(1, 4, 64, dtype=torch.float64), TypeError, "expected x of dtype float32 or"),
    ):
        with pytest.raises(error, match=message):
            warm(x)
    for tokens in (0, 5):
        with pytest.raises(ValueError, match="expected leading_tokens between 1 and 4"):
            block_module.run_in_one_call(warm, torch.randn(1, 4, 64), tokens)


def test_a_block_that_moves_lets_go_of_its_weights(warm):
    codes = weakref.ref(warm.fc1.codes)
    warm.to(torch.device("meta"))
    gc.collect()
    assert codes() is None
