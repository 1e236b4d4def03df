"""The contract against exact arithmetic, float64 and the laws it promises."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vqvit import numerics as nm

TOLERANCES = {  # largest error against float64, absolute; slope: additional error per |x|
    "gelu": (1.6e-6, 1e-7),
    "gelu_tanh": (1.6e-6, 1e-7),
    "quick_gelu": (1e-6, 4e-7),
    "silu": (1e-6, 4e-7),
    "relu": (0.0, 0.0),
    "none": (0.0, 0.0),
}

EXACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "none": lambda x: x,
}

rows = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40)


def nearest_fp32(value: Fraction) -> float:
    """Round a fraction to fp32, half to even, without passing through another rounding."""
    guess = np.float32(float(value))
    candidates = [guess, np.nextafter(guess, np.float32(-np.inf)), np.nextafter(guess, np.float32(np.inf))]
    finite = [c for c in candidates if np.isfinite(c)]
    return float(min(finite, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.int32)) & 1)))


@given(*[st.floats(-(2.0**50), 2.0**50, width=32)] * 3)
@settings(max_examples=500, deadline=None)
def test_fma_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = nm.fma(*(torch.tensor([v], dtype=torch.float32) for v in (a, b, c))).item()
    if abs(exact) > Fraction(2) ** -120:
        assert got == nearest_fp32(exact)


def test_fma_where_double_rounding_would_err():
    """a·b lies just above the midpoint of two fp32 numbers, by less than fp64 resolves after adding c."""
    a = torch.tensor([1.0 + 2.0**-23])
    b = torch.tensor([2.0**-24])
    c = torch.tensor(
        [2.0**30 + 64.0]
    )  # spacing 128: c is a midpoint of two even/odd neighbours in fp32 only once added
    got = nm.fma(a, b, c).item()
    exact = Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item())
    assert got == nearest_fp32(exact)


@pytest.mark.parametrize("name", nm.ACTIVATIONS)
def test_activation_error(name):
    x = torch.cat([torch.linspace(-9, 9, 40001), torch.linspace(-60, 60, 4001)])
    error = (nm.activation(x, name).double() - EXACT[name](x.double())).abs()
    absolute, slope = TOLERANCES[name]
    assert (error <= absolute + slope * x.abs().double()).all(), error.max()


def test_activation_unknown():
    with pytest.raises(ValueError, match=r"expected one of none, gelu.*got 'tanh'"):
        nm.activation(torch.ones(1), "tanh")


def test_exp2_error_and_limits():
    x = torch.linspace(-126, 126, 100001)
    assert (nm.exp2(x).double() / torch.exp2(x.double()) - 1).abs().max() <= 2.5e-7
    assert nm.exp2(torch.tensor([0.0, -3.0])).tolist() == [1.0, 0.125]
    assert nm.exp2(torch.tensor([-1e9, -torch.inf])).tolist() == [2.0**-126] * 2
    assert nm.exp2(torch.tensor([torch.nan])).isnan().all()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_gelu_limits(name):
    """What is not finite stays so, and signs of zero do not depend on the backend's maximum."""
    assert not nm.activation(torch.tensor([torch.nan, torch.inf, -torch.inf]), name).isfinite().any()
    assert nm.activation(torch.tensor([1e38]), name).item() == pytest.approx(1e38)
    assert nm.activation(torch.tensor([0.0, -0.0]), name).view(torch.int32).tolist() == [0, 0]


def test_softmax_numerators():
    x = torch.linspace(-20, 0, 100001)
    error = (nm.softmax_numerators(x).double() - 65535 * torch.exp2(x.double())).abs()
    assert error.max() <= 0.5 + 0.2
    numerators = nm.softmax_numerators(torch.tensor([0.0, -1.0, -1e9, -torch.inf, torch.nan]))
    assert numerators[:4].tolist() == [65535.0, 32768.0, 0.0, 0.0] and numerators[4].isnan()


@pytest.mark.parametrize("offset", [0.0, 100.0, -3e4])
@pytest.mark.parametrize("k", [1, 7, 768, 3073])
def test_layer_norm_error(offset, k):
    """Statistics on the 2^-21 grid: error relative to the row's largest magnitude over its spread."""
    x = torch.randn(20, k) * 2 + offset
    weight, bias = torch.randn(k), torch.randn(k)
    got = nm.layer_norm(x, weight, bias, 1e-6)
    want = F.layer_norm(x.double(), (k,), weight.double(), bias.double(), 1e-6)
    spread = x.double().std(-1, correction=0, keepdim=True) + 1e-3
    bound = 2.0**-20 * x.abs().amax(-1, keepdim=True) / spread * (1 + want.abs() + weight.abs()) * 2
    assert ((got - want).abs() <= bound + 2e-6 * want.abs()).all()


def test_layer_norm_order_independent():
    x = torch.randn(50, 777) * torch.logspace(-3, 3, 50)[:, None]
    order = torch.randperm(777)
    ones, zeros = torch.ones(777), torch.zeros(777)
    assert torch.equal(nm.layer_norm(x, ones, zeros, 1e-6)[:, order], nm.layer_norm(x[:, order], ones, zeros, 1e-6))


def test_layer_norm_paper_epsilon():
    x = torch.randn(5, 64)
    got = nm.layer_norm(x, torch.ones(64), torch.zeros(64), 0.1, paper=True)
    want = (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 0.1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@given(rows)
@settings(max_examples=300, deadline=None)
def test_symmetric_round_trip(values):
    x = torch.tensor([values])
    scale = nm.row_scale(x)
    codes = nm.to_codes(x, scale.unsqueeze(-1))
    assert codes.abs().max() <= nm.QMAX
    error = (x.double() - codes.double() * scale.double()).abs()
    assert (error <= scale.double() * 0.5 * (1 + 1e-5)).all()


@given(rows)
@settings(max_examples=300, deadline=None)
def test_asymmetric_round_trip(values):
    x = torch.tensor([values])
    scale, zero_point = nm.row_scale_asymmetric(x)
    codes = nm.to_codes_asymmetric(x, scale.unsqueeze(-1), zero_point.unsqueeze(-1))
    assert zero_point.abs().max() <= nm.QMAX and codes.abs().max() <= nm.QMAX
    error = (x.double() - (codes.double() - zero_point.double()) * scale.double()).abs()
    assert (
        error <= scale.double() * 1.0001
    ).all()  # half a step, and half a step where the zero point's rounding clips


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]])
    assert nm.to_codes(x, nm.row_scale(x).unsqueeze(-1)).tolist() == [[0, 2, 2, 0, -2, 127]]


def test_delta_adds_standard_deviations():
    x = torch.randn(30, 500)
    widened = nm.row_scale(x, 0.5) * nm.QMAX
    want = x.abs().amax(-1) + 0.5 * x.std(-1, correction=0)
    torch.testing.assert_close(widened, want, rtol=1e-6, atol=0)


def test_weight_scale_spread_and_granularity():
    weight = torch.randn(6, 50) * torch.arange(1, 7)[:, None]
    want = (weight.abs().amax(-1) - 0.5 * weight.std(-1, correction=0)) / 127
    torch.testing.assert_close(nm.weight_scale(weight, beta=-0.5), want)
    assert (nm.weight_scale(weight, per_channel=False) == weight.abs().max() / 127).all()
    assert (nm.weight_scale(torch.zeros(3, 4)) == nm.SCALE_MIN).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_shows_in_its_row_only(poison):
    x = torch.randn(3, 8)
    x[1, 2] = poison
    scale = nm.row_scale(x)
    assert scale.isnan().tolist() == [False, True, False]
    assert (nm.to_codes(x, scale.unsqueeze(-1))[1] == 0).all()
    assert nm.layer_norm(x, torch.ones(8), torch.zeros(8), 1e-6).isnan().any(-1).tolist() == [False, True, False]


def test_accumulator_bounds():
    """The bounds are the largest K whose worst case fits in int32."""
    for bound, step in (
        (nm.K_MAX_SYMMETRIC, 127 * 127),
        (nm.K_MAX_ONE_ZERO_POINT, 127 * 254),
        (nm.K_MAX_TWO_ZERO_POINTS, 254 * 254),
    ):
        assert bound * step <= 2**31 - 1 < (bound + 1) * step
