"""Tables of tuned choices: which shipped config a launch takes on a device, looked up before the model of tiles.

A table is a JSON file that `vqvit tune` writes:

    {"format": 1, "source": "measured", "row": 90, "multiprocessors": 132, "provenance": {...},
     "configs": {"gemm": [{"block_m": 128, ...}, ...], ...},
     "entries": [{"kind": "gemm", "m": 1576, "shape": [768, 3072], "config": 0}, ...]}

It serves devices of one row of the config tables and one number of multiprocessors: waves of tiles depend on both.
`config` counts in the file's own `configs`, which hold every field: a reordered config table cannot change its meaning.
Order: the file that $VQVIT_TUNED names, or else the user's; then the shipped one of `kernels/tables`; then the model.

A measured entry holds for its bucket of M, an eighth of an octave; of two in a bucket the larger M counts. A predicted
entry (`vqvit tune --predict`) is the model's choice written down and holds for its very M: elsewhere the model is at
hand. No GPU has measured the shipped tables: they pin the choices for common models, so that a change of the model, or
a measured table in their place, shows in the diff launch by launch.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vqvit.kernels.launch import INTERPRETER, Device

logger = logging.getLogger("vqvit")

FORMAT = 1
SOURCES = ("measured", "predicted")
KINDS = ("gemm", "gemm_groups", "attention_quantize")
"""`configs` of kernels/gemm_s8.py without and with groups, and LAUNCHES of kernels/attention_s8.py."""

SHIPPED = Path(__file__).parent / "tables"
VARIABLE = "VQVIT_TUNED"


class TableError(ValueError):
    """A file that is no table, or one for other devices or another version; the message says which."""


@dataclass(frozen=True)
class Launch:
    """What a choice depends on. m: rows, which are tokens; shape: (N, K) of a GEMM, or (heads, head dimension, queries,
    keys) of attention.
    """

    kind: str
    m: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Table:
    """choices: config by launch, as the file's entries have it."""

    device: Device
    source: str
    provenance: dict
    choices: dict[Launch, object]

    @functools.cached_property
    def _by_key(self) -> dict[Launch, object]:
        ascending = sorted(self.choices, key=lambda launch: launch.m)
        return {self._key(launch): self.choices[launch] for launch in ascending}

    def _key(self, launch: Launch) -> Launch:
        return launch if self.source == "predicted" else Launch(launch.kind, bucket(launch.m), launch.shape)

    def find(self, launch: Launch) -> object | None:
        return self._by_key.get(self._key(launch))


def bucket(m: int) -> int:
    """The largest M of the bucket: eight to an octave, so a bucket's waves differ by an eighth at most."""
    step = 1 << max(0, m.bit_length() - 4)
    return -(-m // step) * step


def file_name(device: Device) -> str:
    return f"sm_{device.arch}-{device.sms}.json"


# ---- which choices there are ----------------------------------------------------------------------------------------


def configs(kind: str, row: int) -> tuple:
    """The configs of a row that ship, which the compile gate has checked."""
    from vqvit.kernels import attention_s8, gemm_s8  # they look their choices up here

    if kind == "attention_quantize":
        return attention_s8.LAUNCHES
    return gemm_s8.configs(row, groups=kind == "gemm_groups")


def predict(device: Device, launch: Launch) -> object:
    """The choice where no table has one."""
    from vqvit.kernels import attention_s8, gemm_s8

    if launch.kind == "attention_quantize":
        return attention_s8.predict_launches(device, launch.m, *launch.shape)
    return gemm_s8.predict(device, launch.m, *launch.shape, groups=launch.kind == "gemm_groups")


# ---- lookup ---------------------------------------------------------------------------------------------------------

_user_folder: Path | None = None
_forced: dict[str, object] = {}


def search(folder: Path) -> None:
    """Where the user's tables are. Tables already in use stay."""
    global _user_folder
    _user_folder = folder


def find(device: Device, launch: Launch) -> object | None:
    """The config that a table has for a launch, or None. Raises `TableError` if $VQVIT_TUNED names a bad file."""
    if launch.kind in _forced:
        return _forced[launch.kind]
    return next((found for table in tables(device) if (found := table.find(launch)) is not None), None)


@contextlib.contextmanager
def forced(kind: str, config: object) -> Iterator[None]:
    """Every launch of a kind takes `config`, in all threads: for measuring."""
    _forced[kind] = config
    try:
        yield
    finally:
        del _forced[kind]


@functools.cache
def tables(device: Device) -> tuple[Table, ...]:
    """The tables of a device, to be asked in this order: read once, and logged."""
    if device.arch == INTERPRETER:
        return ()
    named, found = os.environ.get(VARIABLE), []
    if named:
        found.append(_logged(read(Path(named), device), Path(named)))
    folders = [SHIPPED] if named or _user_folder is None else [_user_folder, SHIPPED]
    for path in (folder / file_name(device) for folder in folders):
        if not path.is_file():
            continue
        try:
            found.append(_logged(read(path, device), path))
        except TableError as error:
            logger.warning("ignoring a table of tuned choices: %s", error)
    return tuple(found)


def _logged(table: Table, path: Path) -> Table:
    logger.info("%d %s choices of tiles from %s", len(table.choices), table.source, path)
    return table


# ---- files ----------------------------------------------------------------------------------------------------------


def read(path: Path, device: Device | None = None) -> Table:
    """The table in a file, which must be for `device` if that is given. Raises `TableError`."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise TableError(f"{path}: expected a table of tuned choices; {error.strerror}") from error
    except ValueError as error:
        raise TableError(f"{path}: expected a table of tuned choices in JSON; it fails to parse: {error}") from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        later = ", written by a later version of vqvit" if isinstance(version, int) and version > FORMAT else ""
        raise TableError(f"{path}: expected a table of tuned choices of format {FORMAT}; got {version!r}{later}")
    try:
        table = _parse(document)
    except TableError as error:
        raise TableError(f"{path}: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise TableError(f"{path}: expected the fields of a table; got {type(error).__name__}: {error}") from error
    if device is not None and table.device != device:
        raise TableError(f"{path}: expected a table for {_words(device)}; got one for {_words(table.device)}")
    return table


def _parse(document: dict) -> Table:
    device = Device(document["row"], document["multiprocessors"])
    if document["source"] not in SOURCES:
        raise TableError(f"source: expected one of {', '.join(SOURCES)}; got {document['source']!r}")
    shipped = {kind: _shipped(kind, device.arch, fields) for kind, fields in document["configs"].items()}
    choices = {}
    for entry in document["entries"]:
        launch = Launch(entry["kind"], int(entry["m"]), tuple(int(size) for size in entry["shape"]))
        if entry["config"] not in range(len(shipped[launch.kind])):
            raise TableError(f"{launch}: expected a config below {len(shipped[launch.kind])}; got {entry['config']!r}")
        choices[launch] = shipped[launch.kind][entry["config"]]
    return Table(device, document["source"], dict(document["provenance"]), choices)


def _shipped(kind: str, row: int, fields: list[dict]) -> list:
    """The configs with these fields. Raises `TableError` unless all of them ship."""
    if kind not in KINDS:
        raise TableError(f"kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    try:
        known = configs(kind, row)
    except KeyError:
        raise TableError(f"row: expected one of the config tables' rows; got {row!r}") from None
    found = []
    for field in fields:
        config = next((c for c in known if _matches(c, field)), None)
        if config is None:
            valid = "; ".join(str(c) for c in known)
            raise TableError(f"{kind}: expected one of the configs that ship for sm_{row}: {valid}; got {field}")
        found.append(config)
    return found


def _matches(config: object, field: dict) -> bool:
    """Whether the fields, and defaults for those that the file does not know, make this config."""
    try:
        return type(config)(**field) == config
    except TypeError:
        return False


def _words(device: Device) -> str:
    return f"row {device.arch} with {device.sms} multiprocessors"
