"""`vqvit doctor --gpu` on the twin: what it says when all is right, and that a hang, an abort and wrong bits are found.

The probe meets the defect that it was written for: Hopper GEMMs whose consumers are not ordered.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import gpu_rehearse
import pytest
import torch

from vqvit import _build, backends, children, cli, device_checks, native, probe

pytest.importorskip("triton")
pytest.importorskip("transformers")

CSRC = native.csrc_directory()
PROBED = {"mm": ("70x130x400",), "rows": ("33x300",)}

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or backends.unavailable("cpu") is not None, reason="no compiler, or no CPU kernels"
)


@pytest.fixture
def few(monkeypatch):
    """Two families of the probe and two ops, one of them compared with torch._int_mm; the fixture plants a fault."""
    monkeypatch.setattr(probe, "TWIN", PROBED)
    right = device_checks.children

    def of_two(names, device, size, folder, after=(), weight=1, together=False):
        spec = {"checks": ["int8_mm", "quantize_per_token"], "backends": list(names), "device": device, "size": size}
        found = right(names, device, size, folder, after, weight, together)[:1]
        return [children.Child("bits/two", device_checks._command(spec | {"folder": str(folder)}), 9, 90, restarts=1,
                               environment=found[0].environment)]  # fmt: skip

    monkeypatch.setattr(device_checks, "children", of_two)

    def plant(name: str, fault: str, item: str) -> None:
        run = children.run

        def planted(planned, *arguments):
            wanted = gpu_rehearse.Planted(fault, item, "")
            return run([gpu_rehearse.plant(c, wanted) if c.name == name else c for c in planned], *arguments)

        monkeypatch.setattr(children, "run", planted)

    return plant


def doctor(capsys, *arguments: str) -> tuple[int, dict]:
    status = cli.main(["doctor", "--gpu", "--twin", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


@needs_compiler
def test_a_right_device_is_said_to_be_right(few, capsys):
    status, result = doctor(capsys)
    assert status == 0, result
    assert {check["check"] for check in result["checks"]} == {"build", "probe/mm", "probe/rows", "bits/two"}
    assert {n: re.sub(r"\d+", "N", said) for n, said in result["backends"].items()} == dict.fromkeys(
        ("cuda", "triton", "cpu"), "right to the bit in N results"
    )
    from vqvit.commands import doctor as command

    text = command.to_text(result).splitlines()
    assert text[0] == "the CPU, emulating a GPU" and text[-1].endswith("in 4 processes: all right") and len(text) == 5


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "said"),
    [("hang", "killed, silent for 20 s"), ("wrong", "other bits")],
)
def test_a_fault_costs_its_own_check_and_is_told(few, capsys, fault, said):
    few("bits/two", fault, "int8_mm 192x64 on triton, M = 17")
    status, result = doctor(capsys)
    assert status == 1
    checks = {check["check"]: check for check in result["checks"]}
    assert said in checks["bits/two"]["first"] and sum(checks["bits/two"]["results"].values()) > 10
    assert all(not checks[f"probe/{family}"]["wrong"] for family in PROBED)
    if fault == "wrong":
        assert "bits/two" in result["backends"]["triton"]
    else:
        assert checks["bits/two"]["died_at"] == ["int8_mm 192x64 on triton, M = 17"]
        assert "not all checked, for bits/two died" in result["backends"]["triton"]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["doctor", "--gpu"]) == 2
    assert "doctor: expected a CUDA device; torch" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 2
    assert "doctor: expected --gpu" in capsys.readouterr().err


# ---- the probe ------------------------------------------------------------------------------------------------------

GEMM_UNITS = ("gemm_s8*.cu", "library.cu", "*.cpp")


@pytest.fixture(scope="module")
def program() -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    return probe.program(twin=True)


def unordered_twin(folder: Path) -> Path:
    """The GEMMs of the CUDA library's twin, where the consumers of the Hopper kernel do not wait for their turns."""
    shutil.copytree(CSRC, folder / "csrc")
    for path in (folder / "csrc/cuda").iterdir():
        source = path.read_text()
        path.write_text(re.sub(r"barrier_wait\(turns[^;]*;", ";", source))
    library = _build.Library("twin.so", "cuda", GEMM_UNITS, "c++", _build.CXX_FLAGS)
    _build.build(folder / "csrc", library, folder / "twin.so")
    return folder / "twin.so"


def probed(program: Path, library: Path, *cases: str) -> tuple[int, list[dict]]:
    environment = {**probe.TWIN_ENVIRONMENT, "PATH": ""}
    done = subprocess.run([program, library, "-", *cases], capture_output=True, text=True, timeout=60, env=environment)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert messages[-1] == {"end": True}, done.stderr
    return done.returncode, [message["row"] for message in messages if "row" in message]


@pytest.mark.long
def test_the_probe_finds_consumers_that_are_not_ordered(program, tmp_path):
    """Two tiles a block: consumer 2 takes stages that are several phases away. One tile a block does not show it."""
    status, rows = probed(program, unordered_twin(tmp_path), "mm/128x128x1024", "mm/128x256x1024")
    assert status == 1 and [bool(row["wrong"]) for row in rows] == [False, True]


def test_the_probe_finds_wrong_bits_and_stores_beyond_the_end(program, tmp_path):
    """A library of one function: right, one value off by one, one value behind the output."""
    source = (
        '#include "vqvit.h"\n'
        'extern "C" const char* vqvit_cuda_source_hash(void) { return "planted"; }\n'
        'extern "C" const char* vqvit_cuda_last_error(void) { return "no such thing"; }\n'
        'extern "C" int vqvit_cuda_int8_mm(const vqvit_gemm* g, int32_t* acc, void*) {\n'
        "    if (g->m == 7) return VQVIT_CUDA_ERROR;\n"
        "    for (int64_t i = 0; i < g->m; ++i)\n"
        "        for (int64_t j = 0; j < g->n; ++j) {\n"
        "            int32_t sum = g->m == 5 && i == 3 && j == 2;\n"
        "            for (int64_t k = 0; k < g->k; ++k) sum += g->a[i * g->k + k] * g->b[j * g->k + k];\n"
        "            acc[i * g->n + j] = sum;\n"
        "        }\n"
        "    if (g->m == 6) acc[g->m * g->n] = 0;\n"
        "    static int calls = 0;\n"
        "    if (g->m == 8) acc[0] += ++calls == 3;\n"
        "    return VQVIT_OK;\n"
        "}\n"
    )
    (tmp_path / "planted.cpp").write_text(source)
    library = tmp_path / "planted.so"
    command = ["g++", "-shared", "-fPIC", f"-I{CSRC}", str(tmp_path / "planted.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    cases = [f"mm/{m}x9x20" for m in (4, 5, 6, 7, 8)]
    status, rows = probed(program, library, *cases, "linear/4x9x20", "rows/4x9")
    assert status == 1 and [row["case"] for row in rows] == [*cases, "linear/4x9x20", "rows/4x9"]
    assert [row["note"] for row in rows] == [
        "", "", "a store beyond the end of an output", "no such thing", "two launches gave different results",
        "vqvit_cuda_int8_linear is missing", "needs the CPU library",
    ]  # fmt: skip
    assert [row["wrong"] > 0 for row in rows] == [False, True, True, True, True, True, True]
    assert rows[0]["checked"] == 4 * 9 * 2 and rows[1]["wrong"] <= 2, "one value, in a sampled row and column"


@pytest.mark.parametrize(
    ("case", "said"),
    [("gemm/1x2x3", "no such kernel family"), ("mm/1x2", "expected 3 positive sizes"), ("mm/1x0x2", "expected 3")],
)
def test_the_probe_refuses_bad_cases(program, case, said):
    done = subprocess.run([program, "/no/library.so", "-", case], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr


def test_the_probe_is_used_prebuilt_only_from_these_sources(program, tmp_path, monkeypatch):
    monkeypatch.setenv(native.PREBUILT, str(tmp_path))
    prebuilt = tmp_path / program.name
    shutil.copy2(program, prebuilt)
    assert probe.program(twin=True) == prebuilt
    prebuilt.write_text("#!/bin/sh\necho 0123456789abcdef\n")
    assert probe.program(twin=True) == program
    prebuilt.write_text("no program")
    assert probe.program(twin=True) == program


@pytest.mark.parametrize("same", [True, False])
def test_a_prebuilt_library_is_used_only_from_these_sources(tmp_path, monkeypatch, same):
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    prebuilt, built = tmp_path / _build.CPU.file, tmp_path / "built.so"
    monkeypatch.setenv(native.PREBUILT, str(tmp_path))
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "package")
    monkeypatch.setattr(native, "csrc_directory", lambda: CSRC)
    monkeypatch.setattr(native, "cached_library", lambda csrc, library: built)
    said = _build.source_hash(CSRC, _build.CPU) if same else "of other sources"
    (tmp_path / "stub.cpp").write_text(f'extern "C" const char* vqvit_cpu_source_hash() {{ return "{said}"; }}')
    for path in (prebuilt, built):
        subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "stub.cpp"), "-o", str(path)], check=True)
    assert Path(native._load(_build.CPU)._name) == (prebuilt if same else built)


def test_cases_of_the_probe_cover_two_and_three_tiles_a_block():
    """On an H100 with tiles of 128 x 128, and of 64 x 128 with group scales."""
    multiprocessors = 132
    for family, rows in (("mm", 128), ("linear", 128), ("linear-groups", 64)):
        tiles = []
        for case in probe.REAL[family]:
            m, n, _ = map(int, case.split("x"))
            tiles.append(-(-m // rows) * -(-n // 128) / multiprocessors)
        assert any(1 < t for t in tiles) and any(2 < t < 3 or t > 3 for t in tiles), family
    assert {int(case.split("x")[2]) for case in probe.REAL["mm"]} == {400, 768, 1024, 3072}
    assert {int(case.split("x")[0]) for case in probe.REAL["mm"]} >= {197, 1576, 12608}
    small = max(-(-int(c.split("x")[0]) // 64) * -(-int(c.split("x")[1]) // 128) for c in probe.SMALL["mm"])
    assert small > multiprocessors, "two tiles a block under a sanitizer"
