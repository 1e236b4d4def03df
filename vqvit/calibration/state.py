"""An interrupted calibration on disk: what its observers saw, for which model, plan and data, and how far it came.

One safetensors file, replaced as a whole. A calibration that goes on from it gives the same ranges bit for bit, and
one of another model, plan or data refuses it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vqvit import files
from vqvit.batches import Batches
from vqvit.calibration.observers import CalibrationError, MaxObserver
from vqvit.plan import Plan

FORMAT = "vqvit calibration 1"
SEPARATOR = "|"
"""Between a layer's name and its observer's field, in the names of tensors."""


@dataclass(frozen=True)
class Fingerprint:
    """What a calibration belongs to: digests of the quantized model, the plan and the data; batches and images."""

    model: str
    plan: str
    data: str
    batches: int
    images: int
    seed: int

    @staticmethod
    def of(model: nn.Module, plan: Plan, batches: Batches, seed: int) -> "Fingerprint":
        tensors = (tensor for batch in batches for tensor in (*batch.args, *batch.kwargs.values()))
        return Fingerprint(
            _digest(model.state_dict().values()),
            hashlib.sha256(plan.to_json().encode()).hexdigest(),
            _digest(tensors),
            len(batches),
            batches.images,
            seed,
        )


@dataclass(frozen=True)
class CalibrationState:
    """`done` batches of a calibration, and the tensors of its observers: layer -> field -> tensor."""

    fingerprint: Fingerprint
    done: int
    observers: dict[str, dict[str, Tensor]]

    @staticmethod
    def of(fingerprint: Fingerprint, done: int, observers: dict[str, MaxObserver]) -> "CalibrationState":
        return CalibrationState(fingerprint, done, {name: o.state() for name, o in observers.items()})

    def save(self, path: str | Path) -> None:
        """Replace the file at `path`, all of it or nothing; a link is followed."""
        tensors = {
            f"{n}{SEPARATOR}{f}": t.contiguous() for n, state in self.observers.items() for f, t in state.items()
        }
        metadata = {"format": FORMAT, "done": str(self.done), "fingerprint": json.dumps(asdict(self.fingerprint))}
        files.write_file(path, save(tensors, metadata=metadata))

    @staticmethod
    def load(path: str | Path, expected: Fingerprint) -> "CalibrationState":
        """Read a state. Raises `CalibrationError` if it is not one, or belongs to another calibration."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        except SafetensorError as error:
            raise CalibrationError(f"{path}: expected a calibration state; got one that cannot be read") from error
        if metadata.get("format") != FORMAT:
            raise CalibrationError(f"{path}: expected a calibration state ({FORMAT}); got {metadata.get('format')!r}")
        found = Fingerprint(**json.loads(metadata["fingerprint"]))
        if found != expected:
            mine, theirs = asdict(expected), asdict(found)
            differing = ", ".join(
                f"{k} {_short(mine[k])} (got {_short(theirs[k])})" for k in mine if mine[k] != theirs[k]
            )
            raise CalibrationError(
                f"{path}: expected a state of this calibration, with {differing}; delete it to restart"
            )
        observers: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, _, field = name.rpartition(SEPARATOR)
            observers.setdefault(layer, {})[field] = tensor
        return CalibrationState(found, int(metadata["done"]), observers)


def _short(value: str | int) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
