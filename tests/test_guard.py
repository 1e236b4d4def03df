"""INT8 stays only where it is faster: decisions with given times, and one real run."""

import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit import guard
from vqvit.nn import QuantModule
from vqvit.plan import PlanError
from vqvit.rewriter import plan_of, quantized_modules

SAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval()


def given(monkeypatch, int8_ms: list[float]) -> list:
    """Float modules take 1 ms, int8 ones these times in the order of comparison; every call is run once."""
    times, outputs = iter(int8_ms), []

    def timer(candidates, device):
        outputs.append({name: call() for name, call in candidates.items()})
        return {"float": 1.0, "int8": next(times)}

    keep_faster = guard.keep_faster
    monkeypatch.setattr(guard, "keep_faster", lambda *a: keep_faster(*a, timer=timer))
    return outputs


def test_slow_modules_go_back_and_the_plan_and_the_file_know(monkeypatch, model, tmp_path):
    names = [name for name, _ in quantized_modules(_quantized_copy(model))]
    block = next(i for i, name in enumerate(names) if name.endswith("1"))
    outputs = given(monkeypatch, [2.0 if i == block else 0.5 for i in range(len(names))] + [0.6])
    expected = model(SAMPLE).logits
    report = vqvit.quantize_(model, min_speedup=1.0, sample=SAMPLE)
    slow = names[block]
    assert [name for name, _ in quantized_modules(model)] == [name for name in names if name != slow]
    assert not any(isinstance(m, QuantModule) for m in model.get_submodule(slow).modules())
    (row,) = [r for r in report.layers if r.name == slow]
    assert row.status == "skipped" and "0.50x" in row.reason and "1x was asked for" in row.reason
    assert not any(r.name.startswith(f"{slow}.") for r in report.layers)
    assert report.plan == plan_of(model) and slow not in {b.name for b in report.plan.blocks}
    assert torch.equal(outputs[-1]["float"].logits, expected)  # the baseline is the float model
    assert not torch.equal(outputs[-1]["int8"].logits, expected)
    vqvit.save(model, tmp_path / "saved")
    assert torch.equal(vqvit.load(tmp_path / "saved")(SAMPLE).logits, model(SAMPLE).logits)


def test_a_slow_model_stays_float(monkeypatch, model):
    expected = model(SAMPLE).logits
    count = len(list(quantized_modules(_quantized_copy(model))))
    given(monkeypatch, [0.5] * count + [1.25])
    report = vqvit.quantize_(model, min_speedup=1.0, sample=SAMPLE)
    assert torch.equal(model(SAMPLE).logits, expected)
    assert len(report.layers) == count and all("the whole model in INT8 is 0.80x" in r.reason for r in report.layers)
    assert not report.plan.layers and not report.plan.blocks
    with pytest.raises(PlanError, match="expected a quantized model"):
        plan_of(model)


def test_everything_slow_is_not_compared_as_a_whole(monkeypatch, model):
    count = len(list(quantized_modules(_quantized_copy(model))))
    outputs = given(monkeypatch, [2.0] * count)
    vqvit.quantize_(model, min_speedup=1.0, sample=SAMPLE)
    assert len(outputs) == count and not list(quantized_modules(model))


@pytest.mark.parametrize(("asked", "stays"), [(1e-9, True), (1e9, False)])
def test_measured(monkeypatch, model, asked, stays):
    monkeypatch.setattr(guard, "SECONDS", 0.01)
    expected = model(SAMPLE).logits
    report = vqvit.quantize_(model, min_speedup=asked, sample=SAMPLE)
    assert bool(list(quantized_modules(model))) is stays
    assert torch.equal(model(SAMPLE).logits, expected) is not stays
    assert any(r.status == "skipped" for r in report.layers) is not stays


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_speedup": 1.0}, "sample is missing"),
        ({"sample": SAMPLE}, "min_speedup is missing"),
        ({"min_speedup": -1.0, "sample": SAMPLE}, "positive number; got -1"),
        ({"min_speedup": 1.0, "sample": torch.full((1, 3, 32, 32), torch.nan)}, "finite images"),
        ({"min_speedup": 1.0, "sample": torch.randn(1, 3, 40, 32)}, "40"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(model, options, message):
    with pytest.raises(ValueError, match=message):
        vqvit.quantize_(model, **options)
    assert not list(quantized_modules(model))


def _quantized_copy(model: nn.Module) -> nn.Module:
    twin = type(model)(model.config)
    vqvit.quantize_(twin)
    return twin
