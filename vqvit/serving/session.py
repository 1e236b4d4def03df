"""A loaded program and its execution, step by step."""

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from vqvit import cpus
from vqvit.serving import checks, float_ops, int8_ops
from vqvit.serving.program import BATCH, PROGRAM, WEIGHTS, Input, Program, ProgramError, Step, read
from vqvit.serving.weights import WeightFile

Values = dict[str | None, object]
"""By name; the number of images under None."""

Action = Callable[[Values], None]


class Session:
    """A model that `vqvit.export` wrote, ready to run.

    The folder may come from a stranger: every step of its program is checked against the shapes and dtypes of its
    operands here, so that no call reads or writes outside of an array. Calls may come from several threads; a session
    works in a forked child, and a pickled one opens the folder again.

    Args:
        folder: the exported model.
        threads: of the kernels, at most the CPUs that this process may use; default: as many, or $OMP_NUM_THREADS.

    Raises `FileNotFoundError` where the folder holds no exported model, `ProgramError` for whatever is wrong in one;
    `vqvit.native.NativeUnavailableError` where the CPU library cannot be loaded.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        if threads is not None and threads < 1:
            raise ValueError(f"threads: expected at least 1; got {threads}")
        self.threads = min(threads or cpus.default_threads(), cpus.usable_cpus())
        program = read(folder)
        self.inputs, self.outputs = program.inputs, program.outputs
        self._source = Path(folder).absolute(), threads, program.sha256
        with WeightFile(Path(folder) / WEIGHTS) as file:
            try:
                self._known = checks.check(program, file.tensors)
            except ProgramError as error:
                raise ProgramError(f"{Path(folder) / PROGRAM}: {error}") from error
            self._weights = file.load(program.sha256, self.threads)
        self._actions = self._prepare(program)

    def __reduce__(self) -> tuple:
        return reopened, self._source

    def __call__(self, *images: np.ndarray) -> dict[str, np.ndarray]:
        """The model's outputs by name.

        Args: images: fp32, one array for each of `inputs`, usually pixel_values (B, C, H, W) for any B >= 1.

        Raises `ValueError` or `TypeError` for other inputs.
        """
        if len(images) != len(self.inputs):
            raise TypeError(f"expected {', '.join(i.name for i in self.inputs)}; got {len(images)} arrays")
        values: Values = {
            description.name: checked(description, array)
            for description, array in zip(self.inputs, images, strict=True)
        }
        counts = {len(array) for array in values.values()}
        if len(counts) > 1:
            raise ValueError(f"expected as many images in each input; got {sorted(counts)}")
        values[None] = counts.pop()
        for action in self._actions:
            action(values)
        return {name: np.ascontiguousarray(values[value]) for name, value in self.outputs.items()}

    def _prepare(self, program: Program) -> list[Action]:
        """One function a step, each followed by the release of what no later step reads."""
        last, readers = {}, Counter()
        for index, step in enumerate(program.steps):
            last.update(dict.fromkeys(names_read(step.arguments), index))
            readers.update(set(names_read(step.arguments)))
        kept = set(program.outputs.values())
        read_last = defaultdict(list)
        for name, index in last.items():
            if name not in kept:
                read_last[index].append(name)
        streams = {step.results for step in program.steps if step.op == int8_ops.ENCODER_BLOCK} - kept
        actions = []
        for index, step in enumerate(program.steps):
            # A block writes over its input if that is a block's result, so an array of its own, that nobody else reads.
            over_input = all(name in streams and readers[name] == 1 for name in names_read(step.arguments))
            actions.append(self._action(step, over_input))
            if done := tuple(read_last[index]):
                actions.append(lambda values, done=done: [values.pop(name) for name in done])
        return actions

    def _action(self, step: Step, over_input: bool) -> Action:
        op, raw, prepare = self._operation(step, over_input)
        arguments = [argument(a, self._weights) for a in raw]
        wanted = checks.expected(self._known, step) if step.op in float_ops.OPS else []

        def function(values: Values) -> object:
            return op(*(prepare(get(values)) for get in arguments))

        if isinstance(step.results, str):
            name = step.results
            if not wanted:
                return lambda values: values.__setitem__(name, function(values))
            ((_, result),) = wanted

            def assign_array(values: Values) -> None:
                values[name] = foreseen(step, result, function(values), values[None])

            return assign_array
        places = [(i, name) for i, name in enumerate(step.results) if name is not None]
        known = dict(wanted)

        def assign(values: Values) -> None:
            results = function(values)
            for i, name in places:
                values[name] = foreseen(step, known[name], results[i], values[None]) if known else results[i]

        return assign

    def _operation(self, step: Step, over_input: bool) -> tuple[Callable, tuple, Callable]:
        """What to call for a step, the arguments left to it, and what each goes through first."""
        if step.op == int8_ops.ENCODER_BLOCK:
            source, *rest = step.arguments
            block = int8_ops.encoder_block(*(argument(a, self._weights)({}) for a in rest))
            return partial(int8_ops.run_encoder_block, self.threads, *block, over_input), (source,), contiguous
        if step.op in int8_ops.OPS:
            return partial(int8_ops.OPS[step.op], self.threads), step.arguments, contiguous
        return float_ops.OPS[step.op], step.arguments, float_ops.unchanged


def reopened(folder: Path, threads: int | None, sha256: str) -> Session:
    """What a pickled session becomes. Raises `ProgramError` if the folder holds another model by now."""
    session = Session(folder, threads)
    if session._source[2] != sha256:
        raise ProgramError(f"{folder}: expected the model that was pickled; got another one")
    return session


def foreseen(step: Step, wanted: checks.Expected, array: np.ndarray, batch: int) -> np.ndarray:
    """`array`. Raises `ProgramError` if NumPy made another shape or dtype than was foreseen: kernels trust those."""
    if not isinstance(array, np.ndarray) or array.dtype != wanted.dtype or array.shape != wanted.of(batch):
        received = getattr(array, "dtype", type(array).__name__), getattr(array, "shape", ())
        raise ProgramError(f"{step.op}: expected {wanted.dtype} {wanted.of(batch)}; got {received[0]} {received[1]}")
    return array


def checked(description: Input, array: np.ndarray) -> np.ndarray:
    """`array` as contiguous fp32. Raises `ValueError` or `TypeError` if it is not what the model was exported for."""
    array = np.asarray(array)
    if array.dtype != np.float32:
        raise TypeError(f"{description.name}: expected float32; got {array.dtype}")
    fits = array.ndim == len(description.shape) and all(
        size == wanted or (wanted == BATCH and size >= 1)
        for size, wanted in zip(array.shape, description.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in description.shape)
        raise ValueError(f"{description.name}: expected shape ({wanted}); got {array.shape}")
    return np.require(array, requirements=("C", "ALIGNED"))


def contiguous(value: object) -> object:
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) and value.ndim else value


def argument(raw: object, weights: dict[str, np.ndarray]) -> Callable[[Values], object]:
    """How to read one argument of a checked step (its forms: `vqvit.serving.program`)."""
    if isinstance(raw, list):
        parts = [argument(part, weights) for part in raw]
        return lambda values: [get(values) for get in parts]
    if not isinstance(raw, dict):
        return lambda _: raw
    ((kind, content),) = raw.items()
    if kind == "value":
        return lambda values: values[content]
    if kind == "weight":
        return lambda _, found=weights[content]: found
    constant = float(content) if kind == "number" else content
    return lambda _: constant


def names_read(raw: object) -> list[str]:
    """The values that arguments read."""
    if isinstance(raw, list | tuple):
        return [name for part in raw for name in names_read(part)]
    return [raw["value"]] if isinstance(raw, dict) and "value" in raw else []
