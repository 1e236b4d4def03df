"""Checks a program before it runs: every step against the shapes, dtypes and ranges of its operands, once, for any
number of images.

The file may come from a stranger, and the hash in it is no defence: whoever writes a file writes its hash. What passes
here reads and writes inside of its arrays, whatever the values in them are.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from vqvit.serving import float_checks, int8_checks, int8_ops
from vqvit.serving.program import Program, ProgramError, Step, expect, shortened
from vqvit.serving.symbols import Array, Panels, Size
from vqvit.serving.weights import Tensor

RULES: dict[str, Callable] = {**float_checks.RULES, **int8_checks.RULES}

PARAMETERS = {op: inspect.signature(rule).parameters.values() for op, rule in RULES.items()}

COUNTS = {
    op: (
        sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters),
        16 if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(parameters),
    )
    for op, parameters in PARAMETERS.items()
}
"""Fewest and most arguments of each operation."""

UNFORESEEN = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a rule raises for arguments that nobody thought of: the program is refused all the same."""


@dataclass(frozen=True)
class Expected:
    """What a step gives, where NumPy decides about it: shape and dtype of its result."""

    shape: tuple
    dtype: str

    def of(self, batch: int) -> tuple[int, ...]:
        return tuple(part.of(batch) if isinstance(part, Size) else part for part in self.shape)


def check(program: Program, tensors: dict[str, Tensor]) -> dict[str, object]:
    """What is known of each value. Raises `ProgramError` if a step does not fit its operands."""
    weights = {name: described(tensor) for name, tensor in tensors.items()}
    values: dict[str, object] = {}
    for description in program.inputs:
        _define(values, description.name, Array((Size(1, 0), *description.shape[1:]), "float32"))
    for index, step in enumerate(program.steps):
        try:
            _check_step(step, values, weights)
        except ProgramError as error:
            raise ProgramError(f"step {index}, {shortened(step.op)}: {error}") from error
        except UNFORESEEN as error:
            text = shortened(f"{type(error).__name__}: {error}")
            raise ProgramError(f"step {index}, {shortened(step.op)}: expected fitting arguments; got {text}") from error
    for label, name in program.outputs.items():
        expect(name in values, f"the output {shortened(label)} among the values", name)
        expect(isinstance(values[name], Array), f"an array for the output {shortened(label)}", values[name])
        expect(values[name].ndim > 0, f"one or more dimensions for the output {shortened(label)}", values[name])
    return values


def described(tensor: Tensor) -> Array | Panels:
    if tensor.in_panels:
        return Panels(*tensor.shape[:2])
    return Array(tensor.shape, tensor.dtype.name)


def _check_step(step: Step, values: dict, weights: dict) -> None:
    expect(step.op in RULES, "operations that this version knows", step.op)
    least, most = COUNTS[step.op]
    expect(least <= len(step.arguments) <= most, f"{least} to {most} arguments", len(step.arguments))
    if step.op == int8_ops.ENCODER_BLOCK:
        for part in step.arguments[1:]:
            expect(not (isinstance(part, dict) and "value" in part), "weights and constants behind x", part)
    result = RULES[step.op](*(_value(part, values, weights) for part in step.arguments))
    if isinstance(step.results, str):
        _define(values, step.results, result)
        return
    expect(isinstance(result, list | tuple), "the name of one result", step.results)
    expect(len(step.results) <= len(result), f"at most {len(result)} results", step.results)
    for name, part in zip(step.results, result, strict=False):
        if name is not None:
            _define(values, name, part)


def _define(values: dict, name: str, value: object) -> None:
    expect(name not in values, "a name of its own for each value", name)
    values[name] = value


def _value(raw: object, values: dict, weights: dict) -> object:
    """An argument as rules take it."""
    if isinstance(raw, list):
        return [_value(part, values, weights) for part in raw]
    if not isinstance(raw, dict):
        return raw
    ((kind, content),) = raw.items()
    if kind == "value":
        expect(content in values, "a value that an earlier step gives", content)
        return values[content]
    if kind == "weight":
        expect(content in weights, "a weight of the file", content)
        return weights[content]
    return float(content) if kind == "number" else content


def expected(values: dict[str, object], step: Step) -> list[tuple[str, Expected]]:
    """Names of a step's results that are arrays, and what each has to be."""
    names = (step.results,) if isinstance(step.results, str) else step.results
    found = [(name, values[name]) for name in names if name is not None]
    return [(name, Expected(value.shape, value.dtype)) for name, value in found if isinstance(value, Array)]
