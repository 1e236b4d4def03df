"""A loaded program and its execution, step by step."""

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from vqvit import layouts, native
from vqvit.serving import float_ops, int8_ops
from vqvit.serving.program import BATCH, WEIGHTS, Input, Program, ProgramError, Step, read

Values = dict[str, object]
Action = Callable[[Values], None]

ALIGNMENT = 64  # bytes: a cache line and a zmm register, so that no load of weights touches two lines


class Session:
    """A model that `vqvit.export` wrote, ready to run; calls may come from several threads.

    Args:
        folder: the exported model.
        threads: of the kernels; default: the CPUs that this process may use.

    Raises `FileNotFoundError` or `ProgramError` for a folder that is not an exported model;
    `vqvit.native.NativeUnavailableError` where the CPU library cannot be loaded.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        if threads is not None and threads < 1:
            raise ValueError(f"threads: expected at least 1; got {threads}")
        self.threads = threads or usable_cpus()
        program = read(folder)
        self.inputs, self.outputs = program.inputs, program.outputs
        self._weights = load_weights(Path(folder) / WEIGHTS, self.threads)
        self._actions = self._prepare(program)

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
        streams = {step.results for step in program.steps if step.op == int8_ops.ENCODER_BLOCK} - kept
        actions = []
        for index, step in enumerate(program.steps):
            # A block writes over its input if that is a block's result, so an array of its own, that nobody else reads.
            over_input = all(name in streams and readers[name] == 1 for name in names_read(step.arguments))
            actions.append(self._action(step, over_input))
            done = tuple(name for name, user in last.items() if user == index and name not in kept)
            if done:
                actions.append(lambda values, done=done: [values.pop(name) for name in done])
        return actions

    def _action(self, step: Step, over_input: bool) -> Action:
        op, raw, prepare = self._operation(step, over_input)
        arguments = [argument(a, self._weights) for a in raw]

        def function(values: Values) -> object:
            return op(*(prepare(get(values)) for get in arguments))

        if isinstance(step.results, str):
            return lambda values: values.__setitem__(step.results, function(values))
        wanted = [(i, name) for i, name in enumerate(step.results) if name is not None]

        def assign(values: Values) -> None:
            results = function(values)
            for i, name in wanted:
                values[name] = results[i]

        return assign

    def _operation(self, step: Step, over_input: bool) -> tuple[Callable, tuple, Callable]:
        """What to call for a step, the arguments left to it, and what each goes through first."""
        if step.op == int8_ops.ENCODER_BLOCK:
            source, *rest = step.arguments
            block = int8_ops.encoder_block(*(argument(a, self._weights)({}) for a in rest))
            return partial(int8_ops.run_encoder_block, self.threads, *block, over_input), (source,), contiguous
        if step.op in int8_ops.OPS:
            return partial(int8_ops.OPS[step.op], self.threads), step.arguments, contiguous
        if step.op in float_ops.OPS:
            return float_ops.OPS[step.op], step.arguments, float_ops.unchanged
        raise ProgramError(f"expected operations that this version knows; got {step.op}")


def usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
    return np.ascontiguousarray(array)


def contiguous(value: object) -> object:
    return np.ascontiguousarray(value) if isinstance(value, np.ndarray) and value.ndim else value


def load_weights(path: Path, threads: int) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file in one block of memory, each on a cache line of its own; int8 weights, panels
    in the file, in the layout that this machine's kernels are fastest with.

    One large block also gets large pages where the system gives them.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            found = {name: file.get_slice(name) for name in names}
            dtypes = {name: DTYPES[part.get_dtype()] for name, part in found.items()}
            shapes = {name: loaded_shape(tuple(part.get_shape()), dtypes[name]) for name, part in found.items()}
            sizes = {name: int(np.prod(shapes[name])) * dtypes[name].itemsize for name in names}
            starts, total = {}, 0
            for name in names:
                starts[name], total = total, total + -(-sizes[name] // ALIGNMENT) * ALIGNMENT
            block = np.empty(total + ALIGNMENT, np.uint8)
            offset = -block.ctypes.data % ALIGNMENT
            weights = {}
            for name in names:
                start = offset + starts[name]
                weights[name] = block[start : start + sizes[name]].view(dtypes[name]).reshape(shapes[name])
                stored = file.get_tensor(name)
                if stored.shape == shapes[name]:
                    weights[name][...] = stored
                else:
                    int8_ops.reorder_weight(threads, stored, *padded_size(stored.shape), weights[name])
    except (SafetensorError, KeyError) as error:
        raise ProgramError(f"{path}: expected a safetensors file of int8, int32 and fp32; got: {error}") from error
    return weights


def loaded_shape(stored: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """What a tensor with this shape in the file has in memory."""
    in_panels = dtype == np.int8 and len(stored) == 4
    if not in_panels or native.cpu_weight_layout() == "panels":
        return stored
    return layouts.shape_of("strips", *padded_size(stored))


def padded_size(panels: tuple[int, ...]) -> tuple[int, int]:
    """(N, K) of a weight with this shape in panels, what pads them included."""
    return panels[0] * layouts.PANEL, (panels[1] - 1) * layouts.K_GROUP


DTYPES = {"F32": np.dtype(np.float32), "I8": np.dtype(np.int8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
"""By their name in safetensors."""


def argument(raw: object, weights: dict[str, np.ndarray]) -> Callable[[Values], object]:
    """How to read one argument of a step (its forms: `vqvit.serving.program`). Raises `ProgramError` for a weight that
    is missing.
    """
    if isinstance(raw, list):
        parts = [argument(part, weights) for part in raw]
        return lambda values: [get(values) for get in parts]
    if not isinstance(raw, dict):
        return lambda _: raw
    ((kind, content),) = raw.items()
    if kind == "value":
        return lambda values: values[content]
    if kind == "weight":
        if content not in weights:
            raise ProgramError(f"expected a weight {content!r}; the file has none")
        return lambda _, found=weights[content]: found
    constant = float(content) if kind == "number" else content
    return lambda _: constant


def names_read(raw: object) -> list[str]:
    """The values that arguments read."""
    if isinstance(raw, list | tuple):
        return [name for part in raw for name in names_read(part)]
    return [raw["value"]] if isinstance(raw, dict) and "value" in raw else []
