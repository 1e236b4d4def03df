"""What the sections of gpu.py share: where and how long they run, and the peaks of a device, measured."""

import time
from dataclasses import dataclass, field

import roofline
import torch

from vqvit import device_checks
from vqvit.children import Reporter
from vqvit.timing import back_to_back, take_turns


class DeviceLostError(RuntimeError):
    """The device answers no call any more: this process can do nothing else with it."""


@dataclass(frozen=True)
class Run:
    """What the sections share: where, on which backends (best first), how much, until when, and who is told."""

    device: torch.device
    backends: tuple[str, ...]
    quick: bool
    deadline: float
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def gpu(self) -> roofline.Gpu:
        """What predictions are made for."""
        return roofline.part(torch.cuda.get_device_name(self.device) if self.cuda else "")

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def failed(self, error: Exception) -> str:
        """How a contender failed, for its row. Raises `DeviceLostError` if that took the device along."""
        if device_checks.device_lost(self.device):
            raise DeviceLostError(str(error)) from error
        return device_checks.short(error)


def copy_rate(run: Run) -> float:
    """Bytes a microsecond, read and written, of a device-to-device copy."""
    source = torch.empty(2**30 if run.cuda else 2**20, dtype=torch.int8, device=run.device)
    target = torch.empty_like(source)
    timer = back_to_back([lambda: target.copy_(source)], run.device)
    return 2 * source.numel() / take_turns({"copy": timer}, 5)["copy"][0]


def int8_rate(run: Run) -> float:
    """int8 operations a microsecond of torch._int_mm on a large square."""
    n = 8192 if run.cuda else 64
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=run.device) for _ in range(2))
    timer = back_to_back([lambda: torch._int_mm(a, b.t())], run.device)
    return 2 * n**3 / take_turns({"mm": timer}, 5)["mm"][0]
