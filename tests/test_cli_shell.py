"""`vqvit` as a process: its help at once, and an end without a traceback whatever happens to it or to its output."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vqvit

ROOT = Path(vqvit.__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "vqvit"]


def vqvit_(*argv, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, argv)], cwd=ROOT, env=ENVIRONMENT, text=True, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


def test_version():
    done = vqvit_("--version")
    assert (done.returncode, done.stdout) == (0, f"vqvit {vqvit.__version__}\n")


@pytest.mark.parametrize("argv", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_needs_no_torch_and_is_fast(argv):
    """0.1 s here; the processor's time is compared with that of an empty program, since others use the machine too."""
    code = (
        "import sys, time; sys.argv[0] = 'vqvit'; sys.argv[1:] = " + repr(argv) + "\n"
        "from vqvit import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = [m for m in ('torch', 'numpy', 'transformers') if m in sys.modules]\n"
        "sys.exit(f'{heavy} {time.process_time()}' if heavy or time.process_time() > 0.4 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vqvit" in done.stdout


def test_public_names_are_there_in_a_script_called_vqvit(tmp_path):
    script = tmp_path / "vqvit"
    script.write_text(
        "import vqvit\nprint(vqvit.quantize_.__name__, vqvit.QuantConfig().bits, vqvit.runtime.graphed)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("quantize_ 8 <function graphed"), done.stderr


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "{model}"], ["env", "--json"]])
def test_a_reader_that_goes_away(quantized_folder, argv):
    """As `vqvit ... | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = vqvit_(*(part.format(model=quantized_folder) for part in argv), stdout=writing)
    os.close(writing)
    assert done.returncode in (0, 141) and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode == 141 or argv == ["--help"]


def test_a_full_disk_behind_stdout(quantized_folder):
    with open("/dev/full", "w") as full:
        done = vqvit_("inspect", quantized_folder, stdout=full)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "vqvit: error: cannot write the result: No space left on device"


def test_a_full_disk_behind_the_checkpoint(float_folder, tmp_path):
    """RLIMIT_FSIZE stands for it, as an error of the system when a file grows."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from vqvit import cli\n"
        f"sys.exit(cli.main(['quantize', {float_folder!r}, {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vqvit: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["libtorch", "safetensors", "first output"])
def test_ctrl_c_ends_without_a_traceback(float_folder, tmp_path, moment):
    """At an import, or at work: the status is that of Ctrl-C, and nothing is left."""
    argv = [*COMMAND, "quantize", float_folder, str(tmp_path / "out")]
    if moment == "first output":
        argv = [*COMMAND, "bench", float_folder, "--batch", "1", "--seconds", "60"]
    process = subprocess.Popen(
        argv, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if moment == "first output":
        first = process.stderr.read(1)
    else:
        first, maps = "", Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and moment not in maps.read_text():
            time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130), err
    assert "Traceback" not in first + err and not out
    assert list(tmp_path.iterdir()) == []
