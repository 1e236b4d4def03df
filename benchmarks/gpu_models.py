"""Sections `models`, `guard`, `timeline` and `tune` of gpu.py: whole models, and the tiles that they should use."""

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import roofline
import torch
from gpu_timing import Run
from torch import Tensor, nn

import vqvit
from vqvit import engines, precompile, runtime, tuning
from vqvit.plan import QuantConfig
from vqvit.timing import back_to_back, take_turns

TARGETS = {("vit-b16", 1): 1.6, ("vit-b16", 8): 1.7, ("vit-b16", 64): 2.0, ("vit-b16", 256): 2.05} | {
    ("vit-l16", 1): 1.7, ("vit-l16", 8): 1.8, ("vit-l16", 64): 2.1, ("vit-l16", 256): 2.15,
}  # fmt: skip
"""The project's targets: speed-up over compiled bf16 with fused attention, on an H200."""

CONTENDERS = {
    "vqvit per token": QuantConfig(),
    "vqvit groups": tuning.GROUPED,
    "vqvit float attention": QuantConfig(attention="float"),
}

Engine = tuple[str, str]
"""A name, and the backend that its vqvit ops run on, or "torch"."""

# ---- models ---------------------------------------------------------------------------------------------------------


def float_model(run: Run, arch: str) -> nn.Module:
    """In bf16 on the device."""
    if arch != "tiny":
        return engines.random_model(arch).to(run.device, torch.bfloat16)
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(image_size=64, **shape)).eval().to(run.device, torch.bfloat16)


def pixels_for(run: Run, batch: int) -> Tensor:
    side = 224 if run.cuda else 64
    return torch.randn(batch, 3, side, side, device=run.device, dtype=torch.bfloat16)


def forced(backend: str) -> contextlib.AbstractContextManager:
    """vqvit ops run on `backend`; "torch" has none. Entering it takes microseconds: keep it out of timings."""
    return contextlib.nullcontext() if backend == "torch" else vqvit.backend(backend)


def contenders(run: Run, arch: str) -> dict[Engine, Callable[[], nn.Module]]:
    """Engines for one architecture, weights in bf16, each built when it is called for."""
    half = float_model(run, arch)
    half.set_attn_implementation("sdpa")  # fused, whatever the default is

    def quantized(config: QuantConfig) -> nn.Module:
        model = copy.deepcopy(half)
        vqvit.quantize_(model, config)
        return runtime.graphed(model) if run.cuda else model

    def compiled(model: nn.Module) -> nn.Module:
        """Of static shapes, so that no kernel is tuned for another batch."""
        return torch.compile(model, mode="max-autotune", dynamic=False)

    def torchao() -> nn.Module:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
        from torchao.quantization import quantize_ as torchao_quantize

        peer = copy.deepcopy(half)
        torchao_quantize(peer, Int8DynamicActivationInt8WeightConfig())
        return compiled(peer) if run.cuda else peer

    found: dict[Engine, Callable[[], nn.Module]] = {("bf16 eager", "torch"): lambda: half}
    if run.cuda:
        found["bf16 max-autotune", "torch"] = lambda: compiled(half)
    for (name, config), backend in itertools.product(CONTENDERS.items(), run.backends):
        found[name, backend] = lambda config=config: quantized(config)
    if not run.quick:
        found["torchao int8", "torch"] = torchao
    return found


def models(run: Run, arch: str, batch: int) -> Iterator[dict]:
    """Latency, images a second and memory of whole models, all in turns. A contender that fails, or that killed an
    earlier life of this process, is a row that says so.
    """
    pixels = pixels_for(run, batch)
    timers, memory = {}, {}
    torch._dynamo.reset()  # or a second batch in this process would be compiled with a symbolic size
    for engine, build in contenders(run, arch).items():
        what = f"{' on '.join(engine)}, {arch}, batch {batch}"
        if run.late or not run.reporter.survived(what):
            yield model_row(run, arch, batch, engine, note="out of time" if run.late else "it killed its process")
            continue
        run.reporter.doing(what)
        try:
            timers[engine], memory[engine] = model_timer(run, build(), engine[1], pixels)
        except Exception as error:  # a peer may fail in any way: the row says how
            yield model_row(run, arch, batch, engine, note=run.failed(error))
    run.reporter.doing(f"all in turns, {arch}, batch {batch}")
    times = take_turns(timers, (5 if run.quick else 15) if run.cuda else 2) if timers else {}
    floats = [t[0] for (name, _), t in times.items() if name.startswith("bf16")]
    for engine, (median, low, high) in times.items():
        ratio = min(floats) / median if floats else None
        yield model_row(run, arch, batch, engine, median, low, high, ratio, memory[engine])


def model_timer(run: Run, model: nn.Module, backend: str, pixels: Tensor) -> tuple[Callable[[], float], float]:
    """A call that returns microseconds of one forward pass, and the peak memory of a pass in MB."""
    synchronize = torch.cuda.synchronize if run.cuda else lambda: None

    def once() -> float:
        with forced(backend), torch.inference_mode():
            synchronize()
            start = time.perf_counter()
            model(pixels)
            synchronize()
            return (time.perf_counter() - start) * 1e6

    for _ in range(3 if run.cuda else 1):
        once()
    if not run.cuda:
        return once, 0.0
    torch.cuda.reset_peak_memory_stats()
    once()
    return once, torch.cuda.max_memory_allocated() / 1e6


def model_row(
    run: Run, arch, batch, engine, median=None, low=None, high=None, ratio=None, memory=None, note=""
) -> dict:
    known, (name, backend) = median is not None, engine
    ours = name in CONTENDERS
    shape = roofline.SHAPES.get(arch)
    predicted = ""
    if known and shape and name != "vqvit float attention" and ours and backend in roofline.BACKENDS:
        predicted = f"{roofline.model_us(run.gpu, shape, batch, roofline.BACKENDS[backend]):.0f}"
    return {"arch": arch, "batch": batch, "engine": name, "backend": backend, "us": f"{median:.1f}" if known else "",
            "p20": f"{low:.1f}" if known else "", "p80": f"{high:.1f}" if known else "",
            "images_per_s": f"{batch / median * 1e6:.0f}" if known else "",
            "over_best_bf16": f"{ratio:.2f}" if ratio else "",
            "target": TARGETS.get((arch, batch), "") if ours else "", "predicted_us": predicted,
            "peak_memory_mb": f"{memory:.0f}" if memory else "", "note": note}  # fmt: skip


# ---- guard ----------------------------------------------------------------------------------------------------------


def guard(run: Run) -> Iterator[dict]:
    """What `min_speedup=1.0` puts back in one model: eager calls, as a user quantizes."""
    arch, batches = ("vit-b16", (64, 1)) if run.cuda else ("tiny", (1,))
    for batch, backend in itertools.product(batches[:1] if run.quick else batches, run.backends):
        if run.late:
            return
        run.reporter.doing(f"{backend}, batch {batch}")
        model = float_model(run, arch)
        with vqvit.backend(backend):
            report = vqvit.quantize_(model, tuning.GROUPED, min_speedup=1.0, sample=pixels_for(run, batch))
        for layer in report.layers:
            yield {"arch": arch, "batch": batch, "backend": backend, "layer": layer.name, "role": layer.role,
                   "status": layer.status, "reason": layer.reason}  # fmt: skip


# ---- timeline -------------------------------------------------------------------------------------------------------


def timeline(run: Run) -> Iterator[dict]:
    """Time by kernel of one forward pass, divided by the blocks."""
    from torch.profiler import ProfilerActivity, profile

    arch = "vit-b16" if run.cuda else "tiny"
    blocks = roofline.SHAPES[arch].blocks if run.cuda else 2
    activity = ProfilerActivity.CUDA if run.cuda else ProfilerActivity.CPU
    if run.late:
        return
    half, quantized = float_model(run, arch), float_model(run, arch)
    vqvit.quantize_(quantized, tuning.GROUPED)
    found = {("bf16 eager", "torch"): half} | {("vqvit eager", backend): quantized for backend in run.backends}
    for batch, engine in itertools.product((1, 64) if run.cuda else (1,), found):
        if run.late:
            return
        run.reporter.doing(f"{' on '.join(engine)}, batch {batch}")
        pixels = pixels_for(run, batch)
        with forced(engine[1]), torch.inference_mode():
            found[engine](pixels)
            with profile(activities=[activity]) as profiled:
                found[engine](pixels)
                if run.cuda:
                    torch.cuda.synchronize()
        field = "self_device_time_total" if run.cuda else "self_cpu_time_total"
        events = [(getattr(e, field), e.count, e.key) for e in profiled.key_averages() if getattr(e, field) > 0]
        whole = sum(us for us, _, _ in events)
        for us, count, kernel in sorted(events, reverse=True)[:15]:
            yield {"arch": arch, "batch": batch, "engine": engine[0], "backend": engine[1], "kernel": kernel[:100],
                   "calls": count, "us_per_block": f"{us / blocks:.2f}", "share": f"{us / whole:.3f}"}  # fmt: skip


# ---- tune -----------------------------------------------------------------------------------------------------------


def clocked(candidates: dict, device: torch.device) -> dict[str, float]:
    """A `tuning.Timer` for rehearsals: one call of each."""
    timers = {name: back_to_back(calls[:1], device) for name, calls in candidates.items()}
    return {name: median for name, (median, _, _) in take_turns(timers, 1).items()}


def part_of(run: Run) -> precompile.Part:
    """What kernels are compiled for."""
    from vqvit.kernels import devices

    properties = torch.cuda.get_device_properties(run.device)
    capability = properties.major, properties.minor
    row = devices.config_row(capability)
    return precompile.Part(10 * capability[0] + capability[1], row, properties.multi_processor_count)


def tune(run: Run, folder: Path) -> Iterator[dict]:
    """`vqvit tune`: FOLDER/tuned-<device>.json holds what was measured so far."""
    from vqvit.kernels import launch, tuned

    gpu = launch.cuda_device(run.device.index) if run.cuda else launch.Device(launch.INTERPRETER, 1)
    capability = torch.cuda.get_device_capability(run.device) if run.cuda else (0, 0)
    facts = tuning.facts(torch.cuda.get_device_name(run.device) if run.cuda else "interpreter", capability)
    path, choices = folder / f"tuned-{tuned.file_name(gpu)}", []
    folder.mkdir(parents=True, exist_ok=True)
    if run.cuda:
        run.reporter.doing("compiling every config of every launch")
        for problem in precompile.warm(list(tuning.compilations(tune_calls(run, meta=True), gpu)), part_of(run)):
            print(problem)
    with contextlib.closing(tune_calls(run)) as calls:
        for choice in tuning.measure(announced(run, calls), gpu, run.device, tuning.medians if run.cuda else clocked):
            choices.append(choice)
            tuning.write(path, tuning.table(choices, gpu, "measured", facts))
            row = tuning.row(choice)
            times = row["us"]
            gain = f"{times[row['predicted']] / times[row['chosen']]:.3f}" if times else ""
            yield {"kind": row["kind"], "m": row["m"], "shape": "x".join(map(str, row["shape"])),
                   "us": " ".join(f"{us:.2f}" for us in times), "predicted": row["predicted"],
                   "chosen": row["chosen"], "gain": gain, "wrong": int(bool(row["problem"])),
                   "note": row["problem"]}  # fmt: skip


def announced(run: Run, calls: Iterator[tuning.Call]) -> Iterator[tuning.Call]:
    for call in calls:
        launch = call.launch
        if not run.reporter.begin(f"{launch.kind} {launch.m} {'x'.join(map(str, launch.shape))}"):
            continue
        yield call


def tune_calls(run: Run, meta: bool = False) -> Iterator[tuning.Call]:
    """Calls to measure while there is time, the largest batches first, as they gain most; or their shapes alone."""
    place = torch.device("meta") if meta else run.device
    for arch in (("vit-b16",) if run.quick else ("vit-b16", "vit-l16")) if run.cuda else ("tiny",):
        if run.cuda:
            models = [model.to(place) for model in tuning.models_of(arch, torch.device("cpu"))]
        else:
            models = tuning.quantized(float_model(run, arch))
        seen = set()
        for batch in (256, 64, 1, 8) if run.cuda else (1,):
            for call in tuning.record(models, [pixels_for(run, batch).to(place)]):
                if run.late:
                    return
                few = call.launch.kind, call.launch.m
                if run.cuda or few not in seen:  # a rehearsal takes one of each
                    yield call
                seen.add(few)
