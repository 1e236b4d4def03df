"""Compile every shipped Triton kernel and config for a list of architectures, without a GPU, and say what came out.

    python benchmarks/compile_gate.py --arch 80 86 89 90 --csv benchmarks/results/compile_gate.csv

The launchers run for real on meta tensors; only Triton's last step, the launch, is left out. So what is compiled is
what a GPU would run, with the specialisations of real arguments. A case passes if it has the tensor-core instruction
that its config claims, no stack frame (hence no spilled register), shared memory within the architecture's limit, and
nothing that breaks the numerical contract: approximate division or square root, flush to zero, implicit fma.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: kernels are compiled here

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vqvit.kernels import attention_s8, gemm_s8, gemm_s8_compensated, launch, layernorm_quantize, quantize, quantize_qkv
from vqvit.provenance import append_csv, environment


@dataclass(frozen=True)
class Architecture:
    """row: of the config tables; sms: of its usual part; limits of a block's shared memory and an SM's warps."""

    row: int
    sms: int
    shared_bytes: int
    max_warps: int


KIB = 1024
REGISTERS = 65536  # of a multiprocessor, 32-bit, in every architecture here
ARCHITECTURES = {
    80: Architecture(row=80, sms=108, shared_bytes=163 * KIB, max_warps=64),  # A100
    86: Architecture(row=86, sms=84, shared_bytes=99 * KIB, max_warps=48),  # A40, RTX 3090
    89: Architecture(row=86, sms=142, shared_bytes=99 * KIB, max_warps=48),  # L40S, RTX 4090
    90: Architecture(row=90, sms=132, shared_bytes=227 * KIB, max_warps=64),  # H100, H200
}

WGMMA_S8 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
MMA_S8 = r"mma\.sync\.aligned\.m16n8k\d+\.row\.col\.(?:satfinite\.)?s32\.s8\.s8\.s32"
INEXACT = r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt|rcp\.approx|ex2|lg2|tanh)\S*|\b\w+\.\S*ftz\S*"
"""PTX instructions that round otherwise than the contract says."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """A launcher call; `tensor_core` is the instruction it must contain, or None."""

    name: str
    run: Callable[[], object]
    tensor_core: str | None = None


@dataclass(frozen=True)
class Report:
    """What a kernel compiled to. ctas_per_sm: blocks that registers, shared memory and warps allow at once."""

    case: str
    arch: int
    kernel: str
    config: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    tensor_core: str
    tensor_core_count: int
    instructions: int
    seconds: float
    problems: str


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm_cases(row: int, tensor_core: str) -> Iterator[Case]:
    """Each config with the lightest and the heaviest epilogues, at ViT-B's fc1 and fc2 for 64 images."""
    m, k, n = 12608, 768, 3072
    half, int8 = torch.float16, torch.int8
    for c in gemm_s8.GEMM_CONFIGS[row]:
        tile = f"{c.block_m}x{c.block_n}x{c.block_k}"

        def linear(c, n, k, quantized):
            operands = meta(m, k, dtype=int8), meta(m), meta(n, k, dtype=int8), meta(n)
            with mock.patch.object(gemm_s8, "choose", lambda *_: c):
                if quantized:
                    gemm_s8.int8_linear_quantize(*operands, meta(n, dtype=half), "gelu", out_scale=meta())
                else:
                    vector, residual = meta(n, dtype=half), meta(m, n, dtype=half)
                    gemm_s8.int8_linear(*operands, vector, "none", vector, residual, out_dtype=half)

        yield Case(f"int8_linear_quantize gelu static {tile}", functools.partial(linear, c, n, k, True), tensor_core)
        yield Case(f"int8_linear residual fp16 {tile}", functools.partial(linear, c, k, n, False), tensor_core)

    def compensated():
        a, b = meta(m, k, dtype=int8), meta(k, k, dtype=int8)
        gemm_s8_compensated.int8_linear_compensated(
            a, meta(m), a, b, meta(k), b, meta(k), (True, True, True), 1.0, half
        )

    yield Case("int8_linear_compensated full", compensated, tensor_core)


def group_cases(row: int, tensor_core: str) -> Iterator[Case]:
    """Each config of group scales: fc1 that stores groups, fc2 that reads them, and both at once."""
    m, k, n = 12608, 768, 3072
    half, int8 = torch.float16, torch.int8
    for c in (*gemm_s8.GROUP_CONFIGS[row], gemm_s8.RAGGED_GROUP_CONFIG):
        tile = f"{c.block_m}x{c.block_n}x{c.block_k} stages {c.num_stages}"

        def linear(c, n, k, grouped, stored):
            a_scale = meta(m, -(-k // 128)) if grouped else meta(m)
            operands = meta(m, k, dtype=int8), a_scale, meta(n, k, dtype=int8), meta(n)
            with mock.patch.object(gemm_s8, "choose", lambda *_: c):
                if stored:
                    gemm_s8.int8_linear_quantize(*operands, meta(n, dtype=half), "gelu", per_group=True)
                else:
                    vector, residual = meta(n, dtype=half), meta(m, n, dtype=half)
                    gemm_s8.int8_linear(*operands, vector, "none", vector, residual, out_dtype=half)

        ragged = c is gemm_s8.RAGGED_GROUP_CONFIG
        for what, n_, k_, grouped, stored in (
            ("store groups gelu", n, 588 if ragged else k, False, True),
            ("group scales residual fp16", k, 588 if ragged else n, True, False),
            ("group scales store groups", n, 588 if ragged else k, True, True),
        ):
            call = functools.partial(linear, c, n_, k_, grouped, stored)
            yield Case(f"int8_linear {what} {tile}", call, f"{WGMMA_S8}|{MMA_S8}" if ragged else tensor_core)

        def projection(c, heads):
            operands = meta(m, k, dtype=int8), meta(m), meta(k * 3, k, dtype=int8), meta(k * 3), meta(k * 3, dtype=half)
            with mock.patch.object(gemm_s8, "choose", lambda *_: c):
                gemm_s8.int8_linear_qkv(*operands, 197, heads)

        for head_dim in gemm_s8.HEAD_DIMS:
            call = functools.partial(projection, c, k // head_dim)
            yield Case(f"int8_linear_qkv groups of {head_dim} {tile}", call)


def attention_cases() -> Iterator[Case]:
    """Each config: one pass (197 tokens of an image) and two (1568 tokens of a video clip), by head dimension."""
    for tokens, dim in ((197, 64), (197, 80), (1568, 64), (1568, 128), (1568, 256), (197, 512)):
        codes, scale = (meta(8, 12, tokens, dim, dtype=torch.int8),) * 3, meta(8, 12, tokens)
        call = functools.partial(
            attention_s8.int8_attention, *codes, scale, scale, meta(8, 12, dim), 0.125, torch.float16
        )
        yield Case(f"int8_attention S={tokens} D={dim}", call, f"{WGMMA_S8}|{MMA_S8}")


def row_cases() -> Iterator[Case]:
    """Row-wise kernels in half precision at ViT-B's widths, for 64 images and for one."""
    half = torch.float16
    for m in (12608, 197):
        x, channels = meta(m, 768, dtype=half), meta(768, dtype=half)
        yield Case(
            f"add_layernorm_quantize {m}x768",
            functools.partial(layernorm_quantize.add_layernorm_quantize, x, x, channels, channels, 1e-6, channels),
        )
    x = meta(12608, 3072, dtype=half)
    channels = meta(1024, dtype=half)
    yield Case(
        "layernorm_quantize delta 12608x1024",
        functools.partial(
            layernorm_quantize.layernorm_quantize, meta(12608, 1024, dtype=half), channels, channels, 1e-6, 0.5
        ),
    )
    yield Case("quantize_per_token 12608x3072", functools.partial(quantize.quantize_per_token, x))
    yield Case("quantize_per_token asymmetric", functools.partial(quantize.quantize_per_token, x, symmetric=False))
    yield Case("quantize_per_token 197x20000", functools.partial(quantize.quantize_per_token, meta(197, 20000), 0.5))
    yield Case("quantize_static 12608x3072", functools.partial(quantize.quantize_static, x, meta()))
    codes = meta(12608, 3072, dtype=torch.int8)
    yield Case("quantize_residual", functools.partial(quantize.quantize_residual, x, codes, meta(12608)))
    pixels = meta(64, 3, 224, 224, dtype=half)
    yield Case("patchify_quantize", functools.partial(quantize.patchify_quantize, pixels, 16, 16, meta(768)))
    yield Case("quantize_qkv", functools.partial(quantize_qkv.quantize_qkv, meta(64, 197, 2304, dtype=half), 12))


def option_cases() -> Iterator[Case]:
    """Every option of every launcher, and sizes of 1, which Triton specialises: no interpreted test sees them fail."""
    half, bf16, int8, int32 = torch.float16, torch.bfloat16, torch.int8, torch.int32

    def case(function, *arguments, **options) -> Case:
        shown = [f"{k}={v}" if not isinstance(v, torch.Tensor) else k for k, v in options.items()]
        shape = "x".join(str(size) for size in arguments[0].shape)
        return Case(
            f"{function.__name__} {shape} {' '.join(shown)}".strip(), functools.partial(function, *arguments, **options)
        )

    for m, n, k in ((1576, 768, 588), (197, 384, 100), (1, 1, 1)):
        a, b, row, column = meta(m, k, dtype=int8), meta(n, k, dtype=int8), meta(m), meta(n)
        operands = (a, row, b, column)
        b_zero = {"b_zero": meta(n, dtype=int32), "a_sum": meta(m, dtype=int32)}
        zeros = {"a_zero": meta(m, dtype=int32), "b_sum": meta(n, dtype=int32)} | b_zero
        yield case(gemm_s8.int8_mm, a, b)
        yield case(
            gemm_s8.int8_linear, *operands, bias=column, residual=meta(m, n, dtype=bf16), out_dtype=bf16, **zeros
        )
        yield case(gemm_s8.int8_linear, *operands, layer_scale=column, activation="gelu_tanh", **b_zero)
        yield case(gemm_s8.int8_linear_quantize, *operands, symmetric=False, row_sum=True, activation="quick_gelu")
        yield case(gemm_s8.int8_linear_quantize, *operands, out_scale=meta(), row_sum=True, activation="silu", **zeros)
        for terms in ((False, False, False), (False, False, True), (True, False, False), (False, True, False)):
            yield case(
                gemm_s8_compensated.int8_linear_compensated,
                a,
                row,
                a,
                b,
                column,
                b,
                bias=None,
                terms=terms,
                out_dtype=bf16,
            )
    yield case(gemm_s8.int8_linear, *operands, activation="relu", out_dtype=half)

    for m, k in ((197, 588), (1, 1), (1, 16384)):
        x, channels = meta(m, k, dtype=bf16), meta(k)
        yield case(quantize.quantize_per_token, x, delta=0.5, equalizer=channels, row_sum=True)
        yield case(quantize.quantize_per_token, x, symmetric=False, row_sum=True)
        yield case(quantize.quantize_static, x, meta(), equalizer=channels, row_sum=True)
        yield case(quantize.quantize_residual, x, meta(m, k, dtype=int8), meta(m))
        yield case(
            layernorm_quantize.layernorm_quantize, x, channels, channels, 1e-6, delta=0.5, row_sum=True, paper=True
        )
        yield case(layernorm_quantize.add_layernorm_quantize, meta(m, k), x, channels, channels, 1e-6, scale=meta())
    long_rows = meta(2, 20000, dtype=half)
    yield case(quantize.quantize_per_token, long_rows, symmetric=False, row_sum=True)
    yield case(quantize.quantize_static, long_rows, meta(), equalizer=meta(20000))
    for patch, channels in ((14, 3), (1, 1)):
        yield case(quantize.patchify_quantize, meta(1, channels, 28, 28), patch, patch)
    for tokens, heads, dim in ((1, 1, 1), (1568, 12, 80)):
        codes, scale = (meta(1, heads, tokens, dim, dtype=int8),) * 3, meta(1, heads, tokens)
        yield case(quantize_qkv.quantize_qkv, meta(1, tokens, 3 * heads * dim), heads)
        yield case(attention_s8.int8_attention, *codes, scale, scale, meta(1, heads, dim), 0.1, out_dtype=bf16)


def cases(arch: int) -> list[Case]:
    row = ARCHITECTURES[arch].row
    options = option_cases() if arch == max(ARCHITECTURES) else ()  # the language front end is the same for all
    tensor_core = WGMMA_S8 if arch == 90 else MMA_S8
    return [
        *gemm_cases(row, tensor_core), *group_cases(row, tensor_core), *attention_cases(), *row_cases(), *options
    ]  # fmt: skip


class _NoDriver:
    """What Triton asks of a driver before a launch; the device number is the architecture, which keeps caches apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list]:
    """Launches compile for `arch` and append (kernel function, launch options, compiled kernel) to the list."""
    compiled = []
    original_run = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = original_run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self, options, kernel.result() if hasattr(kernel, "result") else kernel))

    limits = ARCHITECTURES[arch]
    device = launch.Device(limits.row, limits.sms)
    triton.runtime.driver.set_active(_NoDriver(arch))
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(launch, "cuda_device", lambda index: device):
        yield compiled


def report(case: Case, arch: int) -> list[Report]:
    """Compile what `case` launches for `arch`: one report a kernel."""
    started = time.perf_counter()
    with compiling_for(arch) as compiled:
        case.run()
    seconds = time.perf_counter() - started
    return [_report(case, arch, *launched, seconds / len(compiled)) for launched in compiled]


def _report(case: Case, arch: int, kernel: JITFunction, options: dict, compiled, seconds: float) -> Report:
    ptx, limits = compiled.asm["ptx"], ARCHITECTURES[arch]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    warp_registers = -(-registers // 8) * 8 * 32
    ctas = min(
        REGISTERS // (warp_registers * num_warps),
        (limits.shared_bytes + KIB) // (shared + KIB),  # each block reserves 1 KiB
        limits.max_warps // num_warps,
    )
    instructions = re.findall(f"{WGMMA_S8}|{MMA_S8}", ptx)
    problems = []
    if case.tensor_core and not re.search(case.tensor_core, ptx):
        problems.append(f"{instructions[0] if instructions else 'no tensor core'} instead of {case.tensor_core}")
    if stack or re.search(r"\b(?:LDL|STL)\b", sass):
        problems.append(f"{stack} bytes of stack")
    if shared > limits.shared_bytes:
        problems.append(f"{shared} bytes of shared memory, {limits.shared_bytes} allowed")
    if inexact := set(re.findall(INEXACT, ptx)):
        problems.append("inexact: " + " ".join(sorted(inexact)))
    if compiled.metadata.enable_fp_fusion:
        problems.append("multiplications and additions may fuse")
    config = " ".join(f"{k}={v}" for k, v in options.items() if k.isupper())
    return Report(
        case=case.name,
        arch=arch,
        kernel=kernel.__name__.strip("_"),
        config=config,
        num_warps=num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        ctas_per_sm=ctas,
        tensor_core=instructions[0] if instructions else "",
        tensor_core_count=len(instructions),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        seconds=round(seconds, 2),
        problems="; ".join(problems),
    )


def _tool(name: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def line(r: Report) -> str:
    return (
        f"sm_{r.arch} {r.case:46} {r.kernel:26} warps {r.num_warps} stages {r.num_stages} registers {r.registers:3}"
        f" shared {r.shared_bytes:6} blocks/sm {r.ctas_per_sm:2} instructions {r.instructions:5}"
        f" {r.tensor_core_count:3} x {r.tensor_core or '-'} {r.problems or 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    facts = environment()
    provenance = {column: facts[column] for column in ("date", "triton", "commit", "command")}
    failed = 0
    for arch in arguments.arch:
        for case in cases(arch):
            for r in report(case, arch) if arguments.only in case.name else ():
                failed += bool(r.problems)
                print(line(r), flush=True)
                if arguments.csv:
                    append_csv(arguments.csv, dataclasses.asdict(r) | provenance)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
