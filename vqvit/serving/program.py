"""The program that a `Session` runs: a folder with `program.json` and `weights.safetensors`, from `vqvit.export`.

A program is a list of steps in single assignment: an operation, its arguments, and the names of its results. Arguments
are plain JSON, but for objects of one key: {"value": name} of an input or an earlier result, {"weight": name} of a
tensor in the file, {"number": "nan"} (JSON has no NaN), {"dtype": name}. int8 weights are stored in panels
(`vqvit.layouts`), for every machine; where kernels are faster with strips, a process lays them out as it loads them.

A folder may come from a stranger. What is read here has the form of a program; `vqvit.serving.checks` finds out whether
its steps fit together.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FORMAT = 1
PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
BATCH = "batch"
"""In the shape of an input: any number of images."""

MOST_JSON = 1 << 26
"""Bytes of JSON that are read: a model of 1,000 unfused layers has a tenth of it."""

MOST_DIMENSIONS = 8
MOST_ELEMENTS = 1 << 28
"""Of one value for one image: a gibibyte of fp32. The attention of ViT-g to 1,370 tokens has a tenth of it."""

INT64 = range(-(1 << 63), 1 << 63)


class ProgramError(ValueError):
    """An exported folder that is incomplete, corrupted, of another version, or whose program no session may run; or a
    model that no program can express.
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


def expect(condition: bool, wanted: str, received: object) -> None:
    """Raise `ProgramError("expected ...; got ...")` unless `condition`."""
    if not condition:
        raise ProgramError(f"expected {wanted}; got {shortened(received)}")


def shortened(value: object) -> str:
    """What an error shows of a value that may be of any length and depth."""
    try:
        text = str(value) if isinstance(value, str | tuple) else repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} of lists in lists"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:200] + "..."


def read(folder: str | Path) -> Program:
    """The program in `folder`. Raises `FileNotFoundError` or `ProgramError`; its weights are not read yet."""
    folder = Path(folder)
    for name in (PROGRAM, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected a model from vqvit.export with {PROGRAM} and {WEIGHTS}")
    path = folder / PROGRAM
    with open(path, "rb") as file:
        text = file.read(MOST_JSON + 1)
    try:
        expect(len(text) <= MOST_JSON, f"at most {MOST_JSON} bytes", "more")
        return _program(parsed(text))
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from error


def parsed(text: bytes) -> object:
    """The JSON of `text`: no name twice in an object, nothing that is not JSON. Raises `ProgramError`."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ProgramError("expected JSON; got brackets in brackets without end") from error
    except ProgramError:
        raise
    except ValueError as error:  # of JSON, of UTF-8, and of numbers with thousands of digits
        raise ProgramError(f"expected JSON; got text that fails to parse: {error}") from error


def _object(pairs: list) -> dict:
    result = dict(pairs)
    expect(len(result) == len(pairs), "names of their own in an object", [name for name, _ in pairs])
    return result


def _no_constant(name: str) -> None:
    raise ProgramError(f"expected JSON; got {name}")


def _program(raw: object) -> Program:
    expect(isinstance(raw, dict), "a program: an object with format, inputs, outputs, steps and sha256", raw)
    version = raw.get("format")
    expect(type(version) is int and version == FORMAT, f"format {FORMAT}", version)
    fields = {"format", "inputs", "outputs", "steps", "sha256"}
    expect(raw.keys() == fields, f"a program: the fields {', '.join(sorted(fields))}", ", ".join(raw))
    inputs, outputs, steps = raw["inputs"], raw["outputs"], raw["steps"]
    expect(isinstance(inputs, list) and len(inputs) > 0, "a program: a list of inputs", inputs)
    expect(isinstance(steps, list), "a program: a list of steps", steps)
    expect(isinstance(outputs, dict) and len(outputs) > 0, "a program: outputs by name", outputs)
    for value in outputs.values():
        expect(isinstance(value, str), "the name of a value for each output", value)
    digest = raw["sha256"]
    expect(isinstance(digest, str) and len(digest) == 64, "the SHA-256 of the weights", digest)
    return Program(tuple(map(_input, inputs)), outputs, tuple(map(_step, steps)), digest)


def _input(raw: object) -> Input:
    expect(isinstance(raw, dict) and raw.keys() == {"name", "shape"}, "an input: name and shape", raw)
    name, shape = raw["name"], raw["shape"]
    expect(isinstance(name, str), "the name of an input", name)
    expect(isinstance(shape, list) and 0 < len(shape) <= MOST_DIMENSIONS, f"a shape for {shortened(name)}", shape)
    elements = 1
    for index, size in enumerate(shape):
        fits = size == BATCH if index == 0 else type(size) is int and 1 <= size <= MOST_ELEMENTS
        expect(fits, f"the shape ({BATCH}, sizes of at least 1) for {shortened(name)}", shape)
        elements *= 1 if index == 0 else size
    expect(elements <= MOST_ELEMENTS, f"at most {MOST_ELEMENTS} elements of an image for {shortened(name)}", shape)
    return Input(name, tuple(shape))


def _step(raw: object) -> Step:
    fields = {"op", "arguments", "results"}
    expect(isinstance(raw, dict) and raw.keys() == fields, f"a step: {', '.join(sorted(fields))}", raw)
    op, arguments, results = raw["op"], raw["arguments"], raw["results"]
    expect(isinstance(op, str), "the name of an operation", op)
    expect(isinstance(arguments, list), f"a list of arguments for {shortened(op)}", arguments)
    for value in arguments:
        _check_argument(value)
    if isinstance(results, list):
        expect(all(name is None or isinstance(name, str) for name in results), "names of results", results)
        return Step(op, tuple(arguments), tuple(results))
    expect(isinstance(results, str), "the name of a result", results)
    return Step(op, tuple(arguments), results)


CONSTANTS = {
    "number": ("nan", "inf", "-inf"),
    "dtype": ("float32", "int8", "int32", "int64"),
}
"""What the objects among arguments may hold, but for names."""


def _check_argument(raw: object) -> None:
    if isinstance(raw, list):
        for part in raw:
            expect(not isinstance(part, list), "at most one list in another", raw)
            _check_argument(part)
    elif isinstance(raw, dict):
        expect(len(raw) == 1, "an argument of one key", raw)
        ((kind, content),) = raw.items()
        expect(kind in ("value", "weight", *CONSTANTS), "a value, weight, number or dtype", raw)
        expect(isinstance(content, str), f"the name of a {kind}", raw)
        expect(kind not in CONSTANTS or content in CONSTANTS[kind], f"one of {CONSTANTS.get(kind)}", raw)
    elif type(raw) is int:
        expect(raw in INT64, "an integer of 64 bits", raw)
