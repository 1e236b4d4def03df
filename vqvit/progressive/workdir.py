"""Snapshots of a run on disk. A run that was killed at any point goes on from its last complete step.

`run.json` names what the run is of, its log, and its state files; it is replaced in one rename, after the state files
it names are complete, and before those it no longer names are removed.
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqvit.plan import Plan
from vqvit.progressive.config import ProgressiveError
from vqvit.progressive.runlog import RunLog, read_json, write_json

RUN_FILE = "run.json"
STATE_PATTERN = "state-*.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A trainable model: its plan, every tensor of its state dict, and the state file once it has one."""

    plan: Plan
    tensors: dict[str, Tensor]
    file: str | None = None


@dataclass(frozen=True)
class SavedRun:
    """What a run needs to go on: its log, the state before the stage under way, and the state after its last step."""

    log: RunLog
    entry: Snapshot
    current: Snapshot


class Workdir:
    """A folder with one run. `identity` says what the run is of: name to fingerprint."""

    def __init__(self, folder: str | Path, identity: dict[str, str], resume: bool):
        """Raises `FileExistsError` for a folder with a run if not `resume`, or with other content; `ProgressiveError`
        if its run is of another model, data or configuration.
        """
        self.folder, self.identity = Path(folder), identity
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder}: expected a folder for the run's snapshots; got a file")
        if self._document.is_file():
            if not resume:
                raise FileExistsError(f"{self.folder}: expected a new folder, or resume for the run that is in it")
            self._require_same(read_json(self._document).get("identity"))
        elif self.folder.is_dir() and any(p for p in self.folder.iterdir() if not _is_leftover(p)):
            raise FileExistsError(f"{self.folder}: expected a new folder or one with a run; got other content")
        self.folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> SavedRun | None:
        """The run as it was last saved, None if it has not begun. Raises `ProgressiveError` for damaged files."""
        if not self._document.is_file():
            return None
        raw = read_json(self._document)
        log = RunLog.from_dict(raw["log"])
        entry = self._read(raw["entry"])
        return SavedRun(log, entry, entry if raw["current"] == raw["entry"] else self._read(raw["current"]))

    def save(self, run: SavedRun) -> SavedRun:
        """Make `run` what `load` returns; returns it with the names of its files."""
        entry = self._write(run.entry)
        current = entry if run.current is run.entry else self._write(run.current)
        states = {
            name: {"file": s.file, "plan": s.plan.to_json()} for name, s in (("entry", entry), ("current", current))
        }
        write_json({"identity": self.identity, "log": run.log.to_dict(), **states}, self._document)
        for path in self.folder.glob(STATE_PATTERN):
            if path.name not in (entry.file, current.file):
                path.unlink()
        return SavedRun(run.log, entry, current)

    @property
    def _document(self) -> Path:
        return self.folder / RUN_FILE

    def _require_same(self, identity: dict | None) -> None:
        if identity is None or identity.keys() != self.identity.keys():
            raise ProgressiveError(f"{self._document}: expected the identity of a run; got another document")
        if different := [name for name, value in self.identity.items() if identity[name] != value]:
            raise ProgressiveError(f"{self.folder}: expected a run of the same {', '.join(different)}; got another's")

    def _write(self, snapshot: Snapshot) -> Snapshot:
        if snapshot.file is not None:
            return snapshot
        path = self.folder / f"state-{secrets.token_hex(8)}.safetensors"
        temporary = path.with_name(f".{path.name}.part")
        save_file({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}, temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        return Snapshot(snapshot.plan, snapshot.tensors, path.name)

    def _read(self, raw: dict) -> Snapshot:
        path = self.folder / raw["file"]
        if not path.is_file():
            raise ProgressiveError(f"{self.folder}: expected the state file {raw['file']}; it is missing")
        try:
            return Snapshot(Plan.from_json(raw["plan"]), load_file(path), raw["file"])
        except SafetensorError as error:
            raise ProgressiveError(
                f"{path}: expected a safetensors file; got one that cannot be read: {error}"
            ) from error


def _is_leftover(path: Path) -> bool:
    """Of a run that was killed before its first step was complete."""
    return path.match(STATE_PATTERN) or path.name.endswith(".part")
