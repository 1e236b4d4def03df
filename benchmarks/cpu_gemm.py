"""The int8 GEMM of vqvit against torch._int_mm and oneDNN, in operations a second and as a share of the measured peak.

All take int8 weights that were packed beforehand where the library can, and give: vqvit and oneDNN fp32 with scales and
bias applied, torch._int_mm raw int32 sums. oneDNN reads u8 activations, for its kernels of s8 ones are slower by far.
vqvit is there twice: as an op, and as the kernel alone, which is what an encoder block calls.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from vqvit import native, ops
from vqvit.backends.operands import native_gemm
from vqvit.provenance import append_csv, provenance_row
from vqvit.report import text_table
from vqvit.timing import take_turns

ROWS = (197, 1576)
"""Tokens of an image of 224 x 224 in patches of 16, and of eight images."""

SHAPES = ((384, 384), (1536, 384), (384, 1536), (768, 768), (2304, 768), (3072, 768), (768, 3072))
"""(N, K) of the layers of DeiT-S and ViT-B."""

ROUNDS, QUICK_ROUNDS = 30, 2

MAX_RELATIVE_ERROR = 1e-5
"""Of an fp32 epilogue against the same operations in fp64."""


class Gemm:
    """Operands of one product, from a fixed seed: a (M, K) and b (N, K), codes of normal values with a scale for each
    row, as quantizers give them (on AVX2 their size decides how fast they are multiplied), and a bias.
    """

    def __init__(self, m: int, n: int, k: int):
        generator = torch.Generator().manual_seed(0)
        self.m, self.n, self.k = m, n, k
        values = (torch.randn(rows, k, generator=generator) for rows in (m, n))
        (self.a, self.a_scale, *_), (self.b, self.b_scale, *_) = (ops.quantize_per_token(x) for x in values)
        self.bias = torch.randn(n, generator=generator)
        self.sums = self.a.double() @ self.b.double().t()

    def expected(self, a_scale: Tensor) -> Tensor:
        """(M, N) fp64 with scales (M) or (1) of a."""
        return self.sums * a_scale.double().view(-1, 1) * self.b_scale.double() + self.bias.double()


def vqvit_call(gemm: Gemm) -> Callable[[], Tensor]:
    packed = ops.pack_weight(gemm.b, native.cpu_weight_layout())
    return lambda: ops.int8_linear(gemm.a, gemm.a_scale, packed, gemm.b_scale, gemm.bias)


def vqvit_kernel_call(gemm: Gemm) -> Callable[[], Tensor]:
    packed = ops.pack_weight(gemm.b, native.cpu_weight_layout())
    problem, tensors = native_gemm(gemm.a, packed, gemm.a_scale, gemm.b_scale, gemm.bias)
    out, threads = torch.empty(gemm.m, gemm.n), torch.get_num_threads()
    kernel, dtype = native.cpu().vqvit_cpu_int8_linear, native.DTYPES["float32"]

    def call(_: tuple = tensors) -> Tensor:  # which the problem points to
        native.run(kernel, problem, out.data_ptr(), dtype, threads)
        return out

    return call


def int_mm_call(gemm: Gemm) -> Callable[[], Tensor]:
    transposed = gemm.b.t()
    return lambda: torch._int_mm(gemm.a, transposed)


def onednn_call(gemm: Gemm) -> Callable[[], Tensor]:
    """u8 activations a + 128 with zero point 128 and one scale. Raises `RuntimeError` where torch lacks oneDNN's op."""
    onednn = torch.ops.onednn
    try:
        prepack, linear = onednn.qlinear_prepack, onednn.qlinear_pointwise.default
    except AttributeError as error:
        raise RuntimeError(f"this torch has no oneDNN int8 linear: {error}") from error
    a = (gemm.a.int() + 128).to(torch.uint8)
    packed = prepack(gemm.b, list(a.shape))
    zeros = torch.zeros(gemm.n, dtype=torch.int64)
    scale = float(gemm.a_scale[0])
    return lambda: linear(
        a, scale, 128, packed, gemm.b_scale, zeros, gemm.bias, 1.0, 0, torch.float32, "none", [], ""
    )  # fmt: skip


CALLS = {
    "vqvit": vqvit_call,
    "vqvit_kernel": vqvit_kernel_call,
    "torch_int_mm": int_mm_call,
    "onednn": onednn_call,
}


def check(name: str, gemm: Gemm, call: Callable[[], Tensor]) -> None:
    """Raises `RuntimeError` if the result is wrong."""
    received = call().double()
    if name == "torch_int_mm":
        expected = gemm.sums
    else:
        expected = gemm.expected(gemm.a_scale[:1] if name == "onednn" else gemm.a_scale)
    error = float((received - expected).norm() / expected.norm())
    if not error <= MAX_RELATIVE_ERROR:
        raise RuntimeError(f"relative error {error:.3g}, expected at most {MAX_RELATIVE_ERROR}")


def measure(m: int, n: int, k: int, peak: float | None, rounds: int) -> Iterator[dict]:
    """A row for each library at one shape; `peak` in GOP/s, or None where the instruction set has none."""
    gemm, timers, failures = Gemm(m, n, k), {}, {}
    for name, make in CALLS.items():
        try:
            call = make(gemm)
            check(name, gemm, call)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            failures[name] = str(error).strip().splitlines()[0]
        else:
            timers[name] = microseconds(call)
    timed = take_turns(timers, rounds)
    for name in CALLS:
        row = {"m": m, "n": n, "k": k, "library": name, "status": failures.get(name, "ok")}
        figures = dict.fromkeys(("median_us", "p20_us", "p80_us", "gops", "peak_gops", "share_of_peak"), "")
        if name in timed:
            median, p20, p80 = timed[name]
            gops = 2 * m * n * k / median * 1e-3
            figures = {"median_us": round(median, 1), "p20_us": round(p20, 1), "p80_us": round(p80, 1)}
            figures |= {"gops": round(gops, 2), "peak_gops": "" if peak is None else round(peak, 2)}
            figures |= {"share_of_peak": "" if peak is None else round(gops / peak, 3)}
        yield row | figures


def microseconds(call: Callable[[], Tensor]) -> Callable[[], float]:
    """A timer of one call after an unmeasured one: activations and weights are then as warm as the caches allow."""

    def timer() -> float:
        call()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    return timer


def int8_peak(threads: int) -> float | None:
    """GOP/s of `vqvit.native.cpu_peak`, or None for an instruction set that has none."""
    try:
        return native.cpu_peak(threads)
    except RuntimeError:
        return None


def run(output: Path, threads: int, quick: bool) -> None:
    """Every shape; rows go to `output` and the terminal."""
    facts, found = provenance_row("cpu"), []
    for m in ROWS:
        for n, k in SHAPES:
            peak = int8_peak(threads)
            for row in measure(m, n, k, peak, QUICK_ROUNDS if quick else ROUNDS):
                append_csv(output, {**row, **facts})
                found.append(row)
    print(text_table(list(found[0]), [[str(value) for value in row.values()] for row in found]))
