"""Fuzzes what reads files: mutated exported folders and checkpoints are loaded, and run once where they are accepted.

    python tests/fuzz_files.py --cases 10000 --seed 1 [--kind exported|checkpoint] [--sanitize]

Allowed are the documented errors, and no other: a crash, a hang, or another exception is a finding, with its seed.
Cases run in child processes, so that a crash costs one of them; findings are kept in `tests/fuzz_corpus`, which
`tests/test_fuzz.py` replays. `--sanitize`: on kernels with address and undefined-behaviour sanitizers.
"""

import argparse
import io
import logging
import os
import random
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_children import run_children, try_cases
from fuzz_mutations import Folder, mutated

CORPUS = Path(__file__).with_name("fuzz_corpus")
MANIFESTS = {"exported": "program.json", "checkpoint": "vqvit.json"}
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


def build_bases(folder: Path, names: tuple[str, ...] = ()) -> None:
    """What is mutated: `folder`/exported/<name> and `folder`/checkpoint/<name>, of these names or of all there are."""
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
    for name in names or models:
        kind, config, options = models[name]
        model = kind(config).eval()
        calibration = [torch.randn(8, 3, 16, 16)] if options.get("activation") == "static" else None
        vqvit.quantize_(model, vqvit.QuantConfig(**options), calibration=calibration)
        vqvit.save(model, folder / "checkpoint" / name)
        vqvit.export(model, folder / "exported" / name)


def read_folder(path: Path) -> Folder:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def read_bases(bases: Path, kind: str) -> dict[str, dict[str, Folder]]:
    return {kind: {path.name: read_folder(path) for path in (bases / kind).iterdir()}}


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
    """As `run_exported`. What an accepted model raises at its call is the model's: of return_dict = false, say."""
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


def child(arguments: argparse.Namespace) -> None:
    """Cases `first` to `first` + `cases`."""
    import faulthandler

    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    kind = arguments.kind
    if kind == "exported":
        os.environ["VQVIT_TORCH"] = "0"  # children begin sooner, and a case's seconds are not those of an import
    import vqvit.serving  # noqa: F401

    if arguments.sanitize:
        from sanitize import use_sanitized

        use_sanitized()
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if kind == "checkpoint":
        import torch

        torch.set_num_threads(1)
    bases = read_bases(arguments.bases, kind)
    with tempfile.TemporaryDirectory() as temporary:

        def run(index: int) -> str:
            for old in Path(temporary).iterdir():
                old.unlink()
            write_folder(Path(temporary), case(bases, kind, arguments.seed, index)[1])
            return RUN[kind](Path(temporary))

        try_cases(range(arguments.first, arguments.first + arguments.cases), arguments.log, run)


def keep(index: int, bases: Path, kind: str, seed: int) -> Path | None:
    """Write a case's folder to the corpus, if it is small."""
    name, content = case(read_bases(bases, kind), kind, seed, index)
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
            command = [__file__, "--kind", kind, "--seed", arguments.seed, "--bases", bases]
            command += ["--sanitize"] if arguments.sanitize else []
            counts, findings = run_children(command, arguments.first, arguments.cases, bases / f"{kind}.log")
            seconds = time.perf_counter() - start
            outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            print(
                f"{kind}: {arguments.cases} cases in {seconds:.0f} s: {outcomes}; {len(findings)} findings", flush=True
            )
            for finding in findings:
                kept = keep(finding["finding"], bases, kind, arguments.seed) if arguments.keep else None
                print(
                    f"\n{kind} case {finding['finding']}: {finding['outcome']}, {kept}\n{finding['text']}", flush=True
                )
            total += len(findings)
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
