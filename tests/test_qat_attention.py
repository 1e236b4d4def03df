"""Static scales of q, k and v: in the integer path, in training, and the same codes in both (numerics §7)."""

import copy

import pytest
import torch
from test_qat import logits, prepared, relative_error
from test_qat import model as model
from torch import nn

import vqvit
from vqvit import backends, ops, qat
from vqvit import numerics as nm
from vqvit.nn import EncoderBlock
from vqvit.nn.fused_block import runs_in_one_call
from vqvit.nn.linear import UncalibratedError
from vqvit.nn.static_attention import quantize_qkv_static
from vqvit.plan import BlockPlan, PlanError, QuantConfig
from vqvit.qat.attention import FakeAttention
from vqvit.rewriter import apply_plan, make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

STATIC = QuantConfig(attention_scales="static")
BACKENDS = [name for name in ("reference", "cpu", "triton") if backends.unavailable(name) is None]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 3, 16, 16)


def operands() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Packed projections of 2 images, 7 tokens, 3 heads of 5 channels, with clipped values, and scales (3,) each."""
    return torch.randn(2, 7, 45) * 3, tuple(torch.rand(3) * 0.04 + 0.01 for _ in range(3))


def blocks(model: nn.Module) -> list[EncoderBlock]:
    return [module for module in model.modules() if isinstance(module, EncoderBlock)]


@pytest.mark.parametrize("name", BACKENDS)
def test_static_codes(name):
    qkv, scales = operands()
    heads = qkv.view(2, 7, 3, 3, 5).permute(2, 0, 3, 1, 4)
    with vqvit.backend(name):
        *codes, q_scale, k_scale, v_scale = quantize_qkv_static(qkv, *scales)
        attended = ops.int8_attention(*codes, q_scale, k_scale, v_scale, 0.4)
    with vqvit.backend("reference"):
        assert torch.equal(ops.int8_attention(*codes, q_scale, k_scale, v_scale, 0.4), attended)
    for got, x, scale in zip(codes, heads, scales, strict=True):
        assert torch.equal(got, nm.to_codes(x, scale[:, None, None]))
        assert got.abs().max() == 127  # some are clipped
    assert torch.equal(q_scale, scales[0][:, None].expand(2, 3, 7))
    assert torch.equal(k_scale, scales[1][:, None].expand(2, 3, 7))
    assert torch.equal(v_scale, scales[2][:, None].expand(2, 3, 5))


def test_not_finite_shows():
    qkv, scales = operands()
    qkv[0, 2, 4] = torch.inf  # q of token 2, head 0
    qkv[1, 3, 30] = torch.nan  # v, head 0, channel 0
    *_, q_scale, k_scale, v_scale = quantize_qkv_static(qkv, *scales)
    assert q_scale.isnan().nonzero().tolist() == [[0, 0, 2]]
    assert not k_scale.isnan().any()
    assert v_scale.isnan().nonzero().tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("scales", ["static", "dynamic"])
def test_codes_are_those_of_the_integer_path(scales):
    qkv, static = operands()
    attention = FakeAttention(BlockPlan("block", attention_scales=scales), 3, 5, 0.4)
    if scales == "static":
        attention.calibrate_(*static)
        static = [scale.detach() for scale in attention.static_scales()]
        want = quantize_qkv_static(qkv, *static)
    else:
        want = ops.quantize_qkv(qkv, 3)
    quantized = attention.quantize(qkv)
    for (_, codes), integer in zip(quantized, want[:3], strict=True):
        assert torch.equal(codes, integer)
    with torch.no_grad():
        exact = attention(qkv, 1.0)
    # 16-bit numerators: each weight is off by at most 1 / 131070 of the largest, and so is their sum of 7
    assert (exact - ops.int8_attention(*want, 0.4)).abs().max() <= 2 * 7 / 131070 * quantized[2][0].abs().max() + 1e-5


def test_quantized_model(model, images, tmp_path):
    want = logits(model, images)
    dynamic = copy.deepcopy(model)
    vqvit.quantize_(dynamic)
    report = vqvit.quantize_(model, STATIC, [images])
    assert all(block.attention_scales == "static" for block in report.plan.blocks)
    assert not any(runs_in_one_call(block) for block in blocks(model))
    got = logits(model, images)
    assert 0 < relative_error(got, want) < 0.05
    assert not torch.equal(got, logits(dynamic, images))
    for block in blocks(model):
        assert block.q_scale.shape == block.k_scale.shape == block.v_scale.shape == (2,)
    for name in BACKENDS:
        with vqvit.backend(name):
            assert torch.equal(logits(model, images), got)
    vqvit.save(model, tmp_path / "checkpoint")
    assert torch.equal(logits(vqvit.load(tmp_path / "checkpoint"), images), got)


@pytest.mark.parametrize(
    "options",
    [
        {"tiers": {"qkv": "fp16"}},
        {"activation": "static"},
        {"activations": {"head": "static", "attn_out": "per_token_group"}},
        {"cls_only": "off"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_static_scales_with_other_options(model, images, options):
    want = logits(model, images)
    vqvit.quantize_(model, QuantConfig(attention_scales="static", **options), [images])
    assert 0 < relative_error(logits(model, images), want) < 0.05


def test_cls_shortcut_changes_nothing(model, images):
    full = copy.deepcopy(model)
    report = vqvit.quantize_(model, STATIC, [images])
    assert report.plan.shortened is not None
    vqvit.quantize_(full, QuantConfig(attention_scales="static", cls_only="off"), [images])
    assert torch.equal(logits(model, images), logits(full, images))


def test_static_scales_need_data(model, images):
    with pytest.raises(ValueError, match="calibration: expected batches"):
        vqvit.quantize_(model, STATIC)
    apply_plan(model, make_plan(model, STATIC)[0])
    with pytest.raises(UncalibratedError, match="expected calibrated static scales of q, k and v"):
        logits(model, images)
    with pytest.raises(PlanError, match="expected dynamic attention_scales with float attention"):
        BlockPlan("block", attention="float", attention_scales="static")


def test_the_four_quantizers_learn_apart(model, images):
    prepared(model, QuantConfig(attention_scales="static", activations={"attn_out": "static"}), images)
    attention = qat.fake_attentions(model)["vit.layers.0"]
    q, k, v = attention.scale_parameters()
    o = qat.fake_layers(model)["vit.layers.0.attn_out"].log_input_alpha
    loss = qat.cross_entropy(model(images).logits, torch.arange(8) % 5)
    gradients = torch.autograd.grad(loss, [q, k, v, o])
    assert [g.shape for g in gradients] == [(2,), (2,), (2,), ()]
    assert all((g != 0).all() and g.isfinite().all() for g in gradients)


def test_learned_scales_reach_the_integer_model(model, images, tmp_path):
    prepared(model, STATIC, images)
    attention = qat.fake_attentions(model)["vit.layers.1"]
    with torch.no_grad():
        for parameter, shift in zip(attention.scale_parameters(), (0.1, -0.2, 0.3), strict=True):
            parameter.add_(shift)
    scales = [scale.detach() for scale in attention.static_scales()]
    qat.freeze_(model)
    vqvit.save(model, tmp_path / "checkpoint")
    block = blocks(vqvit.load(tmp_path / "checkpoint"))[1]
    for got, want in zip((block.q_scale, block.k_scale, block.v_scale), scales, strict=True):
        assert torch.equal(got, want)
