"""`vqvit.report`: tables hold the document's values, the HTML page stands alone, files appear whole or not at all."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vqvit import report

DOCUMENT = {
    "title": "Title <1>",
    "summary": ["One line & more."],
    "sections": [
        {
            "heading": "Latency",
            "columns": [
                {"key": "engine", "label": "Engine"},
                {"key": "ms", "label": "ms", "format": ".1f"},
                {"key": "accuracy", "label": "Accuracy", "format": ".2f"},
            ],
            "rows": [
                {"engine": "FP32", "ms": 12.345, "low": 12.0, "high": 13.0, "accuracy": 98.5},
                {"engine": "W8A8|x", "ms": 3.21, "low": 3.0, "high": 4.0, "accuracy": None},
            ],
            "notes": ["Medians."],
            "charts": [
                {"column": "ms", "title": "Latency (ms)", "low": "low", "high": "high"},
                {"column": "ms", "title": "Accuracy and latency", "low": "low", "high": "high", "against": "accuracy"},
            ],
        }
    ],
    "environment": {"device": "some CPU", "isa": ["avx2", "avx512_vnni"], "commit": None},
}


def test_text():
    text = report.to_text(DOCUMENT)
    lines = text.splitlines()
    assert "Engine    ms  Accuracy" in lines
    assert "FP32    12.3     98.50" in lines
    assert "W8A8|x   3.2         –" in lines
    assert "Medians." in lines


def test_markdown():
    text = report.to_markdown(DOCUMENT)
    assert "| FP32 | 12.3 | 98.50 |" in text
    assert r"| W8A8\|x | 3.2 | – |" in text
    assert "| isa | avx2 avx512_vnni |" in text


def test_html_stands_alone():
    pytest.importorskip("matplotlib")
    page = report.to_html(DOCUMENT)
    assert "<h1>Title &lt;1&gt;</h1>" in page and "One line &amp; more." in page
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', page)) == 2
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert len(page) < 200_000


def test_points_are_drawn_where_a_row_has_both_values():
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().add_subplot()
    section = DOCUMENT["sections"][0]
    report._points(axes, section["columns"], section["charts"][1], section["rows"][:1])
    assert [text.get_text() for text in axes.texts] == ["FP32"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Accuracy", "ms")
    assert axes.lines[0].get_xydata().tolist() == [[98.5, 12.345]]


def test_html_without_matplotlib_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = report.to_html(DOCUMENT)
    assert "matplotlib is not installed" in page and "data:image" not in page


def test_write_and_load(tmp_path):
    paths = report.write(DOCUMENT, tmp_path / "new" / "folder")
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {p.name for p in paths.values()}
    assert report.load(paths["json"]) == json.loads(json.dumps(DOCUMENT))
    assert paths["markdown"].read_text() == report.to_markdown(DOCUMENT)


def test_nothing_is_written_for_a_bad_document(tmp_path):
    broken = {**DOCUMENT, "sections": [{"heading": "x", "columns": [], "rows": [{"a": float("nan")}]}]}
    with pytest.raises(ValueError):
        report.write(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


ERRORS = {
    "not JSON": ("{", "fails to parse"),
    "a list": ("[]", "expected a result document with title and sections"),
    "no sections": ('{"title": "x"}', "expected a result document with title and sections"),
    "empty section": ('{"title": "x", "sections": [{}]}', "section 0: expected heading, columns and rows"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_load_errors(tmp_path, kind):
    content, message = ERRORS[kind]
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(report.ReportError, match=message):
        report.load(tmp_path / "results.json")


def test_matplotlib_is_imported_late():
    code = "import sys, vqvit.report; sys.exit('matplotlib' in sys.modules)"
    root = Path(report.__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
