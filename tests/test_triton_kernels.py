"""Triton kernels where they differ from other backends: tile configs, codes without a division, interpreted fma.

Everything runs in Triton's interpreter (see conftest); parity of the ops themselves is tested in test_ops_parity.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from vqvit import numerics as nm
from vqvit import reference
from vqvit.backends import triton as backend

pytest.importorskip("triton")
import triton
import triton.language as tl

from vqvit.kernels import attention_s8, gemm_s8, launch, quantize
from vqvit.kernels import numerics as device_nm
from vqvit.kernels.gemm_s8_split_k import reduce_shares

CONFIGS = {f"sm_{arch}-{c.block_m}x{c.block_n}": c for arch in (80, 90) for c in gemm_s8.GEMM_CONFIGS[arch]}
GROUP_CONFIGS = {
    f"sm_{arch}-{c.block_m}x{c.block_n}": c for arch in (80, 86, 90) for c in gemm_s8.GROUP_CONFIGS[arch]
} | {"ragged": gemm_s8.RAGGED_GROUP_CONFIG}
H200 = launch.Device(arch=90, sms=132)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("static", [False, True], ids=["float", "static"])
def test_every_gemm_tile_gives_the_same_bits(monkeypatch, config, static):
    monkeypatch.setattr(gemm_s8, "choose", lambda *_: config)
    m, n, k = 70, 260, 136  # ragged in every dimension
    a_scale = torch.rand(m) * 1e-3
    a_scale[3] = torch.nan
    operands = codes(m, k), a_scale, codes(n, k), torch.rand(n), torch.randn(n)
    if static:
        arguments = (*operands, "gelu", None, None, None, None, torch.tensor(0.1), True, True)
        received, expected = (f.int8_linear_quantize(*arguments) for f in (backend, reference))
    else:
        arguments = (*operands, "none", torch.randn(n), torch.randn(m, n))
        received, expected = ((f.int8_linear(*arguments),) for f in (backend, reference))
    assert_same_bits(received, expected)


SMALL_TILE = "sm_90-64x64"


@pytest.mark.parametrize(
    ("config", "shares", "k"),
    [pytest.param(c, 3, 396, id=f"{name}-3") for name, c in CONFIGS.items()]
    + [pytest.param(CONFIGS[SMALL_TILE], s, k, id=f"{SMALL_TILE}-{s}") for s, k in ((2, 272), (8, 1040), (8, 768))],
)
def test_shares_of_k_give_the_same_bits(monkeypatch, config, shares, k):
    monkeypatch.setattr(gemm_s8, "choose", lambda *_: dataclasses.replace(config, split_k=shares))
    reductions = []
    monkeypatch.setattr(gemm_s8, "reduce_shares", lambda *a: reductions.append(a) or reduce_shares(*a))
    m, n = 70, 140
    a_scale = torch.rand(m) * 1e-3
    a_scale[3] = torch.nan
    operands = codes(m, k), a_scale, codes(n, k), torch.rand(n), torch.randn(n)
    zeros = tuple(torch.randint(-127, 128, (size,), dtype=torch.int32) for size in (m, m, n, n))
    residual = (*operands, "none", torch.randn(n), torch.randn(m, n + 3)[:, :n])
    static = (*operands, "gelu", *zeros, torch.tensor(0.1), True, True)
    assert_same_bits(*((f.int8_mm(operands[0], operands[2]),) for f in (backend, reference)))
    assert_same_bits(*((f.int8_linear(*residual),) for f in (backend, reference)))
    assert_same_bits(*(f.int8_linear_quantize(*static) for f in (backend, reference)))
    partial = [arguments[0] for arguments in reductions]
    assert len(partial) == 3 and all(1 < p.shape[0] <= shares for p in partial)


@pytest.mark.parametrize("split_k", [1, *gemm_s8.SPLITS])
@pytest.mark.parametrize("k", [16, 384, 400, 768, 3072])
def test_shares_cover_k_and_none_is_empty(split_k, k):
    for config in CONFIGS.values():
        share_k, shares = gemm_s8.k_shares(dataclasses.replace(config, split_k=split_k), k)
        assert share_k % config.block_k == 0 and shares <= split_k
        assert share_k * (shares - 1) < k <= share_k * shares


def assert_same_bits(received, expected):
    for got, want in zip(received, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", GROUP_CONFIGS.values(), ids=GROUP_CONFIGS)
@pytest.mark.parametrize("k", [256, 136], ids=["whole_groups", "short_group"])
def test_every_group_tile_gives_the_same_bits(monkeypatch, config, k):
    monkeypatch.setattr(gemm_s8, "choose", lambda *_: config)
    m, n = 70, 260
    a_scale = torch.rand(m, 2) * 1e-3
    a_scale[3, 0] = torch.nan
    operands = codes(m, k), a_scale, codes(n, k), torch.rand(n), torch.randn(n)
    stored = (*operands, "gelu", None, None, None, None, None, True, False, True)
    assert_same_bits(*(f.int8_linear_quantize(*stored) for f in (backend, reference)))
    residual = (*operands, "none", torch.randn(n), torch.randn(m, n))
    assert_same_bits(*((f.int8_linear(*residual),) for f in (backend, reference)))


@pytest.mark.parametrize("config", GROUP_CONFIGS.values(), ids=GROUP_CONFIGS)
@pytest.mark.parametrize("head_dim", gemm_s8.HEAD_DIMS)
def test_every_projection_tile_gives_the_same_bits(monkeypatch, config, head_dim):
    monkeypatch.setattr(gemm_s8, "choose", lambda *_: config)
    tokens, heads, k = 17, 2, 140
    n = 3 * heads * head_dim
    a_scale = torch.rand(2 * tokens) * 1e-3
    a_scale[4] = torch.nan
    operands = codes(2 * tokens, k), a_scale, codes(n, k), torch.rand(n), torch.randn(n)
    assert_same_bits(*(f.int8_linear_qkv(*operands, tokens, heads) for f in (backend, reference)))


@pytest.mark.parametrize("dim", attention_s8.TWO_PASS_CONFIGS)
def test_every_two_pass_attention_tile_gives_the_same_bits(monkeypatch, dim):
    monkeypatch.setattr(attention_s8, "ONE_PASS_KEYS", 0)
    q, k, v = codes(1, 2, 5, dim), codes(1, 2, 70, dim), codes(1, 2, 70, dim)
    arguments = (q, k, v, torch.rand(1, 2, 5) * 0.02, torch.rand(1, 2, 70) * 0.02, torch.rand(1, 2, dim), dim**-0.5)
    assert torch.equal(backend.int8_attention(*arguments), reference.int8_attention(*arguments))


@pytest.mark.parametrize(("dim", "heads"), [(64, 3), (128, 2)])
@pytest.mark.parametrize("sms", [1, 10**6], ids=["one_launch", "two_launches"])
@pytest.mark.parametrize("one_pass_keys", [0, 256], ids=["two_passes", "one_pass"])
def test_attention_codes_are_the_same_in_one_launch_and_two(monkeypatch, dim, heads, sms, one_pass_keys):
    monkeypatch.setattr(attention_s8, "ONE_PASS_KEYS", one_pass_keys)
    monkeypatch.setattr(attention_s8, "device_of", lambda tensor: launch.Device(launch.INTERPRETER, sms))
    q, k, v = codes(2, heads, 5, dim), codes(2, heads, 70, dim), codes(2, heads, 70, dim)
    scales = torch.rand(2, heads, 5) * 0.02, torch.rand(2, heads, 70) * 0.02, torch.rand(2, heads, dim)
    assert_same_bits(*(f.int8_attention_quantize(q, k, v, *scales, dim**-0.5) for f in (backend, reference)))


@pytest.mark.parametrize("device", [H200, launch.Device(arch=80, sms=1)], ids=["few_rows", "many_rows"])
def test_row_tiles_give_the_same_bits(monkeypatch, device):
    monkeypatch.setattr(quantize, "device_of", lambda tensor: device)
    x = torch.randn(37, 384)
    received, expected = (f.quantize_per_token(x, 0.5, None, True, True) for f in (backend, reference))
    assert all(torch.equal(got, want) for got, want in zip(received, expected, strict=True))


def test_codes_without_division_at_ties_and_beside_them():
    """Rows whose elements are the floats next to (i + 1/2) · scale, for random scales."""
    absmax = torch.rand(200, 1) * 2.0 ** torch.randint(-20, 60, (200, 1))
    ties = (torch.arange(127) + 0.5) * nm.divide(absmax, nm.QMAX)
    around = [ties, torch.nextafter(ties, ties * 2), torch.nextafter(ties, ties * 0), -ties]
    x = torch.cat([absmax, *around], dim=1)
    received, expected = (f.quantize_per_token(x) for f in (backend, reference))
    assert torch.equal(received[0], expected[0]) and torch.equal(received[1], expected[1])


@triton.jit
def _fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, device_nm.fma(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)))


def test_interpreted_fma_rounds_once():
    size = 4096
    a, b = torch.randn(size), torch.randn(size)
    c = -a * b * (1 + torch.randint(-2, 3, (size,)) * 2.0**-23)  # what cancels shows the rounding of the product
    out = torch.empty(size)
    _fma_kernel[(1,)](a, b, c, out, SIZE=size)
    assert torch.equal(out, nm.fma(a, b, c))


def test_few_rows_share_a_deep_k():
    """fc2 of ViT-L and ViT-H for one image: fewer tiles than multiprocessors, and K to share."""
    for m, n, k in ((197, 1024, 4096), (257, 1280, 5120)):
        c = gemm_s8.choose(H200, m, n, k, 16)
        assert c.split_k > 1
        assert gemm_s8.choose(H200, m, n, k, 16, True).split_k == 1  # group scales are summed in order
        assert gemm_s8.choose(H200, 64 * m, n, k, 16).split_k == 1  # enough tiles
    assert gemm_s8.choose(H200, 197, 768, 768, 16).split_k == 1  # a second launch costs more than it saves


def test_a_second_launch_is_part_of_the_time():
    assert gemm_s8.reduction_cycles(1, 1e4) == 0.0
    assert gemm_s8.reduction_cycles(2, 0) == gemm_s8.SECOND_LAUNCH_CYCLES
    assert gemm_s8.reduction_cycles(8, 1e4) == gemm_s8.SECOND_LAUNCH_CYCLES + 4 * 8 * 1e4 / gemm_s8.L2_BYTES_PER_CYCLE


def test_tile_choice():
    assert gemm_s8.choose(H200, 12608, 768, 588, 4) is gemm_s8.RAGGED_CONFIG
    small, large = gemm_s8.choose(H200, 197, 768, 768, 16), gemm_s8.choose(H200, 12608, 3072, 768, 16)
    assert small.block_m * small.block_n < large.block_m * large.block_n


def test_backend_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in backend.unavailable()
    assert backend.device_types() == ("cuda",)


@pytest.mark.parametrize(
    ("capability", "row", "warned"),
    [((8, 9), 86, False), ((9, 0), 90, False), ((10, 0), 80, True), ((12, 0), 86, True)],
)
def test_devices_newer_than_the_tables_are_told_of(monkeypatch, caplog, capability, row, warned):
    major, minor = capability
    part = SimpleNamespace(name="a GPU", major=major, minor=minor, multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: part)
    assert launch.cuda_device.__wrapped__(0) == launch.Device(row, 100)
    assert (f"sm_{major}{minor} is newer" in caplog.text) is warned


def test_devices_without_int8_mma_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "sm_75 is not supported" in backend.unavailable() and "8.0" in backend.unavailable()
