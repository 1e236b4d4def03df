"""Factorised scales of the patch embedding (numerics §8), and the regularisers of training (numerics §10)."""

import copy
import math

import pytest
import torch
from test_qat import logits, prepared, relative_error
from test_qat import model as model

import vqvit
from vqvit import ops, qat
from vqvit.factorize import MAX_SHIFT, input_factors, output_factors, output_table, shifted_factors
from vqvit.nn import QuantPatchEmbed
from vqvit.nn.patch_embed import cut_patches
from vqvit.plan import LayerPlan, PlanError, QuantConfig
from vqvit.qat.losses import LossOptions, position_grid, total_variation
from vqvit.rewriter import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORIZED = QuantConfig(rounding="nearest", factorize_patches=True)


@pytest.fixture
def images() -> torch.Tensor:
    """One channel with a tenth of the others' range."""
    return torch.randn(8, 3, 16, 16) * torch.tensor([1.0, 0.1, 1.0])[:, None, None]


def patches_of(model) -> QuantPatchEmbed:
    return next(module for module in model.modules() if isinstance(module, QuantPatchEmbed))


def test_input_factors():
    weight = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
    c = input_factors(torch.tensor([4.0, 1.0]), weight)
    assert torch.allclose(c, torch.tensor([2.0, 0.5]))  # sqrt(4 / 1) and sqrt(1 / 4), geometric mean 1 already
    assert input_factors(torch.rand(5) * 3, torch.randn(7, 5)).log().mean().item() == pytest.approx(0, abs=1e-6)
    assert input_factors(torch.zeros(3), torch.zeros(2, 3)).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_output_factors_recover_a_product_and_never_clip():
    tokens, channels = torch.rand(20) + 0.1, torch.rand(30) + 0.1
    exact = output_factors(tokens[:, None] * channels)
    assert torch.allclose(exact.tokens[:, None] * exact.channels, tokens[:, None] * channels, rtol=1e-5)
    table = output_table(torch.randn(4, 20, 30) * channels)
    fitted = output_factors(table)
    cover = fitted.tokens[:, None] * fitted.channels
    assert (cover >= table * (1 - 2**-22)).all()
    tight = cover <= table * (1 + 2**-22)
    assert tight.any(1).all()  # every token's scale is needed
    one_scale = table.amax(1, keepdim=True).expand_as(table)
    assert cover.log().mean() < one_scale.log().mean()  # finer steps than a scale for each token
    with pytest.raises(ValueError, match="expected a positive table"):
        output_factors(torch.zeros(2, 3))


def test_integer_form_shifts_and_never_clips():
    z = torch.randn(4, 20, 30) * torch.exp2(torch.arange(30) % 12 * 1.0)
    table = output_table(z)
    form = shifted_factors(table, output_factors(table))
    assert form.shifts.dtype == torch.int32
    assert form.shifts.min() == 0
    assert form.shifts.max() == MAX_SHIFT
    scale = form.tokens[:, None] * torch.exp2(form.shifts.float())
    codes = torch.round(z / scale).to(torch.int32)
    assert codes.abs().max() == 127
    stream = codes << form.shifts  # what the next LayerNorm reads, in units of s_n
    assert stream.abs().max() < 2**15
    assert torch.allclose(stream * form.tokens[:, None], codes * scale)


def test_quantized_model(model, images, tmp_path):
    exact, plain = logits(model, images), copy.deepcopy(model)
    weight = model.vit.embeddings.patch_embeddings.projection.weight.detach().flatten(1).clone()
    vqvit.quantize_(plain)
    report = vqvit.quantize_(model, FACTORIZED, [images[:4], images[4:]])
    layer = patches_of(model)
    rows = cut_patches("patches", images, 3, (8, 8)).flatten(0, -2)
    c = input_factors(rows.abs().amax(0), weight)
    assert torch.allclose(layer.equalizer, 1 / c)
    codes, scale = ops.patchify_quantize(images, 8, 8, layer.equalizer)
    got = ops.int8_linear(codes, scale, layer.codes, layer.scale, layer.bias)
    want = rows @ weight.t() + layer.bias
    codes, scale = ops.patchify_quantize(images, 8, 8)
    unfactored = patches_of(plain)
    other = ops.int8_linear(codes, scale, unfactored.codes, unfactored.scale, unfactored.bias)
    assert relative_error(got, want) < relative_error(other, want)
    assert 0 < relative_error(logits(model, images), exact) < 0.05
    assert [p.factorized for p in report.plan.layers if p.role == "patch_embed"] == [True]
    vqvit.save(model, tmp_path / "checkpoint")
    assert torch.equal(logits(vqvit.load(tmp_path / "checkpoint"), images), logits(model, images))
    with vqvit.backend("reference"):
        reference = logits(model, images)
    assert torch.equal(reference, logits(model, images))
    assert relative_error(layer.float_weight(), weight) < 0.02  # columns of small patches lose some
    assert relative_error(logits(vqvit.restore(model), images), exact) < 0.05


def test_refused(model):
    with pytest.raises(PlanError, match="expected factorized for an integer patch_embed"):
        LayerPlan("layer", "fc1", factorized=True)
    with pytest.raises(ValueError, match="calibration: expected batches"):
        vqvit.quantize_(model, FACTORIZED)
    plan, _ = make_plan(model, QuantConfig(factorize_patches=True, tiers={"patch_embed": "fp16"}))
    assert not any(layer.factorized for layer in plan.layers)


def test_patches_are_those_of_a_convolution():
    pixels, kernel = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 2)
    got = cut_patches("patches", pixels, 3, (4, 2)) @ kernel.flatten(1).t()
    want = torch.nn.functional.conv2d(pixels, kernel, stride=(4, 2)).permute(0, 2, 3, 1)
    assert torch.allclose(got, want, atol=1e-4)
    for shape in ((2, 4, 8, 12), (2, 3, 9, 12), (3, 8, 12)):
        with pytest.raises(ValueError, match="expected images"):
            cut_patches("patches", torch.randn(shape), 3, (4, 2))


def test_quant_regularizer(model, images):
    """Both readings from the scales by hand: one norm, or one sum of logarithms, for each quantizer."""
    prepared(model, QuantConfig(attention_scales="static", activations={"fc1": "static"}, per_channel=False), images)
    layers, attentions = qat.fake_layers(model).values(), qat.fake_attentions(model).values()
    scales = [layer.log_alpha.detach().exp() for layer in layers]
    scales += [layer.log_input_alpha.detach().exp() for layer in layers if layer.base_plan.role == "fc1"]
    scales += [p.detach().exp() for attention in attentions for p in attention.scale_parameters()]
    assert len(scales) == 10 + 2 + 6
    paper, text = (qat.quant_regularizer(model, reading) for reading in ("paper", "text"))
    assert paper.item() == pytest.approx(sum(s.norm().item() for s in scales), rel=1e-5)
    assert text.item() == pytest.approx(-sum(s.log().sum().item() for s in scales), rel=1e-5)
    parameter = next(iter(layers)).log_alpha
    (down,), (up,) = torch.autograd.grad(paper, parameter), torch.autograd.grad(text, parameter)
    assert (down > 0).all()  # a step down the gradient makes scales smaller
    assert (up < 0).all()  # and here larger
    qat.unprepare_(model)
    with pytest.raises(ValueError, match="expected a prepared model with scales"):
        qat.quant_regularizer(model)
    with pytest.raises(ValueError, match="quant_reading: expected one of paper, text"):
        LossOptions(quant_reading="words")


def test_smooth_regularizer(model, images):
    grid = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    assert total_variation(grid).item() == pytest.approx((1 + 2 + 0 + 0) / 4 + (2 + 1 + 1) / 3)
    assert total_variation(torch.full((4, 3, 3), 2.0)) == 0
    assert position_grid(torch.randn(1, 198, 6)).shape == (6, 14, 14)
    embedding = torch.arange(5.0).view(1, 5, 1)
    assert position_grid(embedding)[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    kernel = model.vit.embeddings.patch_embeddings.projection.weight.detach().clone()
    positions = model.vit.embeddings.position_embeddings.detach()
    prepared(model, FACTORIZED, images)
    want = total_variation(kernel) + total_variation(position_grid(positions))
    assert qat.smooth_regularizer(model).item() == pytest.approx(want.item(), rel=1e-5)
    qat.smooth_regularizer(model).backward()
    assert model.vit.embeddings.position_embeddings.grad.abs().max() > 0
    with pytest.raises(ValueError, match="expected a patch or position embedding"):
        qat.smooth_regularizer(torch.nn.Linear(2, 2))


def test_task_losses():
    got, target = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    kl = qat.kl_to_float(got, target)
    p, q = target.detach().double().softmax(-1), got.detach().double().softmax(-1)
    assert kl.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    kl.backward()
    assert target.grad is None
    assert torch.allclose(got.grad.double(), (q - p) / 6, atol=1e-6)
    assert qat.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item() == pytest.approx(math.log(4))
