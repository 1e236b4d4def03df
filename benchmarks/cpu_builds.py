"""CPU kernels of this checkout against those of other revisions, in one process that loads every build.

    python benchmarks/cpu_builds.py HEAD [REVISION ...] [--arch vit-b16,vit-ti] [--batch 1,8] [--seconds 10]
    python benchmarks/cpu_builds.py HEAD --model EXPORTED

Each build serves the same exported model, takes its turn in every round, and must give the same bits as the first,
unless --difference allows a relative L2 difference, for changes of the numerical contract. Prints medians and ratios,
and writes nothing: these are for deciding whether a change of a kernel stays. One Python calls all builds, so that
revisions need this checkout's csrc/vqvit.h.
"""

import argparse
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import cpu_models
import numpy as np
import torch

import vqvit
from vqvit import _build, engines, native
from vqvit.report import text_table
from vqvit.serving import Session
from vqvit.timing import interleaved

ROOT = Path(__file__).parent.parent

HERE = "checkout"


def sources(revision: str, folder: Path) -> Path:
    """csrc/ of a git revision, below `folder`. Raises `ValueError` if git does not know it, or its vqvit.h differs."""
    done = subprocess.run(["git", "-C", str(ROOT), "archive", revision, "csrc"], capture_output=True)
    if done.returncode != 0:
        raise ValueError(f"revision: expected one that git knows; got {revision!r}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    csrc = folder / "csrc"
    if declarations(csrc) != declarations(ROOT / "csrc"):
        raise ValueError(f"revision: expected the interface of this checkout (csrc/vqvit.h); {revision} has another")
    return csrc


def declarations(csrc: Path) -> str:
    """vqvit.h without its comments and layout."""
    return " ".join(re.sub(r"/\*.*?\*/", " ", (csrc / "vqvit.h").read_text(), flags=re.DOTALL).split())


def load(csrc: Path, path: Path):
    """The CPU library of `csrc`, compiled to `path`."""
    _build.build(csrc, _build.CPU, path)
    return native.open_cpu(path)


def call_of(library, session: Session, images: np.ndarray):
    def call() -> dict[str, np.ndarray]:
        native.use_cpu(library)
        return session(images)

    return call


def difference(found: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> float:
    """Largest relative L2 difference of the outputs; 0 for the same bits, Inf if one is not finite."""
    largest = 0.0
    for key, value in first.items():
        if not np.array_equal(found[key], value, equal_nan=True):
            relative = float(np.linalg.norm(found[key] - value) / np.linalg.norm(value))
            largest = max(largest, relative) if np.isfinite(relative) else np.inf
    return largest


def compare(libraries: dict, session: Session, batch: int, seconds: float, allowed: float = 0.0) -> list[list[str]]:
    """A line for each build. Raises `RuntimeError` if one's outputs differ from the first's by more than `allowed`."""
    _, channels, *size = session.inputs[0].shape
    images = np.random.default_rng(0).standard_normal((batch, channels, *size), dtype=np.float32)
    calls = {name: call_of(library, session, images) for name, library in libraries.items()}
    outputs = {name: call() for name, call in calls.items()}
    first = next(iter(outputs.values()))
    for name, found in outputs.items():
        if (differs := difference(found, first)) > allowed:
            raise RuntimeError(
                f"{name}: expected the bits of {next(iter(outputs))}, or --difference {allowed:g}; got {differs:.3g}"
            )
    timed = interleaved(calls, seconds * len(calls), max_rounds=10_000)
    reference = timed[HERE].median_ms
    return [
        [name, str(batch), f"{t.median_ms:.2f}", f"{t.p20_ms:.2f}", f"{t.p80_ms:.2f}", f"{t.median_ms / reference:.3f}"]
        for name, t in timed.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="+", metavar="REVISION", help="of git")
    parser.add_argument("--arch", default="vit-b16", help="names of vqvit.engines.ARCHITECTURES")
    parser.add_argument("--model", help="what vqvit.export wrote, instead")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="for each build and batch size")
    parser.add_argument("--difference", type=float, default=0.0, help="relative L2, that outputs may show")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vqvit-builds-") as name:
        folder = Path(name)
        try:
            places = {
                HERE: ROOT / "csrc",
                **{r: sources(r, folder / str(i)) for i, r in enumerate(arguments.revisions)},
            }
        except ValueError as error:
            parser.error(str(error))
        libraries = {r: load(csrc, folder / f"{i}.so") for i, (r, csrc) in enumerate(places.items())}
        native.use_cpu(libraries[HERE])
        for arch in [None] if arguments.model else arguments.arch.split(","):
            exported = arguments.model
            if arch is not None:
                if arch not in engines.ARCHITECTURES:
                    parser.error(f"--arch: expected names among {', '.join(engines.ARCHITECTURES)}; got {arch}")
                print(f"exporting {arch}", file=sys.stderr)
                model = cpu_models.with_realistic_weights(engines.random_model(arch))
                vqvit.quantize_(model)
                exported = str(vqvit.export(model, folder / arch))
            session = Session(exported, arguments.threads)
            for batch in map(int, arguments.batch.split(",")):
                rows = compare(libraries, session, batch, arguments.seconds, arguments.difference)
                print(f"{arch or Path(exported).name}, {arguments.threads} threads, {native.cpu_isa()}")
                print(
                    text_table(["build", "batch", "median_ms", "p20_ms", "p80_ms", "of checkout's"], rows), flush=True
                )


if __name__ == "__main__":
    main()
