"""What every launcher shares: the device's description, row-major views, and the launch options."""

import contextlib
import functools
import logging
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vqvit.kernels.devices import CONFIG_ROWS, config_row, support

logger = logging.getLogger("vqvit")

EXACT = {"enable_fp_fusion": False}
"""Compiler options of every launch: the contract spells out each fused multiply-add (see `kernels/numerics.py`)."""

INTERPRETER = 0
"""Architecture key of the configs that the interpreter runs: few, large tiles, since each tile is a numpy call."""


@dataclass(frozen=True)
class Device:
    """arch: the row of the config tables that serves the device; sms: its multiprocessors."""

    arch: int
    sms: int


@functools.cache
def cuda_device(index: int | None) -> Device:
    """The config row of a CUDA device; a part newer than the tables is told of once."""
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    if capability not in CONFIG_ROWS:
        logger.warning("%s: %s", properties.name, support(capability))
    return Device(config_row(capability), properties.multi_processor_count)


def device_of(tensor: Tensor) -> Device:
    if triton.knobs.runtime.interpret:
        return Device(INTERPRETER, 1)
    return cuda_device(tensor.device.index)


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make `tensor`'s device current, as Triton launches on the current device's current stream."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def row_major(tensor: Tensor) -> Tensor:
    """`tensor` if its last dimension is contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def vector(tensor: Tensor | None) -> Tensor | None:
    """A contiguous 1-D operand, or None."""
    return None if tensor is None else tensor.contiguous()


def absent(like: Tensor) -> Tensor:
    """An empty int32 tensor: an output that was not asked for."""
    return torch.empty(0, dtype=torch.int32, device=like.device)
