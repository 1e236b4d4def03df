"""Section `kernels` of gpu.py: every kernel of a block on every native backend, against bf16 and torch._int_mm."""

import functools
import itertools
from collections.abc import Callable, Iterator

import roofline
import torch
from gpu_timing import Run, copy_rate, int8_rate
from torch import Tensor
from torch.nn import functional as F

import vqvit
from vqvit import ops
from vqvit.timing import back_to_back, operand_sets, take_turns

Calls = dict[str, Callable[[], object]]


def kernel_shapes(run: Run) -> Iterator[tuple[str, int, roofline.Shape]]:
    if not run.cuda:
        yield "tiny", 1, roofline.Shape(width=64, mlp=128, heads=1, blocks=2, tokens=17, patch=48)
        return
    archs = ["vit-b16"] if run.quick else ["vit-b16", "vit-l16", "vit-h14"]
    for batch in (256, 1) if run.quick else (256, 64, 1, 8):
        for arch in archs:
            yield arch, batch, roofline.SHAPES[arch]


def codes(run: Run, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=run.device)


def scales(run: Run, *shape: int) -> Tensor:
    return torch.rand(*shape, device=run.device) * 0.01 + 1e-3


def gemm_calls(run: Run, launch: str, m: int, n: int, k: int) -> Calls:
    """One call of each contender for a GEMM of a block, with the epilogue it has there."""
    half = torch.bfloat16
    a, b, bias = codes(run, m, k), codes(run, n, k), torch.randn(n, device=run.device)
    a_scale, b_scale, groups = scales(run, m), scales(run, n), scales(run, m, -(-k // 128))
    x, w = torch.randn(m, k, device=run.device, dtype=half), torch.randn(n, k, device=run.device, dtype=half)
    half_bias, residual = bias.to(half), torch.randn(m, n, device=run.device, dtype=half)
    calls = {
        "vqvit": {
            "qkv": lambda: ops.int8_linear(a, a_scale, b, b_scale, bias, out_dtype=half),
            "attn_out": lambda: ops.int8_linear(a, groups, b, b_scale, bias, residual=residual, out_dtype=half),
            "fc1": lambda: ops.int8_linear_quantize(a, a_scale, b, b_scale, bias, "gelu", per_group=True),
            "fc2": lambda: ops.int8_linear(a, groups, b, b_scale, bias, residual=residual, out_dtype=half),
        }[launch],
        "bf16": lambda: F.linear(x, w, half_bias),
    }
    if launch in ("attn_out", "fc2"):
        calls["vqvit per token"] = lambda: ops.int8_linear(
            a, a_scale, b, b_scale, bias, residual=residual, out_dtype=half
        )
    if m > 16 and k % 8 == 0 and n % 8 == 0:  # what torch._int_mm takes on CUDA
        calls["int_mm"] = lambda: torch._int_mm(a, b.t())
    return calls


def row_calls(run: Run, batch: int, shape: roofline.Shape) -> dict[str, tuple[Callable[[], object], float]]:
    """Row-wise ops: a call and the bytes it has to move."""
    m, w, half = batch * shape.tokens, shape.width, torch.bfloat16
    x = torch.randn(m, w, device=run.device, dtype=half)
    wide = torch.randn(m, shape.mlp, device=run.device, dtype=half)
    qkv = torch.randn(batch, shape.tokens, 3 * w, device=run.device, dtype=half)
    weight, bias = torch.randn(2, w, device=run.device)
    return {
        "layer_norm": (lambda: ops.layer_norm(x, weight, bias, 1e-6), 4 * m * w),
        "layernorm_quantize": (lambda: ops.layernorm_quantize(x, weight, bias, 1e-6), 3 * m * w),
        "add_layernorm_quantize": (lambda: ops.add_layernorm_quantize(x, x, weight, bias, 1e-6), 7 * m * w),
        "quantize_per_token": (lambda: ops.quantize_per_token(wide), 3 * m * shape.mlp),
        "quantize_per_group": (lambda: ops.quantize_per_group(wide), 3 * m * shape.mlp),
        "quantize_qkv": (lambda: ops.quantize_qkv(qkv, shape.heads), 9 * m * w),
    }


def attention_calls(run: Run, backend: str, batch: int, shape: roofline.Shape) -> tuple[Calls, Calls]:
    """Contenders for attention, and for attention that stores codes: there Triton has one launch, or two."""
    size = (batch, shape.heads, shape.tokens, shape.width // shape.heads)
    q, k, v = (codes(run, *size) for _ in range(3))
    operands = q, k, v, scales(run, *size[:3]), scales(run, *size[:3]), scales(run, *size[:2], size[3])
    q16, k16, v16 = (torch.randn(size, device=run.device, dtype=torch.bfloat16) for _ in range(3))
    attention = {
        "vqvit": lambda: ops.int8_attention(*operands, 0.125, torch.bfloat16),
        "bf16": lambda: F.scaled_dot_product_attention(q16, k16, v16),
    }
    stored = {"vqvit": lambda: ops.int8_attention_quantize(*operands, 0.125)}
    if backend == "triton":
        from vqvit.kernels import attention_s8, tuned

        def forced(launches: attention_s8.Launches) -> object:
            with tuned.forced("attention_quantize", launches):
                return ops.int8_attention_quantize(*operands, 0.125)

        if attention_s8.fits_one_launch(size[3], shape.tokens):
            one, two = attention_s8.LAUNCHES
            stored |= {"one launch": functools.partial(forced, one), "two launches": functools.partial(forced, two)}
    return attention, stored


def kernels(run: Run) -> Iterator[dict]:
    """Each kernel of a block, as a share of the peaks measured first; operations and bytes a microsecond."""
    peak, copy = int8_rate(run), copy_rate(run)
    for what, rate in (("int8 peak", peak), ("copy peak", copy)):
        yield kernel_row({"backend": "torch", "arch": "", "batch": ""}, what, "torch", rate=rate, share=1.0)
    rounds = 7 if run.cuda else 2
    for (arch, batch, shape), backend in itertools.product(kernel_shapes(run), run.backends):
        m = batch * shape.tokens
        kernels = roofline.BACKENDS.get(backend, roofline.BACKENDS["triton"])
        predicted = roofline.int8_block(run.gpu, shape, batch, kernels)
        base = {"backend": backend, "arch": arch, "batch": batch}
        with vqvit.backend(backend):
            for launch, (n, k) in shape.linears.items():
                if run.late:
                    return
                run.reporter.doing(f"{launch} of {arch}, batch {batch}")
                sets = [gemm_calls(run, launch, m, n, k) for _ in range(operand_sets(m * k + n * k + m * n))]
                timers = {name: back_to_back([s[name] for s in sets], run.device) for name in sets[0]}
                times = take_turns(timers, rounds)
                yield from kernel_rows(base, launch, times, predicted[launch], 2 * m * n * k, peak)
            if run.late:
                return
            run.reporter.doing(f"attention of {arch}, batch {batch}")
            attention, stored = attention_calls(run, backend, batch, shape)
            for what, calls in (("attention", attention), ("attention_quantize", stored)):
                timers = {name: back_to_back([call], run.device) for name, call in calls.items()}
                yield from kernel_rows(base, what, take_turns(timers, rounds), predicted.get(what))
            for op, (call, traffic) in row_calls(run, batch, shape).items():
                run.reporter.doing(f"{op} of {arch}, batch {batch}")
                times = take_turns({"vqvit": back_to_back([call], run.device)}, rounds)
                yield from kernel_rows(base, op, times, None, traffic, copy)


def kernel_rows(
    base: dict, what: str, times: dict, predicted: float | None = None, work: float = 0.0, peak: float = 0.0
) -> Iterator[dict]:
    """A row for each contender; `work` and `peak` in operations or bytes, and per microsecond."""
    for engine, (median, low, high) in times.items():
        ratio = times["bf16"][0] / median if "bf16" in times else None
        rate = work / median if work else None
        share = rate / peak if rate and engine != "bf16" else None
        shown = predicted if engine == "vqvit" else None
        yield kernel_row(base, what, engine, median, low, high, rate, share, ratio, shown)


def kernel_row(
    base, what, engine, median=None, low=None, high=None, rate=None, share=None, ratio=None, predicted=None
) -> dict:
    def figure(value: float | None, spec: str) -> str:
        return "" if value is None else format(value, spec)

    return {**base, "what": what, "engine": engine, "us": figure(median, ".2f"), "p20": figure(low, ".2f"),
            "p80": figure(high, ".2f"), "rate": figure(rate, ".4g"), "share_of_peak": figure(share, ".3f"),
            "over_bf16": figure(ratio, ".2f"), "predicted_us": figure(predicted, ".2f")}  # fmt: skip
