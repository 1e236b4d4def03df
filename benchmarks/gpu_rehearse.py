"""gpu.py --rehearse: every section in miniature on the CPU, with processes that die in every way, and what must be left
then.

The `cuda` backend is the CUDA library's twin, `triton` runs in its interpreter. A fault is planted at an item of a
child: `python benchmarks/gpu_rehearse.py '{"fault": "hang", "item": ...}' COMMAND ...` runs COMMAND until it says that
the item comes next.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from vqvit.children import ROWS, Child, Outcome, Reporter  # noqa: E402  (the checkout need not be installed)

TWIN = {"VQVIT_CUDA_TWIN": "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
BACKENDS = ("cuda", "triton", "cpu")
SECTIONS = ("build", "probe", "bits", "logits", "ops", "models", "kernels", "tune", "guard", "timeline")
SECONDS = 600.0

# ---- faults ---------------------------------------------------------------------------------------------------------


def hang() -> None:
    """In C, with the interpreter's lock held and every signal blocked: what a kernel that never ends looks like."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(100_000)


def abort() -> None:
    ctypes.CDLL(None).abort()


def killed() -> None:
    """As by a system that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def silent_exit() -> None:
    os._exit(0)


def bad_exit() -> None:
    os._exit(7)


def half_line() -> None:
    with open(os.environ[ROWS], "ab", buffering=0) as file:
        file.write(b'{"row": {"op": "int8_li')
    killed()


def poisoned() -> None:
    """Every later call of a kernel fails, as does asking for the device: what an illegal access leaves behind."""
    from vqvit import backends, device_checks

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    backends.function = lambda op, device: fail
    device_checks.synchronize = fail


def wrong() -> None:
    """Kernels add one to their first result from here on."""
    from vqvit import backends

    right = backends.function

    def function(op: str, device: object) -> Callable:
        def off_by_one(*arguments: object, **options: object) -> object:
            result = right(op, device)(*arguments, **options)
            return (result[0] + 1, *result[1:]) if isinstance(result, tuple) else result + 1

        return off_by_one

    backends.function = function


FAULTS = {f.__name__: f for f in (hang, abort, killed, silent_exit, bad_exit, half_line, poisoned, wrong)}


@dataclass(frozen=True)
class Planted:
    """A fault of a child; said: what its outcome must say; restarted: whether rows behind the item must arrive."""

    fault: str
    item: str
    said: str
    restarted: bool = True


PLANTED = {
    "ops/cuda": Planted("hang", "int8_linear odd", "killed, silent for"),
    "ops/triton": Planted("abort", "int8_linear odd", "SIGABRT"),
    "ops/cpu": Planted("poisoned", "int8_linear odd", "the device was lost"),
    "bits/all": Planted("half_line", "int8_linear_qkv heads on cuda, M = 17", "a half-written last line was dropped"),
    "logits/triton": Planted("killed", "logits on triton", "SIGKILL", restarted=False),
    "timeline/cpu": Planted("silent_exit", "vqvit eager on cpu, batch 1", "never came to its end", restarted=False),
    "models/tiny-1": Planted("bad_exit", "vqvit groups on cuda, tiny, batch 1", "exit status 7"),
}


def plant(child: Child, planted: Planted) -> Child:
    """The child with a fault in it. A hang is noticed soon."""
    python, *command = child.command
    fault = json.dumps({"fault": planted.fault, "item": planted.item})
    silence = 20.0 if planted.fault == "hang" else child.silence
    return dataclasses.replace(child, command=(python, __file__, fault, *command), silence=silence)


def run_planted(fault: str, item: str, command: list[str]) -> None:
    """`python COMMAND`, with a fault when it says that `item` comes next."""
    original = Reporter.doing

    def doing(self: Reporter, what: str, **options: bool) -> None:
        original(self, what, **options)
        if what == item:
            FAULTS[fault]()

    Reporter.doing = doing
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


# ---- the rehearsal --------------------------------------------------------------------------------------------------


def judged(outcome: Outcome, planted: Planted | None) -> str:
    """What is wrong with how a child ended, given the fault planted in it, or ""."""
    bad = [row for row in outcome.rows if str(row.get("wrong", 0)) not in ("0", "")]
    if planted is None:
        problem = outcome.said or (f"{len(bad)} wrong rows" if bad else "" if outcome.rows else "no rows")
        return f"{outcome.name}: nothing was planted, and yet: {problem}" if problem else ""
    if planted.said not in outcome.said or planted.item not in outcome.deaths:
        return f"{outcome.name}: expected {planted.said!r} at {planted.item}; got {outcome.said!r} at {outcome.deaths}"
    if planted.restarted and (outcome.problem or not outcome.rows):
        return f"{outcome.name}: expected it to go on behind {planted.item}; {outcome.said}"
    return ""


def rehearse(arguments: argparse.Namespace) -> int:
    """Run it all. Exit status 0 if every fault cost its own item alone and everything else is right."""
    import gpu
    import gpu_plan
    from gpu_output import Output

    with tempfile.TemporaryDirectory(prefix="vqvit-rehearsal-") as folder:
        work = arguments.work or Path(folder)
        environment = {**gpu.caches(work, arguments.output), **TWIN, "VQVIT_CACHE": os.environ.get("VQVIT_CACHE", "")}
        settings = gpu_plan.Settings("cpu", BACKENDS, arguments.cores, work, environment, tiny=True)
        outcome = gpu.machine(dataclasses.replace(settings, backends=()))
        if outcome.problem:
            print(f"gpu.py: error: {outcome.said}\n{outcome.log}", file=sys.stderr)
            return 1
        sections = tuple(arguments.only.split(",")) if arguments.only else SECTIONS
        planned = gpu_plan.children(settings, sections)
        planted = {} if arguments.no_faults else {c.name: PLANTED[c.name] for c in planned if c.name in PLANTED}
        planned = [plant(c, planted[c.name]) if c.name in planted else c for c in planned]
        output = Output(arguments.output, outcome.facts, sections)
        gpu.finish(output, planned, settings, arguments.budget or SECONDS)
        return report(output.outcomes, planted)


def report(outcomes: list[Outcome], planted: dict[str, Planted]) -> int:
    """A line for each fault, and the verdict on the rehearsal, which is not that on the rows. Returns the exit
    status.
    """
    problems = [problem for o in outcomes if (problem := judged(o, planted.get(o.name)))]
    for outcome in outcomes:
        if outcome.name in planted:
            fault = planted[outcome.name]
            print(f"planted {fault.fault} in {outcome.name}: {len(outcome.rows)} rows arrived. {outcome.said}"[:240])
    print("\n".join(problems))
    rows = sum(len(o.rows) for o in outcomes)
    verdict = "FAILED" if problems else "passed"
    print(f"REHEARSAL {verdict}: {len(planted)} faults, {rows} rows of {len(outcomes)} processes arrived")
    return int(bool(problems))


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    run_planted(spec["fault"], spec["item"], sys.argv[2:])
