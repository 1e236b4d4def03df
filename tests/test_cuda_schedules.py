"""CUDA C++ GEMMs under random schedules of the host's twin: threads in any order, copies and products that land late.

A block gets one, two or three tiles of more steps of K than its ring has stages, as on a GPU from eight images on.
$VQVIT_TWIN_SEEDS is how many schedules of each case are tried.
"""

import os

import pytest
import torch
from bits import assert_same_bits

from vqvit import native, reference
from vqvit.backends import cuda

pytestmark = pytest.mark.skipif(
    not native.emulating_cuda() or native.cuda_unavailable() is not None, reason="needs the CUDA kernels' twin"
)

SEEDS = range(1, 1 + int(os.environ.get("VQVIT_TWIN_SEEDS", "3")))

WIDTHS = (400, 768, 1024, 1152, 3072)
"""Of K: ViT-B's, ViT-L's, SigLIP's and a ragged one; steps of 128 columns: 4, 6, 8, 9, 24."""

TILES = {  # m, n, multiprocessors: one row of tiles, ragged in both dimensions
    "one_tile": (70, 100, 1),
    "two_tiles": (131, 100, 1),
    "three_tiles": (100, 300, 1),
    "six_tiles": (131, 260, 1),
    "unequal_blocks": (131, 390, 4),
}

MACHINES = {"wgmma": 90, "mma_sync": 80}
"""Parts whose GEMMs take these products; a block of mma.sync has one tile, of however many."""

GEMMS = [(machine, tiles) for machine in MACHINES for tiles in TILES if machine == "wgmma" or tiles == "three_tiles"]


@pytest.fixture
def schedule(monkeypatch):
    """Sets the twin's part, multiprocessors and seed."""

    def set_all(arch: int, multiprocessors: int, seed: int) -> None:
        monkeypatch.setenv("VQVIT_TWIN_ARCH", str(arch))
        monkeypatch.setenv("VQVIT_TWIN_MULTIPROCESSORS", str(multiprocessors))
        monkeypatch.setenv("VQVIT_TWIN_SEED", str(seed))

    return set_all


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def operands(m: int, n: int, k: int, groups: bool) -> tuple[torch.Tensor, ...]:
    a_scale = torch.rand(m, -(-k // 128)) if groups else torch.rand(m)
    a_scale[3] = torch.nan
    return codes(m, k), a_scale * 1e-3, codes(n, k), torch.rand(n), torch.randn(n)


@pytest.mark.parametrize("groups", [False, True], ids=["a_scale", "group_scales"])
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize(("machine", "tiles"), GEMMS)
def test_gemm(schedule, machine, tiles, k, groups):
    m, n, multiprocessors = TILES[tiles]
    args = operands(m, n, k, groups)
    expected = reference.int8_linear(*args)
    for seed in SEEDS:
        schedule(MACHINES[machine], multiprocessors, seed)
        assert_same_bits(cuda.int8_linear(*args), expected, f"seed {seed}")


@pytest.mark.parametrize("machine", MACHINES)
def test_epilogues(schedule, machine):
    """Codes by group, static codes with sums and a projection: rows that warps finish together."""
    linear = operands(131, 260, 768, False)
    static = (*linear, "gelu", *[None] * 4, torch.tensor(0.1), True, True)
    by_group = (*operands(131, 260, 768, True), "gelu", *[None] * 4, None, True, False, True)
    tokens, heads, n = 33, 2, 3 * 2 * 64
    projection = (codes(2 * tokens, 768), torch.rand(2 * tokens), codes(n, 768), torch.rand(n), torch.randn(n))
    projection = (*projection, tokens, heads)
    cases = {"int8_linear_quantize": (static, by_group), "int8_linear_qkv": (projection,)}
    for op, calls in cases.items():
        for args in calls:
            expected = getattr(reference, op)(*args)
            for seed in SEEDS:
                schedule(MACHINES[machine], 1, seed)
                assert_same_bits(getattr(cuda, op)(*args), expected, f"seed {seed}")


def test_compensated(schedule):
    a, a_scale, b, b_scale, bias = operands(70, 130, 768, False)
    args = (a, a_scale, codes(70, 768), b, b_scale, codes(130, 768), bias)
    expected = reference.int8_linear_compensated(*args)
    for seed in SEEDS:
        schedule(80, 1, seed)
        assert_same_bits(cuda.int8_linear_compensated(*args), expected, f"seed {seed}")


@pytest.mark.parametrize("keys", [70, 290], ids=["resident", "streaming"])
def test_attention(schedule, keys):
    from op_arguments import attention

    args = attention(1, 2, 70, keys, 64)
    floats, stored = reference.int8_attention(*args), reference.int8_attention_quantize(*args)
    for seed in SEEDS:
        schedule(80, 1, seed)
        assert_same_bits(cuda.int8_attention(*args), floats, f"seed {seed}")
        assert_same_bits(cuda.int8_attention_quantize(*args), stored, f"seed {seed}")


@pytest.mark.parametrize("shape", [(5, 200), (3, 1500), (1, 16400)], ids=str)
def test_rows(schedule, shape):
    x, weight, bias = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])
    qkv = torch.randn(2, 9, 3 * 64)
    cases = {
        "layernorm_quantize": (x, weight, bias, 1e-6, 0.3, None, True),
        "quantize_per_token": (x, 0.5, None, False, True),
        "quantize_per_group": (x,),
        "quantize_qkv": (qkv, 2),
    }
    for op, args in cases.items():
        expected = getattr(reference, op)(*args)
        for seed in SEEDS:
            schedule(80, 1, seed)
            assert_same_bits(getattr(cuda, op)(*args), expected, f"seed {seed}")
