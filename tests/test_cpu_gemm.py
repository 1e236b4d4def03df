"""The GEMM section of the CPU benchmark and the peak it is measured against."""

import cpu_gemm
import pytest

from vqvit import native, ops
from vqvit.backends import cpu as backend


@pytest.mark.skipif(native.cpu_unavailable() is not None, reason="no native library")
def test_the_peak_is_above_every_gemm_and_missing_without_products():
    if backend.isa() == "scalar":
        pytest.skip("scalar kernels have no peak")
    assert native.cpu_peak(1, rounds=1 << 16) > 0
    backend.set_isa("scalar")
    try:
        with pytest.raises(RuntimeError, match="unsupported instruction set"):
            native.cpu_peak(1, rounds=1)
        assert cpu_gemm.int8_peak(1) is None
    finally:
        backend.set_isa(None)


def test_gemm_rows(monkeypatch):
    def broken(gemm):
        raise RuntimeError("not here\nat all")

    monkeypatch.setattr(cpu_gemm, "CALLS", {"vqvit": cpu_gemm.vqvit_call, "broken": broken})
    ran, failed = cpu_gemm.measure(150, 64, 320, peak=1e9, rounds=2)
    assert ran["status"] == "ok" and failed["status"] == "not here" and failed["gops"] == ""
    assert ran["gops"] * ran["median_us"] == pytest.approx(2 * 150 * 64 * 320 * 1e-3, rel=0.02)
    assert set(ran) == set(failed)
    assert [row["share_of_peak"] for row in cpu_gemm.measure(5, 64, 32, peak=None, rounds=2)] == ["", ""]


def test_wrong_products_are_not_timed(monkeypatch):
    monkeypatch.setattr(cpu_gemm, "CALLS", {"torch_int_mm": lambda gemm: lambda: ops.int8_mm(gemm.a, gemm.b) + 1})
    [row] = cpu_gemm.measure(32, 32, 32, peak=1.0, rounds=1)
    assert row["status"].startswith("relative error") and row["median_us"] == ""
