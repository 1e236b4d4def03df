"""The AVX-512 VNNI and AVX-VNNI kernels on CPUs that lack these, emulated: the op cases, bit for bit."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulate
import pytest

from vqvit import native

NEWER = {"avx_vnni", "avx512_vnni"}


def test_op_cases_on_emulated_kernels():
    if native.cpu_unavailable() or "avx2" not in native.cpu_isa_available():
        pytest.skip("needs the native library and AVX2")
    if NEWER <= set(native.cpu_isa_available()):
        pytest.skip("this CPU runs them: test_ops_parity.py does")
    command = [sys.executable, Path(emulate.__file__), "-k", "avx_vnni or avx512_vnni or test_cpu_isa"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 600 and "skipped" not in done.stdout


def test_sources_that_changed_are_noticed(tmp_path, monkeypatch):
    csrc = shutil.copytree(native.csrc_directory(), tmp_path / "changed")
    kernels = csrc / "cpu" / emulate.KERNELS[0]
    kernels.write_text(kernels.read_text().replace("#pragma GCC target", "#pragma GCC other"))
    monkeypatch.setattr(native, "csrc_directory", lambda: csrc)
    with pytest.raises(ValueError, match="expected one target and the features it needs; got 0 and 1"):
        emulate.emulated_sources(tmp_path)
