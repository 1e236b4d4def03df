"""The roofline's arithmetic on cases computed by hand."""

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "roofline.py"
_SPEC = importlib.util.spec_from_file_location("roofline", _PATH)
roofline = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(roofline)

GPU = roofline.Gpu(sms=100, clock=1.0, int8_tops=1000, bf16_tops=500, copy=1.0)
IDEAL = roofline.Fractions(tensor_bf16=1.0, instructions=1.0, bytes=1.0, gap_us=0.0)
INT8 = roofline.Kernels(tensor=1.0, logit=10)


@pytest.fixture(autouse=True)
def _ideal(monkeypatch):
    monkeypatch.setattr(roofline, "FRACTIONS", IDEAL)


def test_bytes_bound_a_row_wise_op():
    # 10^6 elements of 4 bytes at 10^6 bytes a microsecond; 12 · 10^6 instructions at 12.8 · 10^6 a microsecond
    assert roofline.row_us(GPU, 1000, 1000, "quantize", 4) == pytest.approx(4.0)


def test_a_full_wave_of_tiles_runs_at_peak():
    # 100 tiles of 128 x 128 on 100 multiprocessors: 2 · 1280² · 10^6 operations at 10^9 a microsecond
    assert roofline.gemm_us(GPU, 1280, 1280, 10**6, 0, int8=INT8) == pytest.approx(2 * 1280**2 / 1e3)


def test_a_lone_tile_takes_a_whole_wave():
    tile = roofline.gemm_us(GPU, 128, 128, 10**6, 0, int8=INT8)
    assert roofline.gemm_us(GPU, 1, 1, 10**6, 0, int8=INT8) == pytest.approx(tile)
    assert tile == pytest.approx(2 * 128**2 * 10**6 / (1e9 / 100))


def test_the_epilogue_bounds_a_short_product():
    outputs = 12800 * 12800
    assert roofline.gemm_us(GPU, 12800, 12800, 1, 0, "gelu", INT8) == pytest.approx(19 * outputs / (100 * 128 * 1e3))


def test_bf16_takes_twice_the_tensor_time():
    int8, bf16 = (roofline.gemm_us(GPU, 1280, 1280, 10**6, 0, int8=kernels) for kernels in (INT8, None))
    assert bf16 == pytest.approx(2 * int8)


def test_predictions_cover_every_launch_and_the_model():
    rows = roofline.predictions(["h200"], ["vit-b16"], [1, 64])
    assert len(rows) == 2 * 2 * 9
    for row in rows:
        assert row["us"] > 0 and (row["peak"] == "" or 0 < row["peak"] < 1)
    model = [row for row in rows if row["what"] == "model"]
    assert model[2]["us"] > model[0]["us"] > model[1]["us"]


def test_exponentials_bound_attention():
    shape = roofline.Shape(width=64, mlp=64, heads=64, blocks=1, tokens=1000)
    assert roofline.attention_us(GPU, 1, shape, INT8) == pytest.approx(10 * 64e6 / (100 * 128 * 1e3))
