"""Sweeps: arms of one objective that differ in lambda_ alone or in beta alone, and what they trade.

Numbers only; the pictures are in sweep_figures.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from frpo_nemo.evaluation.endpoints import kl_values, reward_before, reward_values
from frpo_nemo.evaluation.matching import DEFAULTS, flat_settings
from frpo_nemo.evaluation.statistics import Summary, summarize
from frpo_nemo.evaluation.study import REWARD, Study

FIELDS = ("lambda_", "beta")


@dataclass(frozen=True)
class Sweep:
    """Arms of one objective by growing value of `field`; label: what tells sweeps of one objective and field apart."""

    field: str
    objective: str
    label: str
    values: tuple[float, ...]
    arms: tuple[str, ...]


@dataclass(frozen=True)
class FrontierPoint:
    """after: {reward: after fine-tuning}; before: {reward: before it}; kl: to the reference at the end of stage one.
    Means over the seeds; what was not measured is left out."""

    arm: str
    value: float | None
    after: dict[str, Summary]
    before: dict[str, Summary]
    kl: Summary | None


def find_sweeps(study: Study) -> list[Sweep]:
    """Sweeps of two and more values, first those of lambda_."""
    return [sweep for field in FIELDS for sweep in _sweeps_of(study, field)]


def frontier(study: Study, sweep: Sweep, task: str) -> list[FrontierPoint]:
    """A point for each arm of the sweep that finished its fine-tuning on `task`."""
    points = [frontier_point(study, arm, task, value) for value, arm in zip(sweep.values, sweep.arms, strict=True)]
    return [point for point in points if point.after]


def frontier_point(study: Study, arm: str, task: str, value: float | None = None) -> FrontierPoint:
    after = {name: summarize(reward_values(study, arm, "after", task, name).values()) for name in kept_rewards(study)}
    before = {name: summarize(reward_before(study, arm, name).values()) for name in after}
    return FrontierPoint(
        arm=arm,
        value=value,
        after={name: summary for name, summary in after.items() if summary},
        before={name: summary for name, summary in before.items() if summary},
        kl=summarize(kl_values(study, arm, "train").values()),
    )


def kept_rewards(study: Study) -> list[str]:
    """The rewards of stage one's tasks; the reward in all if no tasks are told apart."""
    return [name for name in study.reward_names() if name != REWARD] or [REWARD]


def baselines_of(study: Study, arms: tuple[str, ...]) -> list[str]:
    """Baseline arms with the beta of `arms`, or all of them if none has it."""
    betas = {study.objective(arm).get("beta", 0.0) for arm in arms}
    baselines = [arm for arm in study.arms if study.is_baseline(arm) and arm not in arms]
    return [arm for arm in baselines if study.objective(arm).get("beta", 0.0) in betas] or baselines


def _sweeps_of(study: Study, field: str) -> list[Sweep]:
    groups: list[list[str]] = []
    for arm in study.arms:
        if not isinstance(_value(study, arm, field), int | float):
            continue
        group = next((g for g in groups if _differ_only_in(study, g[0], arm, field)), None)
        if group is None:
            groups.append([arm])
        else:
            group.append(arm)
    sweeps = []
    for group in groups:
        values = {_value(study, arm, field): arm for arm in group}  # an equal value is the same setting twice
        if len(values) > 1:
            ordered = sorted(values)
            name = str(study.objective_name(group[0]))
            label = _label(study, group[0], name, field)
            sweeps.append(Sweep(field, name, label, tuple(ordered), tuple(values[v] for v in ordered)))
    return sweeps


def _differ_only_in(study: Study, first: str, second: str, field: str) -> bool:
    """By all settings at a common seed (paths may hold the seed); by objective and optimizer where there is none."""
    a, b = _settings(study, first), _settings(study, second)
    seed = next(iter(a.keys() & b.keys()), None)
    one, two = (a[seed], b[seed]) if seed is not None else (next(iter(a.values())), next(iter(b.values())))
    keys = one.keys() | two.keys()
    if seed is None:
        keys = {key for key in keys if key.startswith(("objective.", "optim.", "max_steps"))}
    return all(
        key == f"objective.{field}" or one.get(key, DEFAULTS.get(key)) == two.get(key, DEFAULTS.get(key))
        for key in keys
    )


def _settings(study: Study, arm: str) -> dict[int, dict[str, Any]]:
    rows = [row for row in study.rows if row["arm"] == arm and row["stage"] == "train"]
    return {row["seed"]: flat_settings(row["settings"]) for row in rows}


def _value(study: Study, arm: str, field: str) -> float | None:
    objective = study.objective(arm)
    return objective.get(field, DEFAULTS.get(f"objective.{field}")) if objective else None


def _label(study: Study, arm: str, name: str, field: str) -> str:
    fixed = {other: _value(study, arm, other) for other in FIELDS if other != field}
    return ", ".join([name, *(f"{key.rstrip('_')} {value:g}" for key, value in fixed.items() if value is not None)])
