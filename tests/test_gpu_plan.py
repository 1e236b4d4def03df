"""The plan of benchmarks/gpu.py, which must fit its calls, and what is compiled without a GPU and carried to one."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu_ops
import gpu_plan
import gpu_prebuild
import pytest

from vqvit import precompile, probe

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"

# ---- the plan -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    correctness, timings = done.stdout.split("timings, 300 s\n")
    return {"correctness": correctness, "timings": timings}


@pytest.mark.parametrize(("call", "seconds"), gpu_plan.BUDGETS.items())
def test_the_real_plan_fits_its_call(plan, call, seconds):
    fitting, planned, last = re.search(r"(\d+) of (\d+) children fit \d+ s on 16 cores: (\d+) s", plan[call]).groups()
    assert int(last) <= seconds
    left_over = re.findall(r"^(\S+) .* if time is left$", plan[call], re.MULTILINE)
    assert int(planned) - int(fitting) == len(left_over)
    assert {gpu_plan.section_of(name) for name in left_over} <= {"guard", "timeline"}
    assert call == "timings" or not left_over


def test_the_plan_counts_compilations(plan):
    counted, shares, most = (
        int(n) for n in re.search(r"(\d+) Triton .* in (\d+) processes, at most (\d+)", plan["correctness"]).groups()
    )
    assert shares == gpu_plan.OPS_SHARES and 250 < counted < 600 and most >= counted / shares
    slowest = max(float(s) for s in re.findall(r"^ops/triton-\d+ +\d+ +\d+ +(\d+)", plan["correctness"], re.MULTILINE))
    each = gpu_plan.COMPILE_SECONDS + gpu_plan.LAUNCHER_SECONDS
    assert slowest == pytest.approx(gpu_plan.START_SECONDS + each * most, abs=1)


def test_shares_of_the_op_cases_make_all_of_them():
    dealt = [item for index in range(3) for item in gpu_ops.share_of(index, 3)]
    assert sorted(dealt) == sorted(gpu_ops.items()) and len(set(dealt)) == len(dealt)


def test_sanitizers_and_sections_are_planned_in_order_of_value(tmp_path):
    settings = gpu_plan.Settings("cuda", ("cuda", "triton"), 16, tmp_path, {}, tools=probe.SANITIZERS)
    for call, sections in gpu_plan.CALLS.items():
        names = [gpu_plan.section_of(c.name) for c in gpu_plan.children(settings, sections)]
        order = [name for name in dict.fromkeys(names) if name in sections]
        assert order == list(sections), call
    tools = [c for c in gpu_plan.children(settings, ("sanitizer",))]
    assert len(tools) == len(probe.SANITIZERS) * len(probe.SMALL)
    assert all("--tool" in c.command and c.limit < 480 for c in tools)


# ---- what is carried ------------------------------------------------------------------------------------------------


def carried(folder: Path, **changes: str) -> Path:
    """A prebuilt Triton cache of one kernel, made elsewhere."""
    elsewhere = {
        "kernel.json": "/elsewhere/K/kernel.json",
        "kernel.cubin": "/elsewhere/K/kernel.cubin",
        "kernel.ptx": "/x",
    }
    members = {
        "K/__grp__kernel.json.json": json.dumps({"child_paths": elsewhere}),
        "K/kernel.json": "{}",
        "K/kernel.cubin": "code",
    }
    folder.mkdir()
    with tarfile.open(folder / gpu_prebuild.ARCHIVE, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    (folder / gpu_prebuild.MANIFEST).write_text(json.dumps(precompile.identity() | changes))
    return folder


def test_a_prebuilt_triton_cache_is_used_where_it_lies(tmp_path):
    cache = tmp_path / "cache"
    said = gpu_prebuild.install(carried(tmp_path / "prebuilt"), cache)
    assert said.startswith("1 compilations from the prebuilt Triton cache")
    group = json.loads((cache / "K" / "__grp__kernel.json.json").read_text())["child_paths"]
    assert group == {name: str(cache / "K" / name) for name in ("kernel.cubin", "kernel.json")}


@pytest.mark.parametrize("what", ["triton", "triton_key"])
def test_a_cache_of_another_triton_is_ignored(tmp_path, what):
    said = gpu_prebuild.install(carried(tmp_path / "prebuilt", **{what: "other"}), tmp_path / "cache")
    assert f"expected {what}" in said and "got other" in said and not (tmp_path / "cache").exists()
    assert "no prebuilt Triton cache" in gpu_prebuild.install(tmp_path / "nothing", tmp_path / "cache")


def test_what_is_compiled_without_a_device_is_found_under_the_same_key(tmp_path):
    """Two processes that compile one op file it once, and `count_keys` foretells how many compilations there are."""
    code = (
        "import os, sys\n"
        f"sys.path[:0] = {[str(SCRIPT.parents[1]), str(SCRIPT.parent), str(Path(__file__).parent)]!r}\n"
        "from pathlib import Path\n"
        "import gpu_ops\n"
        "from vqvit import precompile\n"
        "part = precompile.Part(90, 90, 132)\n"
        "cases = [gpu_ops.arguments_of('int8_mm', case) for case in ('odd', 'k1', 'odd')]\n"
        "jobs = [precompile.Job.of('int8_mm', arguments) for arguments in cases]\n"
        "print(precompile.count_keys(jobs, part), precompile.count_keys(jobs, precompile.Part(80, 80, 108)))\n"
        "assert not precompile.entries(Path(os.environ['TRITON_CACHE_DIR']))\n"
        "with precompile.compiling_for(part):\n"
        "    for job in jobs: job.run()\n"
        "print(*sorted(precompile.entries(Path(os.environ['TRITON_CACHE_DIR']))))\n"
    )
    found = []
    for place in ("a", "b"):
        environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / place)}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200
        )
        assert done.returncode == 0, done.stderr
        counted, names = done.stdout.strip().splitlines()
        found.append(names.split())
        assert [int(n) for n in counted.split()] == [len(found[-1])] * 2 == [2, 2]
    assert found[0] == found[1]


def test_caches_may_not_lie_among_the_results(tmp_path, monkeypatch):
    import gpu

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("VQVIT_CACHE", str(tmp_path / "out" / ".cache"))
    with pytest.raises(ValueError, match="VQVIT_CACHE: expected a folder outside"):
        gpu.caches(tmp_path / "work", tmp_path / "out")
    monkeypatch.setenv("VQVIT_CACHE", str(tmp_path / "cache"))
    assert gpu.caches(tmp_path / "work", tmp_path / "out")["TRITON_CACHE_DIR"].startswith(str(tmp_path / "work"))


def test_the_key_of_an_interpreter_without_triton_is_an_error():
    with pytest.raises(gpu_prebuild.PrebuildError, match="expected an interpreter with Triton"):
        gpu_prebuild.key_of("/no/python")
