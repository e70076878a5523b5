"""Numbers at the two ends of later fine-tuning: what each arm had, kept and learned, and arms against baselines.

All from a `Study`; the statistics themselves are in statistics.py, the tables in tables.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from frpo_nemo.evaluation.statistics import PairedDifference, Summary, holm, paired_difference, summarize
from frpo_nemo.evaluation.study import Study, at_end, at_start, by_seed

DOWNSTREAM = ("downstream/accuracy", "downstream/token_accuracy", "downstream/reward", "downstream/loss")
KINDS = {
    "before": "reward before fine-tuning (its step 0)",
    "after": "reward after fine-tuning",
    "lost": "reward lost in fine-tuning (before - after)",
    "stage one": "reward at the end of stage one (last validation)",
}


@dataclass(frozen=True)
class EndPoints:
    """One arm on one downstream task: means over its finished seeds; None where nothing was measured.

    rewards: {reward metric: {"before", "after", "lost": Summary}}; kl_reference: from the reference policy at the end
    of stage one; kl_finetuning: from the policy before fine-tuning, at its end; downstream: {metric: Summary}.
    """

    arm: str
    seeds: tuple[int, ...]
    rewards: dict[str, dict[str, Summary | None]]
    kl_reference: Summary | None
    kl_finetuning: Summary | None
    downstream: dict[str, Summary | None]


@dataclass(frozen=True)
class Comparison:
    """`arm` - `baseline` by seed. t_holm and wilcoxon_holm are corrected over the `family` comparisons of the same
    kind and reward: all pairs of arms, on all downstream tasks. task is None for the end of stage one."""

    kind: str
    task: str | None
    reward: str
    arm: str
    baseline: str
    difference: PairedDifference
    family: int = 1
    t_holm: float | None = None
    wilcoxon_holm: float | None = None


def end_points(study: Study, task: str) -> list[EndPoints]:
    """Of every arm of the study, also of those that have no finished run."""
    return [_end_points(study, arm, task) for arm in study.arms]


def comparisons(study: Study) -> list[Comparison]:
    """Every objective that is no baseline against every baseline, for each reward: at the end of stage one, and after
    and lost in fine-tuning on each task. Pairs without a common seed are left out."""
    found = []
    for reward in study.reward_names():
        for kind in ("stage one", "after", "lost"):
            tasks = [None] if kind == "stage one" else study.tasks
            found += _family(study, kind, tasks, reward)
    return found


def reward_values(study: Study, arm: str, kind: str, task: str | None, reward: str) -> dict[int, float]:
    """{seed: value} of one of KINDS."""
    if kind == "stage one":
        return by_seed(study.runs(arm, "train"), lambda row: at_end(row, reward))
    runs = study.runs(arm, "finetune", task)
    before = by_seed(runs, lambda row: at_start(row, reward))
    after = by_seed(runs, lambda row: at_end(row, reward))
    lost = {seed: before[seed] - after[seed] for seed in before.keys() & after.keys()}
    return {"before": before, "after": after, "lost": lost}[kind]


def reward_before(study: Study, arm: str, reward: str) -> dict[int, float]:
    """{seed: reward before any fine-tuning}: the last validation of stage one, or step 0 of a fine-tuning where stage
    one is not among the rows."""
    values: dict[int, float] = {}
    for task in study.tasks:
        values = reward_values(study, arm, "before", task, reward) | values
    return values | reward_values(study, arm, "stage one", None, reward)


def kl_values(study: Study, arm: str, stage: str, task: str | None = None) -> dict[int, float]:
    """{seed: KL at the end of the run}, by the estimate that the study's runs share."""
    name = study.kl_name(stage, task)
    return by_seed(study.runs(arm, stage, task), lambda row: at_end(row, name)) if name else {}


def downstream_names(study: Study, task: str) -> list[str]:
    """Those of DOWNSTREAM that the task's runs measured."""
    rows = study.all_runs("finetune", task)
    return [name for name in DOWNSTREAM if any(name in point for row in rows for point in row["points"])]


def _end_points(study: Study, arm: str, task: str) -> EndPoints:
    runs = study.runs(arm, "finetune", task)
    return EndPoints(
        arm=arm,
        seeds=tuple(runs),
        rewards={
            reward: {
                kind: summarize(reward_values(study, arm, kind, task, reward).values())
                for kind in ("before", "after", "lost")
            }
            for reward in study.reward_names()
        },
        kl_reference=summarize(kl_values(study, arm, "train").values()),
        kl_finetuning=summarize(kl_values(study, arm, "finetune", task).values()),
        downstream={
            name: summarize(by_seed(runs, lambda row, name=name: at_end(row, name)).values())
            for name in downstream_names(study, task)
        },
    )


def _family(study: Study, kind: str, tasks: list[str | None], reward: str) -> list[Comparison]:
    found = []
    for task in tasks:
        for arm, baseline in study.pairs():
            first, second = (reward_values(study, name, kind, task, reward) for name in (arm, baseline))
            difference = paired_difference(first, second)
            if difference is not None:
                found.append(Comparison(kind, task, reward, arm, baseline, difference))
    t_holm = holm([c.difference.t_p for c in found])
    wilcoxon_holm = holm([c.difference.wilcoxon_p for c in found])
    return [
        replace(c, family=len(found), t_holm=t, wilcoxon_holm=w)
        for c, t, w in zip(found, t_holm, wilcoxon_holm, strict=True)
    ]
