"""CUDA C++ GEMM epilogues: whole tiles and cut ones, every kind of result with every activation, in the host's twin.

Bits are the reference's. What the tiles of the main loop are is the matter of test_cuda_kernels.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits

from vqvit import _build, native, reference
from vqvit import numerics as nm
from vqvit.backends import cuda

if not native.emulating_cuda() or cuda.unavailable():
    pytest.skip("needs the CUDA kernels' twin", allow_module_level=True)

MACHINES = {"sm_80_large": (80, 1), "sm_80_wide": (80, 5), "sm_80_small": (80, 100), "sm_90_large": (90, 1),
            "sm_90_wide": (90, 6)}  # fmt: skip
"""The twin's architecture and multiprocessors, which choose the tile."""

M, K = 131, 144

WIDTHS = {"whole": 256, "whole_and_cut": 260, "odd": 259, "less_than_a_tile": 20, "a_few": 7}
"""Columns: two whole tiles of 128; a third one cut at a multiple of 4; rows that no vector store fits; one cut tile."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=MACHINES.values(), ids=MACHINES)
def machine(request, monkeypatch):
    arch, multiprocessors = request.param
    monkeypatch.setenv("VQVIT_TWIN_ARCH", str(arch))
    monkeypatch.setenv("VQVIT_TWIN_MULTIPROCESSORS", str(multiprocessors))


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setenv("VQVIT_TWIN_MULTIPROCESSORS", "1")


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def operands(n: int, m: int = M) -> list[torch.Tensor]:
    """a, its scales, b, its scales, bias; with a row of NaN, one of NaN and Inf, one of Inf and one of the bias."""
    a, a_scale, b_scale, bias = codes(m, K), torch.rand(m) * 1e-3, torch.rand(n), torch.randn(n)
    a_scale[3], a_scale[70], a_scale[m - 1] = torch.nan, torch.inf, 3e38
    a[70, 5:], a_scale[71] = 0, 0.0
    bias[::5] = -0.0  # row 71 has negative zeros, which an absent residual has to leave alone
    return [a, a_scale, codes(n, K), b_scale, bias]


def group_operands(n: int) -> list[torch.Tensor]:
    """The same with a scale for each 128 columns of a, of which there are four groups."""
    k = 400
    a_scale = torch.rand(M, nm.group_count(k)) * 1e-3
    a_scale[3, 1], a_scale[70, 3] = torch.nan, torch.inf
    return [codes(M, k), a_scale, codes(n, k), torch.rand(n), torch.randn(n)]


def zero_points(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a_zero = torch.randint(-127, 128, a.shape[:1], dtype=torch.int32)
    b_zero = torch.randint(-127, 128, b.shape[:1], dtype=torch.int32)
    return a_zero, a.sum(1, dtype=torch.int32), b_zero, b.sum(1, dtype=torch.int32)


def check(op: str, *args) -> None:
    """`op` of the CUDA backend returns the reference's bits."""
    assert_same_bits(getattr(cuda, op)(*args), getattr(reference, op)(*args))


def assert_all_kinds(arguments: list[torch.Tensor], activation: str) -> None:
    """Floats, codes by group and codes with a static scale."""
    none = [None] * 4
    check("int8_linear", *arguments, activation)
    check("int8_linear_quantize", *arguments, activation, *none, None, True, False, True)
    check("int8_linear_quantize", *arguments, activation, *none, torch.tensor(0.05), True, True)


@pytest.mark.parametrize("n", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("groups", [False, True], ids=["a_scale", "group_scales"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_results_of_every_kind(machine, n, groups, activation):
    assert_all_kinds((group_operands if groups else operands)(n), activation)


@pytest.mark.parametrize("n", [256, 259], ids=["whole", "odd"])
@pytest.mark.parametrize("activation", sorted(set(nm.ACTIVATIONS) - {"none", "gelu"}))
@pytest.mark.parametrize("arch", [80, 90])
def test_other_activations(large, monkeypatch, arch, n, activation):
    monkeypatch.setenv("VQVIT_TWIN_ARCH", str(arch))
    assert_all_kinds(operands(n), activation)


@pytest.mark.parametrize("scale", [1e-30, 2.0**-64, 2.0**101], ids=str)
def test_static_scales_that_a_reciprocal_does_not_serve(large, scale):
    arguments = operands(256)
    check("int8_linear_quantize", *arguments, "gelu", *[None] * 4, torch.tensor(scale), True, False)


@pytest.mark.parametrize("n", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("adds", ["residual", "layer_scale", "both"])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_residuals_and_layer_scales(large, n, adds, activation):
    arguments = [*operands(n), activation]
    for dtype in FLOATS:
        residual = None if adds == "layer_scale" else torch.randn(M, n).to(dtype)
        layer_scale = None if adds == "residual" else torch.randn(n).to(dtype)
        for out_dtype in FLOATS:
            check("int8_linear", *arguments, layer_scale, residual, *[None] * 4, out_dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_residuals_with_rows_apart(machine, dtype):
    n = 256
    wide = torch.randn(M, n + 12).to(dtype)
    for first in (0, 4, 8, 1):  # aligned to packs of every dtype, of some, of none
        residual = wide[:, first : first + n]
        check("int8_linear", *operands(n), "none", None, residual, *[None] * 4, dtype)
    uneven = torch.randn(M, n + 3).to(dtype)[:, :n]
    check("int8_linear", *operands(n), "none", torch.randn(n), uneven, *[None] * 4, dtype)
    one_row = torch.randn(1, n).to(dtype).expand(M, n)
    check("int8_linear", *operands(n), "gelu", None, one_row, *[None] * 4, dtype)


@pytest.mark.parametrize("n", [256, 259], ids=["whole", "odd"])
@pytest.mark.parametrize("points", ["both", "of_a", "of_b"])
def test_zero_points(machine, n, points):
    arguments = operands(n)
    a_zero, a_sum, b_zero, b_sum = zero_points(arguments[0], arguments[2])
    of_a, of_b = (a_zero, None, None, b_sum), (None, a_sum, b_zero, None)
    used = {"both": (a_zero, a_sum, b_zero, b_sum), "of_a": of_a, "of_b": of_b}[points]
    check("int8_linear", *arguments, "gelu", None, torch.randn(M, n), *used)
    check("int8_linear_quantize", *arguments, "gelu", *used, None, True, False, True)
    check("int8_linear_quantize", *arguments, "none", *used, torch.tensor(0.1), True, True)


@pytest.mark.parametrize("n", WIDTHS.values(), ids=WIDTHS)
def test_accumulators(machine, n):
    check("int8_mm", codes(M, K), codes(n, K))


HEADS = [(32, 1), (32, 2), (32, 3), (32, 4), (64, 1), (64, 3), (128, 1), (128, 2)]
"""Head dimension and heads: heads of q, k and v side by side in one tile, tiles of one of them, a tile that n cuts."""


@pytest.mark.parametrize(("head_dim", "heads"), HEADS)
@pytest.mark.parametrize("tokens", [33, 66, 1], ids=["two_images", "one_image", "images_of_a_token"])
def test_projections(machine, head_dim, heads, tokens):
    n, m = 3 * heads * head_dim, 66
    a_scale = torch.rand(m) * 1e-3
    a_scale[4], a_scale[60] = torch.nan, torch.inf
    arguments = codes(m, K), a_scale, codes(n, K), torch.rand(n), torch.randn(n)
    check("int8_linear_qkv", *arguments, tokens, heads)
    if tokens == 33:
        check("int8_linear_qkv", *arguments, tokens, heads, *zero_points(arguments[0], arguments[2]))


@pytest.mark.parametrize(("head_dim", "heads"), [(32, 3), (64, 2), (128, 1)])
def test_projections_of_group_scales(machine, head_dim, heads):
    tokens = 33
    arguments = [t[: 2 * tokens] if t.shape[0] == M else t for t in group_operands(3 * heads * head_dim)]
    check("int8_linear_qkv", *arguments, tokens, heads)


def test_scales_are_those_of_a_division(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    program, csrc = tmp_path / "scales", native.csrc_directory()
    flags = [*_build.CXX_FLAGS, "-O2", f"-I{csrc}", f"-I{csrc / 'cuda'}"]
    source = Path(__file__).with_name("cuda_scales.cpp")
    subprocess.run([_build.compiler(_build.CUDA_TWIN), *flags, source, "-o", program], check=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == "0\n"
