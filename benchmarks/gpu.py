"""Everything a GPU can say about vqvit, in one offline command: correctness, kernels, tiles, models, guard, timelines.

    python benchmarks/gpu.py [--output FOLDER] [--quick] [--only correctness,kernels,tune,models,guard,timeline]

Runs from a bare checkout, in less than a minute over `--minutes`. Each section appends rows to FOLDER/gpu_<section>.csv
as they come, until its share of the time is spent; time that a section leaves goes to the next. A section that fails is
reported and the others go on. FOLDER/gpu.md sums up, the project's targets first; FOLDER/tuned-<device>.json is a table
for `kernels/tables`. Exit status 1 if an op's result was wrong or a section failed. `--device cpu` rehearses it all in
miniature, on the backends of the CPU.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gpu_models  # noqa: E402  (the checkout need not be installed)
import torch  # noqa: E402
from gpu_kernels import kernels  # noqa: E402
from gpu_summary import verdicts  # noqa: E402
from gpu_timing import Run, native_backends  # noqa: E402
from op_cases import CASES  # noqa: E402
from torch import Tensor  # noqa: E402

import vqvit  # noqa: E402
from vqvit import engines, native, reference  # noqa: E402
from vqvit.provenance import append_csv, environment, provenance_row  # noqa: E402
from vqvit.report import text_table  # noqa: E402

SHARES = {"correctness": 0.18, "kernels": 0.22, "tune": 0.12, "models": 0.33, "guard": 0.08, "timeline": 0.07}
"""Part of the time limit that each section may take."""

GRACE_SECONDS = 45
"""A unit of work, such as a compilation, may outlast its section's time; this long after the limit it is cut off."""


class OutOfTime(BaseException):
    """The command's time is over: no error, and sections that expect any error must let it through."""


# ---- correctness ----------------------------------------------------------------------------------------------------


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
    for (op, cases), backend in itertools.product(CASES.items(), run.backends):
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
        yield from whole_model(run)


def whole_model(run: Run) -> Iterator[dict]:
    """Logits of one quantized model on each backend of this device, against the reference on the CPU."""
    model = engines.random_model("vit-ti")
    vqvit.quantize_(model)
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        with vqvit.backend("reference"):
            want = model(pixels).logits
        model.to(run.device)
        for backend in run.backends:
            with vqvit.backend(backend):
                got = model(pixels.to(run.device)).logits.cpu()
            difference = ((got - want).norm() / want.norm()).item()
            # The layers outside vqvit (classifier norm, embeddings) are torch's and may round differently.
            yield {"backend": backend, "op": "vit-ti logits", "cases": 1, "wrong": int(not difference <= 1e-2),
                   "which": "", "note": f"relative difference {difference:.2e}"}  # fmt: skip


# ---- all of it ------------------------------------------------------------------------------------------------------


def sections(folder: Path) -> dict[str, Callable[[Run], Iterator[dict]]]:
    return {
        "correctness": correctness,
        "kernels": kernels,
        "tune": functools.partial(gpu_models.tune, folder=folder),
        "models": gpu_models.models,
        "guard": gpu_models.guard,
        "timeline": gpu_models.timeline,
    }


def run_section(name: str, run: Run, folder: Path) -> tuple[list[dict], str | None]:
    """The section's rows, which are in its CSV file too, and the traceback if it failed."""
    rows, facts = [], provenance_row(run.device)
    try:
        for row in sections(folder)[name](run):
            rows.append(row)
            append_csv(folder / f"gpu_{name}.csv", row | {k: v for k, v in facts.items() if k not in row})
            print(f"{name}: {' '.join(str(v) for v in row.values() if v != '')}", flush=True)
    except OutOfTime:
        print(f"{name}: cut off, the time is over", file=sys.stderr)
    except Exception:  # the other sections still run, and the summary shows what happened
        return rows, traceback.format_exc()
    return rows, None


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in whatever runs after `seconds`."""

    def stop(*_: object) -> None:
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def table_of(rows: list[dict]) -> str:
    return f"```\n{text_table(list(rows[0]), [[str(v) for v in row.values()] for row in rows])}\n```"


def summary(facts: dict, done: dict[str, tuple[list[dict], str | None, float]], names: tuple[str, ...]) -> str:
    """gpu.md: targets, then every section with its rows and seconds."""
    rows = {name: found for name, (found, _, _) in done.items()}
    parts = [f"# vqvit on {facts['device']}\n", f"```json\n{json.dumps(facts, indent=1)}\n```", "\n## targets\n"]
    parts.append(table_of(list(verdicts(rows.get("kernels", []), rows.get("models", []), names))))
    for name, (found, problem, seconds) in done.items():
        parts.append(f"\n## {name}: {len(found)} rows in {seconds:.0f} s\n")
        if found:
            parts.append(table_of(found))
        if problem:
            parts.append(f"FAILED\n\n```\n{problem}```")
    return "\n".join(parts) + "\n"


def build_cuda() -> None:
    """Build the CUDA C++ kernels; why that fails is what their first use then says."""
    with contextlib.suppress(native.NativeUnavailableError):
        native.cuda()


def run_all(wanted: list[str], device: torch.device, quick: bool, seconds: float, folder: Path) -> bool:
    """Run sections one after the other; gpu.md is rewritten after each. Returns whether anything was wrong."""
    names, facts, done = native_backends(device.type), environment(device), {}
    if "cuda" in names:  # nvcc takes a minute, in which Triton's kernels are checked
        threading.Thread(target=build_cuda, daemon=True).start()
    start, share = time.monotonic(), 0.0
    with contextlib.suppress(OutOfTime), time_limit(seconds + GRACE_SECONDS):
        for name in wanted:
            began = time.monotonic()
            if began > start + seconds:
                break
            share += SHARES[name] / sum(SHARES[w] for w in wanted)
            rows, problem = run_section(name, Run(device, names, quick, start + share * seconds), folder)
            done[name] = rows, problem, time.monotonic() - began
            (folder / "gpu.md").write_text(summary(facts, done, names))  # as far as it got
            if problem:
                print(problem, file=sys.stderr)
    return any(
        problem is not None or any(int(row.get("wrong", 0)) for row in rows) for rows, problem, _ in done.values()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks/results")))
    parser.add_argument("--only", default=",".join(SHARES), help="sections, by comma")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and models")
    parser.add_argument("--minutes", type=float, help="time limit; 7, or 2 with --quick")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - SHARES.keys():
        parser.error(f"--only: expected sections among {', '.join(SHARES)}; got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device; torch sees none (rehearse with --device cpu)")
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: `tune` measures its kernels
    os.environ.setdefault("VQVIT_CACHE", str(arguments.output / ".cache"))
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    arguments.output.mkdir(parents=True, exist_ok=True)
    start, minutes = time.monotonic(), arguments.minutes or (2 if arguments.quick else 7)
    failed = run_all(wanted, device, arguments.quick, 60 * minutes, arguments.output)
    print(f"done in {time.monotonic() - start:.0f} s; summary: {arguments.output.name}/gpu.md")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
