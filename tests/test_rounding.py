"""Error-aware rounding: exact where nothing can be gained, never worse than nearest, and right on planted errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvit import numerics as nm
from vqvit import rounding
from vqvit.rounding import Grid, Moments, Weights, solve


def correlated(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs (tokens, width) fp32 whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]
    return (torch.randn(tokens, width, generator=generator) @ mixing + 0.3) * sizes


def nearest(weight: torch.Tensor) -> Weights:
    scale = nm.weight_scale(weight)
    return Weights(nm.quantize_weight(weight, scale), scale)


def moments_of(x_hat, x=None) -> Moments:
    moments = Moments(x_hat.shape[1])
    moments.add(x_hat, x)
    return moments


def error(x_hat, weights: Weights, bias, y) -> float:
    out = x_hat.double() @ weights.dequantize().double().t()
    return float((out + (0 if bias is None else bias) - y).square().sum())


def test_with_an_identity_gram_matrix_it_is_rounding_to_nearest():
    weight = torch.randn(24, 200)
    scale = nm.weight_scale(weight, -1.0)  # clips
    grid = Grid(scale.unsqueeze(-1), -nm.QMAX, nm.QMAX)
    q = rounding.round_error_aware(weight, grid, torch.eye(200, dtype=torch.float64))
    assert torch.equal(q.to(torch.int8), nm.quantize_weight(weight, scale))
    assert torch.equal(rounding.refine(q, weight, grid, torch.eye(200)), q)


def test_a_weight_on_the_grid_keeps_its_codes():
    codes = torch.randint(-127, 128, (16, 96), dtype=torch.int8)
    codes[:, 0] = 127
    scale = torch.rand(16) + 0.1
    weight = nm.dequantize(codes, scale)
    chosen, _ = solve(weight, None, moments_of(correlated(500, 96)), Weights(codes, scale))
    assert torch.equal(chosen.codes, codes) and torch.equal(chosen.scale, scale)


@pytest.mark.parametrize("width", [1, 7, 127, 128, 129, 300])
def test_blocks_of_columns_do_not_change_the_result(width, monkeypatch):
    weight, gram = torch.randn(8, width), rounding.damp(moments_of(correlated(900, width)).gram)
    grid = Grid(nm.weight_scale(weight).unsqueeze(-1) * 9, -7, 7)
    blocked = [rounding.round_error_aware(weight, grid, gram)]
    blocked.append(rounding.refine(blocked[0], weight, grid, gram))
    monkeypatch.setattr(rounding, "BLOCK", 1000)
    whole = [rounding.round_error_aware(weight, grid, gram)]
    whole.append(rounding.refine(whole[0], weight, grid, gram))
    for a, b in zip(blocked, whole, strict=True):  # sums in another order may tip a tie
        assert (a != b).float().mean() < 0.01


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_output_error_falls_well_below_nearest(bits):
    x, weight = correlated(2000, 160), torch.randn(32, 160)
    grid = Grid(weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1), -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    gram = rounding.damp(moments_of(x).gram)
    first = rounding.round_error_aware(weight, grid, gram)
    codes = (grid.nearest(weight), first, rounding.refine(first, weight, grid, gram))
    errors = [float(rounding.output_error(q * grid.step - weight, gram.float()).sum()) for q in codes]
    assert errors[1] < 0.6 * errors[0] and errors[2] <= errors[1]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 30), st.sampled_from([8, 4, 3]), st.booleans())
def test_never_worse_than_what_the_layer_had(seed, width, tokens, bits, biased):
    """Also with fewer tokens than channels, where the Gram matrix is singular."""
    torch.manual_seed(seed)
    x, weight = correlated(tokens, width, seed), torch.randn(5, width)
    bias = torch.randn(5) if biased else None
    if bits == 8:
        present = nearest(weight)
    else:
        present = Weights(*_low(weight, bits))
    chosen, _ = solve(weight, bias, moments_of(x), present, bits)
    moments = moments_of(x)
    gram = rounding.damp(moments.second(biased)[0], power=moments.power).float()
    new, old = (rounding.output_error(w.dequantize() - weight, gram) for w in (chosen, present))
    assert (new <= old * 1.001 + 1e-9).all()
    assert int(chosen.codes.to(torch.int32).abs().max()) <= 127


def _low(weight, bits):
    from vqvit import low_bit

    codes, scale, multipliers = low_bit.quantize_weight(weight, bits)
    return codes, scale, None, multipliers


def test_ridge_recovers_a_known_change_of_the_inputs():
    """The integer layer sees X̂ = X A: the weight that undoes it is W A⁻ᵀ."""
    x, weight = torch.randn(4000, 24), torch.randn(6, 24)
    change = torch.eye(24) + 0.1 * torch.randn(24, 24)
    moments = moments_of(x @ change, x)
    target = rounding.ridge_target(weight.double(), rounding.damp(moments.gram, 1e-9), moments.shift)
    torch.testing.assert_close(target, weight.double() @ torch.linalg.inv(change.double()).t(), rtol=1e-4, atol=1e-4)


def test_inputs_are_corrected_only_where_that_holds_on_other_tokens():
    """A planted change of the inputs is undone; noise, of which few tokens show a pattern by chance, is left alone."""
    weight, change = torch.randn(6, 24), torch.eye(24) + 0.1 * torch.randn(24, 24)

    def corrected(tokens: int, distort) -> torch.Tensor:
        halves = [moments_of(distort(x), x) for x in torch.randn(2, tokens, 24)]
        return rounding.correct_inputs(weight.double(), *halves, biased=False)

    undone = corrected(2000, lambda x: x @ change)
    wanted = weight.double() @ torch.linalg.inv(change.double()).t()
    assert (undone - wanted).norm() < 0.2 * (weight - wanted).norm()
    noisy = corrected(30, lambda x: x + 0.1 * torch.randn_like(x))
    assert (noisy - weight).norm() < 0.05 * weight.norm()
    whole = torch.randn(60, 24)
    gram = moments_of(whole + 0.1 * torch.randn_like(whole), whole)
    fitted = rounding.ridge_target(weight.double(), rounding.damp(gram.gram, 1e-9), gram.shift)
    assert (fitted - weight).norm() > 0.05 * weight.norm()  # what fitting alone would do


def test_the_bias_takes_a_planted_mean_error():
    x, weight, bias = torch.randn(3000, 32), torch.randn(8, 32), torch.randn(8)
    offset = torch.linspace(-1, 1, 32)
    y = (x.double() @ weight.double().t()) + bias
    corrected, full = solve(weight, bias, moments_of(x + offset, x), nearest(weight))
    none = solve(weight, bias, moments_of(x + offset, x), nearest(weight), mu=0.0)[1]
    torch.testing.assert_close(none, bias.double())
    left = (x + offset).double() @ corrected.dequantize().double().t() + full - y
    assert left.mean(0).abs().max() < 1e-4
    assert error(x + offset, corrected, full, y) < 0.01 * error(x + offset, nearest(weight), bias, y)


def test_zero_points_and_a_shared_scale_stay():
    x, weight = correlated(800, 48), torch.randn(12, 48) + 0.5
    codes, scale, zero_point = nm.quantize_weight_asymmetric(weight)
    present = Weights(codes, scale, zero_point)
    chosen, _ = solve(weight, None, moments_of(x), present)
    assert torch.equal(chosen.scale, scale) and torch.equal(chosen.zero_point, zero_point)
    y = x.double() @ weight.double().t()
    assert error(x, chosen, None, y) < 0.8 * error(x, present, None, y)
    scale = nm.weight_scale(weight, per_channel=False)
    present = Weights(nm.quantize_weight(weight, scale), scale)
    assert torch.equal(solve(weight, None, moments_of(x), present, per_channel=False)[0].scale, scale)


def test_silent_and_doubled_channels():
    """Columns that never see an input, or that always see the same, leave the Gram matrix singular."""
    x, weight = correlated(300, 40), torch.randn(4, 40)
    x[:, 3] = 0
    x[:, 5] = x[:, 4]
    chosen, bias = solve(weight, torch.zeros(4), moments_of(x), nearest(weight))
    assert torch.isfinite(chosen.dequantize()).all() and torch.isfinite(bias).all()
    silent, _ = solve(weight, torch.zeros(4), moments_of(torch.zeros(10, 40)), nearest(weight))
    torch.testing.assert_close(silent.dequantize(), weight, atol=float(silent.scale.max()), rtol=0)


def test_the_scale_search_serves_the_output_not_the_weight():
    """A large weight on a channel without input must not decide the scale."""
    x, weight = torch.randn(500, 64), torch.randn(4, 64)
    x[:, 0] *= 1e-4
    weight[:, 0] = 6.0
    gram = rounding.damp(moments_of(x).gram, 1e-9).float()
    scale = rounding.search_scale(weight, gram)
    assert (scale < 0.8 * nm.weight_scale(weight)).all()


def test_moments_do_not_depend_on_the_batches():
    x, y = correlated(300, 20), correlated(300, 20, seed=1)
    whole, parts = Moments(20), Moments(20)
    whole.add(x, y)
    for a, b in zip(x.split(77), y.split(77), strict=True):
        parts.add(a, b)
    for a, b in zip(whole.second(True), parts.second(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)
    deviation = (x - x.mean(0)).double()
    torch.testing.assert_close(whole.second(True)[0], deviation.t() @ deviation, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"expected two inputs \(T, 20\); got \(300, 20\) and \(77, 20\)"):
        whole.add(x, y[:77])
