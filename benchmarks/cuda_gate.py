"""Compile every CUDA C++ kernel of csrc/cuda for a list of architectures, without a GPU, and say what came out.

    python benchmarks/cuda_gate.py --arch 75 80 90a --csv benchmarks/results/cuda_gate.csv

A kernel passes if it has launch bounds whose registers fit a multiprocessor, no stack frame (hence no spilled
register), tensor-core instructions and wide loads and stores where its file promises them, no integer division in its
inner loops, no remark of ptxas about performance (`wgmma` serialised, `setmaxnreg` ignored), and nothing that breaks
the numerical contract: approximate division or square root, flush to zero, implicit fma. Needs nvcc; the disassembler
is the one that comes with Triton.
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

import sass  # noqa: E402  (the checkout need not be installed)
import triton  # noqa: E402

from vqvit import _build  # noqa: E402
from vqvit.provenance import append_csv, environment  # noqa: E402

PRODUCT = r"I(?:GMMA\.64x128x32|MMA\.16832|MMA\.8816)"
"""SASS of int8 products: wgmma, mma.sync of Ampere, mma.sync of Turing."""

STORE = "STG"

PROMISED = {"75": "IMMA.8816", "80": "IMMA.16832", "90a": "IMMA.16832"}
"""Tensor-core instruction of every kernel that multiplies, by architecture; wgmma kernels promise IGMMA."""

MULTIPLYING = ("gemm_kernel", "attention")

REGISTERS = 65536
"""Of a multiprocessor, on every architecture here."""

INEXACT = r"\b(?:div\.full|div\.approx|sqrt\.approx|rsqrt|rcp\.approx|ex2|lg2|tanh)\S*|\b\w+\.\S*ftz\S*"
"""PTX instructions that round otherwise than the contract says."""

REMARK = r"^ptxas.*?(?:\((C75\d\d)\)|(Potential Performance Loss)|(?:, line \d+; )?warning *:)(.*)$"
"""What nvcc prints: `setmaxnreg` ignored (C7508), `wgmma` serialised (C7510 to C7514), waits put in (C7517, C7519),
launch bounds out of range."""

WIDE = (
    # kernel, architecture, instruction, the innermost loops that hold it (by an instruction in them; anywhere: None)
    ("gemm_kernel", "75", r"LDG\.E\.128", "IMMA"),
    ("gemm_kernel", "80|90a", r"LDGSTS\.E\.BYPASS\.128", "IMMA"),
    ("gemm_kernel", ".*", r"LDSM\.16\.M88\.4", "IMMA"),
    ("attention", "75", r"LDG\.E\.128", None),
    ("attention", "80|90a", r"LDGSTS\.E\.BYPASS\.128", None),
    ("attention", ".*", r"LDSM\.16\.M88\.4", None),
    ("attention", ".*", r"LDSM\.16\.MT88\.4", None),
    ("wgmma_kernel", "90a", r"UTMALDG\.2D", None),
    (r"wgmma_kernel<\d, \d(, [014], [01])?>$", "90a", r"STG\.E\.128", STORE),
    (r"^gemm_kernel<\d, \d+, \d, \d, \d(, [014], [01])?>$", ".*", r"STG\.E\.128", STORE),
    (r"grouped_gemm_kernel<\d+, \d, \d, \d(, [014], [01])?>$", ".*", r"STG\.E\.128", STORE),
    (r"(layernorm|quantize)_kernel<\d, 1, \w+>|quantize_groups|quantize_residual", ".*", r"LDG\.E\.128", None),
    (r"layernorm_kernel<\d, 1, Normalized>", ".*", r"STG\.E\.128", None),
    (r"quantize_values_kernel<1>", ".*", r"LDG\.E\.128", None),
)
"""Wide copies, loads and stores that the files claim for their main path. GEMMs that store fp32: kinds 0, 1 and 4 of
`Store` in csrc/cuda/gemm_s8.h, with activation 0 or 1, which have a loop for whole tiles."""

LANE_OUTPUTS = (
    (r"wgmma_kernel", 16),
    (r"^gemm_kernel<\d, (\d+)", None),
    (r"grouped_gemm_kernel<(\d+)", None),
    (r"compensated_gemm_kernel", 8),
)
"""Outputs of a lane in one iteration of a GEMM's loop over the rows of whole tiles: eight lanes hold a row of 8 · NJ
columns (csrc/cuda/gemm_s8.h). NJ is a parameter in the kernel's name where there is no number."""

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What a kernel compiled to. Loops are innermost ones; their instructions are counted as written, both sides of a
    branch.

    threads, blocks: launch bounds. mma_loop, mma_loop_products: instructions of the loop with most tensor-core
    instructions, and how many these are. store_loop_min, store_loop_max: instructions of the shortest and longest loop
    that stores to global memory; store_loops: each of them with the widths of its stores in bytes. per_output_min and
    per_output_max: instructions an output of the loops of a GEMM's epilogue for whole tiles (`is_whole`). What such a
    kernel stores and computes are the last numbers of its name (`Store` in csrc/cuda/gemm_s8.h and vqvit_activation in
    csrc/vqvit.h).
    """

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    tensor_core: str
    tensor_core_count: int
    instructions: int
    code_bytes: int
    threads: int | None
    blocks: int | None
    mma_loop: int | None
    mma_loop_products: int | None
    store_loop_min: int | None
    store_loop_max: int | None
    store_loops: str
    per_output_min: float | None
    per_output_max: float | None
    problems: str


@dataclass(frozen=True)
class Compiled:
    """A kernel as its checks read it. ptx: from its .entry on; remarks: lines of ptxas about it."""

    name: str
    arch: str
    registers: int
    stack_bytes: int
    ptx: str
    machine: sass.Kernel
    remarks: tuple[str, ...]
    promised: str | None

    @property
    def bounds(self) -> tuple[int | None, int | None]:
        """Threads and least blocks a multiprocessor of __launch_bounds__."""
        directives = self.ptx.split("{", 1)[0]
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        if threads is None:
            return None, None
        x, y, z = (int(size or 1) for size in threads.groups())
        return x * y * z, int(blocks[1]) if blocks else 1


def compiled(source: Path, arch: str) -> Iterator[Report]:
    """One report for each kernel of a file. Raises `vqvit._build.BuildError`."""
    for kernel in compile_kernels(source, arch):
        yield report(kernel)


def compile_kernels(source: Path, arch: str) -> list[Compiled]:
    """The kernels of a file. Raises `vqvit._build.BuildError`."""
    csrc, nvcc = source.parents[1], _build.compiler(_build.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = [*_build.NVCC_FLAGS, f"-I{csrc}", f"-I{source.parent}", '-DVQVIT_SOURCE_HASH="gate"']
        output = [f"-arch=sm_{arch}", "-cubin", "--keep", "--keep-dir", folder, "-Xptxas=-v", "-o", cubin]
        done = subprocess.run([nvcc, *flags, *output, source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise _build.BuildError(f"{source.name} for sm_{arch}:\n{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        machine = {kernel.name: kernel for kernel in sass.kernels(_tool("nvdisasm", "-ndf", cubin))}
        entries = dict(re.findall(r"\.entry (\w+)(\(.*?)(?=\.entry|\Z)", ptx.read_text(), re.DOTALL))
    return [
        Compiled(
            name=name,
            arch=arch,
            registers=int(registers),
            stack_bytes=int(stack),
            ptx=entries[name],
            machine=machine[name],
            remarks=remarks(done.stderr, name, entries),
            promised=_promised(source, name, arch),
        )
        for name, registers, stack in re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", usage)
        if name in entries
    ]


def report(k: Compiled) -> Report:
    kernel, products = readable(k.name), [i.opcode for i in k.machine.code if re.match(PRODUCT, i.opcode)]
    stores = k.machine.innermost(STORE)
    lengths = [k.machine.length(loop) for loop in stores]
    widths = [store_widths(k.machine, loop) for loop in stores]
    main_loop = max(k.machine.innermost(PRODUCT), key=lambda loop: k.machine.count(PRODUCT, loop.body), default=None)
    outputs = lane_outputs(kernel)
    whole = [k.machine.length(loop) / outputs for loop in stores if outputs and is_whole(k.machine, loop, outputs)]
    threads, blocks = k.bounds
    return Report(
        kernel=kernel,
        arch=k.arch,
        registers=k.registers,
        stack_bytes=k.stack_bytes,
        tensor_core=products[0] if products else "",
        tensor_core_count=len(products),
        instructions=len(k.machine.code),
        code_bytes=16 * len(k.machine.code),
        threads=threads,
        blocks=blocks,
        mma_loop=k.machine.length(main_loop) if main_loop else None,
        mma_loop_products=k.machine.count(PRODUCT, main_loop.body) if main_loop else None,
        store_loop_min=min(lengths, default=None),
        store_loop_max=max(lengths, default=None),
        store_loops=", ".join(f"{n} ({'/'.join(map(str, w))})" for n, w in zip(lengths, widths, strict=True)),
        per_output_min=round(min(whole), 1) if whole else None,
        per_output_max=round(max(whole), 1) if whole else None,
        problems="; ".join(problems(k)),
    )


# ---- checks ---------------------------------------------------------------------------------------------------------


def problems(k: Compiled) -> list[str]:
    """What is wrong with a kernel, a sentence each."""
    found = [f"{k.stack_bytes} bytes of stack"] if k.stack_bytes or k.machine.count("LDL|STL") else []
    if inexact := set(re.findall(INEXACT, k.ptx)):
        found.append(f"inexact: {' '.join(sorted(inexact))}")
    found += k.remarks
    found += register_problems(k.registers, *k.bounds)
    found += [f"{n} integer divisions in a loop of {length} instructions" for n, length in dividing_loops(k.machine)]
    asked, kept = len(re.findall(r"\bsetmaxnreg\b", k.ptx)), k.machine.count("USETMAXREG")
    if asked and not kept:
        found.append(f"{asked} setmaxnreg in the PTX, none in the SASS")
    multiplying = {i.opcode for i in k.machine.code if re.match(PRODUCT, i.opcode)}
    if k.promised and (not multiplying or not all(opcode.startswith(k.promised) for opcode in multiplying)):
        found.append(f"{' '.join(sorted(multiplying)) or 'no tensor core'} instead of {k.promised}")
    return found + missing_wide(k.machine, readable(k.name), k.arch)


def dividing_loops(machine: sass.Kernel) -> list[tuple[int, int]]:
    """(divisions, instructions) of innermost loops that multiply or store, where they divide integers. A division
    outside of them, as one a tile, is no problem."""
    loops = machine.innermost(f"{PRODUCT}|{STORE}")
    return [(machine.divisions(loop), machine.length(loop)) for loop in loops if machine.divisions(loop)]


def register_problems(registers: int, threads: int | None, blocks: int | None) -> list[str]:
    """Whether the blocks of the launch bounds have registers on one multiprocessor: 8 at a time to a thread."""
    if threads is None or blocks is None:
        return ["no launch bounds"]
    wanted = -(-registers // 8) * 8 * -(-threads // 32) * 32 * blocks
    if wanted <= REGISTERS:
        return []
    return [f"{blocks} blocks of {threads} threads want {wanted} registers, {REGISTERS} are there"]


def missing_wide(machine: sass.Kernel, kernel: str, arch: str) -> list[str]:
    """Instructions of `WIDE` that a kernel lacks."""
    found = []
    for name, archs, opcode, beside in WIDE:
        if not re.search(name, kernel) or not re.fullmatch(archs, arch):
            continue
        loops = [None] if beside is None else [loop.body for loop in machine.innermost(beside)]
        if not any(machine.count(opcode, body) for body in loops):
            plain, where = opcode.replace("\\", ""), "" if beside is None else f" in a loop with {beside}"
            found.append(f"no {plain}{where}")
    return found


def remarks(log: str, name: str, entries: dict[str, str]) -> tuple[str, ...]:
    """Warnings and remarks of ptxas that name a kernel; those that name none concern every kernel of the file, or, if
    they are about setmaxnreg, those that use it."""
    found = []
    for match in re.finditer(REMARK, log, re.MULTILINE):
        text = match[0]
        named = [entry for entry in entries if re.search(rf"\b{entry}\b", text)]
        unconcerned = "setmaxnreg" in text and "setmaxnreg" not in entries[name]
        if (named and name not in named) or (not named and unconcerned):
            continue
        where = rf" *(?:in|for)? *(?:the )?(?:function|entry) *'?{name}'?| in around line \d+"
        said = re.sub(where, "", (match[2] or "") + match[3]).strip(" :.")
        line = f"{match[1] or 'ptxas'}: {said}"
        if line not in found:
            found.append(line)
    return tuple(found)


# ---- reading --------------------------------------------------------------------------------------------------------


def store_widths(machine: sass.Kernel, loop: sass.Loop) -> list[int]:
    """Different widths of a loop's stores to global memory, in bytes."""
    names = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    stores = (machine.code[i].opcode.split(".") for i in loop.body if machine.code[i].opcode.startswith(STORE))
    return sorted({next((names[part] for part in parts if part in names), 4) for parts in stores})


def is_whole(machine: sass.Kernel, loop: sass.Loop, outputs: int) -> bool:
    """Whether a loop of a GEMM's epilogue is one for whole tiles: its stores have one width, and it reads accumulators
    of that many outputs from shared memory, four at a time."""
    return len(store_widths(machine, loop)) == 1 and machine.count(r"LDS\.(U\.)?128", loop.body) >= outputs // 4


def lane_outputs(kernel: str) -> int | None:
    """Entry of `LANE_OUTPUTS`."""
    for pattern, outputs in LANE_OUTPUTS:
        if match := re.search(pattern, kernel):
            return outputs or int(match[1])
    return None


def sources(arch: str) -> list[Path]:
    """The files of kernels that run on an architecture."""
    found = _build.source_files(ROOT / "csrc", _build.CUDA)
    return [path for path in found if arch == "90a" or "wgmma" not in path.name]


def readable(mangled: str) -> str:
    """name<numbers and types> of a kernel: identifiers are mangled behind their lengths."""
    for length in re.finditer(r"(?<!\d)\d{1,2}(?=[a-z])|(?<=[0-9a-f])\d{2}(?=[a-z])", mangled):
        end = length.end() + int(length[0])
        if mangled[:end].endswith("_kernel"):
            arguments = _template_arguments(mangled[end:])
            return mangled[length.end() : end] + (f"<{', '.join(arguments)}>" if arguments else "")
    return mangled


def _template_arguments(mangled: str) -> list[str]:
    """Numbers, and types of a namespace of ours, behind a name: I Li3E Lb1E NS0_5CodesE E."""
    found, rest = [], mangled[1:] if mangled.startswith("I") else "E"
    while not rest.startswith("E"):
        if number := re.match(r"L[a-z](\d+)E", rest):
            found.append(number[1])
            rest = rest[number.end() :]
        elif nested := re.match(r"NS\d*_(\d+)", rest):
            end = nested.end() + int(nested[1])
            found.append(rest[nested.end() : end])
            rest = rest[end + 1 :]
        else:
            break
    return found


def _promised(source: Path, name: str, arch: str) -> str | None:
    if not any(part in readable(name) for part in MULTIPLYING) and "wgmma_kernel" not in name:
        return None
    return "IGMMA" if "wgmma" in source.name else PROMISED[arch]


def _tool(name: str, *arguments: object) -> str:
    done = subprocess.run([TOOLS / name, *map(str, arguments)], check=True, capture_output=True, text=True)
    return done.stdout


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
                print(line(r), flush=True)
                if arguments.csv:
                    append_csv(arguments.csv, dataclasses.asdict(r) | provenance)
    return 1 if failed else 0


def line(r: Report) -> str:
    loops = f"main loop {r.mma_loop or '-':>4} stores {r.store_loops or '-'}"
    return (
        f"sm_{r.arch:3} {r.kernel:42} registers {r.registers:3} instructions {r.instructions:5} {loops}"
        f" {r.tensor_core_count:3} x {r.tensor_core or '-'} {r.problems or 'ok'}"
    )


if __name__ == "__main__":
    sys.exit(main())
