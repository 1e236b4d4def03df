"""Folders and files that change as a whole or not at all, and digests of files. Standard library only.

`updated_folder` changes files of ours in a folder that may hold other files too, without a moment in which a reader
finds neither the old content nor the new:

    1. everything is written to a hidden folder inside
    2. data files, whose names are of their content and which no reader looks for yet, are renamed into place
    3. the pointer, a file that names them, replaces the old pointer in one rename: from here on the content is new
    4. files that other programs look for under fixed names are replaced, and data that no pointer names is removed

Whoever is killed leaves hidden files or unnamed data, which the next update removes. Lucene's segments and PyTorch's
distributed checkpoints (`.metadata` comes last) are kept in the same way. Renaming whole folders, as Hugging Face's
cache does with single files, would lose what others write into them meanwhile, and a mounted folder has no other name.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: updates at the same time are not kept apart there
    fcntl = None

HASH_CHUNK = 1 << 20  # bytes read at a time

STAGING = ".vqvit-"
"""Begins the names of hidden folders that an update writes to."""

COMMITTED = "committed"
"""In a hidden folder: the pointer may be new, and files under fixed names old, until the folder is gone."""

RENAME_EXCHANGE = 2  # linux/fs.h

ATTEMPTS = 100
"""Times that a folder is made anew, or read again, while others remove or replace it."""


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file) -> str:
    """Hexadecimal digest of an open binary file, from where it stands."""
    digest = hashlib.sha256()
    while chunk := file.read(HASH_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def require_replaceable(directory: Path, marker: str, what: str, data: re.Pattern | None = None) -> None:
    """Raise `FileExistsError` unless `directory` is new, empty, or holds `marker`, the file that tells `what`.

    What an interrupted update left, hidden folders and files that match `data`, does not count.
    """
    if not directory.exists() or (directory / marker).is_file():
        return
    if directory.is_dir() and all(_is_leftover(path, data) for path in directory.iterdir()):
        return
    raise FileExistsError(f"{directory}: expected a new folder or {what} to replace; got other content")


@contextmanager
def updated_folder(directory: Path, pointer: str, data: re.Pattern) -> Iterator[Path]:
    """A hidden folder to write to; its files go into `directory` if nothing raises, and other files there stay.

    Args:
        directory: made if it is not there.
        pointer: the file that names the others, which has to be among those written.
        data: matches the names of data files, which are of their content; those not written this time are removed.

    Raises `OSError`; then `directory` holds what it did. A reader finds the files of the old pointer or of the new one:
    it reads the pointer, then what that names, and begins again where that is gone (`is_unsettled` tells when files
    under fixed names may not be the pointer's). Updates at the same time follow each other; the last one stays.
    """
    made = not directory.exists()
    staging, lock = _staging_in(directory)
    try:
        try:
            yield staging
            _commit(staging, directory, pointer, data)
        finally:
            _remove(staging)
            os.close(lock)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not if somebody else has put something there
                directory.rmdir()
        raise


def is_unsettled(directory: Path) -> bool:
    """Whether an update may have replaced the pointer and not yet the files under fixed names; so after a kill."""
    return any(directory.glob(f"{STAGING}*/{COMMITTED}"))


@contextmanager
def staged_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to write to. It takes the place of `directory` if nothing raises, in one step where
    the system can exchange two folders, and vanishes else. Files that `directory` holds under other names stay.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{STAGING}{directory.name}-"
    staging, lock = _locked_staging(directory.parent, prefix)
    try:
        yield staging
        written = {path.name for path in staging.iterdir()}
        for path in staging.iterdir():
            _settle(path)
        with _locked(directory.parent):
            _exchange(staging, directory, written)
            for dead in _dead(directory.parent, prefix):
                _carry_over(dead, directory, written)
                _remove(dead)
    finally:
        _remove(staging)
        os.close(lock)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all, and make its folder if need be. A link is followed; what is no regular
    file, such as a FIFO or a device, is written to. Raises `OSError`.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    if _is_written_through(path):
        with open(path, "wb", buffering=0) as file:
            remaining = memoryview(content)
            while remaining:
                remaining = remaining[file.write(remaining) :]
        return
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.write_bytes(content)
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        _synchronise(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_written_through(path: Path) -> bool:
    """Devices and FIFOs; and whatever a process names as open files of its own, which have no other name."""
    real = os.path.realpath(path.parent)
    if path.exists() and not path.is_file():
        return not path.is_dir()
    return path.exists() and (real == "/dev" or real.startswith("/proc/"))


def _is_leftover(path: Path, data: re.Pattern | None) -> bool:
    return path.name.startswith(STAGING) or (data is not None and data.fullmatch(path.name) is not None)


def _commit(staging: Path, directory: Path, pointer: str, data: re.Pattern) -> None:
    names = [path.name for path in staging.iterdir()]
    ours = [name for name in names if data.fullmatch(name)]
    plain = [name for name in names if name not in (*ours, pointer)]
    for name in names:
        _settle(staging / name)
    with _locked(directory):
        new = [name for name in ours if not (directory / name).exists()]
        try:
            for name in ours:
                os.replace(staging / name, directory / name)
            (staging / COMMITTED).touch()
            os.replace(staging / pointer, directory / pointer)
        except BaseException:
            for name in new:
                (directory / name).unlink(missing_ok=True)
            raise
        for name in plain:
            os.replace(staging / name, directory / name)
        for path in directory.iterdir():
            if data.fullmatch(path.name) and path.name not in ours:
                path.unlink()
        for dead in _dead(directory, STAGING):
            _remove(dead)
        _synchronise(directory)


def _staging_in(directory: Path) -> tuple[Path, int]:
    """A new hidden folder in `directory`, which is made if need be, and the lock that says its owner lives."""
    for _ in range(ATTEMPTS):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            return _locked_staging(directory, STAGING)
        except FileNotFoundError:
            continue  # a failed save of somebody else has taken away the folder that it had made
    raise FileNotFoundError(f"{directory}: expected a folder to write to; others keep removing it")


def _locked_staging(parent: Path, prefix: str) -> tuple[Path, int]:
    with _locked(parent):  # nobody takes the new folder for a dead one before it is locked
        staging = parent / f"{prefix}{secrets.token_hex(6)}"
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
        _lock(lock)
        return staging, lock


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time; released by the system where its holder is killed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool = True) -> bool:
    """Whether the lock is held now; not without locks, as on some network file systems."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _dead(parent: Path, prefix: str) -> list[Path]:
    """Hidden folders whose owners do not live: their locks can be had."""
    found = []
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        except OSError:
            continue
        if _lock(descriptor, wait=False):
            found.append(path)
        os.close(descriptor)
    return found


def _exchange(staging: Path, directory: Path, written: set[str]) -> None:
    """Put `staging` in the place of `directory`, and what that held under other names into it."""
    if not directory.exists():
        os.rename(staging, directory)
    elif _exchange_names(staging, directory):
        _carry_over(staging, directory, written)
    else:  # a mounted folder, or a system that cannot: file by file
        for name in sorted(written):
            os.replace(staging / name, directory / name)


def _carry_over(old: Path, directory: Path, written: set[str]) -> None:
    for path in old.iterdir():
        if path.name not in written and not (directory / path.name).exists():
            os.rename(path, directory / path.name)


def _exchange_names(a: Path, b: Path) -> bool:
    """Let two folders swap their names in one step; False where the system cannot. b may be a link to a folder."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    at = ctypes.c_int(-100)  # AT_FDCWD
    target = os.path.realpath(b)
    if rename(at, os.fsencode(a.absolute()), at, os.fsencode(target), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.EBUSY, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _settle(path: Path) -> None:
    """The permissions that a new file has here (some writers make private ones), and the content on the disk."""
    if path.is_file():
        probe = path.with_name(f"{path.name}.mode")  # asking for the umask would set it for other threads
        probe.touch()
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
        probe.unlink()
        _synchronise(path)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
