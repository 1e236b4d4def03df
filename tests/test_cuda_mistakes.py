"""Mistakes planted in the CUDA kernels, one at a time: the tests under random schedules find each of them.

Part of `make test-all`: every mistake is compiled.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from vqvit import _build, native

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        native.csrc_directory() is None or shutil.which("g++") is None, reason="needs the C++ sources and g++"
    ),
]

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno", '-DVQVIT_SOURCE_HASH="planted"')

RUN = """
import sys
from pathlib import Path
import pytest
from vqvit import native
native.use_twin(native.open_twin(Path(sys.argv[1])))
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", sys.argv[2], "-k", sys.argv[3]]))
"""

WRONG = "seed "
"""How tests/bits.py is told to begin its message about bits that differ."""


@dataclass(frozen=True)
class Mistake:
    """A text of a file, what stands there instead, the tests that find it, and what one of them says."""

    file: str
    right: str
    wrong: str
    tests: str
    found: str
    count: int = 1  # of places


WGMMA, MMA = "wgmma and gemm and 1024", "mma_sync and gemm and 400"

RING, STAGES, EPILOGUE = "gemm_s8_wgmma.h", "mma_tiles.h", "gemm_s8_epilogue.h"

MISTAKES = {
    "no_turns": Mistake(RING, "ring.begin_turn(turn);", "", WGMMA, "", 2),
    "turn_never_ends": Mistake(RING, "ring.end_turn(turn);", "", WGMMA, "deadlock", 3),
    "no_wgmma_fence": Mistake(RING, "wgmma_fence();", "", WGMMA, "without wgmma_fence"),
    "barriers_not_fenced": Mistake(RING, "barrier_init_done();", "", WGMMA, "initialisation nobody fenced"),
    "barriers_not_initialised": Mistake(
        RING, "        }\n        block_barrier();", "        }", WGMMA, "before it is initialised"
    ),
    "stage_not_waited_for": Mistake(RING, "barrier_wait(full + stage(use), parity(use));", "", WGMMA, ""),
    "stage_refilled_too_early": Mistake(RING, "barrier_wait(empty + stage(use), parity(use) ^ 1);", "", WGMMA, ""),
    "released_too_early": Mistake(
        RING, "ring.release(first_use + step - 1);", "ring.release(first_use + step);", WGMMA, ""
    ),
    "products_not_waited_for": Mistake(RING, "    wait_all<0>(acc);\n", "    wait_all<1>(acc);\n", WGMMA, ""),
    "one_warp_counts": Mistake(
        RING, "barrier_init(empty + s, kConsumerWarps);", "barrier_init(empty + s, 1);", WGMMA, ""
    ),
    "half_of_the_bytes_expected": Mistake(
        RING, "barrier_expect(barrier, kStageBytes);", "barrier_expect(barrier, kStageBytes / 2);", WGMMA, ""
    ),
    "too_many_stages": Mistake(RING, "MI == 1 ? 6 : 4", "MI == 1 ? 8 : 6", WGMMA, "of shared memory, at most"),
    "too_many_threads": Mistake(
        RING,
        "launch(kernel, blocks, kThreads,",
        "launch(kernel, blocks, kThreads + 128,",
        WGMMA,
        "by its launch bounds",
    ),
    "stage_off_its_atom": Mistake(
        RING,
        "stages + stage(use) * kStageBytes;",
        "stages + 512 + stage(use) * kStageBytes;",
        WGMMA,
        "multiple of 1024",
    ),
    "half_rows_of_a_box": Mistake(RING, "g.k, g.k, kColumns)", "g.k, g.k, kColumns / 2)", WGMMA, ""),
    "copies_not_waited_for": Mistake(
        STAGES, "copy_async_wait<Stages - 2>();", "copy_async_wait<Stages - 1>();", MMA, WRONG
    ),
    "stages_without_a_barrier": Mistake(STAGES, "block_barrier();  // this stage is filled", "//", MMA, WRONG),
    "rows_staged_without_a_barrier": Mistake(
        EPILOGUE, "            }\n            warp_barrier();", "            }", MMA, WRONG
    ),
    "keys_without_a_barrier": Mistake(
        "attention_s8.cu",
        "copy_async_wait<1>();\n        block_barrier();",
        "copy_async_wait<1>();",
        "attention",
        WRONG,
    ),
    "sums_of_warps_without_a_barrier": Mistake(
        "rows.h", "slot[warp_id()] = value;\n        block_barrier();", "slot[warp_id()] = value;", "rows", WRONG
    ),
}


@dataclass(frozen=True)
class Objects:
    """Objects of the twin's sources, and the files that each depends on."""

    of: dict[Path, Path]
    files: dict[Path, set[str]]


def compile_source(source: Path, csrc: Path, target: Path) -> None:
    command = [_build.compiler(_build.CUDA_TWIN), *FLAGS, f"-I{csrc}", f"-I{csrc / 'cuda'}", "-MMD"]
    subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(target)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Objects:
    folder, csrc = tmp_path_factory.mktemp("objects"), native.csrc_directory()
    of, files = {}, {}
    for source in _build.source_files(csrc, _build.CUDA_TWIN):
        of[source] = folder / f"{source.name}.o"
        compile_source(source, csrc, of[source])
        files[source] = {
            Path(name).name for name in of[source].with_suffix(".d").read_text().replace("\\\n", " ").split()
        }
    return Objects(of, files)


def planted(mistake: Mistake, objects: Objects, folder: Path) -> Path:
    """The twin with a mistake."""
    csrc = shutil.copytree(native.csrc_directory(), folder / "csrc")
    path = csrc / "cuda" / mistake.file
    text = path.read_text()
    assert text.count(mistake.right) == mistake.count, f"{mistake.file} has other places than this test knows"
    path.write_text(text.replace(mistake.right, mistake.wrong))
    parts = []
    for source, right in objects.of.items():
        parts.append(right)
        if mistake.file in objects.files[source]:
            parts[-1] = folder / right.name
            compile_source(csrc / "cuda" / source.name, csrc, parts[-1])
    return linked(parts, folder)


def linked(parts: list[Path], folder: Path) -> Path:
    library = folder / "twin.so"
    subprocess.run([_build.compiler(_build.CUDA_TWIN), "-shared", *map(str, parts), "-o", str(library)], check=True)
    return library


def run_schedules(library: Path, tests: str) -> subprocess.CompletedProcess:
    """Tests of test_cuda_schedules.py on a twin."""
    schedules = Path(__file__).with_name("test_cuda_schedules.py")
    return subprocess.run(
        [sys.executable, "-c", RUN, str(library), str(schedules), tests],
        cwd=schedules.parents[1],
        env={**os.environ, "VQVIT_CUDA_TWIN": "1", "VQVIT_TWIN_SEEDS": "8"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("tests", sorted({mistake.tests for mistake in MISTAKES.values()}))
def test_the_kernels_as_they_are_pass(objects, tests, tmp_path):
    done = run_schedules(linked(list(objects.of.values()), tmp_path), tests)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(objects, name, tmp_path):
    mistake = MISTAKES[name]
    done = run_schedules(planted(mistake, objects, tmp_path), mistake.tests)
    assert done.returncode == 1, f"status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "1 failed" in done.stdout and mistake.found in done.stdout, done.stdout[-3000:]
