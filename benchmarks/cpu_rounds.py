"""Worker processes, one for each engine, and the rounds in which they take turns: only one of them ever runs."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TURN_S = 0.25
"""What an engine runs before the next one's turn, in at least one call."""

MIN_ROUNDS = 5

OPEN_TIMEOUT_S, CALL_TIMEOUT_S = 600, 120
"""Compilers take minutes; a call, or a turn, of the largest model takes seconds."""


class WorkerFailureError(RuntimeError):
    """An engine failed, or its process died or did not answer; the message says which."""


class Worker:
    """A process that serves requests (`cpu_worker.py`).

    It is stopped between them: threads of libraries that spin after a call would take time from the next engine.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path):
        self.log = log
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=dict(environment)
            )
        self._received = b""

    def ask(self, request: dict, timeout_s: float) -> dict:
        """The answer to a request. Raises `WorkerFailureError`."""
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError as error:
            raise WorkerFailureError(self._last_words()) from error
        answer = json.loads(self._line(timeout_s))
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise WorkerFailureError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _line(self, timeout_s: float) -> bytes:
        end = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise WorkerFailureError(f"no answer in {timeout_s:g} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise WorkerFailureError(self._last_words())
            self._received += part
        line, self._received = self._received.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        status = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"the process ended with status {status}" + (f": {lines[-1]}" if lines else "")

    def _signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


@dataclass
class Entry:
    """What is known of one engine at one batch size: figures as they come, or why there are none."""

    worker: Worker | None = None
    opened: dict = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    outputs: np.ndarray | None = None
    failure: str | None = None

    def fail(self, reason: str) -> None:
        self.failure, self.samples = reason, []
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def python_worker(environment: Mapping[str, str], log: Path) -> Worker:
    return Worker([sys.executable, str(Path(__file__).with_name("cpu_worker.py"))], environment, log)


def ask(entry: Entry, request: dict, timeout_s: float) -> dict | None:
    """The worker's answer, or None after a failure, which the entry then keeps."""
    try:
        return entry.worker.ask(request, timeout_s)
    except WorkerFailureError as error:
        entry.fail(str(error))
        return None


def take_turns(entries: Mapping[str, Entry], seconds: float, min_rounds: int = MIN_ROUNDS) -> int:
    """Fill the samples of every entry that has not failed, in rounds whose order rotates; returns how many.

    Calls shorter than a turn come after an unmeasured one, which refills the caches. The first turn is one call.

    Args:
        seconds: stop after the first round that ends later than this, but not before `min_rounds` rounds.
    """
    end, rounds = time.monotonic() + seconds, 0
    while rounds < min_rounds or time.monotonic() < end:
        names = [name for name, entry in entries.items() if entry.failure is None]
        if not names:
            break
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            entry = entries[name]
            request = {"do": "run", **turn(entry.samples)}
            if (answer := ask(entry, request, CALL_TIMEOUT_S)) is not None:
                entry.samples += answer["ms"]
        rounds += 1
    return rounds


def turn(samples: list[float]) -> dict:
    """How many calls the next turn has, and whether an unmeasured one comes first."""
    if not samples:
        return {"calls": 1, "warm": True}
    usual = float(np.median(samples)) / 1e3
    return {"calls": max(1, round(TURN_S / usual)), "warm": usual < TURN_S}
