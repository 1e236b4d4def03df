"""Cases of a fuzzer in child processes, so that a crash costs one child, and its case is known.

A child writes a line of JSON before each case, one for each finding, and the counts of outcomes when it ends.
"""

import json
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

CASES_OF_A_CHILD = 2000
SECONDS_OF_A_CASE = 120


class Hang(BaseException):
    """A case that took longer than `SECONDS_OF_A_CASE`."""


def _hang(*_: object) -> None:
    raise Hang


def try_cases(indices: Sequence[int], log: Path, run: Callable[[int], str]) -> Counter:
    """In a child: run(index), the name of the outcome, for each index; what it raises is a finding."""
    signal.signal(signal.SIGALRM, _hang)
    counts: Counter[str] = Counter()
    with open(log, "ab", buffering=0) as file:
        for index in indices:
            file.write(f"{json.dumps({'at': index})}\n".encode())
            outcome, text = _tried(run, index)
            counts[outcome] += 1
            if text:
                file.write(f"{json.dumps({'finding': index, 'outcome': outcome, 'text': text[-3000:]})}\n".encode())
        file.write(f"{json.dumps({'counts': counts})}\n".encode())
    return counts


def _tried(run: Callable[[int], str], index: int) -> tuple[str, str]:
    signal.alarm(SECONDS_OF_A_CASE)
    try:
        return run(index), ""
    except Hang:
        return "hang", traceback.format_exc()
    except Exception:
        return "wrong", traceback.format_exc()
    finally:
        signal.alarm(0)


def run_children(command: Sequence[object], first: int, cases: int, log: Path) -> tuple[Counter, list[dict]]:
    """In the parent: outcomes by name, and the findings. `command`: of a child, which takes --first, --cases, --log."""
    counts: Counter[str] = Counter()
    findings: list[dict] = []
    end = first + cases
    while first < end:
        count = min(CASES_OF_A_CHILD, end - first)
        log.write_text("")
        whole = [sys.executable, *command, "--child", "--first", first, "--cases", count, "--log", log]
        done = subprocess.run([str(part) for part in whole], capture_output=True, text=True, errors="replace")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        findings += [entry for entry in entries if "finding" in entry]
        finished = [entry["counts"] for entry in entries if "counts" in entry]
        if finished:
            counts.update(finished[0])
            first += count
            continue
        tried = [entry["at"] for entry in entries if "at" in entry]
        if not tried:
            raise RuntimeError(f"a child did not begin: {done.stderr[-3000:]}")
        counts["tried beside a crash"] += len(tried) - 1
        counts["crash"] += 1
        text = f"status {done.returncode}\n{done.stderr[-6000:]}"
        findings.append({"finding": tried[-1], "outcome": "crash", "text": text})
        first = tried[-1] + 1
    return counts, findings
