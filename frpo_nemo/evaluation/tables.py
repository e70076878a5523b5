"""The tables of a report as text: headings and sections of rows. page.py makes HTML of them, report.py a terminal's."""

from __future__ import annotations

from dataclasses import dataclass, field

from frpo_nemo.evaluation.endpoints import Comparison, comparisons, end_points, kl_values
from frpo_nemo.evaluation.matching import differing_settings
from frpo_nemo.evaluation.results import Row
from frpo_nemo.evaluation.statistics import PairedDifference, Summary, p_text, summarize
from frpo_nemo.evaluation.study import Study, at_end, at_start, by_seed, reward_label

NONE = "–"
_SPREADS = ("/std", "_stderr", "/max")  # of scores: not shown beside their means


@dataclass
class Table:
    """sections: {heading of a section, or "": rows}. Every row has a cell for each heading."""

    headings: list[str]
    sections: dict[str, list[list[str]]] = field(default_factory=dict)
    note: str = ""


def reward_table(study: Study, task: str) -> Table:
    """What each arm had before fine-tuning on `task`, what it kept and what it lost. A section for each reward."""
    table = Table(["arm", "seeds", "before", "after", "lost"])
    ends = end_points(study, task)
    for reward in study.reward_names():
        table.sections[reward_label(reward)] = [
            [end.arm, seeds_text(study, end.arm, "finetune", task)]
            + [value_text(end.rewards[reward][kind]) for kind in ("before", "after", "lost")]
            for end in ends
        ]
    table.note = (
        "Reward on held-out prompts of stage one at step 0 and at the last step of fine-tuning; "
        "mean ± sample standard deviation over the seeds."
    )
    return table


def distance_table(study: Study, task: str) -> Table:
    """How far each arm had gone before, how far it went in fine-tuning on `task`, and what it learned."""
    ends = end_points(study, task)
    names = list(ends[0].downstream)
    headings = ["arm", "seeds", "KL to the reference before", "KL of fine-tuning"]
    table = Table(headings + [f"{task}: {name.removeprefix('downstream/').replace('_', ' ')}" for name in names])
    table.sections[""] = [
        [
            end.arm,
            seeds_text(study, end.arm, "finetune", task),
            value_text(end.kl_reference),
            value_text(end.kl_finetuning),
            *(value_text(end.downstream[name]) for name in names),
        ]
        for end in ends
    ]
    table.note = (
        "KL in nats per response: before, from the reference policy at the end of stage one "
        f"({_measured(study.kl_name('train'))}); of fine-tuning, from the policy before it "
        f"({_measured(study.kl_name('finetune', task))}). The rest: the task's own "
        "held-out examples, after fine-tuning. Mean ± sample standard deviation over the seeds."
    )
    return table


def stage_one_table(study: Study) -> Table:
    """What stage one gave each arm. A section for each reward."""
    table = Table(["arm", "seeds", "reward before", "reward after", "KL to the reference"])
    for reward in study.reward_names():
        rows = []
        for arm in study.arms:
            runs = study.runs(arm, "train")
            values = [by_seed(runs, lambda row, at=at, r=reward: at(row, r)) for at in (at_start, at_end)]
            values.append(kl_values(study, arm, "train"))
            cells = [value_text(summarize(by.values())) for by in values]
            rows.append([arm, seeds_text(study, arm, "train", None), *cells])
        table.sections[reward_label(reward)] = rows
    table.note = (
        "Reward on held-out prompts at the first and the last validation of stage one; KL in nats per response "
        f"({_measured(study.kl_name('train'))}). Mean ± sample standard deviation over the seeds."
    )
    return table


def evaluation_table(study: Study, name: str) -> Table:
    """What recipes/evaluate.py measured of each arm after stage one and after each task. A section for each score."""
    rows = [row for row in study.evaluations if row["evaluation"] == name]
    tasks = [task for task in (None, *study.tasks) if any(row["task"] == task for row in rows)]
    table = Table(["arm", *(f"after {task}" if task else "stage one" for task in tasks)])
    for score in dict.fromkeys(score for row in rows for score in row["scores"]):
        if not score.endswith(_SPREADS):
            table.sections[score.removeprefix("probe/")] = [
                [
                    arm,
                    *(_score_text([r for r in rows if (r["arm"], r["task"]) == (arm, task)], score) for task in tasks),
                ]
                for arm in study.arms
            ]
    table.note = "Mean ± sample standard deviation over the seeds. Spreads within a seed are in results.jsonl."
    return table


def comparison_table(study: Study, kind: str, task: str | None) -> Table | None:
    """Paired differences of one kind (endpoints.KINDS) on one task. A section for each reward; None without pairs."""
    found = [c for c in comparisons(study) if (c.kind, c.task) == (kind, task)]
    if not found:
        return None
    table = Table(
        [
            "arm − baseline",
            "seeds",
            "mean difference",
            "std",
            "wins",
            "95% interval (t)",
            "t-test p",
            "Holm",
            "Wilcoxon p",
            "Holm",
        ]
    )
    for comparison in found:
        table.sections.setdefault(reward_label(comparison.reward), []).append(_comparison_row(comparison))
    return table


def settings_table(study: Study, stage: str, task: str | None = None) -> Table | None:
    """Settings that differ, a column for each arm; None if none does."""
    differing = differing_settings(study, stage, task)
    if not differing:
        return None
    arms = [arm for arm in study.arms if any(arm in values for values in differing.values())]
    return Table(["setting", *arms], {"": [[key, *(v.get(arm, NONE) for arm in arms)] for key, v in differing.items()]})


def value_text(summary: Summary | None) -> str:
    """0.950 ± 0.020; without a spread for one seed."""
    if summary is None:
        return NONE
    return f"{summary.mean:.3f}" + (f" ± {summary.std:.3f}" if summary.std is not None else "")


def seeds_text(study: Study, arm: str, stage: str, task: str | None) -> str:
    """5; 4 (1 failed); failed. A failed stage one counts: without it there is no fine-tuning."""
    finished = len(study.runs(arm, stage, task))
    mine = [
        row
        for row in study.failed
        if row["arm"] == arm and (row["stage"], row["task"]) in ((stage, task), ("train", None))
    ]
    failed = len({row["seed"] for row in mine})
    if not failed:
        return str(finished) if finished else "no run"
    return f"{finished} ({failed} failed)" if finished else "failed"


def _score_text(rows: list[Row], score: str) -> str:
    """0.950 ± 0.020; with (1 failed) if a seed's evaluation did."""
    failed = sum(row["status"] == "failed" for row in rows)
    values = [row["scores"][score] for row in rows if row["status"] == "finished" and score in row["scores"]]
    return value_text(summarize(values)) + (f" ({failed} failed)" if failed else "")


def _measured(kl_name: str | None) -> str:
    return kl_name or "not measured"


def _comparison_row(comparison: Comparison) -> list[str]:
    d: PairedDifference = comparison.difference
    return [
        f"{comparison.arm} − {comparison.baseline}",
        str(d.n),
        f"{d.mean:+.3f}",
        NONE if d.std is None else f"{d.std:.3f}",
        f"{d.wins}/{d.n}",
        NONE if d.ci is None else f"{d.ci[0]:+.3f} to {d.ci[1]:+.3f}",
        p_text(d.t_p),
        p_text(comparison.t_holm),
        p_text(d.wilcoxon_p),
        p_text(comparison.wilcoxon_holm),
    ]
