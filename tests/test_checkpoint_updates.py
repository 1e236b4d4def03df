"""Saving over a checkpoint: what is not ours stays, and whoever reads finds the old or the new model, also when the
saving process is killed or others save at the same time.
"""

import contextlib
import json
import os
import random
import resource
import signal
import stat
import sys
import threading
import time

import pytest
import torch
from test_checkpoint import small_vit, weights

import vqvit
from vqvit import files
from vqvit.checkpoint import CONFIG, MANIFEST, read_manifest
from vqvit.data import PROCESSOR_FILE

pytestmark = pytest.mark.usefixtures("one_thread")

PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3}
IMAGES = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
KILLS, SECONDS = int(os.environ.get("VQVIT_KILLS", 60)), float(os.environ.get("VQVIT_SAVE_SECONDS", 2))


def quantized(labels: int):
    model = small_vit(num_labels=labels, num_hidden_layers=1)
    vqvit.quantize_(model)
    return model


@pytest.fixture(scope="module")
def models():
    """Two models that cannot be mixed: of 3 classes and of 5."""
    return {labels: quantized(labels) for labels in (3, 5)}


def logits_of(model):
    with torch.inference_mode():
        return model(IMAGES).logits


def require_whole(folder, models):
    """The folder holds one of the models, its processor included."""
    loaded = vqvit.load(folder)
    labels = loaded.config.num_labels
    assert torch.equal(logits_of(loaded), logits_of(models[labels]))


def test_other_files_stay(tmp_path, models):
    folder = vqvit.save(models[3], tmp_path / "ck")
    (folder / "notes.txt").write_text("mine")
    (folder / "runs" / "1").mkdir(parents=True)
    (folder / "runs" / "1" / "log.csv").write_text("mine")
    (folder / "other.safetensors").write_bytes(b"mine")
    before = folder.stat().st_ino
    vqvit.save(models[5], folder)
    vqvit.save(models[3], folder)
    assert folder.stat().st_ino == before, "a mounted folder, or one that somebody is in, stays the same folder"
    kept = {"notes.txt", "runs", "other.safetensors"}
    assert {p.name for p in folder.iterdir()} == {MANIFEST, CONFIG, weights(folder).name} | kept
    assert (folder / "runs" / "1" / "log.csv").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_failed_save_changes_nothing(tmp_path, models, monkeypatch):
    folder = vqvit.save(models[3], tmp_path / "ck")
    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for module, name in (("os", "replace"), ("vqvit.files", "_synchronise"), ("vqvit.files", "sha256")):
        with monkeypatch.context() as patched:
            patched.setattr(f"{module}.{name}", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError, match="No space left"):
                vqvit.save(models[5], folder)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path, models):
    """RLIMIT_FSIZE stands for the disk; with it a write fails with an error of the system, as on a full one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError):
            vqvit.save(models[3], tmp_path / "ck")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_those_of_new_files_and_the_umask_is_never_touched(tmp_path, models, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is of the whole process"))
    folder = vqvit.save(models[3], tmp_path / "ck")
    with files.staged_folder(tmp_path / "staged") as staging:
        (staging / "file").write_text("x")
    (tmp_path / "new").write_text("x")
    (tmp_path / "folder").mkdir()
    written = [*folder.iterdir(), tmp_path / "staged" / "file"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in written} == {stat.S_IMODE((tmp_path / "new").stat().st_mode)}
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (folder, tmp_path / "staged", tmp_path / "folder")}
    assert len(modes) == 1


def processors(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / PROCESSOR_FILE).write_text(json.dumps(PROCESSOR))
    return {
        "fields": PROCESSOR,
        "folder": tmp_path / "folder",
        "file": str(tmp_path / "folder" / PROCESSOR_FILE),
        "object": transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder"),
    }


@pytest.mark.parametrize("kind", ["fields", "folder", "file", "object"])
def test_the_processor_is_kept_with_the_model(tmp_path, models, kind):
    folder = vqvit.save(models[3], tmp_path / "ck", processor=processors(tmp_path)[kind])
    stored = json.loads((folder / PROCESSOR_FILE).read_text())
    assert stored["image_mean"] == [0.5] * 3 and stored == read_manifest(folder)["processor"]
    vqvit.save(vqvit.load(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again" / PROCESSOR_FILE).read_text()) == stored, "it travels with the model"


def test_the_processor_of_the_float_folder_is_found(tmp_path):
    small_vit(num_hidden_layers=1).save_pretrained(tmp_path / "float")
    (tmp_path / "float" / PROCESSOR_FILE).write_text(json.dumps(PROCESSOR))
    model = type(small_vit()).from_pretrained(tmp_path / "float")
    vqvit.quantize_(model)
    folder = vqvit.save(model, tmp_path / "ck")
    assert json.loads((folder / PROCESSOR_FILE).read_text()) == PROCESSOR
    assert str(tmp_path) not in (folder / CONFIG).read_text() + (folder / MANIFEST).read_text()


def test_a_processor_put_there_by_hand_stays(tmp_path, models):
    folder = vqvit.save(models[3], tmp_path / "ck")
    (folder / PROCESSOR_FILE).write_text(json.dumps(PROCESSOR))
    vqvit.save(models[5], folder)
    assert json.loads((folder / PROCESSOR_FILE).read_text()) == PROCESSOR


@pytest.mark.parametrize("given", [3, "absent.json", "broken.json", "list.json"])
def test_what_is_no_processor_is_refused(tmp_path, models, given, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises((ValueError, FileNotFoundError), match=r"processor|absent\.json"):
        vqvit.save(models[3], tmp_path / "ck", processor=given)
    assert not (tmp_path / "ck").exists()


def forked(work) -> int:
    """The process id of a child that runs `work` and ends without a word to pytest: 0, or 1 after an error."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.__stderr__)
            os._exit(1)
    return child


def save_in_turn(folder, models, seconds=60.0, first=3):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for labels in (first, 8 - first):
            vqvit.save(models[labels], folder, processor={**PROCESSOR, "labels": labels})


def test_killed_at_any_moment(tmp_path, models):
    """kill -9 while a folder is made, and while it is replaced: absent, or whole; the next save leaves no trace."""
    rng, whole = random.Random(0), 0
    for kill in range(KILLS):
        folder = tmp_path / f"ck{kill % 10 if kill % 2 else 'new'}"
        if not kill % 2:
            with contextlib.suppress(FileNotFoundError):
                for path in sorted(folder.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                folder.rmdir()
        child = forked(lambda folder=folder: save_in_turn(folder, models))
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (folder / MANIFEST).exists():
            require_whole(folder, models)
            whole += 1
    assert whole > KILLS // 4
    for folder in tmp_path.iterdir():
        vqvit.save(models[3], folder, processor={**PROCESSOR, "labels": 3})
        assert {p.name for p in folder.iterdir()} == {MANIFEST, CONFIG, PROCESSOR_FILE, weights(folder).name}
        require_whole(folder, models)


def test_the_processor_and_configuration_of_a_killed_save_are_those_of_its_manifest(tmp_path, models, monkeypatch):
    """Killed between the manifest's rename and those of the files under fixed names: the state, made by hand."""
    from vqvit.data import transform_for

    folder = vqvit.save(models[3], tmp_path / "ck", processor=PROCESSOR)
    old = {name: (folder / name).read_bytes() for name in (CONFIG, PROCESSOR_FILE)}
    larger = {**PROCESSOR, "size": {"height": 48, "width": 48}}
    vqvit.save(models[5], folder, processor=larger)
    for name, content in old.items():
        (folder / name).write_bytes(content)
    (folder / ".vqvit-0123").mkdir()
    (folder / ".vqvit-0123" / files.COMMITTED).touch()
    require_whole(folder, models)
    assert vqvit.load(folder).config.num_labels == 5
    from PIL import Image

    assert transform_for(folder)([Image.new("RGB", (60, 60))]).shape[-1] == 48
    vqvit.save(vqvit.load(folder), folder, processor=larger)
    assert not list(folder.glob(".*")) and json.loads((folder / CONFIG).read_text())["id2label"].keys() == set("01234")


def test_writers_and_readers_at_the_same_time(tmp_path, models):
    folder = tmp_path / "ck"
    writers = [forked(lambda first=first: save_in_turn(folder, models, SECONDS, first)) for first in (3, 5, 3)]
    errors, reads = [], 0
    end = time.monotonic() + SECONDS

    def read():
        nonlocal reads
        while time.monotonic() < end:
            if not (folder / MANIFEST).exists():
                continue
            try:
                require_whole(folder, models)
                reads += 1
            except Exception as error:  # any kind is a failure here, whichever thread meets it
                errors.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) for writer in writers] == [0, 0, 0]
    assert not errors and reads > 5
    require_whole(folder, models)
    assert {p.name for p in folder.iterdir()} == {MANIFEST, CONFIG, PROCESSOR_FILE, weights(folder).name}


def test_threads_that_save_to_one_new_folder(tmp_path, models):
    errors = []

    def save(labels):
        try:
            vqvit.save(models[labels], tmp_path / "ck")
        except Exception as error:  # any kind is a failure here
            errors.append(error)

    threads = [threading.Thread(target=save, args=(labels,)) for labels in (3, 5) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    require_whole(tmp_path / "ck", models)


def test_exports_keep_other_files_and_leave_no_moment_without_a_folder(tmp_path):
    """The folder of `vqvit.export`, which is staged beside and exchanged."""

    def write(text):
        with files.staged_folder(tmp_path / "out") as staging:
            (staging / "program.json").write_text(text)

    write("0")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / ".vqvit-out-dead").mkdir()
    (tmp_path / ".vqvit-out-dead" / "lost.txt").write_text("killed before it was carried over")
    done = threading.Event()

    def rewrite():
        for count in range(200):
            write(str(count))
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        (tmp_path / "out" / "program.json").read_text()
    writer.join()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"program.json", "notes.txt", "lost.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_files_are_replaced_and_links_fifos_and_devices_written_through(tmp_path):
    target, link, fifo = tmp_path / "real" / "plan.json", tmp_path / "link.json", tmp_path / "fifo"
    files.write_file(target, "one")
    target.chmod(0o640)
    link.symlink_to(target)
    files.write_file(link, "two")
    assert link.is_symlink() and target.read_text() == "two" and stat.S_IMODE(target.stat().st_mode) == 0o640
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later.json")
    files.write_file(dangling, "three")
    assert dangling.is_symlink() and (tmp_path / "later.json").read_text() == "three"
    os.mkfifo(fifo)
    received = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_text()))
    reader.start()
    files.write_file(fifo, "four" * 50_000)
    reader.join()
    assert received == ["four" * 50_000] and stat.S_ISFIFO(fifo.stat().st_mode)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for place in (tmp_path, loop):
        with pytest.raises(OSError):
            files.write_file(place, "five")
    assert loop.is_symlink() and not [p for p in tmp_path.rglob(".*")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")
def test_devices_stay_devices(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_text("x")
    except PermissionError:
        pytest.skip("no devices may be made or written here")
    files.write_file(device, "one")
    assert stat.S_ISCHR(device.stat().st_mode)
