"""CUDA graphs of a whole model: one launch a call, so that Python and launch latency do not show.

    fast = vqvit.runtime.graphed(model)
    logits = fast(pixels).logits

A graph is captured for each input signature (shapes, dtypes, devices, and the arguments that are not tensors) on its
first call and replayed afterwards. The least recently used graph is dropped when there are more than `max_graphs`.
"""

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class CaptureError(RuntimeError):
    """A call that cannot become a CUDA graph; the message says why."""


class CudaGraph:
    """`call` captured on a side stream, after warm-up, in a memory pool shared with other graphs."""

    def __init__(self, call: Callable[[], object], warmup: int, pool: object):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=pool):
            self.result = call()

    def replay(self) -> None:
        """Launch on the current stream."""
        self._graph.replay()


class StreamOrder:
    """Orders calls that arrive on different streams: each waits for the one before, which used the same buffers."""

    def __init__(self):
        self._done: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def __exit__(self, *_: object) -> None:
        self._done = torch.cuda.current_stream().record_event()


@dataclass
class _Captured:
    """A graph, the tensors it reads its inputs from, and the weights it reads: kept alive as long as it is."""

    inputs: list[Tensor]
    weights: list[Tensor]
    graph: CudaGraph


class Graphed(nn.Module):
    """What `graphed` returns: called like the model, which is `.module`."""

    def __init__(
        self,
        module: nn.Module,
        max_graphs: int = 8,
        warmup: int = 3,
        copy_outputs: bool = True,
        capture: Callable = CudaGraph,
        order: contextlib.AbstractContextManager | None = None,
    ):
        """`capture` and `order` stand for CUDA; see `graphed` for the rest."""
        super().__init__()
        self.module = module
        self.max_graphs, self.warmup, self.copy_outputs = max_graphs, warmup, copy_outputs
        self._capture, self._order = capture, order or StreamOrder()
        self._captured: OrderedDict[tuple, _Captured] = OrderedDict()
        self._placement: tuple = ()
        self._pool = None
        self._lock = threading.Lock()

    @property
    def graphs(self) -> int:
        """Graphs held now."""
        return len(self._captured)

    def reset(self) -> None:
        """Drop every graph and its memory; the next call captures anew."""
        with self._lock:
            self._drop_all()

    def forward(self, *args, **kwargs):
        """The model's result. Raises `CaptureError`."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._check(tensors)
        with self._lock, torch.inference_mode():
            if self._placement != (placement := self._placed()):
                self._drop_all()
                self._placement = placement
            with self._order:
                captured = self._find(leaves, structure, tensors)
                for static, given in zip(captured.inputs, tensors, strict=True):
                    static.copy_(given)
                captured.graph.replay()
                result = captured.graph.result
                return pytree.tree_map_only(Tensor, torch.clone, result) if self.copy_outputs else result

    def _find(self, leaves: list, structure: pytree.TreeSpec, tensors: list[Tensor]) -> _Captured:
        key = _signature(leaves, structure)
        if key in self._captured:
            self._captured.move_to_end(key)
            return self._captured[key]
        while len(self._captured) >= self.max_graphs:
            self._captured.popitem(last=False)
        inputs = [tensor.clone() for tensor in tensors]
        static = iter(inputs)
        args, kwargs = pytree.tree_unflatten(
            [next(static) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure
        )
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph = self._capture(lambda: self.module(*args, **kwargs), self.warmup, self._pool)
        except RuntimeError as error:
            raise CaptureError(
                f"{type(self.module).__name__}: expected a forward pass without synchronisation or data-dependent "
                f"shapes; capture failed: {error}"
            ) from error
        self._captured[key] = _Captured(inputs, _tensors(self.module), graph)
        return self._captured[key]

    def _placed(self) -> tuple:
        """Where one weight lies: `.to`, `.half` and `.cuda` move all of them. Comparing every weight would cost more
        than a launch.
        """
        weight = next(t for t in itertools.chain(self.module.parameters(), self.module.buffers()) if not t.is_meta)
        return weight.data_ptr(), weight.dtype, weight.device

    def _drop_all(self) -> None:
        self._captured.clear()
        self._pool = None

    def _check(self, tensors: list[Tensor]) -> None:
        name = type(self.module).__name__
        if self.module.training:
            raise CaptureError(f"{name}: expected a model in eval mode; got training mode")
        if not tensors:
            raise CaptureError(f"{name}: expected at least one tensor argument; got none")
        device = self._placement[2] if self._placement else self._placed()[2]
        if wrong := {str(t.device) for t in tensors if t.device != device}:
            raise CaptureError(f"{name}: expected inputs on {device}; got {', '.join(sorted(wrong))}")


def graphed(model: nn.Module, max_graphs: int = 8, warmup: int = 3, copy_outputs: bool = True) -> Graphed:
    """Replay `model` as CUDA graphs; the result is called like the model, on the caller's current stream.

    Args:
        model: in eval mode, on a CUDA device. Moving or casting it later drops its graphs; after replacing parts of it
            (`vqvit.quantize_`, `vqvit.restore`) call `reset()`.
        max_graphs: input signatures kept; each holds its activations in memory.
        warmup: eager calls before a capture.
        copy_outputs: if False, results are overwritten by the next call of the same signature.

    Raises `CaptureError` for a model on another device or in training mode, and at a call that cannot be captured.
    Calls from several threads take turns; a call on another stream waits for the one before.
    """
    devices = {t.device.type for t in _tensors(model)}
    if devices != {"cuda"}:
        found = ", ".join(sorted(devices)) or "no weights"
        raise CaptureError(f"{type(model).__name__}: expected a model on a CUDA device; got {found}")
    if max_graphs < 1 or warmup < 1:
        raise ValueError(f"graphed: expected max_graphs >= 1 and warmup >= 1; got {max_graphs} and {warmup}")
    return Graphed(model, max_graphs, warmup, copy_outputs).eval()


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers that hold data."""
    return [t for t in (*model.parameters(), *model.buffers()) if not t.is_meta]


def _signature(leaves: list, structure: pytree.TreeSpec) -> tuple:
    described = (
        (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    return str(structure), *described
