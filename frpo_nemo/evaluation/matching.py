"""What was not the same in all arms: settings, budgets, starting points, seeds and failures, found from the rows.

Each finding is a sentence with its numbers. A comparison of arms is to be read with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from frpo_nemo.evaluation.endpoints import downstream_names, kl_values, reward_before
from frpo_nemo.evaluation.statistics import summarize
from frpo_nemo.evaluation.study import Row, Study, at_end, by_seed, reward_label

# Means of two arms closer than this count as matched.
TOKENS, KL, REWARD, ACCURACY = 0.01, 0.1, 0.01, 0.01  # the first two relative to the larger, the others absolute
RULE = (
    "Arms count as matched where the largest and the smallest mean differ by less than 1% (tokens), 10% (KL), "
    "or 0.01 (rewards and accuracies); settings where they are equal at the same seed. The reward before fine-tuning is "
    "that of the last validation of stage one, or of step 0 of fine-tuning where stage one is not among the runs."
)
DEFAULTS = {"objective.beta": 0.0}  # what a setting that is not written means


def not_matched(study: Study) -> list[str]:
    """All findings, the gravest first: failures, missing seeds and values, then budgets, settings and what the arms had
    reached before and after. [] if everything was matched."""
    return [
        *failures(study),
        *_missing_seeds(study),
        *_missing_values(study),
        *_budgets(study),
        *_settings(study),
        *_environments(study),
        *_levels(study),
    ]


def failures(study: Study) -> list[str]:
    """One sentence for each failed run, with the last line of its error."""
    return [failure(row) for row in study.failed]


def failure(row: Row) -> str:
    what = stage_text("train" if row["task"] is None else "finetune", row["task"])
    if row["stage"] == "evaluate":
        what = f"evaluation {row['evaluation']} after {what}"
    return f"{row['arm']}, seed {row['seed']}: {what} failed: {_last_line(row['error'])}"


def differing_settings(study: Study, stage: str, task: str | None = None) -> dict[str, dict[str, str]]:
    """{setting: {arm: value}} of the settings that differ between arms at the same seed. A value that changes with the
    seed is shown as "by seed", a setting that is not written as "default"."""
    settings = {arm: _settings_by_seed(study, arm, stage, task) for arm in study.arms}
    settings = {arm: by_seed for arm, by_seed in settings.items() if by_seed}
    keys = dict.fromkeys(key for by_seed in settings.values() for flat in by_seed.values() for key in flat)
    return {
        key: {arm: _shown(_values(by_seed, key).values()) for arm, by_seed in settings.items()}
        for key in keys
        if _differs([_values(by_seed, key) for by_seed in settings.values()])
    }


def flat_settings(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    """{"optim.lr": 1e-3, ...}; a list is one value."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{path}{key}.")
        else:
            flat[path + key] = value
    return flat


def stage_text(stage: str, task: str | None) -> str:
    return "stage one" if stage == "train" else f"fine-tuning on {task}"


def _title(stage: str, task: str | None) -> str:
    text = stage_text(stage, task)
    return text[0].upper() + text[1:]


def _stages(study: Study) -> list[tuple[str, str | None]]:
    """Of the rows: stage one, if any, and each fine-tuning."""
    train = [("train", None)] if any(row["stage"] == "train" for row in study.rows) else []
    return train + [("finetune", task) for task in study.tasks]


def _missing_seeds(study: Study) -> list[str]:
    found = []
    for stage, task in _stages(study):
        for arm in study.arms:
            rows = [r for r in study.rows if (r["arm"], r["stage"], r["task"]) == (arm, stage, task)]
            absent = [str(seed) for seed in study.seeds if seed not in {row["seed"] for row in rows}]
            if absent:
                plural = "s" if len(absent) > 1 else ""
                found.append(f"{arm} has no {stage_text(stage, task)} of seed{plural} {', '.join(absent)}.")
    if found or study.failed:
        found.append("Means are over the finished seeds of each arm; paired differences use the seeds that both have.")
    return found


def _missing_values(study: Study) -> list[str]:
    """Finished runs without a number at the end that other runs of their stage have."""
    found = []
    for stage, task in _stages(study):
        names = [*study.reward_names(), study.kl_name(stage, task)]
        names += downstream_names(study, task) if task else []
        runs = study.all_runs(stage, task)
        for name in filter(None, names):
            absent = [f"{row['arm']} seed {row['seed']}" for row in runs if at_end(row, name) is None]
            if absent and len(absent) < len(runs):
                found.append(f"{_title(stage, task)}: no finite {name} at the end of {', '.join(absent)}; not counted.")
    return found


def _budgets(study: Study) -> list[str]:
    found = []
    for stage, task in _stages(study):
        where = _title(stage, task)
        steps = {arm: _shown(row.get("steps") for row in runs.values()) for arm, runs in _runs(study, stage, task)}
        if len(set(steps.values())) > 1:
            found.append(f"{where}: the number of steps differs: {_grouped(steps)}.")
        tokens = {arm: by_seed(runs, lambda row: row.get("tokens")) for arm, runs in _runs(study, stage, task)}
        found += _level(f"{where}: training tokens differ", tokens, relative=TOKENS, digits=0)
    return found


def _settings(study: Study) -> list[str]:
    found = []
    for stage, task in _stages(study):
        for key, values in differing_settings(study, stage, task).items():
            swept = key.startswith("objective.") and key != "objective.beta"
            if not swept and key != "max_steps":  # other fields of the objective are what arms are made of
                found.append(f"{_title(stage, task)}: {key.removeprefix('objective.')} differs: {_grouped(values)}.")
    return found


def _environments(study: Study) -> list[str]:
    """Code and library versions."""
    commits: dict[str, list[str]] = {}
    packages: dict[str, set[str]] = {}
    for row in study.rows:
        environment = row.get("environment") or {}
        if environment.get("commit"):
            commits.setdefault(environment["commit"][:10], []).append(row["arm"])
        for name, version in environment.get("packages", {}).items():
            packages.setdefault(name, set()).add(version)
    found = []
    if len(commits) > 1:
        listed = ", ".join(f"{commit} ({', '.join(dict.fromkeys(arms))})" for commit, arms in commits.items())
        found.append(f"The runs were made with {len(commits)} commits: {listed}.")
    for name, versions in packages.items():
        if len(versions) > 1:
            found.append(f"The runs were made with {len(versions)} versions of {name}: {', '.join(sorted(versions))}.")
    return found


def _levels(study: Study) -> list[str]:
    """Where the arms stood before fine-tuning, and what they learned in it."""
    name = study.kl_name("train")
    kl = {arm: kl_values(study, arm, "train") for arm in study.arms}
    title = f"KL to the reference at the end of stage one ({name}, nats per response) differs"
    found = _level(title, kl, relative=KL)
    for reward in study.reward_names():
        before = {arm: reward_before(study, arm, reward) for arm in study.arms}
        found += _level(f"Reward before fine-tuning ({reward_label(reward)}) differs", before, absolute=REWARD)
    for task in study.tasks:
        for metric in downstream_names(study, task):
            if metric not in ("downstream/accuracy", "downstream/reward"):
                continue
            reached = metric.removeprefix("downstream/")
            values = {}
            for arm, runs in _runs(study, "finetune", task):
                values[arm] = by_seed(runs, lambda row, metric=metric: at_end(row, metric))
            found += _level(f"Fine-tuning on {task}: the {reached} reached differs", values, absolute=ACCURACY)
    return found


def _level(
    title: str, values: dict[str, dict[int, float]], *, relative: float = 0.0, absolute: float = 0.0, digits: int = 3
) -> list[str]:
    """[one sentence with the mean of each arm] if the largest and smallest mean are too far apart, else []."""
    means = {arm: summary.mean for arm, by_seed in values.items() if (summary := summarize(by_seed.values()))}
    if len(means) < 2 or max(means.values()) - min(means.values()) <= absolute + relative * max(means.values()):
        return []
    listed = ", ".join(f"{arm} {mean:,.{digits}f}" for arm, mean in means.items())
    return [f"{title}: {listed}."]


def _runs(study: Study, stage: str, task: str | None) -> list[tuple[str, dict[int, Row]]]:
    return [(arm, runs) for arm in study.arms if (runs := study.runs(arm, stage, task))]


def _settings_by_seed(study: Study, arm: str, stage: str, task: str | None) -> dict[int, dict[str, Any]]:
    rows = [r for r in study.rows if (r["arm"], r["stage"], r["task"]) == (arm, stage, task) and r["settings"]]
    return {row["seed"]: flat_settings(row["settings"]) for row in rows}


def _values(settings: dict[int, dict[str, Any]], key: str) -> dict[int, str]:
    return {seed: _text(flat.get(key, DEFAULTS.get(key))) for seed, flat in settings.items()}


def _differs(values: list[dict[int, str]]) -> bool:
    """At a seed that several arms have; or in all, where no two arms share a seed."""
    seeds = {seed for by_seed in values for seed in by_seed}
    shared = [[by_seed[seed] for by_seed in values if seed in by_seed] for seed in seeds]
    if any(len(at_seed) > 1 for at_seed in shared):
        return any(len(set(at_seed)) > 1 for at_seed in shared)
    return len({tuple(sorted(set(by_seed.values()))) for by_seed in values}) > 1


def _shown(values: Iterable[Any]) -> str:
    texts = list(dict.fromkeys(_text(value) for value in values))
    return texts[0] if len(texts) == 1 else "by seed" if len(texts) > 3 else " / ".join(texts)


def _text(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool | list):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _grouped(values: dict[str, str]) -> str:
    """{"a": "1", "b": "1", "c": "2"} -> "1 (a, b), 2 (c)"."""
    arms: dict[str, list[str]] = {}
    for arm, value in values.items():
        arms.setdefault(value, []).append(arm)
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in arms.items())


def _last_line(error: str | None) -> str:
    lines = [line for line in (error or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"
