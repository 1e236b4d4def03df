"""The program that a `Session` runs: a folder with `program.json` and `weights.safetensors`, from `vqvit.export`.

A program is a list of steps in single assignment: an operation, its arguments, and the names of its results. Arguments
are plain JSON, but for objects of one key: {"value": name} of an input or an earlier result, {"weight": name} of a
tensor in the file, {"number": "nan"} (JSON has no NaN), {"dtype": name}. int8 weights are stored in panels
(`vqvit.layouts`), for every machine; where kernels are faster with strips, a process lays them out as it loads them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vqvit.files import sha256

FORMAT = 1
PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
BATCH = "batch"
"""In the shape of an input: any number of images."""


class ProgramError(RuntimeError):
    """An exported folder that is missing, incomplete, corrupted, or of another version; or a model that no program can
    express.
    """


@dataclass(frozen=True)
class Input:
    """An fp32 array; `shape` has `BATCH` for the number of images."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """results: a name, or for an operation with several results one each, None for those that nobody reads."""

    op: str
    arguments: tuple
    results: str | tuple[str | None, ...]


@dataclass(frozen=True)
class Program:
    """outputs: name for the caller to the value's name. sha256: of the weights' file."""

    inputs: tuple[Input, ...]
    outputs: dict[str, str]
    steps: tuple[Step, ...]
    sha256: str

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False)


def read(folder: str | Path) -> Program:
    """The program in `folder`, whose weights are checked. Raises `FileNotFoundError` or `ProgramError`."""
    folder = Path(folder)
    for name in (PROGRAM, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected a model from vqvit.export with {PROGRAM} and {WEIGHTS}")
    path = folder / PROGRAM
    try:
        raw = json.loads(path.read_text())
        version = raw.pop("format")
        if version != FORMAT:
            raise ProgramError(f"{path}: expected format {FORMAT}; got {version!r}")
        program = Program(
            tuple(Input(i["name"], tuple(i["shape"])) for i in raw["inputs"]),
            dict(raw["outputs"]),
            tuple(Step(s["op"], tuple(s["arguments"]), _results(s["results"])) for s in raw["steps"]),
            raw["sha256"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ProgramError(
            f"{path}: expected a program; got another document ({type(error).__name__}: {error})"
        ) from error
    if (digest := sha256(folder / WEIGHTS)) != program.sha256:
        raise ProgramError(
            f"{folder / WEIGHTS}: expected SHA-256 {program.sha256[:16]}...; got {digest[:16]}...: "
            "truncated or corrupted"
        )
    return program


def _results(raw: str | list) -> str | tuple[str | None, ...]:
    return raw if isinstance(raw, str) else tuple(raw)
