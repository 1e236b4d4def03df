"""vqvit on this CPU against PyTorch, ONNX Runtime and OpenVINO, a process for each: latency, memory, start and error.

    pip install -e ".[bench]"
    python benchmarks/cpu.py [--arch vit-ti,deit-s,vit-b16] [--batch 1,8] [--engines all] [--threads 2] [--seconds 5]
    python benchmarks/cpu.py --arch dinov2-s --dinov2 FOLDER --images FOLDER
    python benchmarks/cpu.py --gemm

Every engine holds the same weights and serves from files that other processes made. Engines take turns, so that drift
of the machine hits all alike, and while one runs the others' processes are stopped. An engine that is not installed or
fails is a row that says why. Appends to results/cpu.csv; `--gemm` times the int8 GEMM instead, into
results/cpu_gemm.csv.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cpu_engines
import cpu_gemm
import cpu_models
import numpy as np
import torch
from cpu_engines import ENGINES, REFERENCE
from cpu_exports import ARTIFACTS, FLOAT
from cpu_rounds import MIN_ROUNDS, OPEN_TIMEOUT_S, Entry, ask, python_worker, take_turns

from vqvit import engines as architectures
from vqvit.provenance import append_csv, provenance_row
from vqvit.report import text_table

RESULTS = Path(__file__).parent / "results"

EXPORT_TIMEOUT_S = 900

COMPARED_IMAGES = 8
"""At least so many enter the SQNR."""

MAX_RELATIVE_ERROR = 0.5
"""Beyond this an engine computes something else, and its latency means nothing."""


@dataclass(frozen=True)
class Settings:
    """How long to measure, on what, and with how many calibration images."""

    threads: int
    seconds: float
    min_rounds: int
    calibration: int
    images: str | None
    dinov2: str | None


class Exports:
    """The artifacts of one architecture, each made when an engine first needs it."""

    def __init__(self, folder: Path, images: Path, environment: Mapping[str, str]):
        self.folder, self.images, self.environment = folder, images, environment
        self._failures: dict[str, str | None] = {}

    def failure(self, artifact: str, target: str, options: dict) -> str | None:
        """Make `target` if it is not there yet; why that is impossible, or None."""
        if artifact == FLOAT:
            return None
        if target not in self._failures:
            after = ARTIFACTS[artifact].after
            earlier = after and self.failure(after, ARTIFACTS[after].file, {})
            self._failures[target] = earlier or self._make(artifact, target, options)
        return self._failures[target]

    def _make(self, artifact: str, target: str, options: dict) -> str | None:
        say(f"making {target}")
        request = {"artifact": artifact, "folder": str(self.folder), "target": target, "images": str(self.images)}
        try:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).with_name("cpu_exports.py"))],
                input=json.dumps({**request, "options": options}),
                env=dict(self.environment),
                check=False,
                capture_output=True,
                text=True,
                timeout=EXPORT_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return f"making {target}: not done in {EXPORT_TIMEOUT_S} s"
        if done.returncode == 0:
            return None
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        return f"making {target}: {lines[-1]}"


def missing_packages(packages: tuple[str, ...]) -> str | None:
    """Which of `packages` cannot be imported, as a reason, or None."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def versions(packages: tuple[str, ...]) -> str:
    """Installed packages with their versions."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def compare(
    names: list[str],
    batch: int,
    images: np.ndarray,
    exports: Exports,
    environment: Mapping[str, str],
    settings: Settings,
    scratch: Path,
    start_worker=python_worker,
) -> dict[str, Entry]:
    """Open `names` at one batch size, compare their outputs and time them; every engine has an entry.

    Raises `RuntimeError` if the reference fails.
    """
    entries = {name: Entry() for name in names}
    stored = scratch / "images.npy"
    np.save(stored, images)
    try:
        for name, entry in entries.items():
            engine, target = ENGINES[name], ENGINES[name].target(name)
            failure = missing_packages(engine.packages) or exports.failure(engine.artifact, target, engine.options)
            if failure:
                entry.fail(failure)
                say(f"{name}: {failure}")
                continue
            say(f"opening {name} at batch {batch}")
            entry.worker = start_worker(environment, scratch / f"{name}.log")
            request = {
                "do": "open", "engine": name, "path": str(exports.folder / target), "batch": batch,
                "threads": settings.threads, "images": str(stored),
            }  # fmt: skip
            if (answer := ask(entry, request, OPEN_TIMEOUT_S)) is None:
                say(f"{name}: {entry.failure}")
                continue
            entry.opened = answer
            outputs = scratch / f"{name}.npy"
            if ask(entry, {"do": "outputs", "path": str(outputs)}, OPEN_TIMEOUT_S) is not None:
                entry.outputs = np.load(outputs)
        check_outputs(entries)
        say(f"timing at batch {batch}")
        running = sum(entry.failure is None for entry in entries.values())
        take_turns(entries, settings.seconds * running, settings.min_rounds)
        if failure := entries[REFERENCE].failure:
            raise RuntimeError(f"{REFERENCE}: {failure}")
    finally:
        for entry in entries.values():
            if entry.worker is not None:
                entry.worker.close()
    return entries


def check_outputs(entries: Mapping[str, Entry]) -> None:
    """Fail every engine that computes something else. Raises `RuntimeError` if there is no reference."""
    expected = entries[REFERENCE].outputs
    if expected is None:
        raise RuntimeError(f"{REFERENCE}: {entries[REFERENCE].failure}")
    for entry in entries.values():
        if entry.outputs is None:
            continue
        if entry.outputs.shape != expected.shape:
            entry.fail(f"outputs {entry.outputs.shape}, expected {expected.shape}")
        elif not (error := relative_error(entry.outputs, expected)) <= MAX_RELATIVE_ERROR:
            entry.fail(f"relative error {error:.3g} of the outputs, expected at most {MAX_RELATIVE_ERROR}")


def relative_error(outputs: np.ndarray, expected: np.ndarray) -> float:
    """‖out - fp32‖ / ‖fp32‖."""
    return float(np.linalg.norm(outputs - expected) / np.linalg.norm(expected))


def rows(entries: Mapping[str, Entry], batch: int) -> list[dict]:
    """A row for each engine: figures, or the reason why there are none."""
    medians = {name: float(np.median(entry.samples)) for name, entry in entries.items() if entry.samples}
    peers = {name: median for name, median in medians.items() if not ENGINES[name].own}
    best_peer = min(peers, key=peers.get)
    return [
        {
            "engine": name,
            "status": entry.failure or "ok",
            **(figures(entry, entries, batch, medians, name, best_peer) if entry.failure is None else NO_FIGURES),
            "best_peer": best_peer,
            "versions": versions(ENGINES[name].packages),
        }
        for name, entry in entries.items()
    ]


def figures(
    entry: Entry, entries: Mapping[str, Entry], batch: int, medians: Mapping[str, float], name: str, best_peer: str
) -> dict:
    """The measured columns of an engine that ran; the relative error is that of the timed images."""
    p20, median, p80 = np.percentile(entry.samples, (20, 50, 80))
    expected = entries[REFERENCE].outputs
    overall = relative_error(entry.outputs, expected)
    return {
        "median_ms": round(median, 3),
        "p20_ms": round(p20, 3),
        "p80_ms": round(p80, 3),
        "calls": len(entry.samples),
        "speedup_over_fp32": round(medians[REFERENCE] / medians[name], 3),
        "speedup_over_best_peer": round(medians[best_peer] / medians[name], 3),
        "resident_mb": round(entry.opened["resident_mb"], 1),
        "anonymous_mb": round(entry.opened["anonymous_mb"], 1),
        "load_s": round(entry.opened["load_s"], 2),
        "first_result_s": round(entry.opened["first_s"], 2),
        "relative_error": f"{relative_error(entry.outputs[:batch], expected[:batch]):.2e}",
        "sqnr_db": round(-20 * float(np.log10(overall)), 2) if overall else "",
    }


NO_FIGURES = dict.fromkeys(
    (
        "median_ms", "p20_ms", "p80_ms", "calls", "speedup_over_fp32", "speedup_over_best_peer", "resident_mb",
        "anonymous_mb", "load_s", "first_result_s", "relative_error", "sqnr_db",
    ),
    "",
)  # fmt: skip


def run(archs: list[str], batches: list[int], names: list[str], settings: Settings, output: Path) -> None:
    """Compare engines at every architecture and batch size; rows are appended to `output` as each is done."""
    facts = provenance_row("cpu")
    for arch in archs:
        with tempfile.TemporaryDirectory(prefix="vqvit-cpu-") as name:
            folder = Path(name)
            environment = cpu_engines.environment(settings.threads, folder)
            size = architectures.ARCHITECTURES[arch].image_size
            compared = max(COMPARED_IMAGES, *(-(-COMPARED_IMAGES // batch) * batch for batch in batches))
            source = settings.dinov2 if arch == cpu_models.REAL_WEIGHTS else None
            pixels = cpu_models.images(compared + settings.calibration, size, settings.images, source)
            calibration = folder / "calibration.npy"
            np.save(calibration, pixels[compared:])
            cpu_models.float_model(arch, settings.dinov2).save_pretrained(folder / FLOAT)
            exports = Exports(folder, calibration, environment)
            for batch in batches:
                shown = pixels[: -(-COMPARED_IMAGES // batch) * batch]
                measured = rows(compare(names, batch, shown, exports, environment, settings, folder), batch)
                place = {
                    "arch": arch,
                    "weights": Path(source).name if source else "random",
                    "images": Path(settings.images).name if settings.images else "random",
                    "image_size": size,
                    "batch": batch,
                }
                for row in measured:
                    append_csv(output, {**place, **row, **facts})
                print(f"{arch}, batch {batch}, {settings.threads} threads\n{table(measured)}\n", flush=True)


def table(measured: list[dict]) -> str:
    """The rows for a terminal: figures, then the engines without any and why."""
    columns = ["engine", *(key for key in NO_FIGURES if key != "calls")]
    done = [[str(row[key]) for key in columns] for row in measured if row["status"] == "ok"]
    failed = [f"{row['engine']}: {row['status']}" for row in measured if row["status"] != "ok"]
    return "\n".join([text_table(columns, done), *failed])


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def chosen(text: str, known: Mapping, what: str) -> list[str]:
    """Names between commas, or all. Raises `ValueError` naming those there are."""
    if text == "all":
        return list(known)
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what}: expected names among {', '.join(known)}; got {', '.join(unknown)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit-ti,deit-s,vit-b16", help="names of vqvit.engines.ARCHITECTURES")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--engines", default="all", help=f"of {', '.join(ENGINES)}; {REFERENCE} always runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="for each engine and batch size")
    parser.add_argument("--calibration", type=int, default=32, help="images that static INT8 is calibrated on")
    parser.add_argument("--images", help="folder or parquet file of images; default: random ones")
    parser.add_argument("--dinov2", help=f"Hugging Face folder with the weights of {cpu_models.REAL_WEIGHTS}")
    parser.add_argument("--gemm", action="store_true", help="time the int8 GEMM instead")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: 1 second, 4 calibration images, 2 rounds")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # unwinds, so that temporary files go
    torch.set_num_threads(arguments.threads)
    seconds = 1.0 if arguments.quick else arguments.seconds
    if arguments.gemm:
        cpu_gemm.run(arguments.output / "cpu_gemm.csv", arguments.threads, arguments.quick)
        return
    settings = Settings(
        arguments.threads, seconds, 2 if arguments.quick else MIN_ROUNDS, 4 if arguments.quick else
        arguments.calibration, arguments.images, arguments.dinov2,
    )  # fmt: skip
    try:
        archs = chosen(arguments.arch, architectures.ARCHITECTURES, "--arch")
        names = chosen(arguments.engines, ENGINES, "--engines")
        batches = [int(batch) for batch in arguments.batch.split(",")]
        if min(batches) < 1:
            raise ValueError(f"--batch: expected positive integers; got {arguments.batch}")
    except ValueError as error:
        parser.error(str(error))
    names = list(dict.fromkeys([REFERENCE, *names]))
    run(archs, batches, names, settings, arguments.output / "cpu.csv")


if __name__ == "__main__":
    main()
