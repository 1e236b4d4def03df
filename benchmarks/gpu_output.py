"""What a run of gpu.py leaves: one archive with the rows, a summary, and tables of tiles; written anew after each
child.

FOLDER/gpu-rows.tar.gz holds a CSV file a section and the log of each child that died. FOLDER/gpu.md ends with the
verdicts. Sections of an earlier run stay in the archive until they are run again.
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from gpu_plan import section_of
from gpu_summary import target_lines

from vqvit.children import Outcome, write_atomically
from vqvit.report import text_table

ARCHIVE, SUMMARY = "gpu-rows.tar.gz", "gpu.md"
SHOWN_ROWS = 200


class Output:
    """Results so far. facts: of the machine; optional: children that need not run for a run to be complete."""

    def __init__(self, folder: Path, facts: dict, sections: tuple[str, ...], optional: frozenset[str] = frozenset()):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.facts, self.optional = folder, facts, optional
        self.outcomes: list[Outcome] = []
        self.running: dict[str, Outcome] = {}
        self.backends = tuple(facts.get("backends", ()))
        self._kept = {
            name: data for name, data in _members(folder / ARCHIVE) if _section_of_member(name) not in sections
        }

    def note(self, name: str, row: dict) -> None:
        """A row of a child that still runs."""
        self.running.setdefault(name, Outcome(name, problem="it had not ended")).rows.append(row)

    def add(self, outcome: Outcome) -> None:
        self.running.pop(outcome.name, None)
        self.outcomes.append(outcome)

    @property
    def known(self) -> list[Outcome]:
        return [*self.outcomes, *self.running.values()]

    def write(self, tables: Path | None = None) -> None:
        """Archive and summary, each whole or as it was; and copies of the tables in a folder, if there is one."""
        write_atomically(self.folder / ARCHIVE, self._archive())
        write_atomically(self.folder / SUMMARY, self.summary().encode())
        for path in sorted(tables.glob("tuned-*.json")) if tables else ():
            write_atomically(self.folder / path.name, path.read_bytes())

    def rows(self, section: str) -> list[dict]:
        of = [outcome for outcome in self.known if section_of(outcome.name) == section]
        return [row for outcome in of for row in (*outcome.rows, *_death_rows(outcome))]

    def _measured(self, section: str) -> list[dict]:
        return [row for o in self.known if section_of(o.name) == section for row in o.rows]

    def sections(self) -> list[str]:
        return list(dict.fromkeys(section_of(outcome.name) for outcome in self.known))

    # ---- verdicts ---------------------------------------------------------------------------------------------------

    def wrong(self) -> list[Outcome]:
        """Children with a row of wrong results, or that died, and those that were to run and did not."""
        return [
            o
            for o in self.known
            if _wrong_rows(o) or o.deaths or (o.problem and (o.started or o.name not in self.optional))
        ]

    def verdicts(self) -> Iterator[str]:
        """A line for each section, for each child with a fault, for the targets, and for the whole."""
        for section in self.sections():
            of = [o for o in self.known if section_of(o.name) == section]
            ran = [o for o in of if o.started]
            rows, bad = sum(len(o.rows) for o in of), sum(len(_wrong_rows(o)) for o in of)
            died = sum(len(o.deaths) or bool(o.problem) for o in ran)
            seconds = sum(o.seconds for o in ran)
            state = "right" if ran and not bad and not died else "WRONG" if bad else "DIED" if died else "NOT RUN"
            yield (
                f"{section}: {state}; {rows} rows, {bad} wrong; {len(ran)} of {len(of)} processes ran, {died} deaths,"
                f" {seconds:.0f} s of processes"
            )
        for outcome in self.wrong():
            first = next((f"{_item(row)}: {row.get('note') or 'other bits'}" for row in _wrong_rows(outcome)), "")
            yield f"! {outcome.name}: {'; '.join(filter(None, [outcome.said, first]))[:300]}"
        if {"kernels", "models"} & set(self.sections()):
            yield from self._targets()
        bad = self.wrong()
        names = ", ".join(o.name for o in bad[:6]) + (", ..." if len(bad) > 6 else "")
        said = f"{len(bad)} processes with a fault: {names}" if bad else "all right" if self.known else "nothing ran"
        yield f"VERDICT: {said}"

    def _targets(self) -> list[str]:
        try:
            return list(target_lines(self._measured("kernels"), self._measured("models"), self.backends))
        except (KeyError, TypeError, ValueError) as error:  # rows of an unforeseen form must not end the run
            return [f"no targets can be read off the rows: {type(error).__name__}: {error}"]

    # ---- files ------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        parts = [f"# vqvit on {self.facts.get('device', 'an unknown device')}\n"]
        parts.append(f"```json\n{json.dumps(self.facts, indent=1, default=str)}\n```")
        for section in self.sections():
            rows = self.rows(section)
            parts.append(f"\n## {section}: {len(rows)} rows\n")
            if rows:
                shown = rows if len(rows) <= SHOWN_ROWS else [row for row in rows if _is_wrong(row)] or rows[:20]
                parts.append(_table(shown))
                if shown is not rows:
                    parts.append(f"\n{len(rows) - len(shown)} more in {ARCHIVE}.")
        faults = [o for o in self.known if o.said]
        if faults:
            parts.append("\n## processes that died, or have a note\n")
            parts += [f"- {o.name}: {o.said}" for o in faults]
        parts.append("\n## verdicts\n")
        return "\n".join(parts) + "\n" + "\n".join(self.verdicts()) + "\n"

    def _archive(self) -> bytes:
        members = dict(self._kept)
        provenance = self.facts.get("provenance", {})
        for section in self.sections():
            if rows := self.rows(section):
                members[f"gpu_{section}.csv"] = _csv([{**row, **_new(provenance, row)} for row in rows])
        for outcome in self.outcomes:
            if outcome.problem and outcome.log:
                members[f"log_{outcome.name.replace('/', '-')}.txt"] = outcome.log.encode()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()


def read_rows(folder: Path, section: str) -> list[dict]:
    """The rows of a section in a run's archive."""
    data = dict(_members(folder / ARCHIVE)).get(f"gpu_{section}.csv", b"")
    return list(csv.DictReader(io.StringIO(data.decode())))


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if not path.is_file():
        return
    with tarfile.open(path, "r:gz") as archive:
        for info in archive:
            yield info.name, archive.extractfile(info).read()


def _section_of_member(name: str) -> str:
    return name.removeprefix("gpu_").removeprefix("log_").partition(".")[0].partition("-")[0]


def _is_wrong(row: dict) -> bool:
    return str(row.get("wrong", "0")) not in ("0", "")


def _death_rows(outcome: Outcome) -> list[dict]:
    """A row for each item that killed its process."""
    return [{"process": outcome.name, "item": item, "wrong": 1, "note": outcome.said} for item in outcome.deaths]


def _wrong_rows(outcome: Outcome) -> list[dict]:
    return [row for row in outcome.rows if _is_wrong(row)]


def _item(row: dict) -> str:
    return " ".join(
        str(row[key]) for key in ("op", "case", "m", "kind", "shape", "what") if row.get(key) not in (None, "")
    )


def _new(more: dict, row: dict) -> dict:
    return {key: value for key, value in more.items() if key not in row}


def _columns(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _table(rows: list[dict]) -> str:
    columns = _columns(rows)
    return f"```\n{text_table(columns, [[str(row.get(c, '')) for c in columns] for row in rows])}\n```"
