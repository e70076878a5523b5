"""`Study`: the rows of results.jsonl by arm, seed, stage and task, and the values of their points; no statistics. Rows of
evaluations are apart, in `evaluations`.

A value that a point lacks, or that was not finite, is None everywhere: it is never counted as a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.results import Row, check_row

REWARD = "reward/mean"
BASELINES = ("grpo", "dr_grpo")  # objectives that the others are compared with
KL_NAMES = {  # best first; all in nats per response
    "kl/exact": "the exact KL of every next-token distribution, summed over sampled responses",
    "kl/k3": "the k3 estimate of every token, summed over sampled responses",
    "kl/per_response": "the mean log-ratio of sampled responses",
}


class Study:
    """Rows by arm, seed, stage and task. Later rows of the same run replace earlier ones; arms, tasks and seeds are in
    the order in which they first came. ConfigError for a row that cannot be used, or for none."""

    def __init__(self, rows: Iterable[Row]):
        latest = {(r["arm"], r["seed"], r["stage"], r["task"], r.get("evaluation")): r for r in map(check_row, rows)}
        self.rows: list[Row] = [row for row in latest.values() if row["stage"] != "evaluate"]
        self.evaluations: list[Row] = [row for row in latest.values() if row["stage"] == "evaluate"]
        if not self.rows:
            raise ConfigError("There are no results to report.")
        self.arms: list[str] = _unique(row["arm"] for row in self.rows)
        self.tasks: list[str] = _unique(row["task"] for row in self.rows if row["stage"] == "finetune")
        self.seeds: list[int] = sorted(_unique(row["seed"] for row in self.rows))
        self.failed: list[Row] = [row for row in self.rows if row["status"] == "failed"]

    def runs(self, arm: str, stage: str, task: str | None = None) -> dict[int, Row]:
        """{seed: row} of the finished runs, by growing seed."""
        found = {row["seed"]: row for row in self.rows if _is(row, arm, stage, task) and row["status"] == "finished"}
        return dict(sorted(found.items()))

    def all_runs(self, stage: str, task: str | None = None) -> list[Row]:
        """The finished runs of all arms."""
        return [row for arm in self.arms for row in self.runs(arm, stage, task).values()]

    def objective(self, arm: str) -> dict[str, Any]:
        """The objective's settings of stage one; {} for an arm that had none."""
        mine = [row for row in self.rows if row["arm"] == arm and row["stage"] == "train"]
        return dict(mine[0]["settings"].get("objective") or {}) if mine else {}

    def objective_name(self, arm: str) -> str | None:
        objective = self.objective(arm)
        return objective.get("name") or objective.get("_target_")

    def is_baseline(self, arm: str) -> bool:
        return self.objective_name(arm) in BASELINES

    def pairs(self) -> list[tuple[str, str]]:
        """(arm, baseline arm) of every comparison to make."""
        baselines = [arm for arm in self.arms if self.is_baseline(arm)]
        others = [arm for arm in self.arms if self.objective_name(arm) and not self.is_baseline(arm)]
        return [(arm, baseline) for arm in others for baseline in baselines]

    def reward_names(self) -> list[str]:
        """Metrics of the reward on stage one's prompts: of all, then of each task of stage one."""
        names = _unique(name for row in self.rows for point in row["points"] for name in point)
        tasks = sorted(name for name in names if re.fullmatch(r"reward/task/.+/mean", name))
        return ([REWARD] if REWARD in names else []) + tasks

    def kl_name(self, stage: str, task: str | None = None) -> str | None:
        """The KL that most finished runs have, the best one among equals: one for all arms, so that estimates are not
        mixed in a comparison. None where no run has any."""
        runs = self.all_runs(stage, task)
        counts = {name: sum(len(series(row, name)[0]) > 1 for row in runs) for name in KL_NAMES}
        best = max(KL_NAMES, key=lambda name: counts[name])  # the first of equals, which is the best
        return best if counts[best] else None


def series(row: Row, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it is a finite number."""
    points = [(point["step"], point[name]) for point in row["points"] if _finite(point.get(name))]
    return [step for step, _ in points], [value for _, value in points]


def at_start(row: Row, name: str) -> float | None:
    """The metric before the first step; None if it was not measured then, or not finite."""
    first = row["points"][0]
    return first[name] if first["step"] == 0 and _finite(first.get(name)) else None


def at_end(row: Row, name: str) -> float | None:
    """The metric at the last point that measures it; None if there is none, or it was not finite."""
    values = [point[name] for point in row["points"] if name in point]
    return values[-1] if values and _finite(values[-1]) else None


def by_seed(runs: dict[int, Row], value) -> dict[int, float]:
    """{seed: value(row)} where that is not None."""
    return {seed: found for seed, row in runs.items() if (found := value(row)) is not None}


def reward_label(name: str) -> str:
    """reward/task/harmful/mean -> "harmful"; reward/mean -> "all prompts"."""
    return "all prompts" if name == REWARD else name.removeprefix("reward/task/").removesuffix("/mean")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is(row: Row, arm: str, stage: str, task: str | None) -> bool:
    return (row["arm"], row["stage"], row["task"]) == (arm, stage, task)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
