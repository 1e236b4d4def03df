"""Everything a GPU can say about vqvit, offline and from a bare checkout, in a run that cannot be lost.

    python benchmarks/gpu.py --call correctness [--output FOLDER]     # 480 s: probe, sanitizers, bits, logits, op cases
    python benchmarks/gpu.py --call timings     [--output FOLDER]     # 300 s: models, kernels, tiles

Every section is a process of its own for each backend, with its own time limit: one that hangs, aborts or loses the
device costs what it had not yet written. Results are written anew after each process, so that this one may be killed at
any time: FOLDER/gpu-rows.tar.gz with a CSV file a section, FOLDER/gpu.md whose last lines are the verdicts (printed
last, too), FOLDER/tuned-<device>.json for `kernels/tables`. Exit status: 1 if a result was wrong or a process died, 2
for bad arguments or a machine without a GPU.

`--plan` prints what would run and for how long; `--prebuild FOLDER` makes, without a GPU, what `--prebuilt FOLDER` then
need not compile; `--rehearse` runs everything in miniature on the CPU and kills processes in every way.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import gpu_plan  # noqa: E402  (the checkout need not be installed)
from gpu_output import SUMMARY, Output  # noqa: E402
from gpu_plan import BUDGETS, CALLS, OPS_SHARES, SECTIONS, Settings  # noqa: E402

from vqvit import children, native, precompile, probe  # noqa: E402
from vqvit.children import Child, Outcome  # noqa: E402

CACHES = {"VQVIT_CACHE": "vqvit", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""Environment variables that say where builds are kept: never in the folder of results."""

STATUS_NO_GPU = 2

WRITE_SECONDS = 2.0
"""Rows of a process that still runs are written that often."""


def work_folder(arguments: argparse.Namespace) -> Path:
    return arguments.work or Path(tempfile.gettempdir()) / f"vqvit-gpu-{os.getuid()}"


def caches(work: Path, output: Path) -> dict[str, str]:
    """The environment of every child. Raises `ValueError` if builds would land among the results."""
    found = {name: os.environ.get(name) or str(work / "cache" / folder) for name, folder in CACHES.items()}
    for name, folder in found.items():
        if output.resolve() in (Path(folder).resolve(), *Path(folder).resolve().parents):
            raise ValueError(f"{name}: expected a folder outside of the results in {output}; got {folder}")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return found | {"PYTHONPATH": path}  # the checkout need not be installed, nor be the current folder


def machine(settings: Settings) -> Outcome:
    """Facts of the device, asked in a child."""
    child = gpu_plan.machine(settings)
    (outcome,) = children.run([child], settings.work, settings.cores, time.monotonic() + child.limit)
    return outcome


def found_settings(arguments: argparse.Namespace) -> tuple[Settings, dict]:
    """The settings for this machine, and the facts they come from. Raises `RuntimeError` without a usable GPU."""
    work = work_folder(arguments)
    environment = caches(work, arguments.output)
    if arguments.prebuilt:
        environment[native.PREBUILT] = str(arguments.prebuilt.resolve())
    first = Settings("cuda", (), arguments.cores, work, environment, quick=arguments.quick)
    outcome = machine(first)
    if outcome.problem:
        raise RuntimeError(f"expected a CUDA device that torch can use: {outcome.said}")
    facts = outcome.facts
    capability = tuple(facts["capability"])
    tools = probe.SANITIZERS if probe.sanitizer() else ()
    from vqvit.kernels import devices

    part = precompile.Part(10 * capability[0] + capability[1], devices.config_row(capability), facts["multiprocessors"])
    backends = tuple(facts["backends"])
    return Settings("cuda", backends, arguments.cores, work, environment, False, arguments.quick, tools, part), facts


def run_all(planned: list[Child], settings: Settings, output: Output, seconds: float) -> None:
    """Run children until the time is over; results are written after each, and while they come."""
    start, written, tables = time.monotonic(), [0.0], settings.work / "files"

    def say(name: str, row: dict) -> None:
        print(f"{name}: {' '.join(str(v) for v in row.values() if v != '')}"[:240], flush=True)
        output.note(name, row)
        if time.monotonic() > written[0] + WRITE_SECONDS:
            output.write(tables)
            written[0] = time.monotonic()

    output.write(tables)
    for outcome in children.run(planned, settings.work, settings.cores, start + seconds, say):
        print(f"== {outcome.name}: {len(outcome.rows)} rows, {outcome.seconds:.0f} s. {outcome.said}", flush=True)
        output.add(outcome)
        output.write(tables)


def end_on_signals() -> None:
    """SIGTERM ends this process as an interrupt from the keyboard does: children are killed first."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def sections_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.only:
        return tuple(arguments.only.split(","))
    return CALLS[arguments.call] if arguments.call else SECTIONS


def print_plan(arguments: argparse.Namespace) -> int:
    """For an H100, with both backends, unless a GPU is found later: nothing is asked of a device here."""
    tools = probe.SANITIZERS
    settings = Settings("cuda", ("cuda", "triton"), arguments.cores, work_folder(arguments), {}, tools=tools)
    keys = gpu_plan.counted_keys(min(OPS_SHARES, settings.cores))
    one = arguments.only or arguments.call
    for name, sections in {one: sections_of(arguments)}.items() if one else CALLS.items():
        budget = arguments.budget or BUDGETS.get(name, sum(BUDGETS.values()))
        planned = [gpu_plan.machine(settings), *gpu_plan.children(settings, sections, keys)]
        print(f"{name}, {budget:.0f} s")
        print(gpu_plan.text(planned, settings.cores, budget, keys if "ops" in sections else ()), "\n")
    return 0


def run_gpu(arguments: argparse.Namespace) -> int:
    budget = arguments.budget or (BUDGETS[arguments.call] if arguments.call else sum(BUDGETS.values()))
    start, sections = time.monotonic(), sections_of(arguments)
    try:
        settings, facts = found_settings(arguments)
    except (RuntimeError, ValueError) as error:
        print(f"gpu.py: error: {error}. Without a GPU: --plan, --prebuild FOLDER, --rehearse", file=sys.stderr)
        return STATUS_NO_GPU
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.prebuilt:
        import gpu_prebuild

        print(gpu_prebuild.install(arguments.prebuilt, Path(settings.environment["TRITON_CACHE_DIR"])), flush=True)
    planned = gpu_plan.children(settings, sections)
    left = budget - (time.monotonic() - start)
    optional = frozenset(child.name for child in planned) - set(gpu_plan.within(planned, settings.cores, left))
    print(gpu_plan.text(planned, settings.cores, left, ()), flush=True)
    output = Output(arguments.output, facts, sections, optional)
    return finish(output, planned, settings, left)


def finish(output: Output, planned: list[Child], settings: Settings, seconds: float) -> int:
    """Run, and print the verdicts last, however the run ends. Returns the exit status."""
    end_on_signals()
    interrupted = False
    try:
        run_all(planned, settings, output, seconds)
    except KeyboardInterrupt:
        interrupted = True
        output.write()
    print(f"\nsummary: {output.folder.name}/{SUMMARY}")
    print("\n".join(output.verdicts()))
    if interrupted:
        print("interrupted: what came before is kept")
    sys.stdout.flush()
    return int(interrupted or not output.known or bool(output.wrong()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ROOT / "benchmarks/results")))
    parser.add_argument("--call", choices=tuple(CALLS), help="the sections of one call; all of both without it")
    parser.add_argument("--only", help=f"sections, by comma, of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="480 for correctness, 300 for timings")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="processes side by side")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for caches and logs; a temporary folder otherwise")
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="what --prebuild made")
    parser.add_argument("--plan", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--prebuild", type=Path, metavar="FOLDER", help="compile what a GPU machine can be given")
    parser.add_argument("--key-of", metavar="PYTHON", help="--prebuild: for the Triton of another interpreter")
    parser.add_argument("--rehearse", action="store_true", help="in miniature, on the CPU, with planted faults")
    parser.add_argument("--no-faults", action="store_true", help="--rehearse: plant none")
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",") if arguments.only else ()) - set(SECTIONS):
        parser.error(f"--only: expected sections among {', '.join(SECTIONS)}; got {', '.join(sorted(unknown))}")
    if arguments.cores < 1 or (arguments.budget is not None and arguments.budget <= 0):
        parser.error(f"expected positive --cores and --budget; got {arguments.cores} and {arguments.budget}")
    return arguments


def main() -> int:
    arguments = parsed()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.plan:
        arguments.cores = arguments.cores if "--cores" in sys.argv else 16
        return print_plan(arguments)
    if arguments.prebuild:
        import gpu_prebuild

        return gpu_prebuild.prebuild(arguments.prebuild, work_folder(arguments), arguments.cores, arguments.key_of)
    if arguments.rehearse:
        import gpu_rehearse

        return gpu_rehearse.rehearse(arguments)
    return run_gpu(arguments)


if __name__ == "__main__":
    sys.exit(main())
