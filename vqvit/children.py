"""Work in child processes that may hang, abort or be killed: whatever they had found by then is kept.

A child is the leader of a session and process group of its own. It appends one JSON object a line to the file that
$VQVIT_ROWS names: {"facts": {...}} about its machine, {"doing": WHAT} before each step, with "item": true where a
restart may go on behind it, {"row": {...}} for each result, and {"end": true} last. `run` reads these files as they
grow, so a child that dies costs what it had not written yet, and the outcome says why it died and at which item. A
child may be restarted behind that item.

A child is killed with its whole group, and so hard that no handler is asked: SIGKILL reaches a process that hangs in C.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROWS, SKIP, FATAL = "VQVIT_ROWS", "VQVIT_SKIP", "VQVIT_FATAL_ITEMS"
"""Environment of a child: its file of rows; items that earlier lives began; a JSON list of those that they died at."""

DEVICE_LOST = 3
"""Exit status of a child whose device answers no call any more."""

WRONG = 1
"""Exit status of a child that did all of its work, and whose rows say what is wrong."""

POLL_SECONDS = 0.02
GRACE_SECONDS = 5.0
"""How long a killed process may take to go: one that waits inside the kernel, for a driver, is then left behind."""

LOG_BYTES = 20_000


@dataclass(frozen=True)
class Child:
    """A command to run in a process of its own.

    seconds: what it is expected to take; limit: seconds after which it is killed; silence: the same for seconds without
    a line. after: names of children that must have ended before, well or not. weight: its part of `run`'s capacity.
    restarts: how often it may go on behind an item that killed it.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    limit: float
    silence: float | None = None
    after: tuple[str, ...] = ()
    weight: int = 1
    restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a child. problem: why it did not end well, or ""; deaths: items at which it died; log: the end of
    what it printed.
    """

    name: str
    rows: list[dict] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    problem: str = ""
    doing: str = ""
    deaths: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    log: str = ""
    started: bool = True

    @property
    def said(self) -> str:
        """Problem and notes in one line."""
        return "; ".join(filter(None, [self.problem, *self.notes]))


# ---- inside a child -------------------------------------------------------------------------------------------------


class Reporter:
    """How a child written in Python tells its parent what it does and finds."""

    def __init__(self, path: str | None = None):
        path = path or os.environ.get(ROWS)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) if path else 1
        self._skip = int(os.environ.get(SKIP, "0"))
        self._fatal = set(json.loads(os.environ.get(FATAL, "[]")))
        self._begun = 0

    def begin(self, item: str) -> bool:
        """Note that `item` comes next. False if an earlier life of this child began it: go on with the next one."""
        self._begun += 1
        if self._begun <= self._skip:
            return False
        self.doing(item, item=True)
        return True

    def survived(self, item: str) -> bool:
        """False if an earlier life of this child died at `item`."""
        return item not in self._fatal

    def doing(self, what: str, item: bool = False) -> None:
        """Note what comes next. `begin` notes an item."""
        self._say({"doing": what, "item": item})

    def row(self, row: Mapping) -> None:
        self._say({"row": dict(row)})

    def facts(self, **facts: object) -> None:
        self._say({"facts": facts})

    def end(self) -> None:
        """All work is done: without this line an exit, whatever its status, is a failure."""
        self._say({"end": True})

    def _say(self, message: dict) -> None:
        os.write(self._file, (json.dumps(message, default=str) + "\n").encode())


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that happens. Elsewhere it does nothing."""
    import ctypes

    set_parent_death_signal = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


# ---- the parent -----------------------------------------------------------------------------------------------------


def run(
    children: Sequence[Child],
    folder: Path,
    capacity: int,
    deadline: float,
    on_row: Callable[[str, dict], None] = lambda name, row: None,
) -> Iterator[Outcome]:
    """Run children side by side, as many as `capacity` holds, and yield each outcome when it is there.

    They start in the order given; one whose `after` has not ended lets later ones pass. Files go to `folder`. Nothing
    starts after `deadline` (of `time.monotonic`), and nothing lives on. Closing the iterator kills all.
    """
    waiting, running, ended = list(children), [], set()
    known = {child.name for child in children}
    try:
        while waiting or running:
            late = time.monotonic() >= deadline
            for child in _startable(waiting, running, ended, known, capacity) if not late else list(waiting):
                waiting.remove(child)
                if late:
                    ended.add(child.name)
                    yield Outcome(child.name, problem="not started: the time is over", started=False)
                else:
                    running.append(_Running(child, folder, deadline))
            for one in list(running):
                for row in one.poll():
                    on_row(one.child.name, row)
                if one.over:
                    running.remove(one)
                    ended.add(one.child.name)
                    yield one.outcome
            time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.kill()


def _startable(waiting, running, ended, known, capacity) -> Iterable[Child]:
    free = capacity - sum(one.child.weight for one in running)
    for child in list(waiting):
        if any(name in known and name not in ended for name in child.after):
            continue
        weight = min(child.weight, capacity)
        if weight > free:
            return  # a later, lighter one would keep it waiting
        free -= weight
        yield child


def schedule(children: Sequence[Child], capacity: int) -> dict[str, tuple[float, float]]:
    """Start and end of each child, in seconds, if `run` starts them and each takes what is expected."""
    waiting, times, now = list(children), {}, 0.0
    known = {child.name: child for child in children}
    while waiting:
        running = [_Placed(known[name]) for name, (_, end) in times.items() if end > now]
        ended = {name for name, (_, end) in times.items() if end <= now}
        for child in _startable(waiting, running, ended, known, capacity):
            waiting.remove(child)
            times[child.name] = now, now + child.seconds
        later = [end for _, end in times.values() if end > now]
        if waiting and not later:
            raise ValueError(f"children wait for each other: {', '.join(child.name for child in waiting)}")
        now = min(later, default=now)
    return times


@dataclass(frozen=True)
class _Placed:
    child: Child


class _Running:
    """A child's process, and what it has written so far."""

    def __init__(self, child: Child, folder: Path, deadline: float):
        folder.mkdir(parents=True, exist_ok=True)
        stem = child.name.replace("/", "-")
        self.child, self.outcome, self.over = child, Outcome(child.name), False
        self._rows, self._log = folder / f"{stem}.rows", folder / f"{stem}.log"
        for path in (self._rows, self._log):
            path.write_bytes(b"")
        self._start = time.monotonic()
        self._end = min(self._start + child.limit, deadline)
        self._cut = deadline < self._start + child.limit
        self._read, self._begun, self._lives = 0, 0, 0
        self._launch()

    def _launch(self) -> None:
        self._ended, self._partial, self._heard, self._lives = False, b"", time.monotonic(), self._lives + 1
        self.outcome.doing = ""
        environment = {
            **os.environ, **self.child.environment, ROWS: str(self._rows), SKIP: str(self._begun),
            FATAL: json.dumps(self.outcome.deaths), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with open(self._log, "ab") as log:
            try:
                self._process = subprocess.Popen(
                    self.child.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._process = None
                self._finish(f"cannot run {self.child.command[0]}: {error}")

    def poll(self) -> list[dict]:
        """New rows. Sets `over` when the child has ended for good."""
        if self.over:
            return []
        status = self._process.poll()  # before its file is read: nothing can follow then
        rows = self._new_rows()
        now = time.monotonic()
        if status is not None:
            self._sweep()
            self._done(self._verdict(status))
        elif now > self._end:
            self._stop(f"killed after {now - self._start:.0f} s, " + ("the run's end" if self._cut else "its limit"))
        elif self.child.silence is not None and now - self._heard > self.child.silence:
            self._stop(f"killed, silent for {self.child.silence:.0f} s")
        return rows

    def kill(self) -> None:
        """The whole group, and descendants that left it for a session of their own."""
        if self._process is None:
            return
        for pid in (*_descendants(self._process.pid), self._process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.outcome.notes.append("it survives SIGKILL, waiting in the kernel, and was left behind")

    def _sweep(self) -> None:
        """What an ended child left running in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _stop(self, problem: str) -> None:
        self.kill()
        self._new_rows()
        self._done(problem)

    def _verdict(self, status: int) -> str:
        if status == DEVICE_LOST:
            return "the device was lost"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        if status > 0 and not (self._ended and status == WRONG):
            return f"exit status {status}{_last_words(self._log)}"
        return "" if self._ended else f"exit status {status}, but it never came to its end"

    def _done(self, problem: str) -> None:
        if self._partial:
            self.outcome.notes.append("a half-written last line was dropped")
        doing = self.outcome.doing
        if problem and doing:
            self.outcome.deaths.append(doing)
            problem += f" at {doing}"
        if problem and doing and self._lives <= self.child.restarts and time.monotonic() < self._end - 1:
            self.outcome.notes.append(f"restarted: {problem}")
            self._launch()
            return
        self._finish(problem)

    def _finish(self, problem: str) -> None:
        self.outcome.problem = problem
        self.outcome.seconds = time.monotonic() - self._start
        self.outcome.log = _tail(self._log)
        self.over = True

    def _new_rows(self) -> list[dict]:
        with open(self._rows, "rb") as file:
            file.seek(self._read)
            fresh = file.read()
        self._read += len(fresh)
        *lines, self._partial = (self._partial + fresh).split(b"\n")
        if fresh:
            self._heard = time.monotonic()
        return [row for line in lines if line.strip() and (row := self._take(line)) is not None]

    def _take(self, line: bytes) -> dict | None:
        """Keep a line; the row, if it is one."""
        try:
            message = json.loads(line)
            row = message.get("row")
        except (ValueError, AttributeError):
            self.outcome.notes.append(f"a line that is no message was dropped: {line[:60]!r}")
            return None
        if "doing" in message:
            self.outcome.doing = str(message["doing"])
            self._begun += bool(message.get("item"))
        self.outcome.facts |= message.get("facts", {})
        self._ended = self._ended or bool(message.get("end"))
        if row is not None:
            self.outcome.rows.append(row)
        return row


def _descendants(pid: int) -> list[int]:
    """Processes under `pid`, as Linux's /proc tells; empty elsewhere."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, level = [], {pid}
    while level := {child for child, parent in parents.items() if parent in level}:
        found += level
    return found


def _tail(log: Path) -> str:
    data = log.read_bytes()[-LOG_BYTES:]
    return data.decode(errors="replace")


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in _tail(log).splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ", without a word"


def with_environment(child: Child, environment: Mapping[str, str]) -> Child:
    """The child with more in its environment; its own entries count."""
    return dataclasses.replace(child, environment={**environment, **child.environment})


def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the whole new one, whenever this process is killed. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".vqvit-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
