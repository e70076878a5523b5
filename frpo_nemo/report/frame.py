"""`Results`: the rows of results.jsonl as data frames.

The measurements of one stage's runs are a frame of seeds by arms. NaN stands for a value that was not measured or not
finite: pandas leaves it out of means, and the difference of two columns is paired by seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import build_objective
from frpo_nemo.study.results import ResultRow, check_row

REWARD = "reward/mean"
DOWNSTREAM = ("downstream/accuracy", "downstream/token_accuracy", "downstream/reward", "downstream/loss")
BASELINES = ("grpo", "dr_grpo")  # objectives that the others are compared with
KL_NAMES = {  # best first; all in nats per response
    "kl/exact": "the exact KL of every next-token distribution, summed over sampled responses",
    "kl/k3": "the k3 estimate of every token, summed over sampled responses",
    "kl/per_response": "the mean log-ratio of sampled responses",
}
_RUN = ["arm", "seed", "stage", "task", "status"]
_POINT = [*_RUN, "step", "metric", "value"]


class Results:
    """The runs of a study, or any runs. Later rows of the same run replace earlier ones; arms and tasks are in the order
    in which they first occur. Stage one is `stage` "train" with the task "". Raises ConfigError for an invalid row, or if
    there is none.

    rows, evaluations: the rows of trainings and of evaluations. runs: a line for each training (arm, seed, stage, task,
    status, steps, tokens). points: a line for each metric at each step, with its `value`.
    """

    def __init__(self, rows: Iterable[ResultRow]):
        latest = {(r["arm"], r["seed"], r["stage"], r["task"], r.get("evaluation")): r for r in map(check_row, rows)}
        self.rows: list[ResultRow] = [row for row in latest.values() if row["stage"] != "evaluate"]
        self.evaluations: list[ResultRow] = [row for row in latest.values() if row["stage"] == "evaluate"]
        if not self.rows:
            raise ConfigError("There are no results to report.")
        identities = [{name: row[name] for name in _RUN} | {"task": row["task"] or ""} for row in self.rows]
        self.runs = pd.DataFrame(
            identity | {"steps": row.get("steps"), "tokens": row.get("tokens")}
            for identity, row in zip(identities, self.rows, strict=True)
        )
        self.points = _points(identities, self.rows)
        self.arms: list[str] = list(self.runs["arm"].unique())
        self.tasks: list[str] = [task for task in self.runs["task"].unique() if task]
        self.seeds: list[int] = sorted(self.runs["seed"].unique().tolist())
        self.failed: list[ResultRow] = [row for row in self.rows if row["status"] == "failed"]
        names = set(self.points["metric"])
        tasks = sorted(name for name in names if re.fullmatch(r"reward/task/.+/mean", name))
        self.rewards: list[str] = [name for name in (REWARD,) if name in names] + tasks

    def finished(self, stage: str, task: str = "") -> pd.DataFrame:
        """Return the lines of `runs` that finished."""
        return _select(self.runs, stage, task)

    def finished_points(self, stage: str, task: str = "") -> pd.DataFrame:
        """Return the lines of `points` of runs that finished."""
        return _select(self.points, stage, task)

    def by_arm(self, lines: pd.DataFrame, column: str) -> pd.DataFrame:
        """Return [seeds, arms] of a column of `lines`, which has at most one line for each seed and arm."""
        wide = lines.pivot(index="seed", columns="arm", values=column)
        return wide.reindex(index=self.seeds, columns=self.arms)

    def at_start(self, metric: str | None, stage: str, task: str = "") -> pd.DataFrame:
        """Return [seeds, arms] of a metric before the first step."""
        points = self.finished_points(stage, task)
        return self.by_arm(points[(points["metric"] == metric) & (points["step"] == 0)], "value")

    def at_end(self, metric: str | None, stage: str, task: str = "") -> pd.DataFrame:
        """Return [seeds, arms] of a metric at the last point that has it."""
        points = self.finished_points(stage, task)
        last = points[points["metric"] == metric].drop_duplicates(["arm", "seed"], keep="last")
        return self.by_arm(last, "value")

    def reward_before(self, reward: str) -> pd.DataFrame:
        """Return [seeds, arms] of a reward before any fine-tuning: at the last validation of stage one, or at step 0 of a
        fine-tuning where stage one is not among the runs."""
        before = self.at_end(reward, "train")
        for task in self.tasks:
            before = before.combine_first(self.at_start(reward, "finetune", task))
        return before

    def downstream_names(self, task: str) -> list[str]:
        """Return those of DOWNSTREAM that the task's runs measured."""
        measured = set(self.finished_points("finetune", task)["metric"])
        return [name for name in DOWNSTREAM if name in measured]

    def kl_name(self, stage: str, task: str = "") -> str | None:
        """Return the KL that most finished runs have, the best one among equals. It is the same for all arms, so that a
        comparison does not mix estimates. None where no run has any."""
        points = self.finished_points(stage, task).dropna(subset="value")
        moves = points.groupby(["metric", "arm", "seed"]).size() > 1
        counts = moves.groupby("metric").sum().reindex(list(KL_NAMES), fill_value=0)
        return counts.idxmax() if counts.any() else None  # the first of equals, which is the best

    def kl_at_end(self, stage: str, task: str = "") -> pd.DataFrame:
        """Return [seeds, arms] of the KL at the end of the runs, by `kl_name`."""
        return self.at_end(self.kl_name(stage, task), stage, task)

    def objective(self, arm: str) -> dict[str, Any]:
        """Return the objective's settings in stage one; {} for an arm that had none."""
        mine = (row["settings"] for row in self.rows if row["arm"] == arm and row["stage"] == "train")
        return dict(next(mine, dict[str, Any]()).get("objective") or {})

    def effective_beta(self, arm: str) -> float | None:
        """Return the beta of Dr. GRPO that weighs the KL against rewards that hardly differ as this arm does; None where
        that depends on the batch, or where stage one is not among the runs."""
        settings: dict[str, Any] = next((r["settings"] for r in self.rows if r["arm"] == arm and r["stage"] == "train"), {})
        group_size = (settings.get("rollout") or {}).get("group_size")
        if not self.objective(arm) or not group_size:
            return None
        try:
            objective = build_objective(self.objective(arm))
        except ConfigError:  # one of the user's own, whose module is not here
            return None
        weight = objective.reward_weight(group_size)
        return objective.beta / weight if weight else None

    def objective_name(self, arm: str) -> str | None:
        objective = self.objective(arm)
        return objective.get("name") or objective.get("_target_")

    def is_baseline(self, arm: str) -> bool:
        return self.objective_name(arm) in BASELINES

    def pairs(self) -> list[tuple[str, str]]:
        """Return (arm, baseline arm) of every comparison to make."""
        baselines = [arm for arm in self.arms if self.is_baseline(arm)]
        others = [arm for arm in self.arms if self.objective_name(arm) and not self.is_baseline(arm)]
        return [(arm, baseline) for arm in others for baseline in baselines]


def reward_label(name: str) -> str:
    """Return "harmful" for reward/task/harmful/mean, "all prompts" for reward/mean."""
    return "all prompts" if name == REWARD else name.removeprefix("reward/task/").removesuffix("/mean")


def _points(identities: list[dict[str, Any]], rows: list[ResultRow]) -> pd.DataFrame:
    lines = [
        (*identity.values(), point["step"], metric, value)
        for identity, row in zip(identities, rows, strict=True)
        for point in row["points"]
        for metric, value in point.items()
        if metric != "step"
    ]
    points = pd.DataFrame(lines, columns=_POINT)
    points["value"] = pd.to_numeric(points["value"], errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
    return points


def _select(lines: pd.DataFrame, stage: str, task: str) -> pd.DataFrame:
    return lines[(lines["status"] == "finished") & (lines["stage"] == stage) & (lines["task"] == task)]
