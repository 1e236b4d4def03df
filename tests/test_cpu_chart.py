"""The chart of the CPU benchmark on made-up rows."""

import cpu_chart
import pytest


def chart_row(engine: str, batch: int, median: float, date: str = "2026-01-02T03:04Z", status: str = "ok") -> dict:
    figures = {"median_ms": str(median), "p20_ms": str(0.9 * median), "p80_ms": str(1.1 * median)}
    place = {"arch": "vit-b16", "batch": str(batch), "engine": engine, "status": status}
    return {**place, **figures, "date": date, "device": "Some CPU", "threads": "2"}


CHART_ROWS = [
    chart_row("torch_fp32", 1, 999.0, date="2025-01-01T00:00Z"),
    *(
        chart_row(engine, batch, ms * batch)
        for batch in (1, 8)
        for engine, ms in (("torch_fp32", 320.0), ("vqvit", 50.5))
    ),
    chart_row("ort_fp32", 8, 1.0, status="not installed: onnxruntime"),
]


def test_the_chart_shows_the_last_run_and_is_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        cpu_chart.draw(CHART_ROWS, "vit-b16", [1, 8], tmp_path / "docs" / name)
    text = (tmp_path / "docs" / "first.svg").read_text()
    assert text == (tmp_path / "docs" / "second.svg").read_text()
    for shown in ("PyTorch fp32", "vqvit W8A8", ">50.5<", ">404<", "Some CPU, 2 threads, 2026-01-02", cpu_chart.OWN):
        assert shown in text
    assert ">999<" not in text and "ONNX" not in text


def test_a_chart_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected rows of vit-b16 at batch 4; got none"):
        cpu_chart.draw(CHART_ROWS, "vit-b16", [4], tmp_path / "out.svg")
    assert list(tmp_path.iterdir()) == []
