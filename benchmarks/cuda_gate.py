"""Compile every CUDA C++ kernel of csrc/cuda for a list of architectures, without a GPU, and say what came out.

    python benchmarks/cuda_gate.py --arch 75 80 90a --csv benchmarks/results/cuda_gate.csv

A kernel passes if it has no stack frame (hence no spilled register), tensor-core instructions where its file promises
them, no `wgmma` that the compiler serialises, and nothing that breaks the numerical contract: approximate division or
square root, flush to zero, implicit fma. Needs nvcc; the disassembler is the one that comes with Triton.
"""

import argparse
import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import triton  # noqa: E402  (the checkout need not be installed)

from vqvit import _build  # noqa: E402
from vqvit.provenance import append_csv, environment  # noqa: E402

TENSOR_CORE = r"\b(?:IGMMA\.64x128x32|IMMA\.16832|IMMA\.8816)\S*"
"""SASS of int8 products: wgmma, mma.sync of Ampere, mma.sync of Turing."""

PROMISED = {"75": "IMMA.8816", "80": "IMMA.16832", "90a": "IMMA.16832"}
"""Tensor-core instruction of every kernel that multiplies, by architecture; wgmma kernels promise IGMMA."""

MULTIPLYING = ("gemm_kernel", "attention")

INEXACT = r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt|rcp\.approx|ex2|lg2|tanh)\S*|\b\w+\.\S*ftz\S*"
"""PTX instructions that round otherwise than the contract says."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What a kernel compiled to."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    tensor_core: str
    tensor_core_count: int
    instructions: int
    problems: str


def compiled(source: Path, arch: str) -> Iterator[Report]:
    """One report for each kernel of a file. Raises `vqvit._build.BuildError`."""
    csrc, nvcc = source.parents[1], _build.compiler(_build.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = [*_build.NVCC_FLAGS, f"-I{csrc}", f"-I{source.parent}", '-DVQVIT_SOURCE_HASH="gate"']
        output = [f"-arch=sm_{arch}", "-cubin", "--keep", "--keep-dir", folder, "-Xptxas=-v", "-o", cubin]
        done = subprocess.run([nvcc, *flags, *output, source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise _build.BuildError(f"{source.name} for sm_{arch}:\n{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", cubin), _tool("cuobjdump", "--dump-sass", cubin)
        bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.DOTALL))
        inexact = {name: set(re.findall(INEXACT, body)) for name, body in _entries(ptx.read_text())}
    for name, registers, stack in re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", usage):
        instructions = re.findall(TENSOR_CORE, bodies[name])
        problems = [f"{stack} bytes of stack"] if int(stack) or re.search(r"\b(?:LDL|STL)\b", bodies[name]) else []
        problems += [f"inexact: {' '.join(sorted(inexact[name]))}"] if inexact[name] else []
        problems += ["wgmma is serialised"] if re.search(rf"serialized.*{name}", done.stderr) else []
        kernel = _readable(name)
        if any(part in kernel for part in MULTIPLYING):
            promised = "IGMMA" if "wgmma" in source.name else PROMISED[arch]
            if not instructions or not all(i.startswith(promised) for i in instructions):
                problems.append(f"{' '.join(sorted(set(instructions))) or 'no tensor core'} instead of {promised}")
        yield Report(
            kernel=kernel,
            arch=arch,
            registers=int(registers),
            stack_bytes=int(stack),
            tensor_core=instructions[0] if instructions else "",
            tensor_core_count=len(instructions),
            instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", bodies[name], re.MULTILINE)),
            problems="; ".join(problems),
        )


def sources(arch: str) -> list[Path]:
    """The files of kernels that run on an architecture."""
    found = _build.source_files(ROOT / "csrc", _build.CUDA)
    return [path for path in found if arch == "90a" or "wgmma" not in path.name]


def _entries(ptx: str) -> list[tuple[str, str]]:
    return re.findall(r"\.entry (\w+)\((.*?)(?=\.entry|\Z)", ptx, re.DOTALL)


def _readable(mangled: str) -> str:
    """name<numbers> of a kernel in our namespaces: identifiers are mangled behind their lengths."""
    for length in re.finditer(r"(?<!\d)\d{1,2}(?=[a-z])|(?<=[0-9a-f])\d{2}(?=[a-z])", mangled):
        end = length.end() + int(length[0])
        if mangled[:end].endswith("_kernel"):
            numbers = re.match(r"I((?:L[a-z]\d+E)+)E", mangled[end:])
            values = re.findall(r"\d+", numbers[1]) if numbers else []
            return mangled[length.end() : end] + (f"<{', '.join(values)}>" if values else "")
    return mangled


def _tool(name: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(_build.CUDA_ARCHS), choices=_build.CUDA_ARCHS)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--csv", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    facts = environment()
    provenance = {column: facts[column] for column in ("date", "commit", "command")}
    version = re.search(r"V[\d.]+", _build.compiler_version(_build.CUDA))
    provenance["nvcc"] = version[0] if version else ""
    failed = 0
    for arch in arguments.arch:
        for source in sources(arch):
            for r in compiled(source, arch) if arguments.only in source.name else ():
                failed += bool(r.problems)
                print(
                    f"sm_{r.arch:3} {r.kernel:42} registers {r.registers:3} instructions {r.instructions:5}"
                    f" {r.tensor_core_count:3} x {r.tensor_core or '-'} {r.problems or 'ok'}",
                    flush=True,
                )
                if arguments.csv:
                    append_csv(arguments.csv, dataclasses.asdict(r) | provenance)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
