"""Where the time of one inference goes: every op that torch dispatches, with its rate and its share of the roofline.

A dispatch mode times each op on the CPU's clock. It sees ops as the model calls them: what a vqvit op does inside is
the op's own time. Outside of `profile` nothing is installed, so an unprofiled call costs nothing more.

    roofline time = max(operations / peak rate of their arithmetic, bytes / copy bandwidth for so many bytes)

Operations are multiplications and additions of matrix products, as the kernels do them; bytes are those of all tensors
that go in and out, whether a cache holds them or not. Peaks are measured by `measure_peaks` on the same threads.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vqvit import native, ops, reference
from vqvit.reference import COMPENSATION_TERMS

ATTENTION_PRODUCTS = 3
"""q · k, and v times each of the two digits of a softmax numerator (numerics §7)."""

COPY_BYTES = tuple(2**e for e in range(18, 29, 2))
"""Bytes read and written by the copies that give the bandwidth: from half of L2 to DRAM."""

MATRIX = {torch.float32: 1024, torch.bfloat16: 512, torch.float16: 512}
"""Side of the float products whose rate is the peak; half precision may run on slow paths."""

PEAK_RUNS = 5


@dataclass(frozen=True)
class Peaks:
    """Operations a second in 10^9 by arithmetic ("int8", "float32", ...) and copy bandwidth in GB/s by bytes moved."""

    gops: dict[str, float]
    copy_gbs: dict[int, float]

    def roofline_s(self, cost: "Cost") -> float | None:
        """Least seconds that an op of this cost takes; None if its arithmetic has no measured peak."""
        size = min(self.copy_gbs, key=lambda known: abs(known.bit_length() - cost.bytes.bit_length()))
        seconds = cost.bytes / self.copy_gbs[size] * 1e-9
        if not cost.operations:
            return seconds
        peak = self.gops.get(cost.arithmetic)
        return None if peak is None else max(seconds, cost.operations / peak * 1e-9)


@dataclass(frozen=True)
class Cost:
    """What one call does: operations of matrix products, bytes in and out, arithmetic, and the products' sizes."""

    operations: int
    bytes: int
    arithmetic: str
    sizes: str = ""


@dataclass
class Record:
    """All calls of one op with one size in one inference: how often it had which cost, and their time together."""

    costs: Counter = field(default_factory=Counter)
    seconds: float = 0.0


@dataclass(frozen=True)
class OpProfile:
    """One row: totals of an inference, medians over several; None where there is nothing to divide.

    Attributes:
        op, sizes: `vqvit::int8_linear`, "197 x 768 x 3072" (M x N x K); sizes are empty without a matrix product.
        calls, ms, share: of one inference; share is of its time under the profiler.
        gops, gbs: rates of operations and of bytes, 10^9 a second.
        of_roofline: roofline time over measured time.
    """

    op: str
    sizes: str
    calls: int
    ms: float
    share: float
    gops: float | None
    gbs: float | None
    of_roofline: float | None


@dataclass(frozen=True)
class Profile:
    """Rows, slowest first; milliseconds of an inference under the profiler, outside of any op, and without it."""

    ops: list[OpProfile]
    total_ms: float
    outside_ms: float
    plain_ms: float
    peaks: Peaks = field(repr=False)


class _Recorder(TorchDispatchMode):
    """Times every op that is dispatched while it is entered."""

    def __init__(self):
        super().__init__()
        self.records: dict[tuple[str, str], Record] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.vqvit.int8_encoder_block.default:  # its parts are what a profile is about
            with self:
                return reference.compose_encoder_block(ops, *args, **kwargs)
        start = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - start
        cost = cost_of(func, args, kwargs, out)
        record = self.records.setdefault((func.name().partition(".")[0], cost.sizes), Record())
        record.costs[cost] += 1
        record.seconds += seconds
        return out


def profile(call: Callable[[], object], peaks: Peaks, inferences: int = 10) -> Profile:
    """Profile `call`, which runs one inference on the CPU, after an unmeasured one.

    Every inference must dispatch the same ops; the rows are the medians of `inferences` of them.
    """
    call()
    plain, totals, recorded = [], [], []
    for _ in range(inferences):
        plain.append(_seconds(call))
        with _Recorder() as recorder:
            totals.append(_seconds(call))
        recorded.append(recorder.records)
    total = statistics.median(totals)
    ops = [
        _row(name, sizes, [records[name, sizes] for records in recorded], total, peaks) for name, sizes in recorded[0]
    ]
    inside = statistics.median(sum(record.seconds for record in records.values()) for records in recorded)
    return Profile(
        sorted(ops, key=lambda row: -row.ms),
        total * 1e3,
        max(0.0, total - inside) * 1e3,
        statistics.median(plain) * 1e3,
        peaks,
    )


def measure_peaks(dtypes: Iterable[torch.dtype]) -> Peaks:
    """Peaks of this CPU with torch's number of threads: int8 of the native kernels, float products of `dtypes`, copies.

    int8 is missing where the instruction set has no peak to measure (`vqvit.native.cpu_peak`) or no library runs.
    """
    gops = {}
    try:
        gops["int8"] = native.cpu_peak(torch.get_num_threads())
    except RuntimeError:  # NativeUnavailableError is one
        pass
    for dtype in dtypes:
        side = MATRIX[dtype]
        a, b = (torch.ones(side, side, dtype=dtype) for _ in range(2))
        gops[_name(dtype)] = 2 * side**3 / _best(lambda a=a, b=b: torch.mm(a, b)) * 1e-9
    copies = {}
    for size in COPY_BYTES:
        source = torch.zeros(size // 2, dtype=torch.uint8)
        target = torch.empty_like(source)
        copies[size] = size / _best(lambda source=source, target=target: target.copy_(source)) * 1e-9
    return Peaks(gops, copies)


def cost_of(func, args: tuple, kwargs: dict, out: object) -> Cost:
    """Cost of one call of the op overload `func`."""
    parameters = func._schema.arguments  # a mode sees no argument that equals its default
    given = {parameter.name: parameter.default_value for parameter in parameters if parameter.has_default_value()}
    given |= dict(zip((parameter.name for parameter in parameters), args, strict=False)) | kwargs
    tensors = [*_tensors(given.values()), *_tensors([out])]
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    moved = 0 if views else sum(t.numel() * t.element_size() for t in tensors)
    arithmetic = next((_name(t.dtype) for t in tensors if t.is_floating_point()), "")
    name = func.name().partition(".")[0]
    if name in _INT8_PRODUCTS:
        operations, sizes = _INT8_PRODUCTS[name](given)
        return Cost(operations, moved, "int8", sizes)
    if name in _FLOAT_PRODUCTS:
        operations, sizes = _FLOAT_PRODUCTS[name](given, out)
        return Cost(operations, moved, arithmetic, sizes)
    count = flop_registry.get(func._overloadpacket)
    return Cost(0 if count is None else int(count(*args, **kwargs, out_val=out)), moved, arithmetic)


def _int8_linear(given: dict) -> tuple[int, str]:
    m, k = given["a"].shape
    n = given["b_scale"].shape[0] if "b_scale" in given else given["b"].shape[0]
    products = 1 + sum(COMPENSATION_TERMS[given["mode"]]) if "mode" in given else 1
    return 2 * m * n * k * products, f"{m} x {n} x {k}"


def _int8_attention(given: dict) -> tuple[int, str]:
    batch, heads, queries, width = given["q"].shape
    keys = given["k"].shape[2]
    operations = 2 * ATTENTION_PRODUCTS * batch * heads * queries * keys * width
    return operations, f"{batch * heads} x {queries} x {keys} x {width}"


def _linear(given: dict, out: Tensor) -> tuple[int, str]:
    n, k = given["weight"].shape
    m = given["input"].numel() // k
    return 2 * m * n * k, f"{m} x {n} x {k}"


def _convolution(given: dict, out: Tensor) -> tuple[int, str]:
    n, *rest = given["weight"].shape
    m, k = out.numel() // n, torch.Size(rest).numel()
    return 2 * m * n * k, f"{m} x {n} x {k}"


def _matmul(given: dict, out: Tensor) -> tuple[int, str]:
    k = given["self"].shape[-1]
    return 2 * out.numel() * k, f"{out.numel() // out.shape[-1]} x {out.shape[-1]} x {k}"


def _attention(given: dict, out: Tensor) -> tuple[int, str]:
    *batch, queries, width = given["query"].shape
    keys, heads = given["key"].shape[-2], torch.Size(batch).numel()
    return 4 * heads * queries * keys * width, f"{heads} x {queries} x {keys} x {width}"


_INT8_PRODUCTS = {
    **{
        f"vqvit::{name}": _int8_linear
        for name in (
            "int8_mm", "int8_linear", "int8_linear_quantize", "int8_linear_qkv", "int8_linear_compensated",
        )
    },
    **{f"vqvit::{name}": _int8_attention for name in ("int8_attention", "int8_attention_quantize")},
}  # fmt: skip

# Inference mode does not take these apart before a dispatch mode sees them; torch's own counter knows their parts.
_FLOAT_PRODUCTS = {
    "aten::linear": _linear,
    "aten::conv2d": _convolution,
    "aten::matmul": _matmul,
    "aten::scaled_dot_product_attention": _attention,
}


def _row(op: str, sizes: str, records: list[Record], total: float, peaks: Peaks) -> OpProfile:
    costs = records[0].costs
    seconds = statistics.median(record.seconds for record in records)
    operations = sum(cost.operations * calls for cost, calls in costs.items())
    moved = sum(cost.bytes * calls for cost, calls in costs.items())
    least = [(peaks.roofline_s(cost), calls) for cost, calls in costs.items()]
    known = moved > 0 and all(bound is not None for bound, _ in least)
    return OpProfile(
        op, sizes, costs.total(), seconds * 1e3, seconds / total,
        operations / seconds * 1e-9 if operations else None,
        moved / seconds * 1e-9 if moved else None,
        sum(bound * calls for bound, calls in least) / seconds if known else None,
    )  # fmt: skip


def _tensors(values: Iterable) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of `PEAK_RUNS` calls after an unmeasured one."""
    call()
    return min(_seconds(call) for _ in range(PEAK_RUNS))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
