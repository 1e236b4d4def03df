"""The native library: built whole or not at all, cached by sources and compiler, explained when it is missing."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from op_arguments import block
from op_cases import CASES

from vqvit import _build, native, reference
from vqvit.backends import cpu

ROOT = Path(__file__).resolve().parents[1]
CSRC = native.csrc_directory()

pytestmark = pytest.mark.skipif(CSRC is None, reason="no C++ sources at hand")

needs_library = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """A stand-in for g++ that writes its output slowly, and logs its calls to the returned file."""
    log = tmp_path / "calls"
    script = tmp_path / "fake-g++"
    script.write_text(
        f'#!/bin/sh\necho call >> {log}\nif [ "$1" = --version ]; then echo "fake 1.0"; exit; fi\n'
        'for last; do :; done\nprintf half > "$last"\nsleep 0.05\nprintf " whole" >> "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("VQVIT_CACHE", str(tmp_path / "cache"))
    return log


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_compiles_without_warnings(tmp_path, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    strict = tmp_path / "strict-g++"
    strict.write_text('#!/bin/sh\nexec g++ -Werror "$@"\n')
    strict.chmod(0o755)
    monkeypatch.setenv("CXX", str(strict))
    library = tmp_path / "out" / _build.CPU.file
    _build.build(CSRC, _build.CPU, library)
    assert [path.name for path in library.parent.iterdir()] == [library.name], "temporary files stay behind"
    assert native._text(native._open(library), "cpu", "source_hash") == _build.source_hash(CSRC, _build.CPU)


def test_second_use_comes_from_the_cache(fake_compiler, monkeypatch):
    first = native.cached_library(CSRC, _build.CPU)
    assert first.read_text() == "half whole"
    calls = fake_compiler.read_text().count("call")
    assert native.cached_library(CSRC, _build.CPU) == first
    assert fake_compiler.read_text().count("call") == calls + 1, "only --version"


def test_concurrent_builds_leave_one_whole_library(fake_compiler):
    found = []
    threads = [threading.Thread(target=lambda: found.append(native.cached_library(CSRC, _build.CPU))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert found[0].read_text() == "half whole"
    assert [path.name for path in found[0].parent.iterdir()] == [_build.CPU.file]


def test_cache_key_follows_sources_and_compiler(fake_compiler, tmp_path, monkeypatch):
    changed = tmp_path / "csrc"
    shutil.copytree(CSRC, changed)
    with open(changed / "cpu" / "isa.cpp", "a") as file:
        file.write("// changed\n")
    assert _build.source_hash(changed, _build.CPU) != _build.source_hash(CSRC, _build.CPU)
    paths = {native.cached_library(CSRC, _build.CPU), native.cached_library(changed, _build.CPU)}
    monkeypatch.setattr(_build, "compiler_version", lambda path: "another")
    paths.add(native.cached_library(CSRC, _build.CPU))
    assert len(paths) == 3


def test_failed_build_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    compiler = tmp_path / "failing-g++"
    compiler.write_text("#!/bin/sh\necho 'error: no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(_build.BuildError, match="no such instruction"):
        _build.build(CSRC, _build.CPU, tmp_path / "out" / _build.CPU.file)
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_compiler_is_a_reason_not_a_crash(tmp_path):
    code = (
        "import torch, vqvit, vqvit.native as native\n"
        "native._PACKAGE = native._PACKAGE.parent / 'csrc'\n"  # no prebuilt library there
        "native.csrc_directory = lambda: vqvit.native._PACKAGE\n"
        "print(vqvit.backends.unavailable('cpu'))\n"
        "codes = torch.ops.vqvit.quantize_per_token(torch.ones(2, 3))[0]\n"
        "print(codes.tolist(), vqvit.backends.selected(codes.device))\n"
        "try: vqvit.backend('cpu')\n"
        "except vqvit.BackendUnavailableError as error: print(error)\n"
    )
    done = run_python(code, CXX="no-such-compiler", VQVIT_CACHE=str(tmp_path))
    reason, result, forced = done.stdout.splitlines()
    assert reason == "C++ compiler 'no-such-compiler' not found (set CXX or install g++)"
    assert result == "[[127, 127, 127], [127, 127, 127]] reference"
    assert reason in forced


@needs_library
def test_packaged_library_is_used_unless_it_is_stale(tmp_path, monkeypatch):
    packaged = tmp_path / "package" / "_lib" / _build.CPU.file
    packaged.parent.mkdir(parents=True)
    shutil.copy(native.cpu()._name, packaged)
    shutil.copytree(CSRC, tmp_path / "csrc")
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "package")
    assert native._load(_build.CPU)._name == str(packaged)
    with open(tmp_path / "csrc" / "cpu" / "isa.cpp", "a") as file:
        file.write("// changed\n")
    monkeypatch.setattr(native, "cached_library", lambda csrc, library: Path(native.cpu()._name))
    assert native._load(_build.CPU)._name == native.cpu()._name


@pytest.mark.parametrize("device", native._SIGNATURES)
def test_signatures_match_the_header(device):
    signatures = native._SIGNATURES[device]
    header = (CSRC / "vqvit.h").read_text()
    declared = dict(re.findall(rf"VQVIT_EXPORT int vqvit_{device}_(\w+)\(([^)]*)\);", header))
    assert declared.keys() == signatures.keys()
    for name, parameters in declared.items():
        kinds = ["*" if "*" in p else p.split()[0] for p in parameters.split(",") if p != "void"]
        ours = [
            {native.c_int: "int", native.c_int64: "int64_t", native.c_float: "float"}.get(kind, "*")
            for kind in signatures[name]
        ]
        assert ours == kinds, name


@pytest.mark.parametrize(("name", "struct"), [("gemm", native.Gemm), ("encoder_block", native.EncoderBlock)])
def test_struct_matches_the_header(name, struct):
    header = re.sub(r"/\*.*?\*/", "", (CSRC / "vqvit.h").read_text(), flags=re.DOTALL)
    fields = re.search(rf"typedef struct vqvit_{name} \{{(.*?)\}}", header, re.DOTALL)[1]
    names = [
        name.strip(" *")
        for line in fields.splitlines()
        if ";" in line
        for name in line.split(";")[0].split(None, 1 + line.strip().startswith("const"))[-1].split(",")
    ]
    assert names == [name for name, _ in struct._fields_]


@needs_library
@pytest.mark.parametrize("groups", [0, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_allocation_after_warm_up(allocations, threads, groups):
    done = subprocess.run([allocations, str(threads), str(groups)], capture_output=True, text=True, check=True)
    first, last = map(int, done.stdout.split())
    assert first > 0 and last == 0


@pytest.fixture(scope="module")
def allocations(tmp_path_factory) -> Path:
    """The program of allocations.cpp on the library that is loaded."""
    program, library = tmp_path_factory.mktemp("allocations") / "allocations", native.cpu()._name
    source, rpath = Path(__file__).with_name("allocations.cpp"), f"-Wl,-rpath,{Path(library).parent}"
    command = [_build.compiler(_build.CPU), "-std=c++17", "-fopenmp", f"-I{CSRC}", source, library, rpath]
    subprocess.run([*command, "-o", program], check=True)
    return program


@needs_library
def test_codes_need_no_division(tmp_path):
    if "avx2" not in cpu.available_isas():
        pytest.skip("quotients.cpp is written for AVX2, which this CPU lacks")
    program, source = tmp_path / "quotients", Path(__file__).with_name("quotients.cpp")
    command = [_build.compiler(_build.CPU), *_build.CXX_FLAGS, f"-I{CSRC}", f"-I{CSRC / 'cpu'}", source]
    subprocess.run([*command, "-Wno-unused-function", "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "0\n"


@needs_library
@pytest.mark.parametrize(
    ("product", "products", "loops"),
    [(r"vpdpbusd.*zmm", 20, 8), (r"vpmaddubsw.*ymm", 40, 2)],
    ids=["avx512_vnni", "avx2"],
)
def test_products_stay_in_registers(product, products, loops):
    """Compilers like to spill accumulators in the loops of tiles of five and six rows: half of their speed."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump to read the library")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", native.cpu()._name], capture_output=True, text=True, check=True
    ).stdout
    found = product_loops(listing, product, products)
    assert len(found) >= loops
    for function, body in found:
        stored = [line for line in body if re.search(r"%[yz]mm\d+,(-?0x[0-9a-f]+)?\((%rsp|%rbp)\)", line)]
        assert not stored, f"spills in {function}"  # a constant that is read again from the stack is none


def product_loops(listing: str, product: str, products: int) -> list[tuple[str, list[str]]]:
    """Function and instructions of each innermost loop with that many instructions that match `product`, or more."""
    found, function, addresses, lines = [], "", {}, []
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:", line):
            function, addresses, lines = header[1], {}, []
        elif parts := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            addresses[parts[1]] = len(lines)
            lines.append(line)
            target = parts[3].split()[0] if parts[2].startswith("j") and parts[3] else None
            if target in addresses:
                body = lines[addresses[target] :]
                jumps = sum(re.search(r":\s+j", inner) is not None for inner in body)
                if jumps == 1 and sum(re.search(product, inner) is not None for inner in body) >= products:
                    found.append((function, body))
    return found


@needs_library
def test_isa_is_chosen_and_forced():
    available = cpu.available_isas()
    assert available[0] == "scalar" and cpu.isa() == available[-1]
    for name in available:
        cpu.set_isa(name)
        assert cpu.isa() == name
    with pytest.raises(ValueError, match=f"set_isa: expected {', '.join(available)} or None; got 'avx9'"):
        cpu.set_isa("avx9")
    assert cpu.isa() == available[-1]
    cpu.set_isa(None)
    assert cpu.isa() == available[-1]


@needs_library
def test_library_shares_torch_openmp():
    code = (
        "import torch\n"
        "def runtimes(): return {l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split()[-1]}\n"
        "torch.randn(512, 512) @ torch.randn(512, 512)\n"
        "before = runtimes()\n"
        "from vqvit.backends import cpu\n"
        "cpu.quantize_per_token(torch.randn(512, 512))\n"
        "assert cpu.isa() and runtimes() == before, runtimes() - before\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same_bits(threads):
    a, b = torch.randint(-127, 128, (100, 96), dtype=torch.int8), torch.randint(-127, 128, (200, 96), dtype=torch.int8)
    args = (a, torch.rand(100), cpu.pack_weight(b), torch.rand(200), torch.randn(200), "gelu")
    operands_of_block = CASES["int8_encoder_block"]["two_images"]()
    projection = CASES["int8_linear_qkv"]["two_images"]()
    qkv = torch.randn(1, 150, 3 * 2 * 64)
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear, quantized = cpu.int8_linear(*args), cpu.int8_linear_quantize(*args, row_sum=True)
        static = cpu.int8_linear_quantize(*args, out_scale=torch.tensor(0.1), row_sum=True)
        attention = cpu.int8_attention(*cpu.quantize_qkv(qkv, 2), 0.125)
        whole, operands = cpu.int8_encoder_block(*operands_of_block), cpu.int8_linear_qkv(*projection)
        per_group = cpu.int8_linear_quantize(*args, per_group=True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(previous)
    assert torch.equal(linear, reference.int8_linear(*args))
    assert torch.equal(whole, reference.int8_encoder_block(*operands_of_block))
    for got, want in zip(operands, reference.int8_linear_qkv(*projection), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(per_group, reference.int8_linear_quantize(*args, per_group=True), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(quantized, reference.int8_linear_quantize(*args, row_sum=True), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(
        static, reference.int8_linear_quantize(*args, out_scale=torch.tensor(0.1), row_sum=True), strict=True
    ):
        assert torch.equal(got, want)
    assert torch.equal(attention, reference.int8_attention(*reference.quantize_qkv(qkv, 2), 0.125))


@needs_library
@pytest.mark.parametrize("leading", [None, 2])
def test_images_that_go_through_attention_in_parts_are_those_of_calls_alone(leading):
    x, *operands = block(9, 197, 128, 2, 64, 256, leading=leading)
    previous = torch.get_num_threads()
    torch.set_num_threads(1)  # six images a part
    try:
        whole = cpu.int8_encoder_block(x, *operands)
        for image, want in zip(x.split(1), whole.split(1), strict=True):
            assert torch.equal(cpu.int8_encoder_block(image, *operands), want)
    finally:
        torch.set_num_threads(previous)


@needs_library
def test_calls_from_several_python_threads():
    x = torch.randn(300, 400)
    expected = reference.quantize_per_token(x)[0]
    wrong = []

    def work():
        for _ in range(20):
            if not torch.equal(cpu.quantize_per_token(x)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_asking_for_cuda_builds_nothing(tmp_path, monkeypatch, fake_compiler):
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(native, "csrc_directory", lambda: CSRC)
    monkeypatch.setattr(native, "_loaded", {})
    assert native.cuda_unavailable() is None
    assert not fake_compiler.exists() or "call" not in fake_compiler.read_text()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("NVCC", "no-such-compiler")
    for emulated, compiler in (("1", "C++"), ("0", "CUDA")):
        monkeypatch.setenv("VQVIT_CUDA_TWIN", emulated)
        assert f"{compiler} compiler 'no-such-compiler' not found" in native.cuda_unavailable()


def test_failed_build_of_a_cuda_kernel_is_a_reason(tmp_path, monkeypatch):
    compiler = tmp_path / "failing-g++"
    compiler.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'error: no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("VQVIT_CUDA_TWIN", "1")
    monkeypatch.setenv("VQVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_loaded", {})
    with pytest.raises(native.NativeUnavailableError, match="no such instruction"):
        native.cuda()
    assert "no such instruction" in native.cuda_unavailable()


@pytest.mark.parametrize(("capability", "arch"), [((7, 5), "75"), ((8, 0), "80"), ((8, 9), "80"), ((9, 0), "90a")])
def test_first_use_builds_for_the_part_at_hand(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    flags = _build.cuda_library((native._cuda_arch(),)).flags
    assert [flag for flag in flags if "code=sm_" in flag] == [f"-gencode=arch=compute_{arch},code=sm_{arch}"]


@pytest.mark.parametrize("capability", [(7, 0), (6, 1)])
def test_cuda_backend_refuses_parts_without_int8_tensor_cores(monkeypatch, capability):
    from vqvit.backends import cuda

    monkeypatch.setenv("VQVIT_CUDA_TWIN", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert "7.5 or later" in cuda.unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in cuda.unavailable()
