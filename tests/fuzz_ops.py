"""Fuzzes the ops: random arguments of every op, the CPU's kernels against the reference bit for bit.

    python tests/fuzz_ops.py --cases 100000 --seed 1 [--sanitize]

Shapes are odd, empty, one, and around the sizes of tiles; values hold NaN, infinities, denormals, zeros of both signs;
views are strided, overlapping and unaligned to tiles; some arguments are wrong, and then refused. Equal means the same
bits, the sign of zero included, and NaN for NaN. `--sanitize`: kernels with address and undefined-behaviour sanitizers.
A finding is printed with its case; `--first N --cases 1` runs that one again.
"""

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from bits import same_bits
from fuzz_arguments import arguments_of
from fuzz_children import run_children, try_cases
from torch import Tensor

import vqvit
from vqvit import native, reference
from vqvit.backends import cpu

ACCEPTED = (TypeError, ValueError)
"""What an op raises for wrong arguments; PyTorch's dispatcher raises RuntimeError for those of a wrong kind."""


def run_case(seed: int, index: int) -> str:
    """ "equal" or "refused". Raises `AssertionError` for other bits, and passes on what an op may not raise."""
    op, arguments, isa, threads, is_wrong = arguments_of(seed, index)
    cpu.set_isa(isa)
    torch.set_num_threads(threads)
    try:
        received = getattr(torch.ops.vqvit, op)(*arguments)
    except RuntimeError:
        if not is_wrong:
            raise
        return "refused"
    except ACCEPTED:
        return "refused"
    expected = getattr(reference, op)(*arguments)
    pairs = list(zip(*(r if isinstance(r, tuple | list) else (r,) for r in (received, expected)), strict=True))
    for output, (got, want) in enumerate(pairs):
        assert got.shape == want.shape and got.dtype == want.dtype, f"{op}, {isa}: output {output}: {got.shape}"
        equal = same_bits(got, want)
        if not bool(equal.all()):
            place = tuple((~equal).nonzero()[0].tolist())
            shown = ", ".join(_shown(argument) for argument in arguments)
            raise AssertionError(
                f"{op}, {isa}, {threads} threads: output {output}: {int((~equal).sum())} of {equal.numel()} differ, "
                f"at {place}: {got[place].item()!r}, expected {want[place].item()!r}; of {shown}"
            )
    return "equal"


def _shown(argument: object) -> str:
    if not isinstance(argument, Tensor):
        return repr(argument)
    return f"{str(argument.dtype).removeprefix('torch.')}{tuple(argument.shape)}/{argument.stride()}"


def prepare() -> None:
    warnings.simplefilter("ignore")
    vqvit.backend("cpu")
    native.cpu().vqvit_cpu_limit_threads(64)  # a machine of one core runs several threads too


def child(arguments: argparse.Namespace) -> None:
    if arguments.sanitize:
        from sanitize import use_sanitized

        use_sanitized()
    prepare()
    indices = range(arguments.first, arguments.first + arguments.cases)
    try_cases(indices, arguments.log, lambda index: run_case(arguments.seed, index))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.child:
        child(arguments)
        return 0
    if arguments.sanitize:
        from sanitize import READY, with_runtimes

        if os.environ.get(READY) != "1":
            return with_runtimes()
    start = time.perf_counter()
    command = [__file__, "--seed", arguments.seed, *(["--sanitize"] if arguments.sanitize else [])]
    with tempfile.TemporaryDirectory() as temporary:
        counts, findings = run_children(command, arguments.first, arguments.cases, Path(temporary) / "log")
    outcomes: Counter = counts
    seconds = time.perf_counter() - start
    shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"ops: {arguments.cases} cases in {seconds:.0f} s: {shown}; {len(findings)} findings", flush=True)
    for finding in findings:
        print(f"\nops case {finding['finding']}: {finding['outcome']}\n{finding['text']}", flush=True)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
