"""Section `ops` of gpu.py: every op case of tests/op_cases.py on a backend, against the reference on the CPU.

The reference computes once, in a process of its own, and stores its results; the cases are dealt out to several
processes, as most of their time is compilation.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_timing import DeviceLostError, Run
from op_cases import CASES
from torch import Tensor

from vqvit import precompile, reference
from vqvit.device_checks import as_tuple, call, device_lost, differing, short, synchronize

EXPECTED = "expected.pt"

LAYOUT_OPS = ("pack_weight", "unpack_weight")
"""Of CPUs alone: one implementation, which launches nothing."""


def items(quick: bool = False) -> list[tuple[str, str]]:
    """(op, case) of every case, those that share compilations side by side; a few of each op if `quick`."""
    return [
        (op, case)
        for op, cases in CASES.items()
        if op not in LAYOUT_OPS
        for case in list(cases)[: 2 if quick else None]
    ]


def share_of(index: int, count: int, quick: bool = False) -> list[tuple[str, str]]:
    return items(quick)[index::count]


def arguments_of(op: str, case: str) -> tuple:
    torch.manual_seed(0)
    return CASES[op][case]()


def expected(folder: Path, run: Run) -> Iterator[dict]:
    """What the reference computes for every case, stored in `folder` whole or not at all."""
    results = {}
    for op, case in items(run.quick):
        run.reporter.doing(f"{op} {case}")
        results[f"{op} {case}"] = as_tuple(getattr(reference, op)(*arguments_of(op, case)))
    whole = folder / f"{EXPECTED}.part"
    torch.save(results, whole)
    whole.replace(folder / EXPECTED)
    yield {"backend": "reference", "op": "all", "case": f"{len(results)} cases", "wrong": 0, "note": "stored"}


def placed(run: Run, argument: object) -> object:
    return argument.to(run.device) if isinstance(argument, Tensor) else argument


def ops(folder: Path, run: Run, index: int, count: int) -> Iterator[dict]:
    """A row for each case of a share."""
    backend = run.backends[0]
    results = torch.load(folder / EXPECTED, weights_only=True)
    for op, case in share_of(index, count, run.quick):
        if not run.reporter.begin(f"{op} {case}"):
            continue
        note, want = "", results[f"{op} {case}"]
        try:
            got = call(op, backend, tuple(placed(run, a) for a in arguments_of(op, case)), {})
            wrong = sum(differing(g.cpu(), w) for g, w in zip(got, want, strict=True))
            synchronize(run.device)
        except Exception as error:  # a kernel may fail in any way: the row says how
            wrong, note = 1, short(error)
        yield {"backend": backend, "op": op, "case": case, "wrong": wrong, "note": note}
        if note and device_lost(run.device):
            raise DeviceLostError(note)


def compilations() -> list[precompile.Job]:
    """What the cases compile on the `triton` backend."""
    return [precompile.Job.of(op, arguments_of(op, case)) for op, case in items()]
