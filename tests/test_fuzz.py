"""A bounded part of the fuzzers, whose long runs are `make fuzz`; and what they found before, again."""

import random
from pathlib import Path

import fuzz_arguments
import fuzz_files
import fuzz_ops
import pytest
import torch
from fuzz_mutations import mutated

import vqvit
from vqvit import native
from vqvit.backends import cpu
from vqvit.serving import ProgramError, Session

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")

OPS_CASES = 600
EXPORTED_CASES = 1000
CHECKPOINT_CASES = 40

BASES = ("default", "float_attention", "asymmetric_activations", "compensated", "dinov2")

CORPUS = sorted(fuzz_files.CORPUS.glob("*.zip"))


@pytest.fixture
def kernels():
    """The CPU's kernels on any number of threads; afterwards as before."""
    threads = torch.get_num_threads()
    fuzz_ops.prepare()
    yield
    torch.set_num_threads(threads)
    cpu.set_isa(None)
    native.cpu().vqvit_cpu_limit_threads(vqvit.cpus.usable_cpus())


def test_random_arguments_give_the_bits_of_the_reference(kernels):
    outcomes = [fuzz_ops.run_case(1, index) for index in range(OPS_CASES)]
    assert outcomes.count("equal") > 0.8 * OPS_CASES and outcomes.count("refused") > 0.01 * OPS_CASES


def test_every_op_is_drawn():
    assert fuzz_arguments.DRAWS.keys() == set(vqvit.ops.NAMES)
    drawn = {fuzz_arguments.arguments_of(1, index)[0] for index in range(300)}
    assert drawn == fuzz_arguments.DRAWS.keys()


def test_equality_of_bits_sees_the_sign_of_zero_and_not_the_kind_of_nan():
    x, y = torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([-0.0, -torch.nan, 1.0])
    assert fuzz_ops.same_bits(x, y).tolist() == [False, True, True]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, one_thread) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    fuzz_files.build_bases(folder, BASES)
    return folder


@pytest.mark.parametrize(
    ("kind", "cases"), [("exported", EXPORTED_CASES), ("checkpoint", CHECKPOINT_CASES)], ids=["exported", "checkpoint"]
)
def test_mutated_folders_are_refused_or_run(kind, cases, bases):
    """In a child process, as the long runs are: a crash is a finding there."""
    command = [fuzz_files.__file__, "--kind", kind, "--seed", 1, "--bases", bases]
    counts, findings = fuzz_files.run_children(command, 0, cases, bases / "log")
    assert not findings, findings[0]["text"]
    assert counts["refused"] > 0.5 * cases and counts["ran"] > 0.02 * cases and sum(counts.values()) == cases


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_the_fuzzers_found_is_refused_or_run(path, tmp_path):
    kind, content = fuzz_files.unpack(path)
    fuzz_files.write_folder(tmp_path / "case", content)
    assert fuzz_files.RUN[kind](tmp_path / "case") in ("refused", "ran", "large", "raised", "memory")


def test_a_corpus_entry_is_what_it_was_packed_from(tmp_path):
    content = {"a.json": b"{}", "b.safetensors": bytes(range(256))}
    (tmp_path / "exported-x-1-2.zip").write_bytes(fuzz_files.pack(content))
    assert fuzz_files.unpack(tmp_path / "exported-x-1-2.zip") == ("exported", content)
    assert fuzz_files.pack(content) == fuzz_files.pack(dict(content))


def test_mutations_are_of_their_seed_and_change_something(bases):
    original = fuzz_files.read_bases(bases, "exported")["exported"]["default"]
    made = [mutated(random.Random(seed), original, "program.json") for seed in range(50)]
    assert made == [mutated(random.Random(seed), original, "program.json") for seed in range(50)]
    assert sum(folder != original for folder in made) > 40
    with pytest.raises(ProgramError):
        for i, folder in enumerate(made):
            fuzz_files.write_folder(bases / f"made-{i}", folder)
            Session(bases / f"made-{i}", 1)
