"""Sweeps: arms of one objective that differ only in lambda_ or only in beta, and the trade-off among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from frpo_nemo.report.differences import settings_by_run
from frpo_nemo.report.frame import REWARD, Results

FIELDS = ("lambda_", "beta")


@dataclass(frozen=True)
class Sweep:
    """Arms of one objective by growing value of `field`; label: distinguishes sweeps of one objective and field."""

    field: str
    objective: str
    label: str
    values: tuple[float, ...]
    arms: tuple[str, ...]


def find_sweeps(results: Results) -> list[Sweep]:
    """Return sweeps of two and more values, first those of lambda_."""
    return [sweep for field in FIELDS for sweep in _sweeps_of(results, field)]


def outcomes(results: Results, task: str) -> pd.DataFrame:
    """Return what arms had and kept: a line for each arm, the mean and std over seeds of "kl" (to the reference at the end of
    stage one), and of "before NAME" and "after NAME" fine-tuning on `task` for each of `kept_rewards`. NaN: not measured,
    or one seed."""
    values = {"kl": results.kl_at_end("train")}
    for reward in kept_rewards(results):
        values[f"before {reward}"] = results.reward_before(reward)
        values[f"after {reward}"] = results.at_end(reward, "finetune", task)
    return pd.concat({name: by_seed.agg(["mean", "std"]).T for name, by_seed in values.items()}, axis=1)


def kept_rewards(results: Results) -> list[str]:
    """Return the rewards of stage one's tasks, or the reward on all prompts if no tasks are distinguished."""
    return [name for name in results.rewards if name != REWARD] or [REWARD]


def baselines_of(results: Results, arms: Sequence[str]) -> list[str]:
    """Return the baseline arms with the beta of `arms`, or all baselines if none has it."""
    betas = {_value(results, arm, "beta") for arm in arms}
    baselines = [arm for arm in results.arms if results.is_baseline(arm) and arm not in arms]
    return [arm for arm in baselines if _value(results, arm, "beta") in betas] or baselines


def _sweeps_of(results: Results, field: str) -> list[Sweep]:
    settings = settings_by_run(results, "train")
    groups: list[list[str]] = []
    for arm in results.arms:
        if not isinstance(_value(results, arm, field), int | float):
            continue
        group = next((g for g in groups if _differ_only_in(settings.loc[g[0]], settings.loc[arm], field)), None)
        if group is None:
            groups.append([arm])
        else:
            group.append(arm)
    sweeps = []
    for group in groups:
        arms = {_value(results, arm, field): arm for arm in group}  # an equal value is the same setting twice
        if len(arms) > 1:
            name, values = str(results.objective_name(group[0])), sorted(arms)
            label = _label(results, group[0], name, field)
            sweeps.append(Sweep(field, name, label, tuple(values), tuple(arms[value] for value in values)))
    return sweeps


def _differ_only_in(one: pd.DataFrame, two: pd.DataFrame, field: str) -> bool:
    """Compare two arms: by all settings [seeds, settings] at a common seed (paths may hold the seed); where there is none,
    by objective and optimizer."""
    common = one.index.intersection(two.index, sort=False)
    first, second = (one.loc[common[0]], two.loc[common[0]]) if len(common) else (one.iloc[0], two.iloc[0])
    differing = first.index[first != second]
    if not len(common):
        differing = [name for name in differing if name.startswith(("objective.", "optim.", "max_steps"))]
    return set(differing) <= {f"objective.{field}"}


def _value(results: Results, arm: str, field: str) -> float | None:
    objective = results.objective(arm)
    return objective.get(field, 0.0 if field == "beta" else None) if objective else None


def _label(results: Results, arm: str, name: str, field: str) -> str:
    fixed = {other: _value(results, arm, other) for other in FIELDS if other != field}
    return ", ".join([name, *(f"{key.rstrip('_')} {value:g}" for key, value in fixed.items() if value is not None)])
