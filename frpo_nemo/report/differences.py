"""Finds what was not the same in all arms: settings, budgets, starting points, seeds and failures.

Each finding is a sentence with its numbers. Comparisons of arms should be read together with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from frpo_nemo.report.frame import Results, reward_label
from frpo_nemo.study.results import ResultRow

# Means of two arms closer than this count as matched.
TOKENS, KL, REWARD, ACCURACY = 0.01, 0.1, 0.01, 0.01  # the first two relative to the larger, the others absolute
RULE = (
    "Arms count as matched where the largest and the smallest mean differ by less than 1% (tokens), 10% (KL), "
    "or 0.01 (rewards and accuracies); settings where they are equal at the same seed. The reward before fine-tuning is "
    "that of the last validation of stage one, or of step 0 of fine-tuning where stage one is not among the runs."
)
DEFAULTS = {"objective.beta": 0.0}  # the value of a setting that is not written


def not_matched(results: Results) -> list[str]:
    """Return all findings, the most serious first: failures, missing seeds and values, then budgets, settings and what the
    arms had reached before and after. [] if everything was matched."""
    return [
        *map(failure, results.failed),
        *_missing_seeds(results),
        *_missing_values(results),
        *_budgets(results),
        *_settings(results),
        *_environments(results),
        *_levels(results),
    ]


def failure(row: ResultRow) -> str:
    """Describe a failed run in one sentence, with the last line of its error."""
    what = stage_text(row["task"])
    if row["stage"] == "evaluate":
        what = f"evaluation {row['evaluation']} after {what}"
    lines = [line.strip() for line in (row["error"] or "").splitlines() if line.strip()]
    return f"{row['arm']}, seed {row['seed']}: {what} failed: {lines[-1] if lines else 'no message'}"


def stage_text(task: str | None) -> str:
    return f"fine-tuning on {task}" if task else "stage one"


def stages(results: Results) -> list[tuple[str, str]]:
    """Return (stage, task) of stage one, if there is any, and of each fine-tuning."""
    train = [("train", "")] if "train" in set(results.runs["stage"]) else []
    return train + [("finetune", task) for task in results.tasks]


def settings_by_run(results: Results, stage: str, task: str = "") -> pd.DataFrame:
    """Return the settings of a stage's runs as text: a line for each arm and seed, a column for each setting. A setting that
    is not written is "default", or its value in DEFAULTS."""
    rows = [r for r in results.rows if (r["stage"], r["task"] or "") == (stage, task) and r["settings"]]
    index = [[row["arm"] for row in rows], [row["seed"] for row in rows]]
    flat = [{name: _text(value) for name, value in _flat(row["settings"]).items()} for row in rows]
    defaults = {name: _text(value) for name, value in DEFAULTS.items()}
    settings = pd.DataFrame(flat, index=pd.MultiIndex.from_arrays(index, names=["arm", "seed"]))
    return settings.fillna(defaults).fillna("default")


def differing_settings(results: Results, stage: str, task: str = "") -> pd.DataFrame:
    """Return [settings, arms] of the settings that differ between arms at the same seed. A value that changes with the
    seed is shown as "by seed"."""
    settings = settings_by_run(results, stage, task)
    differing = [name for name in settings if _differs(settings[name].unstack("arm"))]
    arms = [arm for arm in results.arms if arm in settings.index]
    shown = {arm: [_shown(settings.loc[arm, name]) for name in differing] for arm in arms}
    return pd.DataFrame(shown, index=pd.Index(differing, name="setting"))


def _differs(values: pd.DataFrame) -> bool:
    """Return whether arms ([seeds, arms]) differ at a seed that several have; or at any, where no two arms share a seed."""
    shared = values[values.count(axis=1) > 1]
    if len(shared):
        return bool((shared.nunique(axis=1) > 1).any())
    return len({frozenset(values[arm].dropna()) for arm in values}) > 1


def _missing_seeds(results: Results) -> list[str]:
    found = []
    for stage, task in stages(results):
        runs = results.runs[(results.runs["stage"] == stage) & (results.runs["task"] == task)]
        for arm, status in results.by_arm(runs, "status").items():
            absent = [str(seed) for seed in status.index[status.isna()]]
            if absent:
                plural = "s" if len(absent) > 1 else ""
                found.append(f"{arm} has no {stage_text(task)} of seed{plural} {', '.join(absent)}.")
    if found or results.failed:
        found.append("Means are over the finished seeds of each arm; paired differences use the seeds that both have.")
    return found


def _missing_values(results: Results) -> list[str]:
    """Report finished runs without a number at the end that other runs of their stage have."""
    found = []
    for stage, task in stages(results):
        names = [*results.rewards, results.kl_name(stage, task)]
        names += results.downstream_names(task) if task else []
        finished = results.by_arm(results.finished(stage, task), "status").notna()
        for name in filter(None, names):
            missing = (finished & results.at_end(name, stage, task).isna()).unstack()
            absent = [f"{arm} seed {seed}" for arm, seed in missing.index[missing]]
            if absent and len(absent) < finished.sum().sum():
                where = stage_title(task)
                found.append(f"{where}: no finite {name} at the end of {', '.join(absent)}; not counted.")
    return found


def _budgets(results: Results) -> list[str]:
    found = []
    for stage, task in stages(results):
        where, runs = stage_title(task), results.finished(stage, task)
        steps = runs.groupby("arm")["steps"].agg(_shown).reindex(results.arms).dropna()
        if steps.nunique() > 1:
            found.append(f"{where}: the number of steps differs: {_grouped(steps)}.")
        tokens = results.by_arm(runs, "tokens")
        found += _level(f"{where}: training tokens differ", tokens, relative=TOKENS, digits=0)
    return found


def _settings(results: Results) -> list[str]:
    found = []
    for stage, task in stages(results):
        for name, values in differing_settings(results, stage, task).iterrows():
            swept = name.startswith("objective.") and name != "objective.beta"
            if not swept and name != "max_steps":  # arms are defined by the other fields of the objective
                shown = name.removeprefix("objective.")
                found.append(f"{stage_title(task)}: {shown} differs: {_grouped(values)}.")
    return found


def _environments(results: Results) -> list[str]:
    """Report differences in code and library versions."""
    commits: dict[str, dict[str, None]] = {}  # commit -> its arms in order
    packages: dict[str, set[str]] = {}
    for row in results.rows:
        environment = row.get("environment") or {}
        if environment.get("commit"):
            commits.setdefault(environment["commit"][:10], {})[row["arm"]] = None
        for name, version in environment.get("packages", {}).items():
            packages.setdefault(name, set()).add(version)
    found = []
    if len(commits) > 1:
        listed = ", ".join(f"{commit} ({', '.join(arms)})" for commit, arms in commits.items())
        found.append(f"The runs were made with {len(commits)} commits: {listed}.")
    for name, versions in packages.items():
        if len(versions) > 1:
            found.append(f"The runs were made with {len(versions)} versions of {name}: {', '.join(sorted(versions))}.")
    return found


def _levels(results: Results) -> list[str]:
    """Report where the arms stood before fine-tuning, and what they learned in it."""
    kl = f"KL to the reference at the end of stage one ({results.kl_name('train')}, nats per response) differs"
    found = _level(kl, results.kl_at_end("train"), relative=KL)
    for reward in results.rewards:
        title = f"Reward before fine-tuning ({reward_label(reward)}) differs"
        found += _level(title, results.reward_before(reward), absolute=REWARD)
    for task in results.tasks:
        for metric in ("downstream/accuracy", "downstream/reward"):
            title = f"{stage_title(task)}: the {metric.removeprefix('downstream/')} reached differs"
            found += _level(title, results.at_end(metric, "finetune", task), absolute=ACCURACY)
    return found


def _level(
    title: str, values: pd.DataFrame, *, relative: float = 0.0, absolute: float = 0.0, digits: int = 3
) -> list[str]:
    """Return [one sentence with the mean of each arm] if the largest and smallest mean are too far apart, else []. values:
    [seeds, arms]."""
    means = values.mean().dropna()
    if len(means) < 2 or means.max() - means.min() <= absolute + relative * means.max():
        return []
    return [f"{title}: {', '.join(f'{arm} {mean:,.{digits}f}' for arm, mean in means.items())}."]


def stage_title(task: str) -> str:
    text = stage_text(task)
    return text[0].upper() + text[1:]


def _flat(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Flatten to {"optim.lr": 1e-3, ...}; a list is one value."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _shown(values: Iterable[Any]) -> str:
    texts = list(dict.fromkeys(_text(value) for value in values))
    return texts[0] if len(texts) == 1 else "by seed" if len(texts) > 3 else " / ".join(texts)


def _text(value: Any) -> str:
    if isinstance(value, bool | list):
        return json.dumps(value)
    if pd.isna(value):
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grouped(values: pd.Series) -> str:
    """Group {"a": "1", "b": "1", "c": "2"} as "1 (a, b), 2 (c)"."""
    groups = values.groupby(values, sort=False)
    return ", ".join(f"{value} ({', '.join(arms.index)})" for value, arms in groups)
