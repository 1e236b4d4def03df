"""The comparison of CPU builds: who runs when, and what stops it."""

from types import SimpleNamespace

import cpu_builds
import numpy as np
import pytest


class Server:
    """A session whose outputs are those of the library in use."""

    inputs = (SimpleNamespace(shape=("batch", 3, 4, 4)),)

    def __init__(self, monkeypatch):
        self.used = []
        monkeypatch.setattr(cpu_builds.native, "use_cpu", self.used.append)

    def __call__(self, images):
        assert images.shape == (2, 3, 4, 4) and images.dtype == np.float32
        return {"logits": images.sum((1, 2, 3)) + self.used[-1]}


def test_builds_take_turns_and_are_compared_with_the_checkout(monkeypatch):
    server = Server(monkeypatch)
    rows = cpu_builds.compare({cpu_builds.HERE: 0.0, "HEAD": -0.0, "main": 0.0}, server, 2, seconds=0.0)
    assert [row[:2] for row in rows] == [["checkout", "2"], ["HEAD", "2"], ["main", "2"]]
    assert rows[0][-1] == "1.000"
    assert server.used.count(0.0) == len(server.used) and len(server.used) >= 3 * 6


def test_other_bits_are_not_timed(monkeypatch):
    builds = {cpu_builds.HERE: 0.0, "HEAD": 1e-3}
    with pytest.raises(RuntimeError, match=r"HEAD: expected the bits of checkout, or --difference 0; got 0\.0"):
        cpu_builds.compare(builds, Server(monkeypatch), 2, seconds=0.0)
    assert len(cpu_builds.compare(builds, Server(monkeypatch), 2, seconds=0.0, allowed=0.1)) == 2


def test_another_interface_is_refused(tmp_path, monkeypatch):
    header = tmp_path / "vqvit.h"
    header.write_text((cpu_builds.ROOT / "csrc" / "vqvit.h").read_text().replace("/* Hash", "/* The hash"))
    assert cpu_builds.declarations(tmp_path) == cpu_builds.declarations(cpu_builds.ROOT / "csrc")
    monkeypatch.setattr(cpu_builds, "declarations", str)
    with pytest.raises(ValueError, match=r"expected the interface of this checkout .*; HEAD has another"):
        cpu_builds.sources("HEAD", tmp_path)


def test_a_revision_that_git_does_not_know(tmp_path):
    with pytest.raises(ValueError, match="expected one that git knows; got 'no-such-revision'"):
        cpu_builds.sources("no-such-revision", tmp_path)
