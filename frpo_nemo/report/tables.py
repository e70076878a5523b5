"""The tables of a report as frames of text, which the page and the terminal show."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from frpo_nemo.report.differences import differing_settings
from frpo_nemo.report.frame import Results, reward_label
from frpo_nemo.study.results import ResultRow

NONE = "–"
_SPREADS = ("/std", "_stderr", "/max")  # endings of scores that are not shown next to their means
_OVER_SEEDS = "Mean ± sample standard deviation over the seeds."
_DIFFERENCE = ["seeds", "mean difference", "std", "wins", "95% interval (t)", "t-test p", "Holm", "Wilcoxon p", "Holm"]


@dataclass(frozen=True)
class Table:
    """sections: {heading of a section, or "": its lines}. All have the same columns; the index is the first one."""

    sections: dict[str, pd.DataFrame]
    note: str = ""

    @property
    def headings(self) -> list[str]:
        return [heading for lines in list(self.sections.values())[:1] for heading in (lines.index.name, *lines.columns)]


def reward_table(results: Results, task: str) -> Table:
    """Return what each arm had before fine-tuning on `task`, kept and lost. A section for each reward."""
    sections = {}
    for reward in results.rewards:
        before, after = results.at_start(reward, "finetune", task), results.at_end(reward, "finetune", task)
        sections[reward] = {"before": before, "after": after, "lost": before - after}
    note = "Reward on held-out prompts of stage one at step 0 and at the last step of fine-tuning. " + _OVER_SEEDS
    return Table(_by_reward(seeds_text(results, "finetune", task), sections), note)


def distance_table(results: Results, task: str) -> Table:
    """Return each arm's distance before fine-tuning on `task` and in it, and what it learned."""
    columns = {
        "KL to the reference before": results.kl_at_end("train"),
        "KL of fine-tuning": results.kl_at_end("finetune", task),
    }
    for name in results.downstream_names(task):
        learned = f"{task}: {name.removeprefix('downstream/').replace('_', ' ')}"
        columns[learned] = results.at_end(name, "finetune", task)
    note = (
        "KL in nats per response: before, from the reference policy at the end of stage one "
        f"({_measured(results.kl_name('train'))}); of fine-tuning, from the policy before it "
        f"({_measured(results.kl_name('finetune', task))}). The rest: the task's own "
        "held-out examples, after fine-tuning. " + _OVER_SEEDS
    )
    return Table({"": _lines(seeds_text(results, "finetune", task), columns)}, note)


def stage_one_table(results: Results) -> Table:
    """Return each arm's results of stage one. A section for each reward."""
    kl, sections = results.kl_at_end("train"), {}
    betas = {arm: results.effective_beta(arm) for arm in results.arms}
    beta = pd.Series({arm: NONE if value is None else f"{value:.3g}" for arm, value in betas.items()})
    for reward in results.rewards:
        before, after = results.at_start(reward, "train"), results.at_end(reward, "train")
        columns = {"reward before": before, "reward after": after, "KL to the reference": kl}
        sections[reward] = {"effective beta": beta} | columns
    note = (
        "Reward on held-out prompts at the first and the last validation of stage one; KL in nats per response "
        f"({_measured(results.kl_name('train'))}). " + _OVER_SEEDS + " Effective beta: the beta at which GRPO without the "
        "standard deviation balances reward and KL as this arm does, where rewards hardly differ. GRPO with the standard "
        "deviation has none: there it is beta times each group's standard deviation."
    )
    return Table(_by_reward(seeds_text(results, "train"), sections), note if sections else "")


def evaluation_table(results: Results, name: str) -> Table:
    """Return what recipes/evaluate.py measured of each arm after stage one and after each task. A section per score."""
    rows = [row for row in results.evaluations if row["evaluation"] == name]
    tasks = [task for task in (None, *results.tasks) if any(row["task"] == task for row in rows)]
    scores = dict.fromkeys(score for row in rows for score in row["scores"] if not score.endswith(_SPREADS))
    sections = {}
    for score in scores:
        cells = [
            [_score_text([r for r in rows if (r["arm"], r["task"]) == (arm, task)], score) for task in tasks]
            for arm in results.arms
        ]
        columns = [f"after {task}" if task else "stage one" for task in tasks]
        lines = pd.DataFrame(cells, index=pd.Index(results.arms, name="arm"), columns=columns)
        sections[score.removeprefix("probe/")] = lines
    return Table(sections, _OVER_SEEDS + " Spreads within a seed are in results.jsonl.")


def comparison_table(found: pd.DataFrame, kind: str, task: str = "") -> Table | None:
    """Return paired differences (comparisons.py) of one kind on one task. A section per reward; None without pairs."""
    chosen = found[(found["kind"] == kind) & (found["task"] == task)]
    sections = {
        reward_label(reward): _difference_lines(lines) for reward, lines in chosen.groupby("reward", sort=False)
    }
    return Table(sections) if sections else None


def settings_table(results: Results, stage: str, task: str = "") -> Table | None:
    """Return the settings that differ, a column for each arm; None if none does."""
    differing = differing_settings(results, stage, task)
    return None if differing.empty else Table({"": differing})


def seeds_text(results: Results, stage: str, task: str = "") -> pd.Series:
    """Return {arm: 5; 4 (1 failed); failed}. A failed stage one counts: without it there is no fine-tuning."""
    runs = results.runs
    concerned = (runs["stage"] == "train") | (runs["stage"] == stage) & (runs["task"] == task)
    failed = runs[concerned & (runs["status"] == "failed")].groupby("arm")["seed"].nunique()
    finished = results.finished(stage, task).groupby("arm").size()
    counts = pd.DataFrame({"finished": finished, "failed": failed}).reindex(results.arms, fill_value=0).fillna(0)
    return counts.astype(int).apply(_seeds, axis=1)


def mean_text(values: pd.Series) -> str:
    """Return 0.950 ± 0.020; without a spread for one value."""
    if not values.count():
        return NONE
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if values.count() > 1 else "")


def p_text(p: float) -> str:
    """Return three digits: .0312, .5; <.001; a dash for a test that was not made."""
    if pd.isna(p):
        return NONE
    return "<.001" if p < 0.001 else f"{p:.3g}".removeprefix("0")


def _by_reward(seeds: pd.Series, sections: dict[str, dict[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """Return {reward: columns} as sections. Where nothing was measured, the seeds show what happened to the arms."""
    return {reward_label(name): _lines(seeds, columns) for name, columns in sections.items()} or {"": _lines(seeds, {})}


def _lines(seeds: pd.Series, columns: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a line for each arm: its seeds, and the mean of each column over them. A column may be text already."""
    texts = {n: values if isinstance(values, pd.Series) else values.apply(mean_text) for n, values in columns.items()}
    lines = pd.DataFrame({"seeds": seeds} | texts)
    return lines.rename_axis("arm")


def _seeds(counts: pd.Series) -> str:
    if not counts["failed"]:
        return str(counts["finished"] or "no run")
    return f"{counts['finished']} ({counts['failed']} failed)" if counts["finished"] else "failed"


def _difference_lines(found: pd.DataFrame) -> pd.DataFrame:
    cells = [
        [
            str(c.n),
            f"{c.mean:+.3f}",
            NONE if pd.isna(c.std) else f"{c.std:.3f}",
            f"{c.wins}/{c.n}",
            NONE if pd.isna(c.low) else f"{c.low:+.3f} to {c.high:+.3f}",
            *map(p_text, (c.t_p, c.t_holm, c.wilcoxon_p, c.wilcoxon_holm)),
        ]
        for c in found.itertuples()
    ]
    pairs = pd.Index(found["arm"] + " − " + found["baseline"], name="arm − baseline")
    return pd.DataFrame(cells, index=pairs, columns=_DIFFERENCE)


def _score_text(rows: list[ResultRow], score: str) -> str:
    """Return 0.950 ± 0.020; with (1 failed) if a seed's evaluation failed."""
    failed = sum(row["status"] == "failed" for row in rows)
    values = [row["scores"][score] for row in rows if row["status"] == "finished" and score in row["scores"]]
    return mean_text(pd.Series(values, dtype=float)) + (f" ({failed} failed)" if failed else "")


def _measured(kl_name: str | None) -> str:
    return kl_name or "not measured"
