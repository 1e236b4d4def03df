"""Sessions and models in forked and spawned processes, in threads, with limits on CPUs, and under kill -9."""

import importlib
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import vqvit
from vqvit import cpus, files, native
from vqvit.backends import cpu
from vqvit.serving import ProgramError, Session
from vqvit.serving.program import PROGRAM, WEIGHTS

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")

export = importlib.import_module("vqvit.export")  # the package has a function of that name

SECONDS = 60  # a child that hangs is killed then
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    vqvit.quantize_(model)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    return vqvit.export(model, tmp_path_factory.mktemp("served") / "out")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Enough of them that kernels share them out to threads."""
    return np.random.default_rng(0).standard_normal((32, 3, 32, 32), np.float32)


def run_python(code: str, *arguments: object, **environment: str) -> str:
    """What a process of its own prints that may use two threads, whatever this machine has."""
    root, tests = Path(vqvit.__file__).parents[1], Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": f"{root}:{tests}",
            "OMP_NUM_THREADS": "2",
            "OPENBLAS_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=3 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = f"""
import os, signal, sys, threading, numpy as np
from vqvit import cpus, native
cpus.usable_cpus = lambda: 2
folder, images = sys.argv[1], np.load(sys.argv[2])
def threads(): return len(os.listdir("/proc/self/task"))
def in_child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm({SECONDS})
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "the child hung or failed"
"""

SESSION = """
from vqvit.serving import Session
session = Session(folder, 2)
wanted = session(images)["logits"]
assert session.threads == 2 and threads() >= 2, threads()
def same(): assert np.array_equal(session(images)["logits"], wanted)
"""

FORKS = {
    "a child": """
def child():
    before = threads()
    same(); same()
    print("threads", before, threads())
in_child(child)
same()
""",
    "a child of a child": """
def child():
    same()
    in_child(same)
    same()
in_child(child)
""",
    "a child with a session of its own": """
in_child(lambda: np.testing.assert_array_equal(Session(folder, 2)(images)["logits"], wanted))
""",
    "python threads in a child": """
def child():
    failed = []
    def work():
        try:
            for _ in range(20): same()
        except BaseException as error: failed.append(error)
    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert not failed, failed
in_child(child)
""",
    "a fork while another thread calls": """
stop = threading.Event()
def work():
    while not stop.is_set(): same()
worker = threading.Thread(target=work)
worker.start()
for _ in range(5): in_child(same)
stop.set()
worker.join()
""",
    "workers of multiprocessing": """
import multiprocessing
def work(i): return np.array_equal(session(images)["logits"], wanted)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map_async(work, range(8)).get(60))
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", FORKS)
def test_a_session_that_two_threads_used_works_in_forked_processes(kind, folder, pixels, tmp_path):
    np.save(tmp_path / "images.npy", pixels)
    printed = run_python(PRELUDE + SESSION + FORKS[kind], folder, tmp_path / "images.npy", VQVIT_TORCH="0")
    if kind == "a child":
        before, after = map(int, printed.split()[1:])
        assert (before, after) == (1, 2), "the child has a thread of its own beside the one that forked"


TORCH = """
import logging, torch, vqvit
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
torch.set_num_threads(2)
native.cpu().vqvit_cpu_limit_threads(2)
model, x = vqvit.load(folder), torch.from_numpy(images)
big = torch.randn(600, 600)
def logits():
    with torch.inference_mode(): return (model(x).logits, big @ big, big.exp())
wanted = logits()
assert threads() >= 2
def child():
    for _ in range(3): assert torch.equal(logits()[0], wanted[0])
in_child(child)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_model_that_two_threads_used_works_in_a_forked_process_and_says_so_once(model, pixels, tmp_path):
    vqvit.save(model, tmp_path / "model")
    np.save(tmp_path / "images.npy", pixels)
    printed = run_python(PRELUDE + TORCH, tmp_path / "model", tmp_path / "images.npy")
    assert printed.count("PyTorch runs on 1 thread in this process, on 2 in its parent") == 1, printed


def test_python_threads_that_share_a_session_get_the_right_bits(folder, pixels, monkeypatch):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 2)
    session = Session(folder, 2)
    batches = [pixels[:count] for count in (1, 3, 8, 32)]
    wanted = [session(batch)["logits"] for batch in batches]
    failures = []

    def work(first: int) -> None:
        for i in range(first, first + 40):
            if not np.array_equal(session(batches[i % 4])["logits"], wanted[i % 4]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    assert not failures and not any(worker.is_alive() for worker in workers)


def test_a_batch_in_parts_and_on_any_number_of_threads_gives_the_same_bits(folder, pixels, monkeypatch):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 5)
    native.cpu().vqvit_cpu_limit_threads(5)
    try:
        whole = Session(folder, 1)(pixels)["logits"]
        for threads in (2, 5):
            session = Session(folder, threads)
            assert np.array_equal(session(pixels)["logits"], whole)
            parts = [session(pixels[i : i + 5])["logits"] for i in range(0, len(pixels), 5)]
            assert np.array_equal(np.concatenate(parts), whole)
    finally:
        native.cpu().vqvit_cpu_limit_threads(cpus.usable_cpus())


def test_a_pickled_session_opens_its_folder_again_in_a_spawned_process(folder, pixels, tmp_path):
    session = Session(folder, 1)
    (tmp_path / "session.pkl").write_bytes(pickle.dumps(session))
    np.save(tmp_path / "images.npy", pixels)
    code = (
        "import pickle, sys, numpy as np\n"
        "session = pickle.load(open(sys.argv[1], 'rb'))\n"
        "np.save(sys.argv[3], session(np.load(sys.argv[2]))['logits'])\n"
        "assert session.threads == 1 and 'torch' not in sys.modules\n"
    )
    run_python(code, *(tmp_path / name for name in ("session.pkl", "images.npy", "logits.npy")), VQVIT_TORCH="0")
    assert np.array_equal(np.load(tmp_path / "logits.npy"), session(pixels)["logits"])
    assert len((tmp_path / "session.pkl").read_bytes()) < 1000


def test_a_pickled_session_refuses_another_model(folder, model, tmp_path):
    pickled = pickle.dumps(Session(vqvit.export(model, tmp_path / "out"), 1))
    with torch.no_grad():
        model.classifier.bias += 1.0
    vqvit.export(model, tmp_path / "out")
    with pytest.raises(ProgramError, match="expected the model that was pickled; got another one"):
        pickle.loads(pickled)


def test_threads_above_the_cpus_of_the_process_are_not_used(folder, monkeypatch):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 2)
    assert Session(folder, 64).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert Session(folder).threads == 1 and Session(folder, 2).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "8,2")
    assert Session(folder).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert Session(folder).threads == 2


WIDE = """
from vqvit.serving import int8_ops
codes, weight, ones = np.ones((4096, 256), np.int8), np.ones((256, 256), np.int8), np.ones(4096, np.float32)
before = threads()
product = int8_ops.int8_linear(64, codes, ones, weight, ones[:256], None, "none", *[None] * 7)
assert (product == 256).all()
print(before, threads())
"""


def test_kernels_start_no_more_threads_than_there_are_cpus(folder, pixels, tmp_path):
    np.save(tmp_path / "images.npy", pixels)
    printed = run_python(PRELUDE + SESSION + WIDE, folder, tmp_path / "images.npy", VQVIT_TORCH="0")
    assert printed.split() == ["2", "2"]


OUT_OF_MEMORY = """
import resource, numpy as np
from vqvit.serving import int8_ops
a, a_scale = np.ones((8, 1), np.int8), np.ones(8, np.float32)
b, b_scale = np.ones((1 << 22, 1), np.int8), np.ones(1 << 22, np.float32)
def product(n):
    options = "none", None, None, None, None, None, True, False, False
    return int8_ops.int8_linear_quantize(1, a, a_scale, b[:n], b_scale[:n], None, *options)
product(64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for room in (40, 80, 120, 1000):
    resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), resource.RLIM_INFINITY))
    try:
        print(int(product(1 << 22)[0].sum()) == 127 << 25)
    except MemoryError as error:
        print(error)
"""


def test_memory_that_does_not_suffice_is_a_memory_error():
    """32 MiB for the codes, 32 for packed weights, 128 for fp32 rows: no abort from inside of the kernels."""
    printed = run_python(OUT_OF_MEMORY, VQVIT_TORCH="0").splitlines()
    assert printed[1:] == [
        "vqvit_cpu_int8_linear_quantize: expected room for its scratch; there is not enough memory"
    ] * 2 + ["True"]


def exports(model: nn.Module, monkeypatch) -> None:
    """Make every later export of `model` cost its writing alone."""
    sample = export._sample(model)
    with export.eval_mode(model), export._in_panels(model), torch.inference_mode():
        made = export._program(model, sample)
    monkeypatch.setattr(export, "_program", lambda *_: made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(not hasattr(files, "_exchange_names"), reason="folders are replaced in two steps")
def test_kill_9_at_any_moment_of_an_export_leaves_the_old_folder_or_the_new_one(
    model, pixels, tmp_path, monkeypatch, one_thread
):
    """A child of its own for each thing that an export does to files, killed before it does that."""
    torch.manual_seed(1)
    other = transformers.ViTForImageClassification(model.config).eval()
    vqvit.quantize_(other)
    old = Session(vqvit.export(model, tmp_path / "old"), 1)(pixels[:1])["logits"]
    new = Session(vqvit.export(other, tmp_path / "new"), 1)(pixels[:1])["logits"]
    vqvit.export(model, tmp_path / "out")
    exports(other, monkeypatch)
    found = []
    for moment in itertools.count():
        pid = os.fork()
        if pid == 0:
            _export_until(moment, other, tmp_path / "out")
        _, status = os.waitpid(pid, 0)
        logits = Session(tmp_path / "out", 1)(pixels[:1])["logits"]
        assert np.array_equal(logits, old) or np.array_equal(logits, new)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [PROGRAM, WEIGHTS]
        found.append(np.array_equal(logits, new))
        for leftover in tmp_path.glob(".*"):
            shutil.rmtree(leftover)
        if status == 0:
            break
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and moment < 200
    assert moment > 5 and found[0] is False and found[-1] is True


def _export_until(moment: int, model: nn.Module, folder: Path) -> None:
    """Export in this child, killed before its event number `moment` on a file below the folder's parent."""
    seen = itertools.count()

    def watch(event: str, arguments: tuple) -> None:
        touched = any(isinstance(a, str | os.PathLike) and str(folder.parent) in os.fspath(a) for a in arguments)
        if touched and next(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        sys.addaudithook(watch)
        vqvit.export(model, folder)
        code = 0
    finally:
        os._exit(code)


def test_an_interrupted_export_leaves_the_old_folder(model, pixels, tmp_path, monkeypatch):
    old = Session(vqvit.export(model, tmp_path / "out"), 1)(pixels[:1])["logits"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vqvit.export(model, tmp_path / "out")
    assert np.array_equal(Session(tmp_path / "out", 1)(pixels[:1])["logits"], old)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
def test_memory_stays_flat_over_calls_of_changing_sizes_from_four_threads(folder, pixels):
    """20,000 calls: resident memory within 2 MB after warm-up, and no wrong bit."""
    session = Session(folder, 2)
    batches = [pixels[:count] for count in (1, 2, 3, 5, 8, 13)]
    wanted = [session(batch)["logits"] for batch in batches]
    failures: list[int] = []

    def work(calls: int, first: int) -> None:
        for i in range(first, first + calls):
            if not np.array_equal(session(batches[i % len(batches)])["logits"], wanted[i % len(batches)]):
                failures.append(i)

    def round_of(calls: int) -> None:
        workers = [threading.Thread(target=work, args=(calls, i)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    for _ in range(5):
        round_of(100)
    before = resident()
    for _ in range(10):
        round_of(500)
        time.sleep(0.01)
    assert not failures
    assert resident() - before < 2 << 20
