"""Ops against float64 and the errors they raise; bit equality between backends is `test_ops_parity`'s."""

import pytest
import torch
from torch.nn import functional as F

import vqvit
from vqvit import layouts, ops
from vqvit import numerics as nm


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale, _, _ = ops.quantize_per_token(x)
    return q, scale


@pytest.mark.parametrize(("m", "k", "n"), [(197, 768, 64), (1, 33, 71), (5, 1, 3)])
def test_int8_mm_is_exact(m, k, n):
    a, b = codes(m, k), codes(n, k)
    assert torch.equal(ops.int8_mm(a, b).long(), a.long() @ b.long().t())


def test_int8_mm_with_identity_returns_codes():
    a = codes(9, 64)
    assert torch.equal(ops.int8_mm(a, torch.eye(64, dtype=torch.int8)), a.int())


def test_int8_linear_epilogue_error():
    """Four fp32 roundings (scale product, dequantization, layer scale, accumulator conversion) bound the float
    error.
    """
    a, b = codes(64, 300), codes(50, 300)
    a_scale, b_scale, bias, layer_scale = torch.rand(64), torch.rand(50), torch.randn(50), torch.randn(50)
    residual = torch.randn(64, 50)
    got = ops.int8_linear(a, a_scale, b, b_scale, bias, "none", layer_scale, residual)
    product = (a.double() @ b.double().t()) * a_scale.double()[:, None] * b_scale.double()
    want = (product + bias) * layer_scale.double() + residual
    bound = 2.0**-22 * (product.abs() + bias.abs()) * layer_scale.abs() + 2.0**-23 * want.abs()
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize(("a_side", "b_side"), [(True, False), (False, True), (True, True)])
def test_zero_points_shift_codes(a_side, b_side):
    a, b, ones = codes(7, 40), codes(9, 40), torch.ones
    a_zero = torch.randint(-127, 128, (7,), dtype=torch.int32) if a_side else None
    b_zero = torch.randint(-127, 128, (9,), dtype=torch.int32) if b_side else None
    a_sum, b_sum = a.sum(-1, dtype=torch.int32), b.sum(-1, dtype=torch.int32)
    got = ops.int8_linear(a, ones(7), b, ones(9), a_zero=a_zero, a_sum=a_sum, b_zero=b_zero, b_sum=b_sum)
    shifted_a = a.double() - (a_zero[:, None] if a_side else 0)
    shifted_b = b.double() - (b_zero[:, None] if b_side else 0)
    assert torch.equal(got.double(), shifted_a @ shifted_b.t())


def test_quantized_store_is_store_then_quantize():
    a, b = codes(12, 64), codes(130, 64)
    args = (a, torch.rand(12) * 0.1, b, torch.rand(130) * 0.1, torch.randn(130), "gelu")
    y = ops.int8_linear(*args)
    for got, want in zip(ops.int8_linear_quantize(*args), ops.quantize_per_token(y), strict=True):
        assert torch.equal(got, want)
    static = ops.int8_linear_quantize(*args, out_scale=torch.tensor(0.3))
    assert torch.equal(static[0], ops.quantize_static(y, torch.tensor(0.3))[0])


def test_compensation_modes_match_their_float_formula():
    """Each mode computes (α_a α_bᵀ) ∘ [Aq Bqᵀ + selected terms] exactly up to fp32 rounding; `full` is the float
    product.
    """
    x, w = torch.randn(33, 500), torch.randn(40, 500)
    (a, a_scale), (b, b_scale) = quantized(x), quantized(w)
    ra, rb = ops.quantize_residual(x, a, a_scale), ops.quantize_residual(w, b, b_scale)
    q, p, r, s = (t.double() for t in (a, b, ra, rb))
    outer = a_scale.double()[:, None] * b_scale.double()
    mu = 1.3
    terms = {
        "none": 0.0,
        "paper": mu * (r @ s.t()) / 254**2,
        "activation": (r @ p.t()) / 254,
        "weight": (q @ s.t()) / 254,
        "full": (r @ p.t() + q @ s.t()) / 254 + mu * (r @ s.t()) / 254**2,
    }
    exact = x.double() @ w.double().t()
    error = {}
    for mode, term in terms.items():
        got = ops.int8_linear_compensated(a, a_scale, ra, b, b_scale, rb, None, mode, mu).double()
        want = outer * (q @ p.t() + term)
        assert (got - want).norm() <= 1e-6 * want.norm(), mode
        full = ops.int8_linear_compensated(a, a_scale, ra, b, b_scale, rb, None, mode).double()
        error[mode] = ((full - exact).norm() / exact.norm()).item()
    assert error["full"] <= 1e-4 < error["activation"] < error["none"]
    assert error["weight"] < error["none"]


def test_attention_error_is_small():
    """Within 2x of what quantizing q, k and v alone costs: the u8 softmax numerators must not dominate."""
    batch, heads, tokens, width = 2, 3, 197, 64
    qkv = torch.randn(batch, tokens, 3 * heads * width)
    q, k, v, q_scale, k_scale, v_scale = ops.quantize_qkv(qkv, heads)
    got = ops.int8_attention(q, k, v, q_scale, k_scale, v_scale, width**-0.5)
    float_qkv = qkv.view(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    exact = F.scaled_dot_product_attention(*float_qkv.double()).transpose(1, 2).flatten(2)
    operands = (q * q_scale[..., None], k * k_scale[..., None], v * v_scale[..., None, :])
    dequantized = F.scaled_dot_product_attention(*(t.double() for t in operands)).transpose(1, 2).flatten(2)
    assert (got - exact).norm() <= 2 * (dequantized - exact).norm()


def test_attention_ignores_what_lies_behind_the_last_key():
    """197 keys are no multiple of any tile: a softmax over uniform logits averages exactly 197 values."""
    tokens, width = 197, 32
    q = torch.zeros(1, 1, 3, width, dtype=torch.int8)
    v = codes(1, 1, tokens, width)
    scale = torch.ones(1, 1, width)
    got = ops.int8_attention(
        q, codes(1, 1, tokens, width), v, torch.ones(1, 1, 3), torch.ones(1, 1, tokens), scale, 1.0
    )
    torch.testing.assert_close(got[0, 0].double(), v[0, 0].double().mean(0), rtol=1e-6, atol=1e-6)


def test_patches_are_the_convolution():
    pixels, weight = torch.randn(2, 3, 32, 48), torch.randn(20, 3, 16, 16)
    a, a_scale = ops.patchify_quantize(pixels, 16, 16)
    rows = nm.dequantize(a, a_scale)
    got = (rows @ weight.flatten(1).t()).view(2, 2, 3, 20).permute(0, 3, 1, 2)
    want = F.conv2d(
        nm.dequantize(a, a_scale).view(2, 2, 3, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 48),
        weight,
        stride=16,
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        rows.view(2, 2, 3, 3, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 48), pixels, rtol=0, atol=0.03
    )


F32 = torch.randn(4, 8)
I8 = torch.zeros(4, 8, dtype=torch.int8)
ONES4 = torch.ones(4)

BAD_CALLS = {
    "dtype": (
        lambda: ops.quantize_per_token(I8),
        TypeError,
        "expected x of dtype float32 or float16 or bfloat16; got int8",
    ),
    "float64": (lambda: ops.quantize_per_token(F32.double()), TypeError, "got float64"),
    "scalar": (lambda: ops.quantize_per_token(torch.tensor(1.0)), ValueError, "expected x of shape"),
    "no_columns": (lambda: ops.quantize_per_token(torch.empty(3, 0)), ValueError, "rows of at least one element"),
    "equalizer": (
        lambda: ops.quantize_per_token(F32, 0.0, torch.ones(7)),
        ValueError,
        r"expected equalizer of shape \(8\); got \(7,\)",
    ),
    "delta_asymmetric": (lambda: ops.quantize_per_token(F32, 0.1, None, False), ValueError, "delta = 0 for asymmetric"),
    "static_shape": (
        lambda: ops.quantize_static(F32, torch.ones(4)),
        ValueError,
        r"expected scale of shape \(\); got \(4,\)",
    ),
    "norm_weight": (
        lambda: ops.layernorm_quantize(F32, torch.ones(7), torch.ones(8), 1e-6),
        ValueError,
        "expected weight of shape",
    ),
    "norm_wide": (
        lambda: ops.layernorm_quantize(torch.empty(0, 65537), torch.ones(65537), torch.ones(65537), 1e-6),
        ValueError,
        "at most 65536",
    ),
    "residual": (
        lambda: ops.add_layernorm_quantize(F32, torch.ones(3, 8), torch.ones(8), torch.ones(8), 1e-6),
        ValueError,
        r"expected residual of shape \(4, 8\)",
    ),
    "patch": (
        lambda: ops.patchify_quantize(torch.ones(1, 3, 30, 32), 16, 16),
        ValueError,
        r"multiples of \(16, 16\); got \(30, 32\)",
    ),
    "mm_inner": (
        lambda: ops.int8_mm(I8, torch.zeros(3, 9, dtype=torch.int8)),
        ValueError,
        r"expected b of shape \(\*, 8\); got \(3, 9\)",
    ),
    "k_bound": (
        lambda: ops.int8_mm(torch.empty(0, 133145, dtype=torch.int8), torch.empty(0, 133145, dtype=torch.int8)),
        ValueError,
        "1 <= K <= 133144",
    ),
    "k_bound_zero_point": (
        lambda: ops.int8_linear(
            torch.empty(0, 66573, dtype=torch.int8),
            torch.empty(0),
            torch.empty(0, 66573, dtype=torch.int8),
            torch.empty(0),
            a_zero=torch.empty(0, dtype=torch.int32),
        ),
        ValueError,
        "1 <= K <= 66572",
    ),
    "a_float": (lambda: ops.int8_linear(F32, ONES4, I8, ONES4), TypeError, "expected a of dtype int8; got float32"),
    "a_scale": (
        lambda: ops.int8_linear(I8, torch.ones(5), I8, ONES4),
        ValueError,
        r"expected a_scale of shape \(4\); got \(5,\)",
    ),
    "activation": (lambda: ops.int8_linear(I8, ONES4, I8, ONES4, None, "tanh"), ValueError, "got 'tanh'"),
    "zero_needs_sum": (
        lambda: ops.int8_linear(I8, ONES4, I8, ONES4, a_zero=torch.zeros(4, dtype=torch.int32)),
        ValueError,
        "expected b_sum with a_zero",
    ),
    "out_dtype": (
        lambda: ops.int8_linear(I8, ONES4, I8, ONES4, out_dtype=torch.int8),
        TypeError,
        "expected out_dtype float32",
    ),
    "packed_shape": (
        lambda: ops.int8_linear(I8, ONES4, torch.zeros(1, 9, 64, 4, dtype=torch.int8), ONES4),
        ValueError,
        r"expected packed b of shape \(1, 3, 64, 4\)",
    ),
    "strips_shape": (
        lambda: ops.int8_linear(I8, ONES4, torch.zeros(1, 4, 64, dtype=torch.int8), ONES4),
        ValueError,
        r"expected packed b of shape \(1, 4, 320\)",
    ),
    "layout": (
        lambda: ops.pack_weight(I8, "columns"),
        ValueError,
        r"pack_weight: expected layout in \('panels', 'strips'\); got 'columns'",
    ),
    "unpacked": (lambda: ops.unpack_weight(I8, 4, 8), ValueError, "expected packed of 3 .* or 4 dimensions .*; got 2"),
    "static_asymmetric": (
        lambda: ops.int8_linear_quantize(I8, ONES4, I8, ONES4, out_scale=torch.tensor(1.0), symmetric=False),
        ValueError,
        "symmetric codes with a static",
    ),
    "mode": (
        lambda: ops.int8_linear_compensated(I8, ONES4, I8, I8, ONES4, I8, None, "half"),
        ValueError,
        "expected mode in",
    ),
    "mode_residual": (
        lambda: ops.int8_linear_compensated(I8, ONES4, None, I8, ONES4, I8, None, "full"),
        ValueError,
        "expected a_residual for mode 'full'; got None",
    ),
    "one_packed": (
        lambda: ops.int8_linear_compensated(I8, ONES4, I8, ops.pack_weight(I8), ONES4, I8),
        ValueError,
        "expected b_residual in the layout of b",
    ),
    "heads": (lambda: ops.quantize_qkv(torch.ones(1, 2, 10), 3), ValueError, "divisible by 3 · 3 heads; got 10"),
    "attention_width": (
        lambda: ops.int8_attention(
            torch.zeros(1, 1, 2, 8, dtype=torch.int8),
            torch.zeros(1, 1, 2, 9, dtype=torch.int8),
            torch.zeros(1, 1, 2, 8, dtype=torch.int8),
            torch.ones(1, 1, 2),
            torch.ones(1, 1, 2),
            torch.ones(1, 1, 8),
            1.0,
        ),
        ValueError,
        "expected k of shape",
    ),
    "device": (lambda: ops.int8_mm(I8, I8.to("meta")), ValueError, "expected b on cpu; got meta"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_says_what_was_expected_and_what_came(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_backend_names():
    with pytest.raises(ValueError, match="expected one of reference, cpu, triton, cuda or None; got 'cuda9'"):
        vqvit.backend("cuda9")
    with vqvit.backend("reference"):
        assert vqvit.backends.selected(torch.device("cpu")) == "reference"
    assert vqvit.backends.selected(torch.device("cpu")) != "reference" or vqvit.backends.unavailable("cpu")


def test_forced_backend_that_is_not_built(monkeypatch):
    from vqvit.backends import cpu

    monkeypatch.setattr(cpu, "unavailable", lambda: "no C++ compiler")
    with pytest.raises(
        vqvit.BackendUnavailableError, match="'cpu' was asked for but cannot run here: no C\\+\\+ compiler"
    ):
        vqvit.backend("cpu")


def test_ops_compile_without_graph_break():
    def block(x, weight, scale):
        a, a_scale, _, _ = torch.ops.vqvit.quantize_per_token(x)
        return torch.ops.vqvit.int8_linear(a, a_scale, weight, scale) * 2

    x, weight, scale = torch.randn(5, 16), codes(8, 16), torch.rand(8)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, scale), block(x, weight, scale))


@pytest.mark.parametrize("layout", layouts.PACKED)
@pytest.mark.parametrize("cut", [1, 3, 15])
def test_packed_weights_know_their_channels(layout, cut):
    """An `a` with fewer columns than the weight has channels is refused, also where the packed shape is the same."""
    k = 64
    a, b = torch.ones(5, k, dtype=torch.int8), torch.ones(70, k, dtype=torch.int8)
    packed, short = ops.pack_weight(b, layout), a[:, : k - cut].contiguous()
    calls = {
        "int8_linear": lambda x: ops.int8_linear(x, torch.ones(5), packed, torch.ones(70)),
        "int8_linear_quantize": lambda x: ops.int8_linear_quantize(x, torch.ones(5), packed, torch.ones(70)),
        "unpack_weight": lambda x: ops.unpack_weight(packed, 70, x.shape[1]),
    }
    for op, call in calls.items():
        call(a)
        with pytest.raises(ValueError, match=f"{op}: expected packed .*({k - cut} input channels|shape)"):
            call(short)
    odd = ops.pack_weight(b[:, : k - cut].contiguous(), layout)
    expected = ops.int8_linear(short, torch.ones(5), b[:, : k - cut].contiguous(), torch.ones(70))
    assert torch.equal(ops.int8_linear(short, torch.ones(5), odd, torch.ones(70)), expected)
