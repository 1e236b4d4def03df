"""Folders that are written as a whole or not at all, and digests of files. Standard library only."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HASH_CHUNK = 1 << 20  # bytes read at a time


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_replaceable(directory: Path, marker: str, what: str) -> None:
    """Raise `FileExistsError` unless `directory` is new, empty, or holds `marker`, the file that tells `what`."""
    if not directory.exists() or (directory / marker).is_file():
        return
    if directory.is_file() or any(directory.iterdir()):
        raise FileExistsError(f"{directory}: expected a new folder or {what} to replace; got other content")


@contextmanager
def staged_folder(directory: Path) -> Iterator[Path]:
    """A folder beside `directory` to write to. It becomes `directory`, replacing what is there, if nothing raises, and
    vanishes else.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        yield staging
        for file in staging.iterdir():
            file.chmod(0o666 & ~_umask())
        staging.chmod(0o777 & ~_umask())
        _replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging: Path, directory: Path) -> None:
    """Rename `staging` to `directory`, moving what is there out of the way first."""
    if not directory.exists():
        os.rename(staging, directory)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    os.rename(directory, retired / "old")
    os.rename(staging, directory)
    shutil.rmtree(retired)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
