"""Everything a GPU can say about vqvit, in one offline command: correctness, kernels, whole models, timelines.

    python benchmarks/gpu.py [--output FOLDER] [--quick] [--only correctness,kernels,models,timeline]

Runs from a bare checkout. Each section appends rows to FOLDER/gpu_<section>.csv as they come, within its share of
`--minutes`; a section that fails is reported and the others go on. FOLDER/gpu.md sums up. Exit status 1 if an op's
result was wrong or a section failed. `--device cpu` rehearses it all in miniature on the reference backend.
"""

import argparse
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import roofline  # noqa: E402  (the checkout need not be installed)
import torch  # noqa: E402
from gpu_timing import L2_BYTES, LAUNCHES, Run, captured, copy_rate, int8_rate, interleaved  # noqa: E402
from op_cases import CASES  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import vqvit  # noqa: E402
from vqvit import backends, engines, ops, reference, runtime  # noqa: E402
from vqvit.provenance import append_csv, environment, provenance_row  # noqa: E402
from vqvit.report import text_table  # noqa: E402

SHARES = {"correctness": 0.2, "kernels": 0.25, "models": 0.45, "timeline": 0.1}
"""Part of the time limit that each section may take."""

TARGETS = {("vit-b16", 1): 1.6, ("vit-b16", 8): 1.7, ("vit-b16", 64): 2.0, ("vit-b16", 256): 2.05} | {
    ("vit-l16", 1): 1.7, ("vit-l16", 8): 1.8, ("vit-l16", 64): 2.1, ("vit-l16", 256): 2.15,
}  # fmt: skip
"""The project's targets: speed-up over compiled bf16 with fused attention, on an H200."""

# ---- (a) correctness ------------------------------------------------------------------------------------------------


def native_backends(run: Run) -> list[str]:
    """The backends that take this device's tensors and can run here."""
    if not run.cuda:
        return ["reference"]
    return [name for name in backends.PREFERENCE["cuda"] if name != "reference" and not backends.unavailable(name)]


def placed(run: Run, argument):
    return argument.to(run.device) if isinstance(argument, Tensor) else argument


def as_tuple(result) -> tuple:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def differing(got: Tensor, want: Tensor) -> int:
    """Values that differ, NaN being equal to NaN; all of them if shape or dtype do."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return max(1, want.numel())
    got = got.cpu()
    equal = (got == want) | ((got != got) & (want != want))
    return int((~equal).sum())


def correctness(run: Run) -> Iterator[dict]:
    """Every op case against the reference on the CPU, bit for bit, and a whole model against the CPU's."""
    names = native_backends(run) or ["reference"]
    for backend, (op, cases) in itertools.product(names, CASES.items()):
        checked, wrong, notes = 0, [], ""
        for case, draw in cases.items():
            if run.late:
                notes = "stopped: out of time"
                break
            torch.manual_seed(0)
            args = draw()
            want = as_tuple(getattr(reference, op)(*args))
            with vqvit.backend(backend):
                try:
                    got = as_tuple(getattr(torch.ops.vqvit, op)(*(placed(run, a) for a in args)))
                    bad = sum(differing(g, w) for g, w in zip(got, want, strict=True))
                except Exception as error:  # a kernel may fail in any way: the row says how
                    bad, notes = 1, f"{case}: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
            checked += 1
            if bad:
                wrong.append(case)
        yield {"backend": backend, "op": op, "cases": checked, "wrong": len(wrong), "which": " ".join(wrong[:8]),
               "note": notes}  # fmt: skip
    if not run.late:
        yield whole_model(run)


def whole_model(run: Run) -> dict:
    """Logits of one quantized model on this device and on the CPU."""
    model = engines.random_model("vit-ti")
    vqvit.quantize_(model)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        want = model(pixels).logits
        got = model.to(run.device)(pixels.to(run.device)).logits.cpu()
    difference = ((got - want).norm() / want.norm()).item()
    # The layers outside vqvit (classifier norm, embeddings) are torch's and may round differently.
    return {"backend": backends.selected(run.device), "op": "vit-ti logits", "cases": 1,
            "wrong": int(difference > 1e-2), "which": "", "note": f"relative difference {difference:.2e}"}  # fmt: skip


# ---- (b) kernels ----------------------------------------------------------------------------------------------------


def kernel_shapes(run: Run) -> Iterator[tuple[str, int, roofline.Shape]]:
    if not run.cuda:
        yield "tiny", 1, roofline.Shape(width=64, mlp=128, heads=2, blocks=2, tokens=17, patch=48)
        return
    archs = ["vit-b16"] if run.quick else ["vit-b16", "vit-l16", "vit-h14"]
    for batch in (64, 1) if run.quick else (256, 64, 1, 8):
        for arch in archs:
            yield arch, batch, roofline.SHAPES[arch]


def codes(run: Run, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=run.device)


def scales(run: Run, *shape: int) -> Tensor:
    return torch.rand(*shape, device=run.device) * 0.01 + 1e-3


def gemm_calls(run: Run, launch: str, m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
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
        "layernorm_quantize": (lambda: ops.layernorm_quantize(x, weight, bias, 1e-6), 3 * m * w),
        "add_layernorm_quantize": (lambda: ops.add_layernorm_quantize(x, x, weight, bias, 1e-6), 7 * m * w),
        "quantize_per_token": (lambda: ops.quantize_per_token(wide), 3 * m * shape.mlp),
        "quantize_per_group": (lambda: ops.quantize_per_group(wide), 3 * m * shape.mlp),
        "quantize_qkv": (lambda: ops.quantize_qkv(qkv, shape.heads), 9 * m * w),
    }


def attention_calls(run: Run, batch: int, shape: roofline.Shape) -> dict[str, Callable[[], object]]:
    size = (batch, shape.heads, shape.tokens, shape.width // shape.heads)
    q, k, v = (codes(run, *size) for _ in range(3))
    q_scale, k_scale, v_scale = scales(run, *size[:3]), scales(run, *size[:3]), scales(run, *size[:2], size[3])
    q16, k16, v16 = (torch.randn(size, device=run.device, dtype=torch.bfloat16) for _ in range(3))
    return {
        "vqvit": lambda: ops.int8_attention(q, k, v, q_scale, k_scale, v_scale, 0.125, torch.bfloat16),
        "bf16": lambda: F.scaled_dot_product_attention(q16, k16, v16),
    }


def kernels(run: Run) -> Iterator[dict]:
    """Each kernel of a block against bf16 and torch._int_mm, as a share of the peaks measured first."""
    peak, copy = int8_rate(run), copy_rate(run)
    rounds = 7 if run.cuda else 2
    for (arch, batch, shape), backend in itertools.product(kernel_shapes(run), native_backends(run)):
        if run.late:
            return
        m = batch * shape.tokens
        predicted = roofline.int8_block(roofline.GPUS["h200"], shape, batch)
        base = {"backend": backend, "arch": arch, "batch": batch}
        with vqvit.backend(backend):
            for launch, (n, k) in shape.linears.items():
                footprint = m * k + n * k + m * n
                sets = [gemm_calls(run, launch, m, n, k) for _ in range(min(LAUNCHES, L2_BYTES // footprint + 1))]
                timers = {name: rotated(run, [s[name] for s in sets]) for name in sets[0]}
                yield from kernel_rows(
                    base, launch, interleaved(timers, rounds), predicted[launch], 2 * m * n * k, peak
                )
            calls = attention_calls(run, batch, shape)
            timers = {name: rotated(run, [call]) for name, call in calls.items()}
            yield from kernel_rows(base, "attention", interleaved(timers, rounds), predicted["attention"])
            for op, (call, traffic) in row_calls(run, batch, shape).items():
                times = interleaved({"vqvit": rotated(run, [call])}, rounds)
                yield from kernel_rows(base, op, times, "", traffic, copy)


def rotated(run: Run, calls: list[Callable[[], object]]) -> Callable[[], float]:
    """`LAUNCHES` calls that cycle through operand sets."""
    return captured(run, list(itertools.islice(itertools.cycle(calls), LAUNCHES if run.cuda else len(calls))))


def kernel_rows(
    base: dict, what: str, times: dict, predicted="", work: float = 0.0, peak: float = 0.0
) -> Iterator[dict]:
    """A row for each contender; `work` and `peak` in operations or bytes, and per microsecond."""
    for engine, (median, low, high) in times.items():
        share = f"{work / median / peak:.3f}" if peak and engine != "bf16" else ""
        ratio = f"{times['bf16'][0] / median:.2f}" if "bf16" in times else ""
        yield {**base, "what": what, "engine": engine, "us": f"{median:.2f}", "p20": f"{low:.2f}", "p80": f"{high:.2f}",
               "share_of_peak": share, "over_bf16": ratio,
               "predicted_us": f"{predicted:.2f}" if predicted and engine == "vqvit" else ""}  # fmt: skip


# ---- (c) whole models -----------------------------------------------------------------------------------------------


def model_cases(run: Run) -> list[tuple[str, list[int]]]:
    if not run.cuda:
        return [("tiny", [1])]
    if run.quick:
        return [("vit-b16", [64, 1])]
    return [("vit-b16", [64, 1, 256, 8]), ("vit-l16", [64, 1, 256, 8]), ("dinov2-s", [64, 1])]


def float_model(arch: str) -> nn.Module:
    if arch != "tiny":
        return engines.random_model(arch)
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    return ViTForImageClassification(config).eval()


def contenders(run: Run, arch: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Engines for one architecture, weights in bf16, and why others are missing."""
    import copy

    half = float_model(arch).to(run.device, torch.bfloat16)
    quantized = copy.deepcopy(half)
    groups = {"attn_out": "per_token_group", "fc2": "per_token_group"}
    vqvit.quantize_(quantized, vqvit.QuantConfig(activations=groups))
    models, missing = {"bf16 eager": half, "vqvit eager": quantized}, {}
    if run.cuda:
        models["vqvit graphed"] = runtime.graphed(quantized)
        mode = "reduce-overhead" if run.quick else "max-autotune"
        models[f"bf16 {mode}"] = torch.compile(half, mode=mode)
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
        from torchao.quantization import quantize_ as torchao_quantize
    except ImportError as error:
        missing["torchao int8"] = str(error)
    else:
        peer = copy.deepcopy(half)
        torchao_quantize(peer, Int8DynamicActivationInt8WeightConfig())
        models["torchao int8"] = torch.compile(peer, mode="max-autotune") if run.cuda else peer
    return models, missing


def models(run: Run) -> Iterator[dict]:
    """Latency, images a second and memory of whole models."""
    for arch, batches in model_cases(run):
        if run.late:
            return
        found, missing = contenders(run, arch)
        base = {"arch": arch}
        for engine, reason in missing.items():
            yield model_row(base, "", engine, note=f"missing: {reason}")
        for batch in batches:
            pixels = torch.randn(batch, 3, 224, 224, device=run.device, dtype=torch.bfloat16)
            timers, memory = {}, {}
            for engine, model in found.items():
                if run.late:
                    yield model_row(base, batch, engine, note="skipped: out of time")
                    continue
                try:
                    timers[engine], memory[engine] = model_timer(run, model, pixels)
                except Exception as error:  # a peer may fail in any way: the row says how
                    yield model_row(base, batch, engine, note=f"{type(error).__name__}: {str(error)[:160]}")
            times = interleaved(timers, (5 if run.quick else 15) if run.cuda else 2) if timers else {}
            floats = [t[0] for engine, t in times.items() if engine.startswith("bf16")]
            for engine, (median, low, high) in times.items():
                ratio = min(floats) / median if floats else None
                yield model_row(base, batch, engine, median, low, high, ratio, memory[engine])


def model_timer(run: Run, model: nn.Module, pixels: Tensor) -> tuple[Callable[[], float], float]:
    """A call that returns microseconds of one forward pass, and the peak memory of a pass in MB."""

    def once() -> float:
        with torch.inference_mode():
            if not run.cuda:
                start = time.perf_counter()
                model(pixels)
                return (time.perf_counter() - start) * 1e6
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(pixels)
            torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e6

    for _ in range(3):
        once()
    if not run.cuda:
        return once, 0.0
    torch.cuda.reset_peak_memory_stats()
    once()
    return once, torch.cuda.max_memory_allocated() / 1e6


def model_row(base, batch, engine, median=None, low=None, high=None, ratio=None, memory=None, note="") -> dict:
    known = median is not None
    target = TARGETS.get((base["arch"], batch), "") if engine == "vqvit graphed" else ""
    shape = roofline.SHAPES.get(base["arch"])
    predicted = ""
    if known and shape and engine == "vqvit graphed":
        predicted = f"{roofline.model_us(roofline.GPUS['h200'], shape, batch, 8):.0f}"
    return {**base, "batch": batch, "engine": engine, "us": f"{median:.1f}" if known else "",
            "p20": f"{low:.1f}" if known else "", "p80": f"{high:.1f}" if known else "",
            "images_per_s": f"{batch / median * 1e6:.0f}" if known else "",
            "over_best_bf16": f"{ratio:.2f}" if ratio else "", "target": target, "predicted_us": predicted,
            "peak_memory_mb": f"{memory:.0f}" if memory else "", "note": note}  # fmt: skip


# ---- (d) timeline ---------------------------------------------------------------------------------------------------


def timeline(run: Run) -> Iterator[dict]:
    """Time by kernel of one forward pass, divided by the blocks."""
    from torch.profiler import ProfilerActivity, profile

    arch = "vit-b16" if run.cuda else "tiny"
    blocks = roofline.SHAPES[arch].blocks if run.cuda else 2
    activity = ProfilerActivity.CUDA if run.cuda else ProfilerActivity.CPU
    found, _ = contenders(run, arch)
    for batch, engine in itertools.product((1, 64) if run.cuda else (1,), ("vqvit eager", "bf16 eager")):
        pixels = torch.randn(batch, 3, 224, 224, device=run.device, dtype=torch.bfloat16)
        with torch.inference_mode():
            found[engine](pixels)
            with profile(activities=[activity]) as profiled:
                found[engine](pixels)
                if run.cuda:
                    torch.cuda.synchronize()
        field = "self_device_time_total" if run.cuda else "self_cpu_time_total"
        events = [(getattr(e, field), e.count, e.key) for e in profiled.key_averages() if getattr(e, field) > 0]
        whole = sum(us for us, _, _ in events)
        for us, count, name in sorted(events, reverse=True)[:15]:
            yield {"arch": arch, "batch": batch, "engine": engine, "kernel": name[:100], "calls": count,
                   "us_per_block": f"{us / blocks:.2f}", "share": f"{us / whole:.3f}"}  # fmt: skip


# ---- all of it ------------------------------------------------------------------------------------------------------

SECTIONS = {"correctness": correctness, "kernels": kernels, "models": models, "timeline": timeline}


def run_section(name: str, run: Run, folder: Path) -> tuple[list[dict], str | None]:
    """The section's rows, which are in its CSV file too, and the traceback if it failed."""
    rows, facts = [], provenance_row(run.device)
    try:
        for row in SECTIONS[name](run):
            rows.append(row)
            append_csv(folder / f"gpu_{name}.csv", {**row, **facts})
            print(f"{name}: {' '.join(str(v) for v in row.values() if v != '')}", flush=True)
    except Exception:  # the other sections still run, and the summary shows what happened
        return rows, traceback.format_exc()
    return rows, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks/results")))
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, by comma")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and models")
    parser.add_argument("--minutes", type=float, help="time limit; 7, or 2 with --quick")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - SECTIONS.keys():
        parser.error(f"--only: expected sections among {', '.join(SECTIONS)}; got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device; torch sees none (rehearse with --device cpu)")
    if arguments.device == "cpu":
        vqvit.backend("reference")
    os.environ.setdefault("VQVIT_CACHE", str(arguments.output / ".cache"))
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    seconds = 60 * (arguments.minutes or (2 if arguments.quick else 7))
    arguments.output.mkdir(parents=True, exist_ok=True)
    parts = [
        f"# vqvit on {environment(device)['device']}\n",
        f"```json\n{json.dumps(environment(device), indent=1)}\n```",
    ]
    failed, start = False, time.monotonic()
    for name in wanted:
        began = time.monotonic()
        budget = seconds * SHARES[name] / sum(SHARES[w] for w in wanted)
        rows, problem = run_section(name, Run(device, arguments.quick, began + budget), arguments.output)
        failed |= problem is not None or any(int(row.get("wrong", 0)) for row in rows)
        parts.append(f"\n## {name}: {len(rows)} rows in {time.monotonic() - began:.0f} s\n")
        if rows:
            table = text_table(list(rows[0]), [[str(v) for v in row.values()] for row in rows])
            parts.append(f"```\n{table}\n```")
        if problem:
            parts.append(f"FAILED\n\n```\n{problem}```")
            print(problem, file=sys.stderr)
        (arguments.output / "gpu.md").write_text("\n".join(parts) + "\n")  # as far as it got
    print(f"done in {time.monotonic() - start:.0f} s; summary: {arguments.output.name}/gpu.md")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
