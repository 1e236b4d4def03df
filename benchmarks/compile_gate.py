"""Compile every shipped Triton kernel and config for a list of architectures, without a GPU, and say what came out.

    python benchmarks/compile_gate.py --arch 80 86 89 90 --csv benchmarks/results/compile_gate.csv

The launchers run for real on meta tensors; only Triton's last step, the launch, is left out. So what is compiled is
what a GPU would run, with the specialisations of real arguments. A case passes if it has the tensor-core instruction
and the blocks per multiprocessor that its config claims, no stack frame (hence no spilled register), shared memory
within the architecture's limit, and nothing that breaks the numerical contract: approximate division or square root,
flush to zero, implicit fma.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: kernels are compiled here

import triton
from compile_cases import ARCHITECTURES, KIB, MMA_S8, WGMMA_S8, Case, cases
from triton.runtime.jit import JITFunction

from vqvit import precompile
from vqvit.kernels.gemm_s8 import REGISTERS
from vqvit.provenance import append_csv, environment

INEXACT = r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt|rcp\.approx|ex2|lg2|tanh)\S*|\b\w+\.\S*ftz\S*"
"""PTX instructions that round otherwise than the contract says."""

COPIES = {"async_copies": "LDGSTS", "tma_copies": "UTMALDG", "plain_loads": "LDG"}

SASS_LINE = r"^(\.L_\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+);"
"""A label, or the instruction behind an address and a predicate."""

TENSOR_CORE_SASS = r"\bI(?:G?MMA)\b"

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What a kernel compiled to, counted in its SASS as written: an instruction of a loop once, both sides of a branch.

    ctas_per_sm: blocks that registers, shared memory and warps allow at once. async_copies, tma_copies, plain_loads:
    LDGSTS, UTMALDG and LDG. loop_instructions: of the innermost loop around the tensor-core instructions, its main
    loop; epilogue_per_output: what a GEMM has behind that loop, over the outputs that a thread owns (rare paths, such
    as that of a tile with NaN, included). Both are None without such a loop.
    """

    case: str
    arch: int
    kernel: str
    config: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    tensor_core: str
    tensor_core_count: int
    async_copies: int
    tma_copies: int
    plain_loads: int
    instructions: int
    loop_instructions: int | None
    epilogue_per_output: float | None
    seconds: float
    problems: str


def report(case: Case, arch: int) -> list[Report]:
    """Compile what `case` launches for `arch`: one report a kernel."""
    started = time.perf_counter()
    limits = ARCHITECTURES[arch]
    with precompile.compiling_for(precompile.Part(arch, limits.row, limits.sms)) as compiled:
        case.run()
    seconds = time.perf_counter() - started
    first, *others = (_report(case, arch, *launched, seconds / len(compiled)) for launched in compiled)
    problems = filter(None, (first.problems, broken_claims(case, first)))
    return [dataclasses.replace(first, problems="; ".join(problems)), *others]


def broken_claims(case: Case, r: Report) -> str:
    problems = []
    if case.tensor_core and not re.match(case.tensor_core, r.tensor_core):
        problems.append(f"{r.tensor_core or 'no tensor core'} instead of {case.tensor_core}")
    if r.ctas_per_sm < case.ctas:
        problems.append(f"{r.ctas_per_sm} blocks fit a multiprocessor, {case.ctas} claimed")
    return "; ".join(problems)


def _report(case: Case, arch: int, kernel: JITFunction, options: dict, compiled, seconds: float) -> Report:
    ptx, limits = compiled.asm["ptx"], ARCHITECTURES[arch]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        sass = _tool("nvdisasm", "-c", "-ndf", cubin)  # no data flow: the same listing in less time
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    warp_registers = -(-registers // 8) * 8 * 32
    ctas = min(
        REGISTERS // (warp_registers * num_warps),
        (limits.shared_bytes + KIB) // (shared + KIB),  # each block reserves 1 KiB
        limits.max_warps // num_warps,
    )
    instructions = re.findall(f"{WGMMA_S8}|{MMA_S8}", ptx)
    problems = []
    if stack or re.search(r"\b(?:LDL|STL)\b", sass):
        problems.append(f"{stack} bytes of stack")
    if shared > limits.shared_bytes:
        problems.append(f"{shared} bytes of shared memory, {limits.shared_bytes} allowed")
    if inexact := set(re.findall(INEXACT, ptx)):
        problems.append("inexact: " + " ".join(sorted(inexact)))
    if compiled.metadata.enable_fp_fusion:
        problems.append("multiplications and additions may fuse")
    code = instructions_of(sass)
    loop = main_loop(code)
    epilogue = None
    if loop and {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= options.keys():
        outputs = options["BLOCK_M"] * options["BLOCK_N"] / (32 * num_warps)
        epilogue = round((len(code) - loop.stop) / outputs, 1)
    config = " ".join(f"{k}={v}" for k, v in options.items() if k.isupper())
    return Report(
        case=case.name,
        arch=arch,
        kernel=kernel.__name__.strip("_"),
        config=config,
        num_warps=num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        ctas_per_sm=ctas,
        tensor_core=instructions[0] if instructions else "",
        tensor_core_count=len(instructions),
        **{column: sum(name in line.split()[0].split(".") for line in code) for column, name in COPIES.items()},
        instructions=len(code),
        loop_instructions=len(loop) if loop else None,
        epilogue_per_output=epilogue,
        seconds=round(seconds, 2),
        problems="; ".join(problems),
    )


def instructions_of(sass: str) -> list[str]:
    """Opcode and operands of each instruction, without its predicate; the target of a branch as its index, @INDEX."""
    code, labels = [], {}
    for label, text in re.findall(SASS_LINE, sass, re.MULTILINE):
        if label:
            labels[label] = len(code)
        elif not text.startswith("NOP"):
            code.append(text.strip())
    return [re.sub(r"`\((\.L_\w+)\)", lambda m: f"@{labels[m[1]]}", text) for text in code]


def main_loop(code: list[str]) -> range | None:
    """The innermost loop that holds tensor-core instructions: from a label to the branch that jumps back to it."""
    loops = []
    for end, text in enumerate(code):
        target = re.match(r"BRA\b.*@(\d+)", text)
        if target and int(target[1]) < end:
            body = range(int(target[1]), end + 1)
            if any(re.match(TENSOR_CORE_SASS, code[i]) for i in body):
                loops.append(body)
    return min(loops, key=len, default=None)


def _tool(name: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def line(r: Report) -> str:
    return (
        f"sm_{r.arch} {r.case:46} {r.kernel:26} warps {r.num_warps} stages {r.num_stages} registers {r.registers:3}"
        f" shared {r.shared_bytes:6} blocks/sm {r.ctas_per_sm:2} instructions {r.instructions:5}"
        f" loop {r.loop_instructions or '-':>4} epilogue {r.epilogue_per_output or '-':>5}"
        f" copies {r.async_copies}/{r.tma_copies}/{r.plain_loads}"
        f" {r.tensor_core_count:3} x {r.tensor_core or '-'} {r.problems or 'ok'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    facts = environment()
    provenance = {column: facts[column] for column in ("date", "triton", "commit", "command")}
    failed = 0
    for arch in arguments.arch:
        for case in cases(arch):
            for r in report(case, arch) if arguments.only in case.name else ():
                failed += bool(r.problems)
                print(line(r), flush=True)
                if arguments.csv:
                    append_csv(arguments.csv, dataclasses.asdict(r) | provenance)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
