"""A process that opens one engine and answers requests: one JSON object a line on stdin, one a line on stdout.

`do` is the request's name:
    open     engine, path, batch, threads, images (.npy)   load_s, first_s, resident_mb, anonymous_mb
    run      calls, warm                                   ms: a list
    outputs  path                                          nothing; outputs (N, D) of all images in that .npy file

A request that fails is answered by {"error": ...}. What libraries print goes to stderr.
"""

import ctypes
import gc
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np

WARMUP_CALLS = 3
"""Before memory is read: allocators and thread pools have then taken what they keep."""

MEGABYTE = 1e6

PR_SET_PDEATHSIG = 1


class Server:
    """One engine, opened by the first request."""

    def open(self, request: dict) -> dict:
        import cpu_engines

        engine = cpu_engines.ENGINES[request["engine"]]
        images, batch = np.load(request["images"]), request["batch"]
        start = time.perf_counter()
        self.session = engine.open(Path(request["path"]), engine.options, batch, request["threads"])
        loaded = time.perf_counter()
        self.batches = [self.session.place(images[i : i + batch]) for i in range(0, len(images), batch)]
        placed = time.perf_counter()
        self.session.fetch(self.session.call(self.batches[0]))
        first = time.perf_counter()
        for _ in range(WARMUP_CALLS - 1):
            self.session.call(self.batches[0])
        gc.collect()
        return {"load_s": loaded - start, "first_s": first - placed + loaded - start, **memory_of_this_process()}

    def run(self, request: dict) -> dict:
        if request["warm"]:
            self.session.call(self.batches[0])
        return {"ms": [self._timed() for _ in range(request["calls"])]}

    def outputs(self, request: dict) -> dict:
        # An engine may reuse its output buffer: each is copied before the next call.
        found = [np.array(self.session.fetch(self.session.call(placed))) for placed in self.batches]
        np.save(request["path"], np.concatenate(found).astype(np.float32))
        return {}

    def _timed(self) -> float:
        start = time.perf_counter()
        self.session.call(self.batches[0])
        return (time.perf_counter() - start) * 1e3


def memory_of_this_process() -> dict[str, float]:
    """Resident MB (RSS), and the part of it that no file backs, which the kernel cannot drop. Linux only.

    Not PSS: it would divide libtorch's pages among the engines that share it here, and serve those better than others.
    """
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE))
    return {
        "resident_mb": int(fields["Rss"]) * 1024 / MEGABYTE,
        "anonymous_mb": int(fields["Anonymous"]) * 1024 / MEGABYTE,
    }


def serve(lines, answer, server: object) -> None:
    """Answer each request by the method of `server` that `do` names."""
    for line in lines:
        request = json.loads(line)
        try:
            reply = getattr(server, request["do"])(request)
        except Exception as error:  # whatever a library raises is this engine's result
            reply = {"error": f"{type(error).__name__}: {error}"}
        answer.write(json.dumps(reply) + "\n")
        answer.flush()


def end_with_parent() -> None:
    """Linux ends this process when its parent dies, even while it is stopped; it would wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, answers, Server())


if __name__ == "__main__":
    main()
