"""Exports a quantized model as a program for `vqvit.serving`: the graph of `torch.export`, simplified, and weights."""

import contextlib
import dataclasses
import math
import operator
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from vqvit import files, layouts, ops
from vqvit.evaluate import eval_mode
from vqvit.nn import QuantLinear
from vqvit.rewriter import plan_of
from vqvit.serving import Session, float_ops, int8_ops
from vqvit.serving.program import BATCH, PROGRAM, WEIGHTS, Input, Program, ProgramError, Step

TOLERANCE = 1e-3
"""Relative error of the session's outputs to the model's at which an export is refused. Kernels give the same bits, but
float operations between them round otherwise, and a code may change that lay on a tie."""

PACKED_ARGUMENTS = {
    "int8_linear": ("b",),
    "int8_linear_quantize": ("b",),
    "int8_linear_qkv": ("b",),
    "int8_linear_compensated": ("b", "b_residual"),
    "int8_encoder_block": ("qkv", "attn_out", "fc1", "fc2"),
}
"""Arguments that the session takes as packed panels."""


def export(model: nn.Module, folder: str | Path, sample: Tensor | None = None) -> Path:
    """Write `model` for `vqvit.serving.Session`, all of it or nothing; an earlier export in `folder` is replaced.

    Args:
        model: quantized, on the CPU, with fp32 outside of its integer layers.
        folder: new, empty, or an earlier export.
        sample: fp32 (B, C, H, W), whose size all later images have; default: random, of the size in the model's
            configuration. The session's outputs on it are compared with the model's.

    Raises `PlanError` if the model is not quantized, `ProgramError` if it computes what no session can, `ValueError`
    without a sample where the configuration names no size, `FileExistsError` if `folder` holds something else.
    """
    folder = Path(folder)
    plan_of(model)  # raises for a float model
    files.require_replaceable(folder, PROGRAM, "an exported model")
    sample = _sample(model) if sample is None else sample.detach()
    with eval_mode(model), _in_panels(model), torch.inference_mode():
        program, weights = _program(model, sample)
        expected = dict(_named_tensors(model(sample)))
    with files.staged_folder(folder) as staging:
        save_file(weights, staging / WEIGHTS)
        finished = dataclasses.replace(program, sha256=files.sha256(staging / WEIGHTS))
        (staging / PROGRAM).write_text(finished.to_json() + "\n")
        _compare(Session(staging)(sample.numpy()), expected)
    return folder


@contextlib.contextmanager
def _in_panels(model: nn.Module) -> Iterator[None]:
    """Packed weights as every instruction set can load them, then again as this one is fastest with them."""
    packed = [module for module in model.modules() if isinstance(module, QuantLinear) and module.packed]
    for layer in packed:
        layer.pack_("panels")
    try:
        yield
    finally:
        for layer in packed:
            layer.pack_()


def _sample(model: nn.Module) -> Tensor:
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError("sample: expected images, for the model's configuration names no image_size; got none")
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)


def _program(model: nn.Module, sample: Tensor) -> tuple[Program, dict[str, Tensor]]:
    """The program but for its hash, and its weights by name."""
    two = torch.cat([sample, sample])[:2]  # with one image the number of images would count as a constant
    exported = torch.export.export(model, (two,), dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},), strict=False)
    graph = exported.graph
    _drop_checks(graph)
    _drop_whole_slices(graph)
    _read_selected_rows_only(graph)
    constants = _constants(graph, _model_tensors(exported))
    inputs = tuple(
        Input(node.name, (BATCH, *node.meta["val"].shape[1:]))
        for node in graph.find_nodes(op="placeholder")
        if node.users and node not in constants
    )
    writer = _Writer({node: name for node, (name, _) in constants.items()})
    steps = tuple(writer.steps(graph))
    weights = {
        name: _stored(value, name, name in writer.packed) for name, value in constants.values() if name in writer.used
    }
    (results,) = next(node.args for node in graph.nodes if node.op == "output")
    labels = _labels(exported.call_spec.out_spec, len(results))
    outputs = {label: node.name for label, node in zip(labels, results, strict=True) if node is not None}
    return Program(inputs, outputs, steps, ""), weights


def _model_tensors(exported: torch.export.ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """By placeholder: the name in the model, and the tensor."""
    signature = exported.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**exported.state_dict, **exported.constants}
    return {placeholder: (name, tensors[name]) for placeholder, name in names.items()}


def _constants(graph: fx.Graph, tensors: dict[str, tuple[str, Tensor]]) -> dict[fx.Node, tuple[str, object]]:
    """Name and value of every node that no input reaches: the model's tensors, and what it computes of them alone, such
    as position embeddings interpolated to the size of the images.
    """
    constants = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in tensors:
            constants[node] = tensors[node.name]
        elif node.op == "call_function" and _is_pure(node) and all(n in constants for n in node.all_input_nodes):
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: constants[n][1])
            constants[node] = (f"constants.{node.name}", node.target(*arguments[0], **arguments[1]))
    return constants


def _is_pure(node: fx.Node) -> bool:
    """Whether the node's value depends on its arguments alone, and changes none of them."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def _drop_checks(graph: fx.Graph) -> None:
    """Checks of the input have no place in a program: a session checks its own."""
    for node in graph.nodes:
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _drop_whole_slices(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor):
        _, _, start, end, step = (value for _, value in _all_arguments(node))
        if start in (None, 0) and (end is None or end == sys.maxsize) and step == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _read_selected_rows_only(graph: fx.Graph) -> None:
    """Move the choice of a token before what works on each token alone: heads normalise all of them, and read one."""
    aten = torch.ops.aten
    moved = True
    while moved:
        moved = False
        for node in list(graph.nodes):
            if node.target is not aten.select.int or len(node.args[0].users) > 1:
                continue
            source, axis, index = node.args
            rank = source.meta["val"].dim()
            if source.target is aten.layer_norm.default and axis % rank < rank - len(source.args[1]):
                with graph.inserting_before(source):
                    row = graph.call_function(aten.select.int, (source.args[0], axis, index))
                row.meta["val"] = source.args[0].meta["val"].select(axis, index)
                source.args = (row, *source.args[1:])
                source.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                moved = True
            elif source.target is aten.pad.default and _keeps(source, axis, index):
                node.args = (source.args[0], axis, index)
                graph.erase_node(source)
                moved = True


def _keeps(padded: fx.Node, axis: int, index: int) -> bool:
    """Whether `index` of `axis` is an element of what was padded, with nothing added before any of it, and on no other
    axis.
    """
    before = padded.args[0].meta["val"]
    amounts = list(padded.args[1])
    place = 2 * (before.dim() - 1 - axis % before.dim())
    others = amounts[:place] + amounts[place + 2 :]
    return place < len(amounts) and amounts[place] == 0 and 0 <= index < before.shape[axis] and not any(others)


class _Writer:
    """Nodes to steps. `weights`: the name of each node that is a constant."""

    def __init__(self, weights: dict[fx.Node, str]):
        self.weights = weights
        self.used: set[str] = set()
        self.packed: set[str] = set()

    def steps(self, graph: fx.Graph) -> Iterator[Step]:
        for node in graph.nodes:
            if node.op == "call_function" and node.target is not operator.getitem and node not in self.weights:
                yield self.step(node)

    def step(self, node: fx.Node) -> Step:
        name = _op_name(node.target)
        known = name in int8_ops.OPS or name == int8_ops.ENCODER_BLOCK or name in float_ops.OPS
        if not known:
            raise ProgramError(f"export: expected operations that vqvit.serving has; the model uses {name}")
        arguments = list(_all_arguments(node))
        packed = PACKED_ARGUMENTS.get(name.split(".")[1], ()) if name.startswith("vqvit.") else ()
        for parameter, value in arguments:
            if parameter not in packed or value is None:
                continue
            if value not in self.weights:
                raise ProgramError(f"export: expected weights that the model stores as int8; {name} gets computed ones")
            self.packed.add(self.weights[value])
        values = node.meta.get("val")
        for tensor in values if isinstance(values, list | tuple) else [values]:
            if isinstance(tensor, Tensor) and tensor.dtype not in DTYPES:
                raise ProgramError(
                    f"export: expected tensors of {', '.join(map(str, DTYPES))}; {name} gives {tensor.dtype}"
                )
        return Step(name, tuple(self.argument(value) for _, value in arguments), _result_names(node))

    def argument(self, value: object) -> object:
        """As `vqvit.serving.program` writes arguments."""
        if isinstance(value, fx.Node):
            if value in self.weights:
                self.used.add(self.weights[value])
                return {"weight": self.weights[value]}
            return {"value": value.name}
        if isinstance(value, list | tuple):
            return [self.argument(part) for part in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return None  # device, layout and memory format mean nothing to NumPy


DTYPES = (torch.float32, torch.int8, torch.int32, torch.int64)
"""Of the values between the steps."""


def _op_name(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def _all_arguments(node: fx.Node) -> Iterator[tuple[str, object]]:
    """Every argument by name, defaults included, in the schema's order."""
    if not isinstance(node.target, torch._ops.OpOverload):
        yield from (("", value) for value in node.args)
        return
    for index, parameter in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            yield parameter.name, node.args[index]
        else:
            yield parameter.name, node.kwargs.get(parameter.name, parameter.default_value)


def _result_names(node: fx.Node) -> str | tuple[str | None, ...]:
    parts = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
    if not parts:
        return node.name
    return tuple(parts.get(i) for i in range(max(parts) + 1))


def _stored(tensor: Tensor, name: str, packed: bool) -> Tensor:
    """A weight as the session reads it: int8 in panels where a kernel takes them, all else fp32 or an integer."""
    tensor = tensor.detach().cpu().contiguous()
    if packed:
        if layouts.of(tensor) == "strips":
            raise ProgramError(f"export: expected weights in rows or panels; {name} is in strips")
        return tensor.clone() if layouts.of(tensor) == "panels" else ops.pack_weight(tensor)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise ProgramError(f"export: expected fp32 outside of the integer layers; {name} is {tensor.dtype}")
    return tensor.clone()


def _labels(spec: object, count: int) -> list[str]:
    """Names of the outputs: the fields of transformers' outputs, else output or output.0, output.1, ..."""
    fields = getattr(spec, "context", None)
    names = [str(field) for field in fields] if isinstance(fields, list | tuple) else []
    if len(names) == count:
        return names
    return ["output"] if count == 1 else [f"output.{i}" for i in range(count)]


def _named_tensors(output: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield "output", output
    elif isinstance(output, dict):
        yield from ((name, value) for name, value in output.items() if isinstance(value, Tensor))
    else:
        found = [value for value in output if isinstance(value, Tensor)]
        yield from zip(_labels(None, len(found)), found, strict=True)


def _compare(received: dict, expected: dict[str, Tensor]) -> None:
    for name, want in expected.items():
        if name not in received:
            raise ProgramError(f"export: expected the output {name!r} from the session; it has {', '.join(received)}")
        got = torch.from_numpy(received[name])
        error = float((got - want).norm() / want.norm().clamp_min(1e-12))
        if got.shape != want.shape or not error <= TOLERANCE:
            raise ProgramError(
                f"export: expected {name} {tuple(want.shape)} to {TOLERANCE:g}; the session gives {tuple(got.shape)} "
                f"with a relative error of {error:.3g}"
            )
