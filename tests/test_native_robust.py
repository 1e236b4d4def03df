"""The native library under conditions that are not good: no memory, a cache that was cut off, unusual compilers."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import vqvit
from vqvit import _build, native
from vqvit.backends import cpu

ROOT = Path(vqvit.__file__).resolve().parents[1]
CSRC = native.csrc_directory()

pytestmark = [
    pytest.mark.skipif(CSRC is None or shutil.which("g++") is None, reason="no sources, or no g++"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}"),
]

LIMITED = """
import gc, resource, sys, torch, vqvit
threads = int(sys.argv[1])
torch.set_num_threads(threads)
vqvit.backend("cpu")
ops = torch.ops.vqvit


def gemm(size):
    a, b = torch.ones(4, size, dtype=torch.int8), torch.ones(size, size, dtype=torch.int8)
    return lambda: ops.int8_mm(a, b)


def attention(tokens):
    codes = torch.ones(1, threads, tokens, 256, dtype=torch.int8)
    scale = torch.ones(1, threads, tokens)
    query, column = codes[:, :, :64].contiguous(), torch.ones(1, threads, 256)
    return lambda: ops.int8_attention(query, codes, codes, scale[:, :, :64].contiguous(), scale, column, 0.125)


for make, size in ((gemm, 6000), (attention, 32_768)):
    make(256)()  # threads and small scratch are there
    large = make(size)
    gc.collect()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))
    try:
        large()
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    make(256)()
print("alive")
"""


def python(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], env=env, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_memory_limit_is_a_memory_error(threads):
    """Also where a thread of a parallel region meets it; the process goes on."""
    done = python(LIMITED, str(threads), MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr
    expected = "expected room for its scratch; there is not enough memory"
    ops = ("int8_mm", "int8_attention")
    assert done.stdout.splitlines() == [*(f"vqvit_cpu_{op}: {expected}" for op in ops), "alive"]


@pytest.fixture
def wrapped(tmp_path, monkeypatch):
    """g++ behind another program, as behind ccache, which logs what it is called with."""
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec "$@"\n')
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("VQVIT_CACHE", str(tmp_path / "cache"))
    return launcher


def test_a_compiler_with_arguments(wrapped, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{wrapped} g++ -DEXTRA='a b'")
    assert _build.compiler_command(_build.CPU) == [str(wrapped), "g++", "-DEXTRA=a b"]
    assert "Free Software Foundation" in _build.compiler_version(_build.CPU)
    spaced = tmp_path / "with space"
    spaced.mkdir()
    shutil.copy(wrapped, spaced / "g++")
    monkeypatch.setenv("CXX", str(spaced / "g++"))
    assert _build.compiler_command(_build.CPU) == [str(spaced / "g++")], "a path with a space is one word"
    for wrong, message in (("absent-g++ -O2", "'absent-g\\+\\+ -O2' not found"), ("g++ 'x", "cannot be understood")):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(_build.BuildError, match=message):
            _build.compiler_command(_build.CPU)


def test_builds_with_a_compiler_with_arguments(wrapped, monkeypatch, tmp_path):
    small = tmp_path / "csrc"
    (small / "cpu").mkdir(parents=True)
    (small / "cpu" / "one.cpp").write_text('extern "C" int one() { return EXTRA; }\n')
    monkeypatch.setenv("CXX", f"{wrapped} g++ -DEXTRA=1")
    _build.build(small, _build.CPU, tmp_path / "lib.so")
    assert (tmp_path / "lib.so").is_file() and "-DEXTRA=1" in (tmp_path / "calls").read_text()


def test_a_cached_library_that_was_cut_off_is_built_again(tmp_path, monkeypatch):
    """As after a full disk or a power cut; opening it would end the process with SIGBUS."""
    small = tmp_path / "csrc"
    (small / "cpu").mkdir(parents=True)
    (small / "cpu" / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setenv("VQVIT_CACHE", str(tmp_path / "cache"))
    path = native.cached_library(small, _build.CPU)
    whole = path.read_bytes()
    assert not native._is_cut_off(path)
    for damaged in (whole[: len(whole) // 2], whole[:10], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        assert native._is_cut_off(path) == (len(damaged) < len(whole))
        assert native.cached_library(small, _build.CPU) == path and path.stat().st_size == len(whole)
        native._open(path)
    path.parent.with_suffix(".sha256").unlink()
    native.cached_library(small, _build.CPU)
    assert path.parent.with_suffix(".sha256").is_file()


def test_a_library_in_the_package_that_was_cut_off_is_not_opened(tmp_path):
    code = (
        "import pathlib, sys, vqvit\nfrom vqvit import native\n"
        "package = pathlib.Path(sys.argv[1])\n"
        "native.csrc_directory = lambda: None\nnative._PACKAGE = package\n"
        "print(vqvit.backends.unavailable('cpu'))"
    )
    (tmp_path / "_lib").mkdir()
    library = Path(native.cpu()._name).read_bytes()
    (tmp_path / "_lib" / _build.CPU.file).write_bytes(library[: len(library) // 2])
    done = python(code, str(tmp_path))
    assert done.returncode == 0 and "nor sources to build it from" in done.stdout, done.stderr
