"""The chart of the README: latency by engine at two batch sizes, from the last run in results/cpu.csv, as an SVG.

    python benchmarks/cpu_chart.py [--arch vit-b16] [--batch 1,8] [--csv FILE] [--output docs/cpu_latency.svg]

The same rows give the same file. Needs matplotlib.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from cpu_engines import ENGINES

ROOT = Path(__file__).resolve().parents[1]

PEER, OWN = "#9aa5b1", "#d9480f"


def last_run(rows: Sequence[dict], arch: str, batches: Sequence[int]) -> dict[int, list[dict]]:
    """Rows with a latency by batch size, from the last run of `arch` that has each. Raises `ValueError` if none has."""
    found = {}
    for batch in batches:
        here = [row for row in rows if row["arch"] == arch and row["batch"] == str(batch)]
        date = here[-1]["date"] if here else None
        found[batch] = [row for row in here if row["date"] == date and row["status"] == "ok"]
        if not found[batch]:
            raise ValueError(f"expected rows of {arch} at batch {batch}; got none")
    return found


def draw(rows: Sequence[dict], arch: str, batches: Sequence[int], output: Path) -> None:
    """Horizontal bars of median milliseconds with p20 to p80, fastest first, one panel for each batch size."""
    import matplotlib
    from matplotlib.figure import Figure

    found = last_run(rows, arch, batches)
    height = 1.2 + 0.3 * max(map(len, found.values()))
    # Text stays text, ids come from the salt and the date is left out, so that the same rows give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vqvit", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.2 * len(batches), height), layout="constrained")
        for index, (batch, measured) in enumerate(found.items()):
            axes = figure.add_subplot(1, len(batches), index + 1)
            ordered = sorted(measured, key=lambda row: (float(row["median_ms"]), row["engine"]))
            medians = [float(row["median_ms"]) for row in ordered]
            below = [median - float(row["p20_ms"]) for median, row in zip(medians, ordered, strict=True)]
            above = [float(row["p80_ms"]) - median for median, row in zip(medians, ordered, strict=True)]
            engines = [ENGINES[row["engine"]] for row in ordered]
            bars = axes.barh(
                [engine.title for engine in engines],
                medians,
                xerr=[below, above],
                color=[OWN if engine.own else PEER for engine in engines],
                error_kw={"lw": 1},
            )
            axes.bar_label(bars, [f"{median:.4g}" for median in medians], padding=4, fontsize=8)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{arch}, batch {batch}: milliseconds, less is better", fontsize=9)
        first = found[batches[0]][0]
        figure.supxlabel(f"{first['device']}, {first['threads']} threads, {first['date'][:10]}", fontsize=8)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit-b16")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.csv")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "cpu_latency.svg")
    arguments = parser.parse_args()
    with open(arguments.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    draw(rows, arguments.arch, [int(batch) for batch in arguments.batch.split(",")], arguments.output)


if __name__ == "__main__":
    main()
