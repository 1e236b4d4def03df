"""One section of gpu.py on one backend, in a process of its own.

python benchmarks/gpu_child.py '{"section": "ops", ...}'
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402  (the checkout need not be installed)

from vqvit import device_checks, precompile, provenance, tuning  # noqa: E402
from vqvit.children import DEVICE_LOST, Reporter, die_with_parent  # noqa: E402


def machine(run, spec: dict) -> Iterator[dict]:
    """Facts of the device: the parent asks nothing of it itself."""
    run.reporter.doing("imports and the device's first call")
    facts = provenance.environment(run.device)
    facts["backends"] = list(device_checks.native_backends(run.device.type))
    if run.cuda:
        properties = torch.cuda.get_device_properties(run.device)
        facts["capability"] = [properties.major, properties.minor]
        facts["multiprocessors"] = properties.multi_processor_count
        facts["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
    facts["provenance"] = provenance.provenance_row(run.device)
    run.reporter.facts(**facts)
    yield {"what": facts["device"], "wrong": 0, "note": " ".join(facts["backends"])}


def expected(run, spec: dict) -> Iterator[dict]:
    import gpu_ops

    yield from gpu_ops.expected(Path(spec["work"]), run)


def ops(run, spec: dict) -> Iterator[dict]:
    import gpu_ops

    yield from gpu_ops.ops(Path(spec["work"]), run, *spec["share"])


def kernels(run, spec: dict) -> Iterator[dict]:
    import gpu_kernels

    yield from gpu_kernels.kernels(run)


def models(run, spec: dict) -> Iterator[dict]:
    import gpu_models

    yield from gpu_models.models(run, spec["arch"], spec["batch"])


def guard(run, spec: dict) -> Iterator[dict]:
    import gpu_models

    yield from gpu_models.guard(run)


def timeline(run, spec: dict) -> Iterator[dict]:
    import gpu_models

    yield from gpu_models.timeline(run)


def tune(run, spec: dict) -> Iterator[dict]:
    import gpu_models

    yield from gpu_models.tune(run, Path(spec["work"]) / "files")


def warm(run, spec: dict) -> Iterator[dict]:
    """Compile what the timed sections launch, on all cores, before anything is timed."""
    jobs = list(warm_jobs(run, spec))
    run.reporter.doing(f"compiling for {len(jobs)} calls")
    problems = precompile.warm(jobs, precompile.Part(*spec["part"]), spec["cores"])
    for problem in problems:
        print(problem)
    note = f"{len(problems)} failed; {problems[0]}" if problems else ""
    yield {"what": f"compilations for {len(jobs)} calls", "wrong": 0, "note": note}


def warm_jobs(run, spec: dict) -> Iterator[precompile.Job]:
    """Every op of the models to time, at each batch, recorded on the meta device."""
    import gpu_models
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.jobs = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "vqvit":
                self.jobs.append(precompile.Job.of(func._schema.name.removeprefix("vqvit::"), args, kwargs))
            return func(*args, **(kwargs or {}))

    for arch in spec["archs"]:
        for config in gpu_models.CONTENDERS.values():
            model = tuning.models_of(arch, torch.device("cpu"), configurations=(config,))[0].to("meta")
            for batch in spec["batches"]:
                pixels = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta")
                with torch.inference_mode(), Recorder() as recorder:
                    model(pixels)
                yield from recorder.jobs


SECTIONS = {
    section.__name__: section for section in (machine, expected, ops, kernels, models, guard, timeline, tune, warm)
}


def run_section(spec: dict) -> int:
    """Rows of a section, told as they come. Returns the exit status."""
    from gpu_timing import DeviceLostError, Run

    reporter = Reporter()
    reporter.doing("imports and the device's first call")
    device = torch.device(spec["device"])
    run = Run(device, tuple(spec["backends"]), spec["quick"], time.monotonic() + spec["seconds"], reporter)
    try:
        with contextlib.closing(SECTIONS[spec["section"]](run, spec)) as rows:
            for row in rows:
                reporter.row(row)
    except DeviceLostError as error:
        print(error)
        return DEVICE_LOST
    reporter.end()
    return 0


def main() -> int:
    die_with_parent()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    return run_section(json.loads(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
