"""Arms against baselines: paired differences by seed, with SciPy's tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pandas as pd
from scipy import stats

from frpo_nemo.report.frame import Results

CONFIDENCE = 0.95
WILCOXON_SEEDS = 6  # with fewer, the smallest p-value of the signed-rank test, 2 / 2**n, is above .05
_DIGITS = 12  # differences that agree in as many digits are equal except for rounding


@dataclass(frozen=True)
class PairedTest:
    """Mean of n paired differences. wins and losses: how many are above and below 0.

    std is the sample standard deviation, low and high are the ends of the 95% confidence interval of the mean (Student's
    t), t_p and wilcoxon_p are the two-sided p-values of the paired t-test and of the Wilcoxon signed-rank test. They are
    NaN for n = 1; those of Student's t also where all differences are equal, and wilcoxon_p where all are 0.
    """

    n: int
    mean: float
    std: float
    wins: int
    losses: int
    low: float = float("nan")
    high: float = float("nan")
    t_p: float = float("nan")
    wilcoxon_p: float = float("nan")


def paired_test(first: pd.Series, second: pd.Series) -> PairedTest:
    """Compare first - second over the labels (seeds, prompts) at which both have a value."""
    differences = (first - second).dropna().round(_DIGITS)
    tests: dict[str, float] = {}
    if differences.nunique() > 1:
        t = stats.ttest_1samp(differences, 0.0)  # on differences, this is the paired t-test
        interval = t.confidence_interval(CONFIDENCE)
        tests |= dict(low=float(interval.low), high=float(interval.high), t_p=float(t.pvalue))
    if len(differences) > 1 and differences.any():
        tests["wilcoxon_p"] = float(stats.wilcoxon(differences).pvalue)
    return PairedTest(
        n=len(differences),
        mean=float(differences.mean()),
        std=float(differences.std()),
        wins=int((differences > 0).sum()),
        losses=int((differences < 0).sum()),
        **tests,
    )


def comparisons(results: Results) -> pd.DataFrame:
    """Compare every objective that is not a baseline with every baseline: a line for each kind ("stage one": the reward at
    its end; "after" a fine-tuning; "lost" in it), task, reward and pair of arms that have a seed in common.

    Columns: kind, task, reward, arm, baseline, those of PairedTest, and t_holm and wilcoxon_holm: corrected over the
    `family` comparisons of the same kind and reward, all pairs of arms on all downstream tasks.
    """
    lines = [
        dict(kind=kind, task=task, reward=reward, arm=arm, baseline=baseline, **asdict(test))
        for reward in results.rewards
        for kind, task, values in _compared(results, reward)
        for arm, baseline in results.pairs()
        if (test := paired_test(values[arm], values[baseline])).n
    ]
    found = pd.DataFrame(lines, columns=["kind", "task", "reward", "arm", "baseline", *PairedTest.__annotations__])
    families = found.groupby(["kind", "reward"])
    found["family"] = families["n"].transform("size")
    found["t_holm"] = families["t_p"].transform(holm)
    found["wilcoxon_holm"] = families["wilcoxon_p"].transform(holm)
    return found


def holm(p_values: pd.Series) -> pd.Series:
    """Apply Holm's step-down correction (Holm 1979) to those that are not NaN: the corrected p-value of rank k of m is the
    largest (m - j + 1) p_(j) of ranks j <= k, at most 1."""
    ranked = p_values.dropna().sort_values()
    corrected = (ranked * range(len(ranked), 0, -1)).cummax().clip(upper=1.0)
    return corrected.reindex(p_values.index)


def share_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a share by Wilson's method, which is also right near 0 and 1."""
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def explain_tests(results: Results, found: pd.DataFrame) -> list[str]:
    """Explain how `comparisons` were tested, and what the tests cannot say."""
    if found.empty:
        names = ", ".join(sorted({name for arm in results.arms if (name := results.objective_name(arm))})) or "none"
        return [
            f"There are no paired differences: they need FRPO and a baseline at a common seed (objectives: {names})."
        ]
    texts = [
        "Differences are arm − baseline at the same seed; wins counts the seeds where it is above 0 (for the reward lost, "
        "a win is a greater loss). The interval is Student's t, 95%. p-values are two-sided: the paired t-test and the "
        "Wilcoxon signed-rank test, both by SciPy.",
        f"Holm: corrected over a family of comparisons of the same kind and the same reward, all pairs of arms on all "
        f"downstream tasks together ({_family_sizes(found)}). Rewards and kinds are not corrected for one another.",
    ]
    smallest = found["n"].min()
    if smallest < WILCOXON_SEEDS:
        texts.append(
            f"With fewer than {WILCOXON_SEEDS} seeds the Wilcoxon test cannot reach .05: at n = {smallest} its smallest "
            f"p-value is {min(1.0, 2 / 2**smallest):.4g}."
        )
    if smallest == 1:
        texts.append("One seed has no spread, so nothing can be tested with it.")
    return texts


def _compared(results: Results, reward: str) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (kind, task, [seeds, arms] of what is compared)."""
    yield "stage one", "", results.at_end(reward, "train")
    for task in results.tasks:
        before, after = results.at_start(reward, "finetune", task), results.at_end(reward, "finetune", task)
        yield "after", task, after
        yield "lost", task, before - after


def _family_sizes(found: pd.DataFrame) -> str:
    sizes = found.groupby("kind", sort=False)["family"].unique()
    return "; ".join(f"{kind}: {' or '.join(map(str, sorted(numbers)))}" for kind, numbers in sizes.items())
