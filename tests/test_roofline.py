"""The roofline's arithmetic on cases computed by hand."""

import csv
import dataclasses
from pathlib import Path

import pytest
import roofline

ROOT = Path(__file__).resolve().parents[1]

# 2 · 5000 int8 and 2 · 2500 bf16 multiply-adds a cycle of each multiprocessor.
GPU = roofline.Gpu(sms=100, clock=1.0, int8_tops=1000, bf16_tops=500, copy=1.0)
IDEAL = roofline.Fractions(tensor_bf16=1.0, instructions=1.0, issue=1.0, bytes=1.0, l2_bytes=1e9, gap_us=0.0)
BIG, SMALL, FEW = roofline.Tile(128, 1, 0, 1.0), roofline.Tile(64, 0.5, 0, 1.0), roofline.Tile(64, 0, 0, 0.5)


def kernels(**changes) -> roofline.Kernels:
    given = {"plain": (BIG, SMALL, FEW), "grouped": (SMALL, FEW), "epilogue": {"none": 0, "gelu": 19}}
    return roofline.Kernels(**(given | {"logit": 10, "block_columns": 128} | changes))


INT8 = kernels()


@pytest.fixture(autouse=True)
def fractions(monkeypatch):
    """Sets fractions; the others are ideal."""

    def use(**changes):
        monkeypatch.setattr(roofline, "FRACTIONS", dataclasses.replace(IDEAL, **changes))

    use()
    return use


def test_bytes_bound_a_row_wise_op():
    # 10^6 elements of 4 bytes at 10^6 bytes a microsecond; 12 · 10^6 instructions at 12.8 · 10^6 a microsecond
    assert roofline.row_us(GPU, 1000, 1000, "quantize", 4) == pytest.approx(4.0)


def test_the_gap_is_added(fractions):
    fractions(gap_us=1.5)
    assert roofline.row_us(GPU, 1000, 1000, "quantize", 4) == pytest.approx(4.0 + 1.5)


def test_a_full_wave_of_tiles_runs_at_peak():
    # 100 tiles of 128 x 128 on 100 multiprocessors: 2 · 1280² · 10^6 operations at 10^9 a microsecond
    assert roofline.gemm_us(GPU, 1280, 1280, 10**6, 0, int8=INT8) == pytest.approx(2 * 1280**2 / 1e3)


def test_a_tile_more_takes_another_wave():
    full, more = (roofline.gemm_us(GPU, m, 1280, 10**6, 0, int8=INT8) for m in (1280, 1281))
    assert more == pytest.approx(2 * full)


def test_tiles_are_taken_where_there_are_enough():
    def rows(m, n):
        tile = roofline.tile_of(GPU, m, n, INT8.plain)
        return tile.rows, tile.tensor

    assert rows(1280, 1280) == (128, 1.0)  # 100 of 128 rows
    assert rows(1152, 1280) == (64, 1.0)  # 90 of 128 rows, 180 of 64
    assert rows(320, 1280) == (64, 1.0)  # 50 of 64 rows
    assert rows(256, 1280) == (64, 0.5)  # 40


def test_a_lone_tile_takes_a_whole_wave():
    tile = roofline.gemm_us(GPU, 64, 128, 10**6, 0, int8=INT8)
    assert roofline.gemm_us(GPU, 1, 1, 10**6, 0, int8=INT8) == pytest.approx(tile)
    assert tile == pytest.approx(2 * 64 * 128 * 10**6 / (0.5 * 1e9 / 100))


def test_bytes_from_l2_bound_a_tile(fractions):
    fractions(l2_bytes=40)
    # 256 and 192 rows of 10^6 bytes at 40 000 a microsecond; the tensor cores would take 3277 and 1638
    assert roofline.gemm_us(GPU, 1280, 1280, 10**6, 0, int8=INT8) == pytest.approx(256 * 10**6 / 40e3)
    assert roofline.gemm_us(GPU, 640, 1280, 10**6, 0, int8=INT8, grouped=True) == pytest.approx(192 * 10**6 / 40e3)


def test_the_epilogue_bounds_a_short_product():
    outputs = 12800 * 12800
    assert roofline.gemm_us(GPU, 12800, 12800, 1, 0, "gelu", INT8) == pytest.approx(19 * outputs / (100 * 128 * 1e3))


def test_sums_of_group_scales_and_epilogue_share_the_schedulers(fractions):
    fractions(issue=0.5)
    promoting = kernels(grouped=(roofline.Tile(64, 0, 300, 1.0),))
    # 100 tiles of 64 rows and 10 stages of 300 instructions, and 64 · 128 · 19 / 128 for the epilogue, at 500 a
    # microsecond. The tensor cores would take 2 · 64 · 128 · 1280 / 10^7 = 2.1.
    us = roofline.gemm_us(GPU, 640, 1280, 1280, 0, "gelu", promoting, grouped=True)
    assert us == pytest.approx((10 * 300 + 64 * 19) / 500)


def test_the_epilogue_of_a_lone_tile_follows_its_main_loop():
    # 100 tiles: 2 · 128 · 128 · 12800 / 10^7 = 41.94 and 128 · 128 · 19 / (128 · 10^3) = 2.432; of 200 one hides
    one, two = (roofline.gemm_us(GPU, m, 1280, 12800, 0, "gelu", INT8) for m in (1280, 2560))
    assert one == pytest.approx(41.94304 + 2.432) and two == pytest.approx(2 * 41.94304)


def test_memory_bounds_a_product_of_few_operations():
    # (1280 + 1280) · 128 bytes read, 100 an output stored, at 10^6 a microsecond
    us = roofline.gemm_us(GPU, 1280, 1280, 128, 100, int8=INT8)
    assert us == pytest.approx((2560 * 128 + 1280 * 1280 * 100) / 1e6)


def test_bf16_takes_twice_the_tensor_time():
    int8, bf16 = (roofline.gemm_us(GPU, 1280, 1280, 10**6, 0, int8=kernels) for kernels in (INT8, None))
    assert bf16 == pytest.approx(2 * int8)


def test_exponentials_bound_attention():
    shape = roofline.Shape(width=640, mlp=64, heads=10, blocks=1, tokens=1000)
    assert roofline.attention_us(GPU, 10, shape, INT8) == pytest.approx(10 * 100e6 / (100 * 128 * 1e3))


def test_attention_of_one_image_takes_as_long_as_a_block():
    # 64 queries x 200 keys x 2 heads of 64 a block; 24 blocks leave 76 multiprocessors without one
    shape = roofline.Shape(width=768, mlp=64, heads=12, blocks=1, tokens=200)
    assert roofline.attention_us(GPU, 1, shape, INT8) == pytest.approx(10 * 64 * 200 * 2 / (128 * 1e3))
    one_head = roofline.attention_us(GPU, 1, shape, kernels(block_columns=64))
    assert one_head == pytest.approx(10 * 64 * 200 / (128 * 1e3))


def test_predictions_cover_every_launch_and_the_model():
    rows = roofline.predictions(["h200"], ["vit-b16"], [1, 64])
    assert len(rows) == 2 * len(roofline.BACKENDS) * 9
    for row in rows:
        assert row["us"] > 0 and (row["peak"] == "" or 0 < row["peak"] < 1)
    model = {(row["batch"], row["kernels"]): row["us"] for row in rows if row["what"] == "model"}
    assert all(model[64, backend] > model[1, backend] for backend in roofline.BACKENDS)


def test_a_block_launches_eight_kernels(fractions):
    """A launch more or less would move a model's time by a gap a block."""
    shape = roofline.SHAPES["vit-b16"]
    fractions(gap_us=0.0)
    without = roofline.model_us(GPU, shape, 1, kernels(epilogue=roofline.BACKENDS["cuda"].epilogue))
    fractions(gap_us=1.0)
    with_gaps = roofline.model_us(GPU, shape, 1, kernels(epilogue=roofline.BACKENDS["cuda"].epilogue))
    assert with_gaps - without == pytest.approx(12 * 8 + 1)


# As the kernels of commit 0331ebe were counted: one kernel held all paths. Compiled for one path each, their loops over
# 16 outputs had 725 instructions for q and k, 193 for v, 560 for GELU and codes by group, 370 for bf16 with a residual.
LONG_EPILOGUES = roofline.Kernels(
    plain=(roofline.Tile(128, 1, 138, 0.80), roofline.Tile(64, 0.5, 93, 0.80), roofline.Tile(64, 0, 2 * 344, 0.5)),
    grouped=(roofline.Tile(64, 0.5, 616 // 2, 0.80), roofline.Tile(64, 0, 344 + 594, 0.5)),
    epilogue={"none": 370 / 16, "residual": 370 / 16, "codes": (2 * 725 + 193) / 3 / 16, "gelu_codes": 560 / 16},
    logit=25,
    block_columns=128,
)
BY_HAND = {"qkv": 217, "fc1": 256, "fc2": 320, "attn_out": 84, "attention": 169, "v_codes": 54, "norm1": 66}
"""Microseconds of their launches at batch 256 of ViT-B on an H200, estimated by hand from counted instructions."""


@pytest.mark.parametrize("launch", BY_HAND)
def test_launches_agree_with_an_estimate_by_hand(monkeypatch, launch):
    monkeypatch.setattr(roofline, "FRACTIONS", roofline.Fractions())
    block = roofline.int8_block(roofline.GPUS["h200"], roofline.SHAPES["vit-b16"], 256, LONG_EPILOGUES)
    assert block[launch] == pytest.approx(BY_HAND[launch], rel=0.25)


@pytest.mark.parametrize(
    ("kernel", "stages", "tile"),
    [
        ("wgmma_kernel<2, 0, ", 1, roofline.BACKENDS["cuda"].plain[0]),
        ("wgmma_kernel<1, 0, ", 1, roofline.BACKENDS["cuda"].plain[1]),
        ("gemm_kernel<1, 16, 4, 4, 2, ", 0.5, roofline.BACKENDS["cuda"].plain[2]),
        ("wgmma_kernel<1, 1, ", 2, roofline.BACKENDS["cuda"].grouped[0]),
    ],
)
def test_the_main_loops_of_cuda_are_as_long_as_the_gate_counts(kernel, stages, tile):
    """stages: of an iteration. When this fails, the kernels have changed: so must `BACKENDS`, epilogues included."""
    with open(ROOT / "benchmarks" / "results" / "cuda_gate.csv", newline="") as file:
        loops = [
            int(r["mma_loop"]) for r in csv.DictReader(file) if r["arch"] == "90a" and r["kernel"].startswith(kernel)
        ]
    assert loops and all(loop / stages == pytest.approx(tile.stage, rel=0.05) for loop in loops)
