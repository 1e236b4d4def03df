"""Child processes that hang, abort, vanish or babble: what they had found arrives, and their end is told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqvit import children
from vqvit.children import Child

HEAD = f"""
import ctypes, json, os, signal, subprocess, sys, time
def say(**message):
    with open(os.environ[{children.ROWS!r}], "a") as file: file.write(json.dumps(message) + "\\n")
skip = int(os.environ[{children.SKIP!r}])
"""


def child(code: str, name: str = "one", limit: float = 20.0, **options) -> Child:
    return Child(name, (sys.executable, "-S", "-c", HEAD + code), 1.0, limit, **options)


def run(*planned: Child, folder: Path, seconds: float = 60.0, capacity: int = 2) -> dict[str, children.Outcome]:
    found = children.run(planned, folder, capacity, time.monotonic() + seconds)
    return {outcome.name: outcome for outcome in found}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


WAYS = {
    "abort": ("ctypes.CDLL(None).abort()", "killed by SIGABRT at item 2"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL at item 2"),
    "bad exit": ("print('no memory', flush=True); os._exit(7)", "exit status 7: no memory at item 2"),
    "silent exit": ("os._exit(0)", "exit status 0, but it never came to its end at item 2"),
    "device": (f"os._exit({children.DEVICE_LOST})", "the device was lost at item 2"),
    "hang": (
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); ctypes.PyDLL(None).sleep(1000)",
        "killed, silent for 1 s at item 2",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_death_keeps_the_rows_before_it_and_is_told(way, tmp_path):
    death, said = WAYS[way]
    code = f"say(doing='item 1'); say(row={{'n': 1}}); say(doing='item 2'); {death}"
    outcome = run(child(code, silence=1.0), folder=tmp_path)["one"]
    assert outcome.rows == [{"n": 1}] and outcome.problem == said and outcome.deaths == ["item 2"]


def test_a_child_that_ends_well_has_no_problem(tmp_path):
    code = "say(facts={'gpu': 'x'}); say(doing='item'); say(row={'n': 1}); say(end=True)"
    outcome = run(child(code), folder=tmp_path)["one"]
    assert (outcome.rows, outcome.facts, outcome.said, outcome.deaths) == ([{"n": 1}], {"gpu": "x"}, "", [])
    failed = run(child(code + "\nsys.exit(1)"), folder=tmp_path)["one"]
    assert failed.said == "", "all its work is done: the status says that a row is wrong"
    accused = run(child(code + "\nprint('ERROR SUMMARY: 1 error'); sys.exit(9)"), folder=tmp_path)["one"]
    assert accused.problem == "exit status 9: ERROR SUMMARY: 1 error at item", "as a sanitizer ends what it runs"


def test_half_a_line_and_babble_are_dropped_with_a_note(tmp_path):
    code = (
        "say(row={'n': 1})\n"
        f"file = open(os.environ[{children.ROWS!r}], 'a')\n"
        'file.write(\'== babble ==\\n[1]\\n{"row": {"n": 2\'); file.close()\n'
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    outcome = run(child(code), folder=tmp_path)["one"]
    assert outcome.rows == [{"n": 1}]
    assert outcome.said.count("a line that is no message was dropped") == 2 and "babble" in outcome.said
    assert "a half-written last line was dropped" in outcome.said and "SIGKILL" in outcome.problem


def test_a_restarted_child_goes_on_behind_what_killed_it(tmp_path):
    code = (
        "say(doing='imports')\n"
        "for n in range(skip, 4):\n"
        "    say(doing=f'item {n}', item=True)\n"
        "    if n in (1, 2): os.abort()\n"
        "    say(row={'n': n})\n"
        "say(end=True)"
    )
    outcome = run(child(code, restarts=2), folder=tmp_path)["one"]
    assert [row["n"] for row in outcome.rows] == [0, 3] and outcome.deaths == ["item 1", "item 2"]
    assert outcome.problem == "" and outcome.said.count("restarted: killed by SIGABRT") == 2
    outcome = run(child(code, restarts=1), folder=tmp_path)["one"]
    assert [row["n"] for row in outcome.rows] == [0] and outcome.problem == "killed by SIGABRT at item 2"


def test_a_limit_kills_the_whole_group_and_what_left_it(tmp_path):
    code = (
        "sleep = [sys.executable, '-S', '-c', 'import time; time.sleep(1000)']\n"
        "inside, outside = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)\n"
        "say(row={'pids': [os.getpid(), inside.pid, outside.pid]})\n"
        "time.sleep(1000)"
    )
    outcome = run(child(code, limit=1.5), folder=tmp_path)["one"]
    assert "its limit" in outcome.problem
    (pids,) = [row["pids"] for row in outcome.rows]
    time.sleep(0.2)
    assert [alive(pid) for pid in pids] == [False] * 3


def test_the_end_of_the_run_cuts_a_child_off_and_starts_no_other(tmp_path):
    code = "say(row={'n': 1}); time.sleep(1000)"
    outcomes = run(child(code), child(code, "two"), folder=tmp_path, seconds=1.0, capacity=1)
    assert "the run's end" in outcomes["one"].problem and outcomes["one"].rows == [{"n": 1}]
    assert outcomes["two"].problem == "not started: the time is over" and not outcomes["two"].started


def test_children_wait_for_others_and_for_room(tmp_path):
    code = "start = time.time(); time.sleep(0.2); say(row={'start': start, 'end': time.time()}); say(end=True)"
    planned = [child(code, "a", weight=2), child(code, "b"), child(code, "c", after=("d",)), child(code, "d")]
    times = {name: o.rows[0] for name, o in run(*planned, folder=tmp_path, capacity=2).items()}
    assert times["b"]["start"] >= times["a"]["end"] and times["c"]["start"] >= times["d"]["end"]
    planned_times = children.schedule(planned, 2)
    assert planned_times == {"a": (0, 1), "b": (1, 2), "d": (1, 2), "c": (2, 3)}


def test_a_command_that_cannot_run_is_told(tmp_path):
    outcome = run(Child("one", ("/no/such/program",), 1.0, 5.0), folder=tmp_path)["one"]
    assert "cannot run /no/such/program" in outcome.problem


def test_children_die_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from vqvit import children\n"
        "from vqvit.children import Child, die_with_parent\n"
        "if sys.argv[1] == 'child':\n"
        "    die_with_parent(); children.Reporter().row({'n': 1}); time.sleep(1000)\n"
        "command = (sys.executable, '-c', CODE, 'child', sys.argv[2])\n"
        "list(children.run([Child('one', command, 1, 100)], Path(sys.argv[2]), 1, time.monotonic() + 100))\n"
    )
    command = [sys.executable, "-c", f"CODE = {code!r}\nexec(CODE)", "parent", str(tmp_path)]
    parent = subprocess.Popen(command, cwd=Path(children.__file__).parents[1])
    rows, deadline = tmp_path / "one.rows", time.monotonic() + 60
    while not (rows.exists() and rows.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
        assert parent.poll() is None
    (pid,) = children._descendants(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    children.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        children.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_reporter_skips_what_earlier_lives_began(tmp_path, monkeypatch):
    monkeypatch.setenv(children.ROWS, str(tmp_path / "rows"))
    monkeypatch.setenv(children.SKIP, "2")
    monkeypatch.setenv(children.FATAL, json.dumps(["c"]))
    reporter = children.Reporter()
    assert [reporter.begin(item) for item in "abcd"] == [False, False, True, True]
    assert not reporter.survived("c") and reporter.survived("d")
    messages = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert messages == [{"doing": "c", "item": True}, {"doing": "d", "item": True}]
