"""The profile of an inference: costs computed by hand, rows that add up, and nothing left behind."""

import json
import time

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import vqvit
from vqvit import cli, native, ops, profiling
from vqvit.profiling import Cost, Peaks, cost_of

PEAKS = Peaks({"int8": 100.0, "float32": 10.0}, {2**20: 10.0, 2**30: 1.0})


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def recorded(call) -> list[tuple[str, Cost]]:
    """Op and cost of everything that `call` dispatches in inference mode."""
    with torch.inference_mode(), profiling._Recorder() as recorder:
        call()
    return [(name, cost) for (name, _), record in recorder.records.items() for cost in record.costs]


def test_cost_of_an_int8_linear():
    a, b, a_scale, b_scale = codes(5, 70), codes(9, 70), torch.rand(5), torch.rand(9)
    [(name, cost)] = recorded(lambda: ops.int8_linear(a, a_scale, b, b_scale))
    assert name == "vqvit::int8_linear"
    assert cost == Cost(2 * 5 * 9 * 70, 5 * 70 + 9 * 70 + 4 * (5 + 9 + 5 * 9), "int8", "5 x 9 x 70")


def test_packed_weights_count_their_own_bytes_and_not_their_padding_as_work():
    a, b, a_scale, b_scale = codes(5, 70), codes(9, 70), torch.rand(5), torch.rand(9)
    packed = ops.pack_weight(b)
    [(_, cost)] = recorded(lambda: ops.int8_linear(a, a_scale, packed, b_scale))
    assert cost.operations == 2 * 5 * 9 * 70 and cost.sizes == "5 x 9 x 70"
    assert cost.bytes == 5 * 70 + packed.numel() + 4 * (5 + 9 + 5 * 9)


def test_compensation_adds_a_product_for_each_of_its_terms():
    a, b, a_scale, b_scale = codes(5, 8), codes(9, 8), torch.rand(5), torch.rand(9)
    for mode, products in (("none", 1), ("paper", 2), ("activation", 2), ("full", 4)):
        [(_, cost)] = recorded(lambda mode=mode: ops.int8_linear_compensated(a, a_scale, a, b, b_scale, b, mode=mode))
        assert cost.operations == 2 * 5 * 9 * 8 * products


def test_cost_of_int8_attention():
    q, k = codes(2, 3, 7, 16), codes(2, 3, 11, 16)
    scales = torch.rand(2, 3, 7), torch.rand(2, 3, 11), torch.rand(2, 3, 16)
    [(_, cost)] = recorded(lambda: ops.int8_attention(q, k, k, *scales, 0.25))
    assert cost.operations == 2 * 3 * (2 * 3 * 7 * 11 * 16) and cost.arithmetic == "int8"
    assert cost.sizes == "6 x 7 x 11 x 16"


@pytest.mark.parametrize(
    ("call", "operations", "sizes"),
    [
        (lambda: torch.nn.functional.linear(torch.ones(2, 3, 4), torch.ones(5, 4)), 2 * 6 * 5 * 4, "6 x 5 x 4"),
        (
            lambda: torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(5, 3, 4, 4), stride=4),
            2 * 8 * 5 * 48,
            "8 x 5 x 48",
        ),
        (lambda: torch.ones(2, 3, 4) @ torch.ones(2, 4, 5), 2 * 2 * 3 * 5 * 4, "6 x 5 x 4"),
        (lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 5)), 2 * 3 * 5 * 4, ""),
        (
            lambda: torch.nn.functional.scaled_dot_product_attention(*[torch.ones(2, 3, 7, 8)] * 3),
            4 * 6 * 7 * 7 * 8,
            "6 x 7 x 7 x 8",
        ),
    ],
    ids=["linear", "conv2d", "matmul", "mm", "attention"],
)
def test_cost_of_float_products(call, operations, sizes):
    costs = [cost for _, cost in recorded(call) if cost.operations]
    assert costs == [Cost(operations, costs[0].bytes, "float32", sizes)]


def test_views_move_nothing():
    x = torch.ones(4, 6)
    assert cost_of(torch.ops.aten.view.default, (x, [24]), {}, x.view(24)) == Cost(0, 0, "float32")
    assert cost_of(torch.ops.aten.neg.default, (x,), {}, -x).bytes == 2 * 4 * 24


def test_roofline_is_the_slower_of_arithmetic_and_bytes():
    assert PEAKS.roofline_s(Cost(10**9, 10**3, "int8")) == pytest.approx(1e-2)
    assert PEAKS.roofline_s(Cost(10, 10**6, "int8")) == pytest.approx(1e-4), "the bandwidth of 1 MiB"
    assert PEAKS.roofline_s(Cost(0, 10**9, "")) == pytest.approx(1.0), "the bandwidth of 1 GiB"
    assert PEAKS.roofline_s(Cost(10**9, 10**3, "bfloat16")) is None


def test_rows_add_up():
    x, w = torch.randn(64, 64), torch.randn(64, 64)

    def call():
        with torch.inference_mode():
            y = torch.mm(x, w)
            torch.mm(y, w).neg()
            torch.ones(3).neg()
            time.sleep(0.01)

    measured = profiling.profile(call, PEAKS, inferences=3)
    rows = {row.op: row for row in measured.ops}
    assert (rows["aten::mm"].calls, rows["aten::neg"].calls) == (2, 2)
    assert [row.ms for row in measured.ops] == sorted((row.ms for row in measured.ops), reverse=True)
    assert measured.outside_ms >= 10 and measured.plain_ms >= 10 and measured.total_ms >= measured.outside_ms
    mm = rows["aten::mm"]
    assert mm.gops * mm.ms == pytest.approx(2 * 2 * 64**3 * 1e-6)
    assert mm.gbs * mm.ms == pytest.approx(2 * 3 * 4 * 64**2 * 1e-6)
    assert mm.of_roofline * mm.ms == pytest.approx(2 * 2 * 64**3 / 10e9 * 1e3)
    neg = rows["aten::neg"]
    assert neg.gops is None and neg.gbs * neg.ms == pytest.approx(2 * 4 * (64**2 + 3) * 1e-6)


def test_nothing_is_left_behind_even_by_an_error():
    def broken():
        if _get_current_dispatch_mode() is not None:
            raise ValueError("stop")
        torch.ones(2).neg()

    with pytest.raises(ValueError, match="stop"):
        profiling.profile(broken, PEAKS, inferences=1)
    assert _get_current_dispatch_mode() is None


def test_peaks_are_measured(monkeypatch):
    monkeypatch.setattr(profiling, "COPY_BYTES", (2**16, 2**18))
    monkeypatch.setattr(profiling, "MATRIX", {torch.float32: 32})
    measured = profiling.measure_peaks([torch.float32])
    assert measured.gops["float32"] > 0 and set(measured.copy_gbs) == {2**16, 2**18}
    has_int8 = native.cpu_unavailable() is None and native.cpu_isa() != "scalar"
    assert ("int8" in measured.gops) == has_int8


def test_peaks_without_a_library(monkeypatch):
    def unavailable(threads):
        raise native.NativeUnavailableError("no compiler")

    monkeypatch.setattr(native, "cpu_peak", unavailable)
    monkeypatch.setattr(profiling, "COPY_BYTES", (2**16,))
    assert profiling.measure_peaks([]).gops == {}


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_command(folder, capsys, monkeypatch):
    monkeypatch.setattr(profiling, "measure_peaks", lambda dtypes: PEAKS)
    arguments = ["bench", folder, "--profile", "--device", "cpu", "--batch", "3,5"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["engine"], result["batch"], result["image_size"]) == ("w8a8", 3, 32)
    rows = {(row["op"], row["sizes"]): row for row in result["profile"]["ops"]}
    for sizes in ("51 x 128 x 64", "3 x 128 x 64"):  # of all tokens, and of the last block's CLS tokens
        assert rows["vqvit::int8_linear_quantize", sizes]["calls"] == 1
    for sizes in ("6 x 17 x 17 x 32", "6 x 1 x 17 x 32"):
        assert rows["vqvit::int8_attention", sizes]["calls"] == 1
    assert sum(row["share"] for row in rows.values()) <= 1.01
    assert cli.main([*arguments, "--engine", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert "aten::linear" in shown and "without the profiler" in shown and "vqvit::" not in shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--engine", "int4"], "expected one of fp32"), (["--memory"], "expected no --memory")],
)
def test_bad_options(folder, capsys, extra, message):
    assert cli.main(["bench", folder, "--profile", "--device", "cpu", *extra]) == 2
    assert message in capsys.readouterr().err


def test_gpus_are_refused(folder):
    arguments = cli._parser().parse_args(["bench", folder, "--profile"])
    with pytest.raises(ValueError, match="expected --device cpu"):
        vqvit.commands.bench._profile(arguments, torch.device("cuda"))
