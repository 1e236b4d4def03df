"""Reads the weights of an exported model: a safetensors file, which may come from a stranger.

The file: its header's length (8 bytes, little endian), the header, JSON of {name: {dtype, shape, data_offsets}}, and
the tensors, one after the other without a gap. Nothing is allocated before the header agrees with the file's length,
and what is hashed is what is used: the file is read once.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vqvit import layouts, native
from vqvit.serving import int8_ops
from vqvit.serving.program import MOST_DIMENSIONS, MOST_JSON, ProgramError, expect, parsed, shortened

ALIGNMENT = 64  # bytes: a cache line and a zmm register, so that no load of weights touches two lines
MOST_SIZE = 1 << 40

DTYPES = {"F32": np.dtype("<f4"), "I8": np.dtype(np.int8), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
"""By their name in safetensors."""


@dataclass(frozen=True)
class Tensor:
    """What the header says of a tensor; start: of its bytes, behind the header."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def in_panels(self) -> bool:
        return self.dtype == np.int8 and len(self.shape) == 4

    @property
    def padded_size(self) -> tuple[int, int]:
        """(N, K) of a weight in panels, what pads them included."""
        return self.shape[0] * layouts.PANEL, (self.shape[1] - 1) * layouts.K_GROUP


class WeightFile:
    """An open file of weights, whose header is checked. Raises `ProgramError` for another file."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = open(path, "rb")
        try:
            self._digest = hashlib.sha256()
            self.tensors = self._header()
        except ProgramError as error:
            self.close()
            raise ProgramError(f"{path}: {error}") from error

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def load(self, sha256: str, threads: int) -> dict[str, np.ndarray]:
        """Every tensor, read-only, in one block of memory, each on a cache line of its own; int8 weights, panels in the
        file, in the layout that this machine's kernels are fastest with. Raises `ProgramError` for another digest.

        One large block also gets large pages where the system gives them.
        """
        strips = native.cpu_weight_layout() == "strips"
        shapes = {
            name: layouts.shape_of("strips", *tensor.padded_size) if strips and tensor.in_panels else tensor.shape
            for name, tensor in self.tensors.items()
        }
        starts, total = {}, 0
        for name, shape in shapes.items():
            starts[name] = total
            total += -(-math.prod(shape) * self.tensors[name].dtype.itemsize // ALIGNMENT) * ALIGNMENT
        block = np.empty(total + ALIGNMENT, np.uint8)
        offset = -block.ctypes.data % ALIGNMENT
        weights = {}
        for name, tensor in self.tensors.items():  # in the order of the file
            shape, start = shapes[name], offset + starts[name]
            size = math.prod(shape) * tensor.dtype.itemsize
            array = block[start : start + size].view(tensor.dtype).reshape(shape)
            if shape == tensor.shape:
                self._read_into(block[start : start + size])
            else:
                panels = np.empty(tensor.shape, np.int8)
                self._read_into(panels.reshape(-1).view(np.uint8))
                int8_ops.reorder_weight(threads, panels, *tensor.padded_size, array)
            array.flags.writeable = False
            weights[name] = array
        if (digest := self._digest.hexdigest()) != sha256:
            raise ProgramError(
                f"{self.path}: expected SHA-256 {sha256[:16]}...; got {digest[:16]}...: truncated or corrupted"
            )
        return weights

    def _read_into(self, target: np.ndarray) -> None:
        view = memoryview(target)
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise ProgramError(f"{self.path}: expected {len(view)} more bytes; the file ends: truncated")
            self._digest.update(view[:count])
            view = view[count:]

    def _header(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of their bytes."""
        length = os.fstat(self._file.fileno()).st_size
        first = self._file.read(8)
        size = int.from_bytes(first, "little")
        expect(len(first) == 8 and size <= length - 8, f"a header inside of {length} bytes", f"{size} bytes: truncated")
        expect(size <= MOST_JSON, f"a header of at most {MOST_JSON} bytes", size)
        text = self._file.read(size)
        expect(len(text) == size, f"a header of {size} bytes", f"{len(text)}: truncated")
        self._digest.update(first)
        self._digest.update(text)
        raw = parsed(text)
        expect(isinstance(raw, dict), "a header: an object of tensors by name", raw)
        found = {name: _tensor(name, entry) for name, entry in raw.items() if name != "__metadata__"}
        tensors = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].bytes)))
        end = 0
        for name, tensor in tensors.items():
            expect(tensor.start == end, f"the bytes of {shortened(name)} from {end} on", tensor.start)
            end += tensor.bytes
        received = length - 8 - size
        expect(end == received, f"{end} bytes of tensors", f"{received}: truncated or corrupted")
        return tensors


def _tensor(name: str, raw: object) -> Tensor:
    name, fields = shortened(name), {"dtype", "shape", "data_offsets"}
    expect(isinstance(raw, dict) and raw.keys() == fields, f"{', '.join(sorted(fields))} of {name}", raw)
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    expect(isinstance(dtype, str) and dtype in DTYPES, f"{name} of {', '.join(DTYPES)}", dtype)
    sizes = isinstance(shape, list) and all(type(size) is int and 1 <= size <= MOST_SIZE for size in shape)
    expect(sizes and len(shape) <= MOST_DIMENSIONS, f"a shape of sizes of at least 1 for {name}", shape)
    expect(
        isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets),
        f"two offsets for {name}",
        offsets,
    )
    tensor = Tensor(tuple(shape), DTYPES[dtype], offsets[0])
    expect(offsets[1] - offsets[0] == tensor.bytes, f"{tensor.bytes} bytes for {name}", offsets)
    if tensor.in_panels:
        panels = shape[1] >= 2 and shape[2:] == [layouts.PANEL, layouts.K_GROUP]
        expect(panels, f"panels (·, 2 or more, {layouts.PANEL}, {layouts.K_GROUP}) for {name}", shape)
    return tensor
