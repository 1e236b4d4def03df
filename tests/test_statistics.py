"""Paired tests against enumeration, against scipy where it is installed, and against their own laws."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqvit import statistics

COUNTS = [(0, 0), (1, 0), (0, 1), (5, 5), (3, 0), (7, 2), (2, 7), (40, 21), (300, 240)]


def enumerated(losses: int, gains: int) -> list[tuple[int, int]]:
    """Losses and gains of every equally likely outcome of as many fair coins."""
    m = losses + gains
    return [(sum(outcome), m - sum(outcome)) for outcome in itertools.product((0, 1), repeat=m)]


@pytest.mark.parametrize("losses, gains", [c for c in COUNTS if sum(c) <= 12])
def test_mcnemar_is_the_share_of_outcomes_at_least_as_extreme(losses, gains):
    outcomes = enumerated(losses, gains)
    two_sided = sum(abs(b - c) >= abs(losses - gains) for b, c in outcomes) / len(outcomes)
    one_sided = sum(b >= losses for b, c in outcomes) / len(outcomes)
    assert statistics.mcnemar(losses, gains) == pytest.approx(two_sided, abs=1e-15)
    assert statistics.mcnemar_one_sided(losses, gains) == pytest.approx(one_sided, abs=1e-15)


@pytest.mark.parametrize("losses, gains", COUNTS[1:])
def test_exact_tests_against_scipy(losses, gains):
    stats = pytest.importorskip("scipy.stats")
    n = losses + gains
    assert statistics.mcnemar(losses, gains) == pytest.approx(stats.binomtest(losses, n).pvalue, rel=1e-9)
    greater = stats.binomtest(losses, n, alternative="greater")
    assert statistics.mcnemar_one_sided(losses, gains) == pytest.approx(greater.pvalue, rel=1e-9)
    want = greater.proportion_ci(0.9, "exact").low
    assert statistics.binomial_lower_bound(losses, n, 0.9) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("successes, trials", [(0, 10), (10, 10), (98, 100), (503, 512), (1, 3)])
def test_wilson_against_scipy(successes, trials):
    stats = pytest.importorskip("scipy.stats")
    want = stats.binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert statistics.wilson_interval(successes, trials) == pytest.approx((want.low, want.high), abs=1e-12)


@given(st.integers(1, 400), st.integers(0, 400), st.floats(0.5, 0.99))
def test_wilson_ends_solve_its_equation(trials, successes, confidence):
    successes = min(successes, trials)
    low, high = statistics.wilson_interval(successes, trials, confidence)
    assert 0 <= low <= successes / trials <= high <= 1
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    for end in (low, high):
        if 0 < end < 1:
            assert abs(successes / trials - end) == pytest.approx(z * math.sqrt(end * (1 - end) / trials), rel=1e-6)


@given(st.integers(0, 60), st.integers(0, 60))
def test_the_bound_is_positive_exactly_where_mcnemar_rejects(losses, gains):
    bound = statistics.drop_lower_bound(losses, gains, 512, 0.95)
    assert bound <= (losses - gains) / 512
    p = statistics.mcnemar_one_sided(losses, gains)
    if abs(p - 0.05) > 1e-9:
        assert (bound > 0) == (p < 0.05)


def test_the_bound_covers():
    """Of many draws of 20 discordant images with π = 0.7 at least 95 % have their bound at or below the true drop."""
    generator = torch.Generator().manual_seed(0)
    losses = (torch.rand(4000, 20, generator=generator) < 0.7).sum(1).tolist()
    bounds = {b: statistics.drop_lower_bound(b, 20 - b, 100, 0.95) for b in set(losses)}
    covered = sum(bounds[b] <= 20 * 0.4 / 100 for b in losses) / len(losses)
    assert 0.95 <= covered < 1


def test_bootstrap_agrees_with_the_normal_law_and_is_reproducible():
    generator = torch.Generator().manual_seed(1)
    differences = torch.randn(2000, generator=generator) + 0.3
    bound = statistics.bootstrap_lower_bound(differences, 0.95, 2000, seed=3)
    want = float(differences.mean() - 1.645 * differences.std() / math.sqrt(2000))
    assert bound == pytest.approx(want, abs=0.004)
    assert bound == statistics.bootstrap_lower_bound(differences, 0.95, 2000, seed=3)
    assert bound != statistics.bootstrap_lower_bound(differences, 0.95, 2000, seed=4)


def test_bootstrap_of_one_value_is_that_value():
    assert statistics.bootstrap_lower_bound(torch.full((7,), -0.25)) == -0.25


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: statistics.mcnemar(-1, 2), "losses -1"),
        (lambda: statistics.drop_lower_bound(3, 3, 5), "losses \\+ gains = 6; got 5"),
        (lambda: statistics.drop_lower_bound(0, 0, 0), "got 0"),
        (lambda: statistics.binomial_lower_bound(3, 2), "got 3 of 2"),
        (lambda: statistics.wilson_interval(1, 2, 1.0), "between 0 and 1; got 1.0"),
        (lambda: statistics.bootstrap_lower_bound(torch.empty(0)), "n >= 1"),
        (lambda: statistics.bootstrap_lower_bound(torch.ones(3), resamples=0), "resamples 0"),
    ],
)
def test_impossible_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
