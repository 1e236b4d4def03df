"""Where a figure comes from: machine, versions, commit and command, and the CSV files that keep them beside it."""

import csv
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import vqvit
from vqvit import backends

CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""Instruction sets that decide which kernels run, as Linux spells them."""

PACKAGES = ("torch", "triton", "transformers", "numpy")

PROVENANCE_COLUMNS = (
    "date",
    "device",
    "threads",
    "isa",
    "backend",
    "torch",
    "triton",
    "transformers",
    "commit",
    "command",
)


def environment(device: torch.device | str = "cpu") -> dict:
    """What must be known to repeat a measurement on `device`: JSON-ready, without paths of this machine."""
    device = torch.device(device)
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "isa": cpu_flags(),
        "threads": torch.get_num_threads(),
        "backend": _backend(device),
        "python": platform.python_version(),
        "vqvit": vqvit.__version__,
        **versions,
        "commit": commit(),
        "command": command(),
    }


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """Model of the CPU with its family and model numbers, which tell generations apart where the name does not."""
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def cpu_flags() -> list[str]:
    """Those of `CPU_FLAGS` that this CPU reports; empty where the system does not say."""
    fields = _cpuinfo()
    present = (fields.get("flags") or fields.get("Features") or "").split()
    return [flag for flag in CPU_FLAGS if flag in present]


def commit() -> str | None:
    """Commit of the source checkout this package runs from, with "+" if files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def command() -> str:
    """The command line of this process, with every absolute path cut to its last part."""
    program, *arguments = sys.argv or [""]
    shown = [_without_folder(argument) for argument in arguments]
    return f"{_program(program)} {shlex.join(shown)}".rstrip()


def append_csv(path: str | Path, row: dict) -> None:
    """Append `row` to a CSV file, which is made with a header if need be. Rows are never rewritten.

    Raises `ValueError` if the file has other columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(row)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with open(path, newline="") as file:
            present = next(csv.reader(file))
        if present != columns:
            raise ValueError(f"{path}: expected the columns {present}; got {columns}")
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def provenance_row(device: torch.device | str = "cpu") -> dict:
    """The columns of `PROVENANCE_COLUMNS` for a CSV row."""
    facts = environment(device)
    return {name: " ".join(facts[name]) if name == "isa" else facts[name] for name in PROVENANCE_COLUMNS}


def _backend(device: torch.device) -> str:
    """The backend that ops on `device` run, with the instruction set that the native kernels chose."""
    name = backends.selected(device)
    if name != "cpu":
        return name
    from vqvit.backends import cpu

    return f"cpu, {cpu.isa()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """First processor of Linux's cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    block = path.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        arguments = ["git", "-C", str(root), *arguments]
        done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _program(program: str) -> str:
    path = Path(program)
    if path.name == "__main__.py":
        return f"python -m {path.parent.name}"
    if path.suffix == ".py" and path.parent.name == "vqvit":
        return f"python -m vqvit.{path.stem}"
    return f"python {path.parent.name}/{path.name}" if path.suffix == ".py" else path.name


def _without_folder(argument: str) -> str:
    option, separator, value = argument.partition("=")
    if separator and value.startswith("/"):
        return f"{option}={Path(value).name}"
    return Path(argument).name if argument.startswith("/") else argument
