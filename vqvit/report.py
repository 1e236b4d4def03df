"""Results as text, Markdown and one self-contained HTML page. Reads result documents only: plain dicts, or their JSON.

A result document:

    {"title": str, "summary": [str, ...], "sections": [section, ...], "environment": {name: value}}
    section = {"heading": str, "notes": [str, ...], "columns": [column, ...], "rows": [{column key: value}, ...],
               "charts": [{"column": key, "title": str, "low": key, "high": key, "against": key}, ...]}
    column = {"key": str, "label": str, "format": format spec such as ".2f"}

Rows hold raw values: the format belongs to the column. A value that is missing or None shows as a dash. `low` and
`high` are optional: keys of the ends of an error bar. The first column names the row. A chart is of bars, one a row, or
with `against` of points at (`against`, `column`).
"""

import base64
import html
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

DASH = "–"

REPORT_FILES = {"json": "results.json", "markdown": "report.md", "html": "report.html"}

_FIGURE = re.compile(rf"[-+]?[\d.,]+(e[-+]\d+)?( ?%)?|-?inf|{DASH}")

_BAR_COLOURS = ("#8a94a6", "#5b8def", "#1a9e77", "#d9822b")

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #dfe3ea; text-align: right }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #8a94a6 }
p.note { color: #5a6472; font-size: .9em; margin: .3rem 0 }
img { max-width: 100%; margin-right: 1rem }
""".strip()


class ReportError(ValueError):
    """A result document that is not one."""


def load(path: str | Path) -> dict:
    """Read a result document from its JSON file. Raises `FileNotFoundError` or `ReportError`."""
    try:
        document = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: expected a JSON result document; got text that fails to parse: {error}") from error
    _check(document, str(path))
    return document


def write(document: dict, directory: str | Path) -> dict[str, Path]:
    """Write `REPORT_FILES` into `directory`, each under a temporary name and then renamed. Returns the paths."""
    _check(document, "report")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "json": json.dumps(document, indent=1, allow_nan=False) + "\n",
        "markdown": to_markdown(document),
        "html": to_html(document),
    }
    paths = {kind: directory / name for kind, name in REPORT_FILES.items()}
    for kind, path in paths.items():
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(contents[kind])
        os.replace(temporary, path)
    return paths


def to_text(document: dict) -> str:
    """The document for a terminal."""
    blocks = [document["title"], *document.get("summary", ())]
    for section in document["sections"]:
        blocks += ["", section["heading"], text_table(*cells(section)), *section.get("notes", ())]
    return "\n".join(blocks)


def to_markdown(document: dict) -> str:
    blocks = [f"# {document['title']}", *document.get("summary", ())]
    for section in document["sections"]:
        blocks += [f"## {section['heading']}", markdown_table(*cells(section)), *section.get("notes", ())]
    blocks += ["## Environment", markdown_table(["", ""], _environment_rows(document))]
    return "\n\n".join(blocks) + "\n"


def to_html(document: dict) -> str:
    """One page without scripts or links; charts are embedded PNG images, or a note where matplotlib is missing."""
    title = html.escape(document["title"])
    body = [f"<h1>{title}</h1>", *(f"<p>{html.escape(line)}</p>" for line in document.get("summary", ()))]
    for section in document["sections"]:
        body.append(f"<h2>{html.escape(section['heading'])}</h2>")
        body.append(_html_table(*cells(section)))
        body += [_html_chart(section, chart) for chart in section.get("charts", ())]
        body += [f'<p class="note">{html.escape(note)}</p>' for note in section.get("notes", ())]
    body += ["<h2>Environment</h2>", _html_table(["", ""], _environment_rows(document))]
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
    return f'<!doctype html>\n<html lang="en">{head}<body>\n' + "\n".join(body) + "\n</body></html>\n"


def cells(section: dict) -> tuple[list[str], list[list[str]]]:
    """Header labels and formatted cells of a section's table."""
    columns = section["columns"]
    labels = [column["label"] for column in columns]
    rows = [[_format(row.get(c["key"]), c.get("format", "")) for c in columns] for row in section["rows"]]
    return labels, rows


def text_table(labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: figures to the right, words to the left."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(labels)
    widths = [max(map(len, (label, *column))) for label, column in zip(labels, columns, strict=True)]
    figures = [bool(column) and all(_FIGURE.fullmatch(cell) for cell in column) for column in columns]

    def line(row: Sequence[str]) -> str:
        triples = zip(row, widths, figures, strict=True)
        return "  ".join(cell.rjust(w) if figure else cell.ljust(w) for cell, w, figure in triples).rstrip()

    return "\n".join([line(labels), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown_table(labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(labels) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (labels, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:]))


def _check(document: object, what: str) -> None:
    if not isinstance(document, dict) or not {"title", "sections"} <= document.keys():
        raise ReportError(f"{what}: expected a result document with title and sections; got another")
    for index, section in enumerate(document["sections"]):
        if not isinstance(section, dict) or not {"heading", "columns", "rows"} <= section.keys():
            raise ReportError(f"{what}, section {index}: expected heading, columns and rows; got another")


def _format(value: object, spec: str) -> str:
    if value is None:
        return DASH
    return format(value, spec) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _environment_rows(document: dict) -> list[list[str]]:
    facts = document.get("environment", {})
    shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    return [[name, _format(value, "")] for name, value in shown.items()]


def _html_table(labels: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head = f"<thead>{line(labels, 'th')}</thead>" if any(labels) else ""
    return f"<table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _html_chart(section: dict, chart: dict) -> str:
    png = _chart(section, chart)
    title = html.escape(chart["title"])
    if png is None:
        return f'<p class="note">No chart "{title}": matplotlib is not installed.</p>'
    return f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _chart(section: dict, chart: dict) -> bytes | None:
    """PNG of the rows that have the values; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    needed = [chart[key] for key in ("column", "against", "low", "high") if key in chart]
    rows = [row for row in section["rows"] if all(row.get(key) is not None for key in needed)]
    figure = Figure(figsize=_size(section, chart, rows), layout="constrained")
    axes = figure.add_subplot()
    draw = _points if "against" in chart else _bars
    draw(axes, section["columns"], chart, rows)
    axes.set_title(chart["title"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _size(section: dict, chart: dict, rows: list[dict]) -> tuple[float, float]:
    """Width and height in inches; bars keep their room beside long names."""
    if "against" in chart:
        return 4.6, 3.4
    longest = max((len(str(row[section["columns"][0]["key"]])) for row in rows), default=0)
    return 4.6 + 0.08 * max(0, longest - 12), 0.7 + 0.38 * len(rows)


def _errors(chart: dict, rows: list[dict]) -> list[list[float]] | None:
    """Distances to the lower and to the upper end of each error bar, if the chart has them."""
    if "low" not in chart:
        return None
    lower = [max(0.0, row[chart["column"]] - row[chart["low"]]) for row in rows]
    return [lower, [max(0.0, row[chart["high"]] - row[chart["column"]]) for row in rows]]


def _colours(rows: list[dict]) -> list[str]:
    return [_BAR_COLOURS[i % len(_BAR_COLOURS)] for i in range(len(rows))]


def _bars(axes, columns: list[dict], chart: dict, rows: list[dict]) -> None:
    """Horizontal bars, the first row on top."""
    values = [row[chart["column"]] for row in rows]
    spec = next(c for c in columns if c["key"] == chart["column"]).get("format", "")
    names = [str(row[columns[0]["key"]]) for row in rows]
    bars = axes.barh(names, values, xerr=_errors(chart, rows), color=_colours(rows), error_kw={"lw": 1})
    axes.bar_label(bars, [_format(v, spec) for v in values], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.18)


def _points(axes, columns: list[dict], chart: dict, rows: list[dict]) -> None:
    """Named points with their error bars."""
    errors = _errors(chart, rows)
    for index, (row, colour) in enumerate(zip(rows, _colours(rows), strict=True)):
        x, y = row[chart["against"]], row[chart["column"]]
        error = None if errors is None else [[errors[0][index]], [errors[1][index]]]
        axes.errorbar([x], [y], yerr=error, fmt="o", color=colour, elinewidth=1)
        axes.annotate(str(row[columns[0]["key"]]), (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    labels = {column["key"]: column["label"] for column in columns}
    axes.set_xlabel(labels[chart["against"]], fontsize=9)
    axes.set_ylabel(labels[chart["column"]], fontsize=9)
    axes.margins(x=0.25, y=0.2)
