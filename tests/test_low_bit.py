"""Weights of 4 and 3 bits: exact int8 codes, packed storage bit for bit, and the sizes that are promised."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import vqvit
from vqvit import low_bit
from vqvit import numerics as nm
from vqvit.checkpoint import read_manifest, weights_of
from vqvit.nn import QuantLinear

SIZE_RATIO = {4: 7.7, 3: 10.1}
"""fp32 bytes over stored bytes of a linear's weight, at least."""


def plan(bits: int = 4, **options) -> vqvit.LayerPlan:
    return vqvit.LayerPlan("layer", "linear", bits=bits, **options)


def tiny_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=200, image_size=16, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 127, 128, 300])
def test_packing_is_lossless(bits, width):
    limit = low_bit.code_limit(bits)
    q = torch.randint(-limit, limit + 1, (5, width), dtype=torch.int8)
    packed = low_bit.pack(q, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, low_bit.packed_width(width, bits))
    assert torch.equal(low_bit.unpack(packed, bits, width), q)
    assert low_bit.pack(q.to("meta"), bits).shape == packed.shape


def test_packed_bytes_are_little_endian_bit_streams():
    q = torch.tensor([[1, -1, 3, -3]], dtype=torch.int8)
    assert low_bit.pack(q, 4).tolist() == [[0xF1, 0xD3]]
    stream = sum((value & 7) << (3 * i) for i, value in enumerate([1, -1, 3, -3]))
    assert low_bit.pack(q, 3).tolist() == [[stream & 255, stream >> 8, 0]]


@pytest.mark.parametrize("bits", [4, 3])
def test_codes_are_multiples_and_run_without_a_second_rounding(bits):
    weight = torch.randn(10, 300) * torch.logspace(-2, 0, 300)
    codes, scale, multipliers = low_bit.quantize_weight(weight, bits)
    q = low_bit.contract(codes, multipliers)
    assert torch.equal(low_bit.expand(q, multipliers), codes) and int(q.abs().max()) <= low_bit.code_limit(bits)
    assert 1 <= int(multipliers.min()) and int(multipliers.max()) <= low_bit.multiplier_limit(bits)
    assert low_bit.multiplier_limit(bits) * low_bit.code_limit(bits) <= nm.QMAX
    steps = low_bit.column_steps(scale, multipliers, 300)
    assert torch.equal(codes.float(), (q.float() * multipliers.repeat_interleave(128, -1)[:, :300]))
    torch.testing.assert_close(nm.dequantize(codes, scale), q * steps)


@pytest.mark.parametrize("bits", [4, 3])
def test_groups_have_steps_of_their_own(bits):
    """A group a twentieth as large as its neighbour keeps most of its precision."""
    weight = torch.randn(16, 256)
    weight[:, 128:] *= 0.05
    codes, scale, _ = low_bit.quantize_weight(weight, bits)
    grouped = (nm.dequantize(codes, scale) - weight)[:, 128:].norm()
    step = weight.abs().amax(1, keepdim=True) / low_bit.code_limit(bits)
    single = (torch.round(weight / step) * step - weight)[:, 128:].norm()
    assert grouped < 0.4 * single


@pytest.mark.parametrize("bits", [4, 3])
def test_the_search_beats_the_range(bits):
    weight = torch.randn(32, 256)
    codes, scale, _ = low_bit.quantize_weight(weight, bits)
    groups = nm.groups(weight)
    step = groups.abs().amax(-1, keepdim=True) / low_bit.code_limit(bits)
    by_range = (torch.round(groups / step) * step).flatten(1)
    assert (nm.dequantize(codes, scale) - weight).norm() < 0.97 * (by_range - weight).norm()


def test_layer_saves_and_loads_packed(tmp_path):
    weight = torch.randn(30, 300)
    for bits in (4, 3):
        layer = QuantLinear(plan(bits), weight, torch.randn(30))
        layer.pack_()
        state = layer.state_dict()
        assert state["codes"].shape == (30, low_bit.packed_width(300, bits)) and state["codes"].dtype == torch.uint8
        other = QuantLinear(plan(bits), torch.randn(30, 300), torch.randn(30))
        other.load_state_dict(state)
        assert torch.equal(other.plain_codes(), layer.plain_codes())
        x = torch.randn(3, 300)
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("bits", [4, 3])
def test_checkpoint_round_trip(bits, tmp_path):
    model = tiny_vit()
    report = vqvit.quantize_(model, vqvit.QuantConfig(bits=bits, bits_exceptions={"head": 8, "*.0.fc1": 8}))
    planned = {layer.name: layer.bits for layer in report.plan.layers}
    assert planned["classifier"] == 8 and set(planned.values()) == {8, bits}
    assert [b for name, b in planned.items() if name.endswith("0.fc1")] == [8]
    again = vqvit.load(vqvit.save(model, tmp_path / "ck"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(again(images).logits, model(images).logits)
    stored = load_file(weights_of(tmp_path / "ck", read_manifest(tmp_path / "ck")))
    saved = vqvit.load(vqvit.save(again, tmp_path / "again"))
    assert torch.equal(saved(images).logits, again(images).logits)
    assert any(t.dtype == torch.uint8 for t in stored.values())


@pytest.mark.parametrize("bits", [4, 3])
def test_size_on_disk(bits, tmp_path):
    """The linears of a block of ViT-B, scales and multipliers counted, biases left out on both sides."""
    stored = fp32 = 0
    for n, k in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
        with torch.device("meta"):
            layer = QuantLinear(plan(bits), torch.empty(n, k), None)
        stored += sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        fp32 += 4 * n * k
    assert SIZE_RATIO[bits] < fp32 / stored < 32 / bits


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tier": "int8_asym"}, r"expected tier int8 and per_channel with 4 bits; got tier int8_asym"),
        ({"per_channel": False}, r"expected tier int8 and per_channel with 4 bits; got tier int8, per_channel False"),
    ],
)
def test_refused_combinations(options, message):
    with pytest.raises(vqvit.PlanError, match=message):
        plan(**options)
    with pytest.raises(vqvit.PlanError, match=message):
        vqvit.quantize_(tiny_vit(), vqvit.QuantConfig(bits=4, **options))


def test_bits_of_a_configuration_are_checked():
    with pytest.raises(vqvit.PlanError, match="bits: expected one of 8, 4, 3; got 5"):
        vqvit.QuantConfig(bits=5)
    with pytest.raises(vqvit.PlanError, match="bits of 'fc2': expected one of 8, 4, 3; got 2"):
        vqvit.QuantConfig(bits_exceptions={"fc2": 2})


def test_half_precision_layers_have_no_bits():
    report = vqvit.quantize_(tiny_vit(), vqvit.QuantConfig(bits=4, tiers={"fc2": "fp16"}))
    assert {layer.bits for layer in report.plan.layers if layer.tier == "fp16"} == {8}


def test_assign_checks_what_it_is_given():
    layer = QuantLinear(plan(4), torch.randn(8, 200), None)
    codes, scale, multipliers = low_bit.quantize_weight(torch.randn(8, 200), 4)
    layer.assign_(codes, scale, None, multipliers)
    assert torch.equal(layer.plain_codes(), codes)
    wrong = codes.clone()
    wrong[0, 0] = 127
    with pytest.raises(ValueError, match="expected codes that are multiples m q with"):
        layer.assign_(wrong, scale, None, torch.full_like(multipliers, 2))
    with pytest.raises(ValueError, match="expected multipliers of its 4 bits; got none"):
        layer.assign_(codes, scale)
    with pytest.raises(ValueError, match="expected multipliers of 1 to 18; got 0 to 0"):
        layer.assign_(codes, scale, None, torch.zeros_like(multipliers))
    with pytest.raises(ValueError, match=r"expected multipliers \(8, 2\) uint8; got \(8, 1\)"):
        layer.assign_(codes, scale, None, multipliers[:, :1])
    with pytest.raises(ValueError, match="expected no multipliers; got some"):
        QuantLinear(vqvit.LayerPlan("layer", "linear"), torch.randn(8, 200), None).assign_(
            codes, scale, None, multipliers
        )
    assert torch.equal(layer.plain_codes(), codes)
