"""Calibration observers: each range against its definition, resumed calibrations, and data that is refused."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit.calibration import LayerRange, Ranges, activations, make_observer, observers, ranges_of
from vqvit.calibration.observers import KINDS
from vqvit.calibration.state import CalibrationState, Fingerprint
from vqvit.nn import QuantLinear
from vqvit.plan import OBSERVERS, PlanError, QuantConfig, read_observer

NAMES = (*OBSERVERS, "percentile:99.9")
STATIC = QuantConfig(activation="static", cls_only="off")


pytestmark = pytest.mark.usefixtures("one_thread")


def heavy_tailed(rows: int = 200, seed: int = 0) -> torch.Tensor:
    """(rows, 32) of sd about 1 with two values far outside."""
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    x[3, 5], x[rows // 2, 7] = 60.0, -45.0
    return x


def observe(name: str, batches: list[torch.Tensor], weight: torch.Tensor | None = None) -> LayerRange:
    observer = make_observer("layer", name)
    for batch in batches:
        observer.update(batch)
    return observer.range(name, 0.0, weight)[0]


def squared_error(x: torch.Tensor, clip: float) -> float:
    step = clip / 127
    return ((torch.round(x / step).clamp(-127, 127) * step - x).double() ** 2).sum().item()


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config).eval()


def images(count: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def scales(model: nn.Module) -> dict[str, float]:
    modules = model.named_modules()
    return {n: m.input_scale.item() for n, m in modules if isinstance(m, QuantLinear) and m.input_scale is not None}


def test_every_observer_of_a_plan_is_there():
    assert tuple(KINDS) == OBSERVERS


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_on_bit_for_bit(name):
    batches, weight = [heavy_tailed(40, s) for s in range(6)], torch.randn(8, 32)
    first = make_observer("layer", name)
    for batch in batches[:3]:
        first.update(batch)
    second = make_observer("layer", name)
    second.load(first.state(), torch.device("cpu"))
    for batch in batches[3:]:
        second.update(batch)
    assert second.range(name, 0.5, weight)[0] == ranged(name, batches, weight)


def ranged(name: str, batches: list[torch.Tensor], weight: torch.Tensor) -> LayerRange:
    observer = make_observer("layer", name)
    for batch in batches:
        observer.update(batch)
    return observer.range(name, 0.5, weight)[0]


def test_state_of_another_observer_is_refused():
    source = make_observer("layer", "max")
    source.update(heavy_tailed())
    with pytest.raises(vqvit.CalibrationError, match=r"expected count, counts, .*; got count, maximum, .* for layer"):
        make_observer("layer", "mse").load(source.state(), torch.device("cpu"))


def test_max_and_deviation_are_those_of_all_data():
    batches = [heavy_tailed(seed=s) + 3 for s in range(3)]
    found, everything = observe("max", batches), torch.cat(batches)
    assert found.clip == found.maximum == everything.abs().max().item()
    assert found.deviation == pytest.approx(everything.std(correction=0).item(), rel=1e-6)
    assert found.scale == torch.tensor(found.clip).div(127).item()


def test_ema_is_the_running_average_of_batches():
    batches = [torch.full((2, 4), v) for v in (1.0, 2.0, 4.0)]
    want = 0.99 * (0.99 * 1.0 + 0.01 * 2.0) + 0.01 * 4.0
    assert observe("ema", batches).maximum == pytest.approx(want, rel=1e-6)


def test_delta_adds_deviations_to_the_range():
    observer = make_observer("layer", "max")
    observer.update(heavy_tailed())
    found, scale = observer.range("max", 0.5)
    assert scale.item() == pytest.approx((found.clip + 0.5 * found.deviation) / 127, rel=1e-6)
    assert observer.scale(0.5) == scale


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_percentile_is_numpys_within_a_bin(percentile, magnitude):
    batches = [magnitude * heavy_tailed(500, s) for s in range(4)]
    want = np.percentile(torch.cat(batches).abs().numpy(), percentile)
    ordered = np.sort(torch.cat(batches).abs().numpy(), axis=None)
    spacing = (
        np.diff(ordered[-max(2, int(len(ordered) * (1.002 - percentile / 100))) :]).max() if percentile > 99.9 else 0
    )
    assert abs(observe(f"percentile:{percentile}", batches).clip - want) <= want / 128 + spacing


def test_histogram_does_not_depend_on_batches():
    x = heavy_tailed(120)
    for name in ("percentile", "mse"):
        assert observe(name, [x]).clip == observe(name, list(x.split(7)[::-1])).clip


def test_mse_beats_the_maximum_on_heavy_tails_and_finds_the_best_clip():
    x = torch.cat([heavy_tailed(4000, s) for s in range(4)])
    clip = observe("mse", [x]).clip
    assert clip < 0.8 * x.abs().max()
    assert squared_error(x, clip) < 0.8 * squared_error(x, x.abs().max().item())
    grid = [x.abs().max().item() * 2 ** (-i / 16) for i in range(100)]
    assert squared_error(x, clip) <= 1.02 * min(squared_error(x, c) for c in grid)


def test_mse_keeps_the_maximum_of_a_uniform_input():
    x = torch.rand(1000, 32) * 2 - 1
    assert observe("mse", [x]).clip == x.abs().max().item()


def test_error_integral_is_the_integral():
    edges = torch.linspace(0, 140, 280001, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    numeric = ((middle - middle.round().clamp(max=127)) ** 2 * edges.diff()).cumsum(0)
    assert torch.allclose(observers._error_integral(edges[1:]), numeric, atol=1e-6)


def test_output_error_weighs_columns_by_what_the_layer_does_with_them():
    """The outlier column is worth clipping exactly if the weight hardly reads it."""
    x = torch.randn(200, 32)
    x[:, 0] *= 40
    reads, ignores = torch.randn(8, 32), torch.randn(8, 32)
    reads[:, 0] *= 100
    ignores[:, 0] = 0
    top = x.abs().max().item()
    assert observe("output_error", [x], reads).clip == top
    assert observe("output_error", [x], ignores).clip < top / 4


def test_output_error_minimises_the_error_it_names():
    x, weight = heavy_tailed(200), torch.randn(16, 32)

    def error(clip: float) -> float:
        step = clip / 127
        return (((torch.round(x / step).clamp(-127, 127) * step - x) @ weight.T).double() ** 2).sum().item()

    clip = observe("output_error", list(x.split(30)), weight).clip
    best = min(error(c.item()) for c in observers.candidates(x.abs().max(), 8, 5))
    assert error(clip) == pytest.approx(best, rel=1e-5)


def test_reservoir_holds_the_peaks_and_a_sample_of_the_others():
    """Rows 0 to 1999 in any order: the 128 largest, and others whose mean is that of the rest."""
    observer = make_observer("layer", "output_error")
    values = torch.randperm(2000, generator=torch.Generator().manual_seed(3)).float()
    for batch in values.view(20, 100, 1):
        observer.update(batch)
    rows = observer.tensors["rows"].flatten()
    peaks, others = rows.split([observers.PEAK_ROWS, observers.SAMPLE_ROWS])
    assert torch.equal(peaks, torch.arange(1999.0, 1871.0, -1))
    assert len(others.unique()) == len(others) and others.max() < 1872
    assert abs(others.mean() - 936) < 4 * 540 / math.sqrt(len(others))
    priorities = dict(zip(rows.tolist(), observer.tensors["priorities"].tolist(), strict=True))
    assert max(priorities[v] for v in others.tolist()) < 0.2  # of 1872, the 128 smallest of uniform numbers


def test_a_rare_outlier_is_weighed_against_all_rows():
    """One row in 20,000 holds the outlier: the clip weighs it once, and the others as many as they are."""
    x = torch.randn(20000, 16)
    x[777] = 60.0
    weight = torch.randn(8, 16)

    def error(clip: float) -> float:
        step = clip / 127
        return (((torch.round(x / step).clamp(-127, 127) * step - x) @ weight.T).double() ** 2).sum().item()

    clip = observe("output_error", list(x.split(1000)), weight).clip
    best = min(error(c.item()) for c in observers.candidates(x.abs().max(), 8, 5))
    assert error(clip) < 1.2 * best


@pytest.mark.parametrize("text", ["median", "percentile:0", "percentile:101", "percentile:x", "max:3", 7, None])
def test_bad_observers(text):
    with pytest.raises(PlanError, match="observer: expected"):
        QuantConfig(observer=text)


def test_named_percentile():
    assert read_observer("observer", "percentile:99.5") == ("percentile", 99.5)


@pytest.mark.parametrize("name", OBSERVERS)
def test_a_model_calibrates_and_keeps_its_ranges(name, tmp_path):
    model = vit()
    report = vqvit.quantize_(model, vqvit.QuantConfig("int8", activation="static", observer=name), [images()])
    assert {p.observer for p in report.plan.layers} == {name}
    ranges = ranges_of(model)
    assert ranges.layers.keys() == scales(model).keys() and len(ranges.layers) == 9
    assert all(layer.scale == scales(model)[n] and layer.observer == name for n, layer in ranges.layers.items())
    assert Ranges.from_json(ranges.to_json()) == ranges
    vqvit.save(model, tmp_path / "checkpoint")
    manifest = json.loads((tmp_path / "checkpoint" / "vqvit.json").read_text())
    assert manifest["ranges"].keys() == ranges.layers.keys()
    assert ranges_of(vqvit.load(tmp_path / "checkpoint")) == ranges


def test_a_model_without_static_scales_has_no_ranges(tmp_path):
    model = vit()
    vqvit.quantize_(model)
    vqvit.save(model, tmp_path / "checkpoint")
    assert ranges_of(model) is None and ranges_of(vqvit.load(tmp_path / "checkpoint")) is None


@pytest.mark.parametrize(
    ("ranges", "message"),
    [([1], "expected a JSON object of layer ranges"), ({"head": None}, "expected a JSON object of layer ranges")],
)
def test_damaged_ranges_are_refused(ranges, message, tmp_path):
    model = vit()
    vqvit.quantize_(model, STATIC, [images()])
    path = vqvit.save(model, tmp_path / "checkpoint") / "vqvit.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "ranges": ranges}))
    with pytest.raises(vqvit.CheckpointError, match=message):
        vqvit.load(path.parent)
    moved = {"classifier.nothing": next(iter(good["ranges"].values()))}
    path.write_text(json.dumps({**good, "ranges": moved}))
    with pytest.raises(vqvit.CheckpointError, match=r"expected ranges of static layers; got \['classifier\.nothing'\]"):
        vqvit.load(path.parent)


class Killed(BaseException):
    """What no handler catches, as a signal would be."""


def kill_at(monkeypatch, batch: int) -> None:
    observe_batch = activations._observe

    def dying(model, part, index):
        if index == batch:
            raise Killed
        observe_batch(model, part, index)

    monkeypatch.setattr(activations, "_observe", dying)


@pytest.mark.parametrize("name", OBSERVERS)
def test_killed_calibration_goes_on_where_it_was(name, monkeypatch, tmp_path):
    config = QuantConfig(activation="static", observer=name, cls_only="off")
    batches, state = list(images(36).split(3)), tmp_path / "states" / "calibration"
    whole = vit()
    vqvit.quantize_(whole, config, batches)
    with monkeypatch.context() as patch:
        kill_at(patch, 10)
        with pytest.raises(Killed):
            vqvit.quantize_(vit(), config, batches, calibration_state=state)
    assert [p.name for p in state.parent.iterdir()] == ["calibration"]
    seen, resumed = [], vit()
    observe_batch = activations._observe
    with monkeypatch.context() as patch:
        patch.setattr(activations, "_observe", lambda m, b, i: (seen.append(i), observe_batch(m, b, i)))
        vqvit.quantize_(resumed, config, batches, calibration_state=state)
    assert seen == list(range(8, 12))
    assert scales(resumed) == scales(whole) and ranges_of(resumed) == ranges_of(whole)
    assert not state.exists()


def killed_state(monkeypatch, path) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(Killed):
            vqvit.quantize_(vit(), STATIC, images(36).split(3), calibration_state=path)


def test_states_of_other_calibrations_are_refused(monkeypatch, tmp_path):
    state = tmp_path / "calibration"
    killed_state(monkeypatch, state)
    before = state.read_bytes()
    other = vit()
    with torch.no_grad():
        other.classifier.weight.mul_(1.5)
    static_mse = QuantConfig(activation="static", observer="mse", cls_only="off")
    cases = {
        r"with model \w+ \(got \w+\); delete it": (other, STATIC, images(36).split(3)),
        r"with plan \w+ \(got \w+\); delete": (vit(), static_mse, images(36).split(3)),
        r"with data \w+ \(got \w+\), batches 11 \(got 12\), images 33": (vit(), STATIC, images(36).split(3)[:-1]),
        r"with data \w+ \(got \w+\); delete": (vit(), STATIC, images(36, seed=9).split(3)),
    }
    for message, (model, config, batches) in cases.items():
        untouched = copy.deepcopy(model.state_dict())
        with pytest.raises(vqvit.CalibrationError, match=message):
            vqvit.quantize_(model, config, batches, calibration_state=state)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in untouched.items())
        assert state.read_bytes() == before


def test_damaged_states_are_refused(tmp_path):
    state = tmp_path / "calibration"
    state.write_bytes(b"not a state")
    with pytest.raises(vqvit.CalibrationError, match="expected a calibration state; got one that cannot be read"):
        vqvit.quantize_(vit(), STATIC, [images()], calibration_state=state)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, state)
    with pytest.raises(vqvit.CalibrationError, match=r"expected a calibration state \(vqvit calibration 1\); got None"):
        vqvit.quantize_(vit(), STATIC, [images()], calibration_state=state)


def test_a_state_that_cannot_be_written_leaves_no_part(monkeypatch, tmp_path):
    killed_state(monkeypatch, tmp_path / "calibration")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").mkdir()
    fingerprint = Fingerprint("m", "p", "d", 1, 8, 0)
    with pytest.raises(OSError, match="directory"):
        CalibrationState(fingerprint, 1, {"layer": {"maximum": torch.ones(())}}).save(tmp_path / "folder")
    assert {p.name for p in tmp_path.iterdir()} == {"calibration", "folder"}


BAD_DATA = {
    "too few": ([images(7)], "expected at least 8 images for static scales; got 7"),
    "size": ([torch.randn(8, 3, 24, 24)], r"expected images that the model takes; batch 0, \(8, 3, 24, 24\): Input"),
    "channels": ([torch.randn(8, 4, 16, 16)], r"images that the model takes; batch 0, \(8, 4, 16, 16\)"),
    "later batch": ([images(8), torch.randn(8, 1, 16, 16)], r"batch 1, \(8, 1, 16, 16\)"),
    "nan": ([images(8), torch.full((1, 3, 16, 16), torch.nan)], "expected finite images; got NaN or Inf"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_leaves_the_model_unchanged(kind):
    batches, message = BAD_DATA[kind]
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(vqvit.CalibrationError, match=message):
        vqvit.quantize_(model, STATIC, batches)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_inputs_that_become_infinite_are_refused():
    model = vit()
    with torch.no_grad():
        model.vit.layernorm.weight.fill_(3e38)
    with pytest.raises(vqvit.CalibrationError, match="expected finite inputs of classifier; got NaN or Inf"):
        vqvit.quantize_(model, STATIC, [10 * images()])
