"""The reward-against-KL landscape (figure 2 of arXiv 2602.08813) and curves by training step, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from frpo_nemo.report.frame import Results

GRID = 101  # KL values at which the seeds are averaged


@dataclass(frozen=True)
class Landscape:
    """Reward against KL for one arm.

    by_seed: {seed: reward of each probe, indexed by growing KL}; ends: {seed: (kl, reward)} at the last probe.
    rewards [GRID, seeds]: at equal KL, which is the index, over the KL that every seed reaches; it has no lines if the seeds
    have no KL in common.
    """

    by_seed: dict[int, pd.Series]
    ends: dict[int, tuple[float, float]]
    rewards: pd.DataFrame


def landscape(results: Results, arm: str, task: str, reward: str) -> Landscape | None:
    """Return how much reward an arm kept on its way; None if none of its runs has two probes with both values.

    Fine-tuning moves away from the policy, but a measured KL may fall between two probes: the probes of a seed are put
    in order of their KL (the mean reward where KL is equal) and joined by straight lines. Seeds are compared at equal
    KL, from the largest of the seeds' first KLs to the smallest of their last.
    """
    kl = results.kl_name("finetune", task)
    points = results.finished_points("finetune", task)
    points = points[(points["arm"] == arm) & points["metric"].isin([kl, reward])]
    probes = points.pivot(index=["seed", "step"], columns="metric", values="value")
    probes = probes.reindex(columns=[kl, reward]).dropna()
    runs = {seed: run for seed, run in probes.groupby("seed") if len(run) > 1}
    if not runs:
        return None
    by_seed = {seed: run.groupby(kl)[reward].mean() for seed, run in runs.items()}
    ends = {seed: tuple(run.iloc[-1]) for seed, run in runs.items()}
    low = max(line.index[0] for line in by_seed.values())
    high = min(line.index[-1] for line in by_seed.values())
    grid = np.linspace(low, high, GRID if high > low else 0)
    rewards = {seed: np.interp(grid, line.index, line) for seed, line in by_seed.items()}
    return Landscape(by_seed, ends, pd.DataFrame(rewards, index=grid))


def by_step(results: Results, arm: str, metric: str, stage: str, task: str = "") -> pd.DataFrame:
    """Return [steps, seeds] of a metric at the steps where every run of the arm that has the metric at all has a number."""
    points = results.finished_points(stage, task)
    points = points[(points["arm"] == arm) & (points["metric"] == metric)].dropna(subset="value")
    return points.pivot(index="step", columns="seed", values="value").dropna()
