"""The report of a study: one HTML page that needs nothing else, with its pictures beside it as PNG files; and its
tables on a terminal.

Here is what is on the page and in which order. Numbers come from endpoints.py, matching.py and sweeps.py, pictures from
landscape.py, curves.py and sweep_figures.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from frpo_nemo.evaluation import page
from frpo_nemo.evaluation.curves import draw_finetuning, draw_stage_one
from frpo_nemo.evaluation.endpoints import Comparison, comparisons
from frpo_nemo.evaluation.figures import Picture
from frpo_nemo.evaluation.landscape import draw_landscape
from frpo_nemo.evaluation.matching import RULE, failure, failures, not_matched, stage_text
from frpo_nemo.evaluation.results import Row
from frpo_nemo.evaluation.statistics import WILCOXON_SEEDS
from frpo_nemo.evaluation.study import KL_NAMES, Study, reward_label
from frpo_nemo.evaluation.sweep_figures import draw_frontier, draw_landscape_by_value
from frpo_nemo.evaluation.sweeps import FIELDS, find_sweeps, kept_rewards
from frpo_nemo.evaluation.tables import (
    Table,
    comparison_table,
    distance_table,
    evaluation_table,
    reward_table,
    settings_table,
    stage_one_table,
)


def write_report(rows: Iterable[Row], out_dir: str | Path, *, title: str = "Reward under later fine-tuning") -> Path:
    """Write out_dir/report.html and the pictures; returns the page's path. ConfigError for no rows or wrong ones."""
    study, out_dir = Study(rows), Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = [
        *_introduction(study),
        *_landscapes(study, out_dir),
        *_end_points(study),
        *_evaluations(study),
        *_sweeps(study, out_dir),
        *_curves(study, out_dir),
        *_not_matched(study),
        *_configs(study),
    ]
    path = out_dir / "report.html"
    path.write_text(page.document(title, parts), encoding="utf-8")
    return path


def print_summary(rows: Iterable[Row], console: Console | None = None) -> None:
    """Print for each downstream task what the arms had, kept and learned, and what was not matched between them.
    Without fine-tuning: what stage one gave."""
    study = Study(rows)
    console = console or Console()
    if not study.tasks:
        console.print(_rich(stage_one_table(study), "Stage one"))
    for task in study.tasks:
        console.print(_rich(reward_table(study, task), f"Reward before and after fine-tuning on {task}"))
        console.print(_rich(distance_table(study, task), f"Distance and learning: {task}"))
    for name in dict.fromkeys(row["evaluation"] for row in study.evaluations):
        console.print(_rich(evaluation_table(study, name), f"Evaluation {name}"))
    for sentence in not_matched(study):
        console.print(f"not matched: {sentence}", markup=False, highlight=False)


def _introduction(study: Study) -> list[str]:
    seeds = ", ".join(map(str, study.seeds))
    tasks = f"then fine-tuned on {' and, separately, '.join(study.tasks)}" if study.tasks else "not fine-tuned further"
    runs = len(study.rows)
    text = (
        f"{len(study.arms)} arms ({', '.join(study.arms)}), seeds {seeds}: each trained in stage one, {tasks}. "
        f"{runs} runs, of which {runs - len(study.failed)} finished."
    )
    parts = [page.paragraph(text)]
    if study.failed:
        parts += [page.paragraph("Failed runs:"), page.bullets(failures(study))]
    return parts


def _landscapes(study: Study, out_dir: Path) -> list[str]:
    if not study.tasks:
        return []
    parts = [page.heading("Reward against KL")]
    for task in study.tasks:
        picture = draw_landscape(study, task, out_dir / f"landscape_{_file_name(task)}.png")
        missing = f"Fine-tuning on {task}: no finished run has both a reward and one of {', '.join(KL_NAMES)}."
        parts += [page.heading(task, 3), page.figure(picture) if picture else page.paragraph(missing)]
    return parts


def _end_points(study: Study) -> list[str]:
    parts = []
    for task in study.tasks:
        parts += [page.heading(f"Before and after fine-tuning on {task}"), page.table(reward_table(study, task))]
        parts.append(page.table(distance_table(study, task)))
        after, lost = (comparison_table(study, kind, task) for kind in ("after", "lost"))
        if after:
            parts += [page.heading(f"Paired differences of the reward after {task}", 3), page.table(after)]
        if lost:
            parts.append(page.folded("Paired differences of the reward lost", [page.table(lost)]))
    parts += [page.heading("Stage one"), page.table(stage_one_table(study))] if study.all_runs("train") else []
    before = comparison_table(study, "stage one", None)
    if before:
        parts += [page.heading("Paired differences of the reward before fine-tuning", 3), page.table(before)]
    return parts + [page.paragraph(text, note=True) for text in explain_tests(study)]


def _evaluations(study: Study) -> list[str]:
    parts = []
    for name in dict.fromkeys(row["evaluation"] for row in study.evaluations):
        parts += [page.heading(f"Evaluation {name}"), page.table(evaluation_table(study, name))]
    failed = [row for row in study.evaluations if row["status"] == "failed"]
    return parts + ([page.paragraph("Failed evaluations:"), page.bullets(map(failure, failed))] if failed else [])


def explain_tests(study: Study) -> list[str]:
    """How the paired differences were tested, and what the tests cannot say."""
    found = comparisons(study)
    if not found:
        names = ", ".join(sorted({name for arm in study.arms if (name := study.objective_name(arm))})) or "none"
        return [
            f"There are no paired differences: they need FRPO and a baseline at a common seed (objectives: {names})."
        ]
    texts = [
        "Differences are arm − baseline at the same seed; wins counts the seeds where it is above 0 (for the reward lost, "
        "a win is a greater loss). The interval is Student's t, 95%. p-values are two-sided: the paired t-test and the "
        "Wilcoxon signed-rank test, both by SciPy.",
        f"Holm: corrected over a family of comparisons of the same kind and the same reward, all pairs of arms on all "
        f"downstream tasks together ({_family_sizes(found)}). Rewards and kinds are not corrected for one another.",
    ]
    smallest = min(comparison.difference.n for comparison in found)
    if smallest < WILCOXON_SEEDS:
        texts.append(
            f"With fewer than {WILCOXON_SEEDS} seeds the Wilcoxon test cannot reach .05: at n = {smallest} its smallest "
            f"p-value is {min(1.0, 2 / 2**smallest):.4g}."
        )
    if smallest == 1:
        texts.append("One seed has no spread, and nothing can be tested with it.")
    return texts


def _family_sizes(found: list[Comparison]) -> str:
    sizes: dict[str, set[int]] = {}
    for comparison in found:
        sizes.setdefault(comparison.kind, set()).add(comparison.family)
    return "; ".join(f"{kind}: {' or '.join(map(str, sorted(numbers)))}" for kind, numbers in sizes.items())


def _sweeps(study: Study, out_dir: Path) -> list[str]:
    sweeps = find_sweeps(study)
    parts = []
    for task in study.tasks:
        pictures: list[Picture | None] = []
        for field in FIELDS:
            mine = [sweep for sweep in sweeps if sweep.field == field]
            if mine:
                name = f"frontier_{field.rstrip('_')}_{_file_name(task)}.png"
                pictures.append(draw_frontier(study, mine, task, out_dir / name))
        for number, sweep in enumerate((s for s in sweeps if s.field == "lambda_"), start=1):
            for reward in kept_rewards(study):
                name = f"by_lambda_{number}_{_file_name(reward_label(reward))}_{_file_name(task)}.png"
                pictures.append(draw_landscape_by_value(study, sweep, task, reward, out_dir / name))
        drawn = [page.figure(picture) for picture in pictures if picture]
        parts += [page.heading(task, 3), *drawn] if drawn else []
    return [page.heading("Sweeps"), *parts] if parts else []


def _curves(study: Study, out_dir: Path) -> list[str]:
    pictures = [draw_stage_one(study, out_dir / "stage_one.png")]
    pictures += [draw_finetuning(study, task, out_dir / f"finetune_{_file_name(task)}.png") for task in study.tasks]
    drawn = [page.figure(picture) for picture in pictures if picture]
    return [page.heading("By training step"), *drawn] if drawn else []


def _not_matched(study: Study) -> list[str]:
    found = not_matched(study)
    content = page.bullets(found) if found else page.paragraph("Nothing was found to differ but the objective.")
    return [page.heading("What was not matched between arms"), content, page.paragraph(RULE, note=True)]


def _configs(study: Study) -> list[str]:
    parts = []
    for stage, task in (("train", None), *(("finetune", task) for task in study.tasks)):
        rows = [row for row in study.rows if (row["stage"], row["task"]) == (stage, task)]
        if rows:
            differing = settings_table(study, stage, task)
            content = page.table(differing, kind="settings") if differing else page.paragraph("The same in all arms.")
            parts += [page.heading(f"{stage_text(stage, task)}: settings that differ".capitalize(), 3), content]
    for arm in study.arms:
        first = next(row for row in study.rows if row["arm"] == arm)
        text = json.dumps({"run_dir": first.get("run_dir"), **first["settings"]}, indent=1)
        parts.append(page.folded(f"{arm}, seed {first['seed']}", [page.preformatted(text)]))
    return [page.heading("Configurations"), page.folded("Settings of the arms", parts)]


def _file_name(task: str) -> str:
    """Letters, digits, dots and dashes of a task's name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in task).strip("_")


def _rich(content: Table, title: str) -> RichTable:
    table = RichTable(title=title, caption=content.note or None, title_justify="left", caption_justify="left")
    for i, heading in enumerate(content.headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for section, rows in content.sections.items():
        if section:
            table.add_row(Text(section, style="bold"))
        for row in rows:
            table.add_row(*map(Text, row))  # never markup: names may have brackets
        table.add_section()
    return table
