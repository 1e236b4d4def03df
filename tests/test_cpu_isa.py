"""Every instruction set of the C++ backend returns the reference's bits where tiles, panels and vectors have edges."""

import pytest
import torch

from vqvit import layouts, reference
from vqvit import numerics as nm
from vqvit.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}")


@pytest.fixture(autouse=True)
def _best_isa_afterwards():
    yield
    cpu.set_isa(None)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-nm.QMAX, nm.QMAX + 1, shape, dtype=torch.int8)


def normal_codes(rows: int, k: int, spread: float) -> torch.Tensor:
    """Codes of normal values, `spread` their standard deviation: a quantizer's are 10 to 40."""
    return (torch.randn(rows, k) * spread).round().clamp(-nm.QMAX, nm.QMAX).to(torch.int8)


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple | list) else (result,)


def assert_same(op: str, *args, **kwargs) -> None:
    """Every instruction set of this machine gives the reference's bits, NaN for NaN."""
    expected = as_tuple(getattr(reference, op)(*args, **kwargs))
    for isa in cpu.available_isas():
        cpu.set_isa(isa)
        received = as_tuple(getattr(cpu, op)(*args, **kwargs))
        for output, (got, want) in enumerate(zip(received, expected, strict=True)):
            assert got.shape == want.shape and got.dtype == want.dtype, f"{isa}: {op}, output {output}"
            same = (got == want) | (got.isnan() & want.isnan()) if got.is_floating_point() else got == want
            assert same.all(), f"{isa}: {op}, output {output}: {int((~same).sum())} of {same.numel()} differ"


# GEMM


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 31, 64, 67])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 130])
def test_accumulators_at_panel_edges(n, k):
    for m in (*range(1, 14), 197):
        assert_same("int8_mm", codes(m, k), codes(n, k))


@pytest.mark.parametrize("k", [1, 3, 64, 3072])
def test_accumulators_never_saturate(k):
    for left in (-127, 127):
        for right in (-127, 127):
            a, b = torch.full((7, k), left, dtype=torch.int8), torch.full((70, k), right, dtype=torch.int8)
            assert (reference.int8_mm(a, b) == k * left * right).all()
            assert_same("int8_mm", a, b)


def test_accumulators_at_the_longest_k():
    a, b = torch.full((2, nm.K_MAX_SYMMETRIC), 127, dtype=torch.int8), codes(3, nm.K_MAX_SYMMETRIC)
    b[0] = 127
    assert reference.int8_mm(a, b)[0, 0] == nm.K_MAX_SYMMETRIC * 127**2
    assert_same("int8_mm", a, b)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 192, 400])
@pytest.mark.parametrize("spread", [5, 20, 30, 40, 60])
def test_accumulators_of_codes_of_any_size(k, spread):
    """On AVX2 their size decides whether the sums of many rows stay in int16 throughout, for some chunks, or not."""
    for m, n in ((24, 16), (41, 65)):
        assert_same("int8_mm", normal_codes(m, k, spread), normal_codes(n, k, spread))


@pytest.mark.parametrize("left", [-128, -127, -65, -64, 1, 63, 64, 65, 127])
@pytest.mark.parametrize("right", [-128, -127, -64, 32, 64, 127])
def test_accumulators_at_the_bounds_of_int16(left, right):
    """Pairs of 128, beyond which vpmaddubsw saturates, and eight products of 64 · 64, which are 2^15."""
    a, b = torch.full((30, 144), left, dtype=torch.int8), torch.full((70, 144), right, dtype=torch.int8)
    assert (reference.int8_mm(a, b) == 144 * left * right).all()
    assert_same("int8_mm", a, b)
    a[:, 1::2], b[::2] = -left if left > -128 else 127, 1
    assert_same("int8_mm", a, b)
    a[3, ::7], a[17, 5:9], b[9, 3::4] = 127, -127, -128
    assert_same("int8_mm", a, b)


def test_quiet_rows_beside_loud_ones():
    a, b = normal_codes(50, 300, 20), normal_codes(130, 300, 30)
    a[7:9], a[30], a[44, 130:140] = codes(2, 300), 127, 0
    a[12:18] = 0
    assert_same("int8_mm", a, b)
    assert_same("int8_mm", codes(50, 300), b)
    for layout in layouts.PACKED:
        weights = reference.pack_weight(b, layout)
        operands = (a, torch.rand(50, nm.group_count(300)) * 0.01, weights, torch.rand(130) * 0.05)
        assert_same("int8_linear", *operands, torch.randn(130), "gelu")
        assert_same("int8_linear_quantize", *operands, torch.randn(130), "gelu", per_group=True)


@pytest.mark.parametrize("layout", layouts.PACKED)
@pytest.mark.parametrize("head_dim", [48, 64])
def test_layers_of_normal_codes(head_dim, layout):
    tokens, k, n = 29, 200, 3 * 2 * head_dim
    a, weights = normal_codes(2 * tokens, k, 30), reference.pack_weight(normal_codes(n, k, 35), layout)
    args = (a, torch.rand(2 * tokens) * 0.01, weights, torch.rand(n) * 0.05, torch.randn(n))
    assert_same("int8_linear", *args, "none", torch.rand(n), torch.randn(2 * tokens, n))
    assert_same("int8_linear_qkv", *args, tokens, 2)
    for store in ({}, {"row_sum": True}, {"per_group": True}, {"out_scale": torch.tensor(0.03)}, {"symmetric": False}):
        assert_same("int8_linear_quantize", *args, "gelu", **store)


def test_rows_apart_and_transposed_operands():
    wide = codes(9, 300)
    assert_same("int8_mm", wide[:, 3:100], codes(40, 97))
    assert_same("int8_mm", wide[::2, :97], codes(97, 40).t())
    assert_same("int8_mm", codes(97, 9).t(), codes(40, 97))
    assert_same("int8_mm", codes(1, 97).expand(5, 97), codes(40, 97))


@pytest.mark.parametrize("n", [1, 64, 100, 192])
@pytest.mark.parametrize("k", [3, 64, 130])
@pytest.mark.parametrize("layout", layouts.PACKED)
def test_packing(layout, n, k):
    for b in (codes(n, k), normal_codes(n, k, 30), torch.full((n, k), -128, dtype=torch.int8)):
        assert_same("pack_weight", b, layout)
        assert_same("unpack_weight", reference.pack_weight(b, layout), n, k)


@pytest.mark.parametrize("m", [1, 5, 24, 50])
@pytest.mark.parametrize("layout", layouts.NAMES)
def test_few_rows_and_many_on_every_layout(layout, m):
    """Each instruction set reads one packed layout as it is and converts the other."""
    for k in (16, 127, 300):
        b = normal_codes(130, k, 35)
        weights = b if layout == "rows" else reference.pack_weight(b, layout)
        for a in (codes(m, k), normal_codes(m, k, 30)):
            assert_same("int8_linear", a, torch.rand(m), weights, torch.rand(130))


@pytest.mark.parametrize("activation", nm.ACTIVATIONS)
@pytest.mark.parametrize("layout", layouts.NAMES)
@pytest.mark.parametrize("n", [64, 100])
def test_epilogues(n, layout, activation):
    m, k = 11, 37
    a, b = codes(m, k), codes(n, k)
    vectors = {"a_scale": torch.rand(m) * 0.01, "b_scale": torch.rand(n) * 0.05}
    zeros = {
        "a_zero": torch.randint(-127, 128, (m,), dtype=torch.int32),
        "b_zero": torch.randint(-127, 128, (n,), dtype=torch.int32),
        "a_sum": a.sum(-1, dtype=torch.int32),
        "b_sum": b.sum(-1, dtype=torch.int32),
    }
    one_zero = {key: zeros[key] for key in ("a_zero", "b_sum")}
    weights = b if layout == "rows" else reference.pack_weight(b, layout)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for extras in (
            {},
            one_zero,
            {**zeros, "bias": torch.randn(n).to(dtype)},
            {"layer_scale": torch.randn(n)},
            {"residual": torch.randn(m, n).to(dtype)},
            {"bias": torch.randn(n), "layer_scale": torch.randn(n).to(dtype), "residual": torch.randn(m, n).to(dtype)},
        ):
            args = (a, vectors["a_scale"], weights, vectors["b_scale"])
            assert_same("int8_linear", *args, activation=activation, out_dtype=dtype, **extras)
    for quantizer in (
        {"row_sum": True},
        {"symmetric": False, "row_sum": True},
        {"out_scale": torch.tensor(0.03), "row_sum": True},
    ):
        args = (a, vectors["a_scale"], weights, vectors["b_scale"], torch.randn(n), activation)
        assert_same("int8_linear_quantize", *args, **zeros, **quantizer)


@pytest.mark.parametrize("rows", [1, 6, 47, 197])
def test_quantized_output_whichever_way_rows_are_shared_out(rows):
    args = (codes(rows, 64), torch.rand(rows), reference.pack_weight(codes(300, 64)), torch.rand(300), None, "gelu")
    assert_same("int8_linear_quantize", *args, row_sum=True)
    assert_same("int8_linear_quantize", *args, out_scale=torch.tensor(100.0), row_sum=True)


@pytest.mark.parametrize("n", [1, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("k", [1, 127, 128, 129, 300])
def test_scales_of_groups(n, k):
    for m, layout in ((1, "panels"), (6, "panels"), (7, "strips"), (41, "strips")):
        a, weights = codes(m, k), reference.pack_weight(codes(n, k), layout)
        operands = (a, torch.rand(m, nm.group_count(k)) * 0.01, weights, torch.rand(n) * 0.05)
        operands[1][m // 2, -1] = torch.nan
        assert_same("int8_linear", *operands)
        for store in ({}, {"per_group": True}, {"out_scale": torch.tensor(0.03)}, {"symmetric": False}):
            assert_same("int8_linear_quantize", *operands, torch.randn(n), "gelu", **store)
        one_scale = (a, torch.rand(m) * 0.01, *operands[2:])
        assert_same("int8_linear_quantize", *one_scale, torch.randn(n), "gelu", per_group=True)


def test_poison_of_a_column_reaches_the_static_scale_of_its_rows():
    a, b_scale = codes(13, 40), torch.rand(200) * 0.01
    b_scale[150] = torch.nan  # of the third panel
    a_scale = torch.rand(13)
    assert_same("int8_linear_quantize", a, a_scale, codes(200, 40), b_scale, out_scale=torch.tensor(0.1))
    b_scale[150], a_scale[3], a_scale[7] = 0.0, torch.inf, torch.nan
    for activation in nm.ACTIVATIONS:
        for out_scale in (None, torch.tensor(0.1)):
            args = (a, a_scale, codes(200, 40), b_scale, None, activation)
            assert_same("int8_linear_quantize", *args, out_scale=out_scale)


@pytest.mark.parametrize("mode", reference.COMPENSATION_TERMS)
def test_compensation(mode):
    a, b = codes(14, 70), codes(75, 70)
    args = (a, torch.rand(14), codes(14, 70), b, torch.rand(75), codes(75, 70), torch.randn(75), mode, 0.7)
    assert_same("int8_linear_compensated", *args)
    assert_same("int8_linear_compensated", *args, "gelu", torch.randn(75), torch.randn(14, 75))


# Elementwise functions


def every_kind_of_float() -> torch.Tensor:
    """Bit patterns spread over all of fp32, a dense sweep of [-12, 12], and the special values."""
    patterns = torch.arange(-(2**31), 2**31, 2**31 // 20011, dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 1.0, -5.0, 5.0, torch.nan, torch.inf, -torch.inf, 1e-45, 3.4e38, -126.0, 88.0])
    return torch.cat([patterns, torch.linspace(-12, 12, 20011), torch.randn(20011) * 3, special])


@pytest.mark.parametrize("activation", nm.ACTIVATIONS)
def test_activations_on_every_kind_of_float(activation):
    x = every_kind_of_float()
    zero, ones = torch.zeros(1, 1, dtype=torch.int8), torch.ones(1)
    weights = torch.zeros(x.numel(), 1, dtype=torch.int8)
    assert_same("int8_linear", zero, ones, weights, torch.ones_like(x), x, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_conversions(dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same("quantize_static", halves.reshape(64, -1), torch.tensor(0.5))
    ones, zeros = torch.ones(64), torch.zeros(64)
    rows = halves.reshape(-1, 64)
    assert_same("add_layernorm_quantize", torch.zeros_like(rows), rows, ones, zeros, 1e-6)
    x = every_kind_of_float()
    x = torch.cat([x, (halves.float() * (1 + 2**-12)).nan_to_num(0.0)])  # beside the ties of fp16
    rows = x[: x.numel() // 64 * 64].reshape(-1, 64)
    assert_same("add_layernorm_quantize", rows, torch.zeros_like(rows, dtype=dtype), ones, zeros, 1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.3, 1e-8, 7e-3, 1e-30, 1e30, 1e-42, 3e38, torch.inf, torch.nan])
def test_codes_beside_every_tie(scale):
    ties = (torch.arange(-130, 130, dtype=torch.float32) + 0.5) * scale
    around = [ties]
    for _ in range(3):
        around = [torch.nextafter(around[0], torch.tensor(-torch.inf)), *around]
        around.append(torch.nextafter(around[-1], torch.tensor(torch.inf)))
    assert_same("quantize_static", torch.stack(around), torch.tensor(scale))


@pytest.mark.parametrize("k", [1, 7, 8, 9, 15, 16, 17, 50, 768])
def test_row_ops_at_vector_edges(k):
    x, weight, bias = torch.randn(6, k) * 3, torch.randn(k), torch.randn(k)
    x[1, k // 2], x[2, -1], x[3] = torch.nan, -torch.inf, 0.0
    for delta in (0.0, 0.5):
        assert_same("quantize_per_token", x, delta, torch.rand(k), True, True)
        assert_same("layernorm_quantize", x, weight, bias, 1e-6, delta, None, True)
        assert_same("layernorm_quantize", x, weight, bias, 1e-6, delta, None, True, True)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same("layer_norm", x.to(dtype), weight, bias, 1e-6)
    assert_same("quantize_per_token", x, 0.0, None, False, True)
    assert_same("quantize_per_group", x, torch.rand(k))
    assert_same("layernorm_quantize", x, weight, bias, 1e-6, 0.0, torch.tensor(0.02))
    assert_same("add_layernorm_quantize", x, torch.randn(6, k), weight, bias, 1e-6, torch.randn(k))
    quantized, scale, _, _ = reference.quantize_per_token(x)
    assert_same("quantize_residual", x, quantized, scale)


def test_statistics_of_the_longest_rows():
    x = torch.randn(2, nm.NORM_K_MAX) * 0.1 + 0.999
    weight = torch.ones(nm.NORM_K_MAX)
    assert_same("layernorm_quantize", x, weight, weight, 1e-6)


# Attention


@pytest.mark.parametrize("width", [1, 15, 16, 63, 64, 65, 72, 130])
def test_attention_head_widths(width):
    for queries, keys in ((1, 1), (5, 17), (13, 66)):
        q, k, v = codes(2, 2, queries, width), codes(2, 2, keys, width), codes(2, 2, keys, width)
        scales = torch.rand(2, 2, queries) * 0.02, torch.rand(2, 2, keys) * 0.02, torch.rand(2, 2, width)
        assert_same("int8_attention", q, k, v, *scales, width**-0.5)


@pytest.mark.parametrize("keys", [1, 2, 3, 4, 15, 16, 17, 48, 49, 63, 64, 65, 128, 197, 257])
def test_attention_key_counts(keys):
    q, k, v = codes(1, 3, 7, 32), codes(1, 3, keys, 32), codes(1, 3, keys, 32)
    scales = torch.rand(1, 3, 7) * 0.02, torch.rand(1, 3, keys) * 0.02, torch.rand(1, 3, 32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_same("int8_attention", q, k, v, *scales, 0.2, dtype)


@pytest.mark.parametrize("keys", [256, 257, 258, 259, 520])
@pytest.mark.parametrize("value", [-127, 127])
def test_attention_sums_that_are_largest(keys, value):
    """Equal logits: every numerator is 65535, and up to 258 of them times 127 fit int32."""
    q, k = torch.zeros(1, 1, 7, 32, dtype=torch.int8), codes(1, 1, keys, 32)
    v = torch.full((1, 1, keys, 32), value, dtype=torch.int8)
    v[..., 3], v[..., 5::2, 8] = codes(1, 1, keys), -value
    scales = torch.rand(1, 1, 7), torch.rand(1, 1, keys), torch.rand(1, 1, 32)
    assert_same("int8_attention", q, k, v, *scales, 0.2)


def test_attention_poison():
    q, k, v = codes(1, 3, 8, 16), codes(1, 3, 20, 16), codes(1, 3, 20, 16)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 0.0):
        for which in range(3):
            scales = [torch.rand(1, 3, 8), torch.rand(1, 3, 20), torch.rand(1, 3, 16)]
            scales[which][0, 1, 5] = bad
            assert_same("int8_attention", q, k, v, *scales, 0.25)
    overflowing = [torch.full((1, 3, 8), 1e25), torch.full((1, 3, 20), 1e25), torch.rand(1, 3, 16)]
    assert_same("int8_attention", q, k, v, *overflowing, 0.25)
    assert_same("int8_attention", q, torch.zeros_like(k), v, *overflowing, 0.25)


@pytest.mark.parametrize("head_dim", [1, 24, 64, 80])
def test_quantize_qkv(head_dim):
    qkv = torch.randn(2, 9, 3 * 2 * head_dim)
    qkv[0, 3, 0], qkv[1, 4, -1] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_same("quantize_qkv", qkv.to(dtype), 2)
