"""Means with their spread, and paired differences with SciPy's tests. Plain numbers in and out: no rows, no pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
WILCOXON_SEEDS = 6  # with fewer, the smallest p-value of the signed-rank test, 2 / 2**n, is above .05
_EQUAL = 1e-12  # differences closer than this are rounding


@dataclass(frozen=True)
class Summary:
    """mean; std: sample standard deviation (n - 1), None for n = 1."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Differences first - second by seed, over the seeds that both have.

    wins and losses: seeds where the difference is above and below 0. std, ci (95% confidence interval of the mean,
    Student's t), t_p (paired t-test) and wilcoxon_p (Wilcoxon signed-rank test) are None for n = 1; the t statistics
    also where all differences are equal, and wilcoxon_p where all are 0. Both tests are two-sided.
    """

    by_seed: dict[int, float]
    mean: float
    std: float | None
    n: int
    wins: int
    losses: int
    ci: tuple[float, float] | None
    t_p: float | None
    wilcoxon_p: float | None


def summarize(values: Iterable[float]) -> Summary | None:
    """None of no values."""
    values = np.array(list(values), dtype=float)
    if not len(values):
        return None
    return Summary(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None, len(values))


def paired_difference(first: dict[int, float], second: dict[int, float]) -> PairedDifference | None:
    """{seed: value} of two arms; None if they have no seed in common. Values must be finite."""
    seeds = sorted(first.keys() & second.keys())
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    differences[np.abs(differences) < _EQUAL] = 0.0
    summary = summarize(differences)
    if summary is None:
        return None
    ci = t_p = wilcoxon_p = None
    if len(seeds) > 1 and np.ptp(differences) > _EQUAL:
        test = stats.ttest_1samp(differences, 0.0)  # of the differences: this is the paired t-test
        interval = test.confidence_interval(CONFIDENCE)
        ci, t_p = (float(interval.low), float(interval.high)), float(test.pvalue)
    if len(seeds) > 1 and differences.any():
        wilcoxon_p = float(stats.wilcoxon(differences.round(12)).pvalue)  # rounded: ties are ties
    return PairedDifference(
        by_seed=dict(zip(seeds, differences.tolist(), strict=True)),
        mean=summary.mean,
        std=summary.std,
        n=summary.n,
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        ci=ci,
        t_p=t_p,
        wilcoxon_p=wilcoxon_p,
    )


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's step-down correction (Holm 1979) over those that are not None, in the order given: the corrected p-value
    of rank k of m is the largest (m - j + 1) p_(j) of ranks j <= k, at most 1."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


def p_text(p: float | None) -> str:
    """Three digits: .0312, .5; <.001; a dash for a test that was not made."""
    if p is None:
        return "–"
    return "<.001" if p < 0.001 else f"{p:.3g}".removeprefix("0")
