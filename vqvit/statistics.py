"""Is one classifier worse than another on the same images, or is it chance? Paired tests on few hundred images.

Of n images let `losses` be those that only the reference classifies correctly and `gains` those that only the candidate
does. The rest, where both are right or both wrong, says nothing about the difference

    drop = (losses - gains) / n.

Given m = losses + gains, the losses are Binomial(m, π); without a difference π = 1/2 (McNemar), and in general
drop = m (2 π - 1) / n. With 512 images one standard error of an accuracy of 98 % is 0.6 points: a drop alone decides
nothing.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

BISECTIONS = 64
"""Halvings of the interval [0, 1]: past the resolution of fp64."""

RESAMPLES_AT_ONCE = 256


def mcnemar(losses: int, gains: int) -> float:
    """Exact two-sided p-value of McNemar's test: the chance of a split at least as uneven as losses : gains."""
    return min(1.0, 2 * _tail(max(losses, gains), _discordant(losses, gains)))


def mcnemar_one_sided(losses: int, gains: int) -> float:
    """Exact p-value against "no worse": P(Binomial(losses + gains, 1/2) >= losses)."""
    return _tail(losses, _discordant(losses, gains))


def drop_lower_bound(losses: int, gains: int, images: int, confidence: float = 0.95) -> float:
    """Exact one-sided lower confidence bound of the drop given m, as a share of the images.

    m (2 π_low - 1) / n with π_low the Clopper-Pearson bound of losses of m. It is above 0 exactly where
    `mcnemar_one_sided` is below 1 - confidence. Raises `ValueError` for impossible counts or confidence.
    """
    discordant = _discordant(losses, gains)
    if images < max(1, discordant):
        raise ValueError(f"images: expected at least 1, and at least losses + gains = {discordant}; got {images}")
    return discordant * (2 * binomial_lower_bound(losses, discordant, confidence) - 1) / images


def binomial_lower_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson's one-sided lower bound: the π with P(X >= successes) = 1 - confidence; 0 without successes."""
    _check_share(successes, trials)
    _check_confidence(confidence)
    if successes == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _upper_tail(successes, trials, middle) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def bootstrap_lower_bound(differences: Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> float:
    """Lower confidence bound of the mean of paired differences (n,): the 1 - confidence quantile of resampled means.

    For a drop of accuracy they are reference right minus candidate right, each -1, 0 or 1. Raises `ValueError` if there
    are none, or for impossible options.
    """
    _check_confidence(confidence)
    if differences.dim() != 1 or len(differences) == 0 or resamples < 1:
        received = f"differences {tuple(differences.shape)}, resamples {resamples}"
        raise ValueError(f"bootstrap: expected differences (n,) with n >= 1 and resamples >= 1; got {received}")
    generator, n = torch.Generator().manual_seed(seed), len(differences)
    differences, means = differences.double().cpu(), []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        rows = min(RESAMPLES_AT_ONCE, resamples - start)
        means.append(differences[torch.randint(n, (rows, n), generator=generator)].mean(1))
    return float(torch.cat(means).quantile(1 - confidence))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's two-sided interval of a share, such as an accuracy.

    The π with |p - π| <= z sqrt(π (1 - π) / n), p = successes / n. Raises `ValueError` for impossible counts.
    """
    _check_share(successes, trials)
    _check_confidence(confidence)
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, spread = successes / trials, z * z / trials
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / trials + spread / (4 * trials)) / (1 + spread)
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == trials else middle + half
    return low, high


def _tail(at_least: int, trials: int) -> float:
    """P(Binomial(trials, 1/2) >= at_least), summed in integers."""
    return sum(math.comb(trials, k) for k in range(at_least, trials + 1)) / (1 << trials)


def _upper_tail(successes: int, trials: int, share: float) -> float:
    """P(Binomial(trials, share) >= successes) for 0 < share < 1."""
    log_p, log_q = math.log(share), math.log1p(-share)
    logs = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q
        for k in range(successes, trials + 1)
    )
    return math.fsum(map(math.exp, logs))


def _discordant(losses: int, gains: int) -> int:
    if losses < 0 or gains < 0:
        raise ValueError(f"paired test: expected counts of at least 0; got losses {losses}, gains {gains}")
    return losses + gains


def _check_share(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials:
        raise ValueError(f"share: expected 0 <= successes <= trials; got {successes} of {trials}")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1; got {confidence}")
