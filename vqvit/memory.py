"""Peak memory of one engine, measured in a process of its own: `python -m vqvit.memory` does as a JSON request says.

A process that has held another engine would report that one's peak, and pages that its allocator kept.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MEBIBYTE = 2**20
TIMEOUT_S = 900


class WorkerError(RuntimeError):
    """The measuring process failed."""


@dataclass(frozen=True)
class Memory:
    """MiB of a process that loads a model folder and runs it.

    Attributes:
        baseline: resident memory with torch, transformers and the model's class imported, and the images in place.
        load_peak: largest resident memory while the model was loaded.
        run_peak: largest resident memory while it ran; on CUDA, largest device memory allocated.
        peak: larger of load_peak and run_peak on the CPU; run_peak on CUDA.
    """

    baseline: float
    load_peak: float
    run_peak: float
    peak: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(
    folder: str | Path,
    inputs: str | Path,
    outputs: str | Path | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    runs: int = 2,
) -> Memory:
    """Load `folder` in a new process, run it `runs` times on stored images and report its memory.

    Args:
        folder: what `vqvit.engines.open_model` reads.
        inputs: safetensors file with `pixel_values` (B, 3, H, W).
        outputs: safetensors file to write `outputs` (B, D) to; the same values that the process computed.
        batch_size: images in one call; default all.
        device: where to run.
        runs: how often.

    Raises `WorkerError` with the process's last words if it fails.
    """
    request = {
        "folder": str(folder),
        "inputs": str(inputs),
        "outputs": outputs and str(outputs),
        "batch_size": batch_size,
        "device": device,
        "runs": runs,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "vqvit.memory"],
        input=json.dumps(request),
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=_environment(),
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise WorkerError(f"measuring {folder} in a new process: {lines[-1]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def work(request: dict) -> Memory:
    """What the new process does."""
    from vqvit import engines

    torch.set_num_threads(request["threads"])
    on_gpu = request["device"].startswith("cuda")
    pixels = load_file(request["inputs"])["pixel_values"]
    engines.import_class(request["folder"])
    baseline = resident()
    reset_peak()
    model = engines.open_model(request["folder"], request["device"])
    load_peak = peak_resident()
    reset_peak()
    with torch.inference_mode():
        for _ in range(request["runs"]):
            parts = pixels.split(request["batch_size"] or len(pixels))
            outputs = torch.cat([engines.call(model, part).cpu() for part in parts])
    run_peak = torch.cuda.max_memory_allocated() / MEBIBYTE if on_gpu else peak_resident()
    if request["outputs"]:
        save_file({"outputs": outputs.contiguous()}, request["outputs"])
    return Memory(baseline, load_peak, run_peak, run_peak if on_gpu else max(load_peak, run_peak))


def resident() -> float:
    """Resident memory of this process now, MiB."""
    return _status("VmRSS")


def peak_resident() -> float:
    """Largest resident memory of this process since it began or since `reset_peak`, MiB."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Start a new peak, where the kernel lets a process do so; else peaks stay those of the whole life."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status(field: str) -> float:
    """A size in /proc/self/status, MiB; elsewhere the peak that getrusage knows."""
    path = Path("/proc/self/status")
    if path.is_file():
        return int(re.search(rf"{field}:\s+(\d+) kB", path.read_text())[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MEBIBYTE if sys.platform == "darwin" else peak / 1024


def _environment() -> dict[str, str]:
    """This process's environment, with a source checkout on the path of the new one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "csrc").is_dir():
        return dict(os.environ)
    path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path}


if __name__ == "__main__":
    print(json.dumps(work(json.load(sys.stdin)).to_dict()))
