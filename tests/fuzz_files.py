"""Fuzzes what reads files: mutated exported folders and checkpoints are loaded, and run once where they are accepted.

    python tests/fuzz_files.py --cases 10000 --seed 1 [--kind exported|checkpoint] [--sanitize]

Allowed are the documented errors, and no other: a crash, a hang, or another exception is a finding, with its seed.
Cases run in child processes, so that a crash costs one of them; findings are kept in `tests/fuzz_corpus`, which
`tests/test_fuzz.py` replays. `--sanitize`: on kernels with address and undefined-behaviour sanitizers.
"""

import argparse
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_mutations import Folder, mutated

CORPUS = Path(__file__).with_name("fuzz_corpus")
MANIFESTS = {"exported": "program.json", "checkpoint": "vqvit.json"}
CASES_OF_A_CHILD = 2000
SECONDS_OF_A_CASE = 60
MEMORY = 6 << 30  # bytes a child may have
MOST_PIXELS = 1 << 20  # of an input that is run
MOST_KEPT = 40_000  # bytes of a corpus entry

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 72,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 5,
}

CONFIGURATIONS = {
    "default": {},
    "grouped": {"activations": {"attn_out": "per_token_group", "fc2": "per_token_group"}},
    "static": {"activation": "static"},
    "float_attention": {"attention": "float"},
    "asymmetric_weights": {"tiers": {"fc1": "int8_asym"}},
    "float_head": {"tiers": {"head": "skip"}},
    "four_bits": {"bits": 4},
    "asymmetric_activations": {"activation": "per_token_asym"},
    "groups_behind_layer_norms": {"activation": "per_token_group"},
    "compensated": {"compensations": {"*": "paper", "*.fc2": "full", "head": "activation", "*.attn_out": "weight"}},
}


def build_bases(folder: Path) -> None:
    """What is mutated: `folder`/exported/<name> and `folder`/checkpoint/<name>."""
    import torch
    import transformers

    import vqvit

    torch.manual_seed(0)
    torch.set_num_threads(1)
    models = {name: (transformers.ViTForImageClassification, transformers.ViTConfig(**SIZES), options)
              for name, options in CONFIGURATIONS.items()}  # fmt: skip
    models["two_blocks"] = (
        transformers.ViTModel, transformers.ViTConfig(**{**SIZES, "num_hidden_layers": 2}), {"cls_only": "off"}
    )  # fmt: skip
    deit, dinov2 = transformers.DeiTForImageClassificationWithTeacher, transformers.Dinov2ForImageClassification
    models["deit"] = (deit, transformers.DeiTConfig(**SIZES), {})
    models["dinov2"] = (dinov2, transformers.Dinov2Config(**{**SIZES, "mlp_ratio": 2}), {})
    for name, (kind, config, options) in models.items():
        model = kind(config).eval()
        calibration = [torch.randn(8, 3, 16, 16)] if options.get("activation") == "static" else None
        vqvit.quantize_(model, vqvit.QuantConfig(**options), calibration=calibration)
        vqvit.save(model, folder / "checkpoint" / name)
        vqvit.export(model, folder / "exported" / name)


def read_folder(path: Path) -> Folder:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def write_folder(path: Path, content: Folder) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (path / name).write_bytes(data)


def case(bases: dict[str, dict[str, Folder]], kind: str, seed: int, index: int) -> tuple[str, Folder]:
    """The name of the base and the mutated folder of a case."""
    r = random.Random(f"{kind} {seed} {index}")
    name = r.choice(sorted(bases[kind]))
    return name, mutated(r, bases[kind][name], MANIFESTS[kind])


def run_exported(folder: Path) -> str:
    """What became of it: "refused" or "ran"; any other exception than the documented ones passes on."""
    import numpy as np

    from vqvit.serving import ProgramError, Session

    try:
        session = Session(folder, 1)
    except (ProgramError, FileNotFoundError):
        return "refused"
    shapes = [(2, *description.shape[1:]) for description in session.inputs]
    if sum(int(np.prod(shape)) for shape in shapes) > MOST_PIXELS:
        return "large"
    r = np.random.default_rng(0)
    try:
        session(*(r.standard_normal(shape, np.float32) for shape in shapes))
    except MemoryError:
        return "memory"
    return "ran"


def run_checkpoint(folder: Path) -> str:
    """As `run_exported`. What an accepted model raises at its call is transformers' own: of return_dict = false, say."""
    import torch

    import vqvit
    from vqvit.hf import ArchitectureError

    try:
        model = vqvit.load(folder)
    except (vqvit.CheckpointError, vqvit.PlanError, ArchitectureError, FileNotFoundError):
        return "refused"
    with torch.inference_mode():
        try:
            model(torch.zeros(1, 3, 16, 16))
        except Exception:
            return "raised"
    return "ran"


RUN = {"exported": run_exported, "checkpoint": run_checkpoint}


class Hang(BaseException):
    """A case that took longer than `SECONDS_OF_A_CASE`."""


def _hang(*_: object) -> None:
    raise Hang


def try_case(kind: str, folder: Path) -> tuple[str, str]:
    """What became of it, and for "wrong" and "hang" the traceback."""
    signal.alarm(SECONDS_OF_A_CASE)
    try:
        return RUN[kind](folder), ""
    except Hang:
        return "hang", traceback.format_exc()
    except Exception:
        return "wrong", traceback.format_exc()
    finally:
        signal.alarm(0)


def child(arguments: argparse.Namespace) -> None:
    """Cases `first` to `first` + `cases`; the index of each is written down before it is tried."""
    import faulthandler

    faulthandler.enable()
    signal.signal(signal.SIGALRM, _hang)
    warnings.simplefilter("ignore")
    if arguments.sanitize:
        from sanitize import use_sanitized

        use_sanitized()
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    kind = arguments.kind
    if kind == "checkpoint":
        import torch

        torch.set_num_threads(1)
        import logging

        logging.disable(logging.CRITICAL)
    bases = {kind: {path.name: read_folder(path) for path in (arguments.bases / kind).iterdir()}}
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary, open(arguments.log, "ab", buffering=0) as log:
        for index in range(arguments.first, arguments.first + arguments.cases):
            log.write(f"{json.dumps({'at': index})}\n".encode())
            _, content = case(bases, kind, arguments.seed, index)
            folder = Path(temporary)
            for old in folder.iterdir():
                old.unlink()
            write_folder(folder, content)
            outcome, text = try_case(kind, folder)
            counts[outcome] += 1
            if text:
                log.write(f"{json.dumps({'finding': index, 'outcome': outcome, 'text': text[-3000:]})}\n".encode())
        log.write(f"{json.dumps({'counts': counts})}\n".encode())


def run_children(arguments: argparse.Namespace, kind: str, bases: Path) -> tuple[Counter, list[dict]]:
    """Outcomes by name, and the findings."""
    counts: Counter[str] = Counter()
    findings: list[dict] = []
    first, end = arguments.first, arguments.first + arguments.cases
    while first < end:
        count = min(CASES_OF_A_CHILD, end - first)
        log = bases / f"{kind}.log"
        log.write_text("")
        command = [sys.executable, __file__, "--child", "--kind", kind, "--seed", arguments.seed, "--cases", count]
        command += ["--first", first, "--bases", bases, "--log", log, *(["--sanitize"] if arguments.sanitize else [])]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        findings += [{**entry, "kind": kind} for entry in entries if "finding" in entry]
        finished = [entry["counts"] for entry in entries if "counts" in entry]
        if finished:
            counts.update(finished[0])
            first += count
            continue
        tried = [entry["at"] for entry in entries if "at" in entry]
        if not tried:
            raise RuntimeError(f"a child did not begin: {done.stderr[-3000:]}")
        counts["tried in a child that crashed"] += len(tried) - 1
        text = f"status {done.returncode}\n{done.stderr[-6000:]}"
        findings.append({"finding": tried[-1], "outcome": "crash", "text": text, "kind": kind})
        first = tried[-1] + 1
    return counts, findings


def keep(finding: dict, bases: Path, seed: int) -> Path | None:
    """Write a finding's folder to the corpus, if it is small."""
    kind, index = finding["kind"], finding["finding"]
    found = {kind: {path.name: read_folder(path) for path in (bases / kind).iterdir()}}
    name, content = case(found, kind, seed, index)
    packed = pack(content)
    if len(packed) > MOST_KEPT:
        return None
    path = CORPUS / f"{kind}-{name}-{seed}-{index}.zip"
    CORPUS.mkdir(exist_ok=True)
    path.write_bytes(packed)
    return path


def pack(content: Folder) -> bytes:
    """A zip archive, the same bytes whenever it is written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_LZMA)
    return buffer.getvalue()


def unpack(path: Path) -> tuple[str, Folder]:
    """The kind and the content of a corpus entry."""
    with zipfile.ZipFile(path) as archive:
        return path.name.partition("-")[0], {name: archive.read(name) for name in archive.namelist()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=sorted(RUN), help="default: all")
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--keep", action="store_true", help="write findings to the corpus")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bases", type=Path, help=argparse.SUPPRESS)
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
    total = 0
    with tempfile.TemporaryDirectory() as temporary:
        bases = arguments.bases or Path(temporary)
        if not (bases / "exported").is_dir():
            build_bases(bases)
        for kind in [arguments.kind] if arguments.kind else sorted(RUN):
            start = time.perf_counter()
            counts, findings = run_children(arguments, kind, bases)
            seconds = time.perf_counter() - start
            outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            print(
                f"{kind}: {arguments.cases} cases in {seconds:.0f} s: {outcomes}; {len(findings)} findings", flush=True
            )
            for finding in findings:
                kept = keep(finding, bases, arguments.seed) if arguments.keep else None
                print(
                    f"\n{kind} case {finding['finding']}: {finding['outcome']}, {kept}\n{finding['text']}", flush=True
                )
            total += len(findings)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
