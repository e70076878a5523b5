"""The report of a study: one self-contained HTML page, with its pictures next to it as PNG files; and its tables on a
terminal.

page.html defines what is on the page, and in which order.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from frpo_nemo.report import differences, plots, tables
from frpo_nemo.report.comparisons import comparisons, explain_tests
from frpo_nemo.report.frame import KL_NAMES, Results, reward_label
from frpo_nemo.report.plots import Picture
from frpo_nemo.report.sweeps import FIELDS, find_sweeps, kept_rewards
from frpo_nemo.study.results import ResultRow


def write_report(
    rows: Iterable[ResultRow], out_dir: str | Path, *, title: str = "Reward under later fine-tuning"
) -> Path:
    """Write out_dir/report.html and the pictures; return the page's path. Raises ConfigError for missing or invalid rows."""
    results, out_dir = Results(rows), Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    compared = comparisons(results)
    html = _template().render(
        title=title,
        results=results,
        kl_names=KL_NAMES,
        landscapes={
            task: plots.draw_landscape(results, task, out_dir / f"landscape_{_file_name(task)}.png")
            for task in results.tasks
        },
        comparisons=compared,
        stage_one=None if results.finished("train").empty else tables.stage_one_table(results),
        test_notes=explain_tests(results, compared),
        evaluations=_evaluations(results),
        failed_evaluations=[row for row in results.evaluations if row["status"] == "failed"],
        sweeps=_sweeps(results, out_dir),
        curves=_curves(results, out_dir),
        not_matched=differences.not_matched(results),
        matching_rule=differences.RULE,
        stages=differences.stages(results),
        first_rows=[next(row for row in results.rows if row["arm"] == arm) for arm in results.arms],
    )
    path = out_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def print_summary(rows: Iterable[ResultRow], console: Console | None = None) -> None:
    """Print for each downstream task what the arms had, kept and learned, and what was not matched between them.
    Without fine-tuning, print the results of stage one."""
    results, console = Results(rows), console or Console()
    if not results.tasks:
        console.print(_rich(tables.stage_one_table(results), "Stage one"))
    for task in results.tasks:
        rewards = tables.reward_table(results, task)
        console.print(_rich(rewards, f"Reward before and after fine-tuning on {task}"))
        console.print(_rich(tables.distance_table(results, task), f"Distance and learning: {task}"))
    for name in _evaluations(results):
        console.print(_rich(tables.evaluation_table(results, name), f"Evaluation {name}"))
    for sentence in differences.not_matched(results):
        console.print(f"not matched: {sentence}", markup=False, highlight=False)


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "base64": lambda picture: base64.b64encode(picture.path.read_bytes()).decode(),
        "failure": differences.failure,
        "settings": lambda row: json.dumps({"run_dir": row.get("run_dir"), **row["settings"]}, indent=1),
        "stage_title": differences.stage_title,
    }
    makers = (tables.reward_table, tables.distance_table, tables.comparison_table, tables.evaluation_table)
    environment.globals |= {maker.__name__: maker for maker in (*makers, tables.settings_table)}
    return environment.get_template("page.html")


def _evaluations(results: Results) -> list[str]:
    """Return the names of the evaluations."""
    return list(dict.fromkeys(row["evaluation"] for row in results.evaluations))


def _sweeps(results: Results, out_dir: Path) -> dict[str, list[Picture]]:
    """Draw {task: pictures} of the tasks that have any."""
    sweeps, found = find_sweeps(results), {}
    for task in results.tasks:
        pictures = []
        for field in FIELDS:
            name = f"frontier_{field.rstrip('_')}_{_file_name(task)}.png"
            mine = [sweep for sweep in sweeps if sweep.field == field]
            pictures.append(plots.draw_frontier(results, mine, task, out_dir / name))
        for number, sweep in enumerate((s for s in sweeps if s.field == "lambda_"), start=1):
            for reward in kept_rewards(results):
                name = f"by_lambda_{number}_{_file_name(reward_label(reward))}_{_file_name(task)}.png"
                pictures.append(plots.draw_landscape_by_value(results, sweep, task, reward, out_dir / name))
        found[task] = [picture for picture in pictures if picture]
    return {task: pictures for task, pictures in found.items() if pictures}


def _curves(results: Results, out_dir: Path) -> list[Picture]:
    pictures = [plots.draw_stage_one(results, out_dir / "stage_one.png")]
    for task in results.tasks:
        pictures.append(plots.draw_finetuning(results, task, out_dir / f"finetune_{_file_name(task)}.png"))
    return [picture for picture in pictures if picture]


def _file_name(task: str) -> str:
    """Return the letters, digits, dots and dashes of a task's name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in task).strip("_")


def _rich(content: tables.Table, title: str) -> RichTable:
    table = RichTable(title=title, caption=content.note or None, title_justify="left", caption_justify="left")
    for i, heading in enumerate(content.headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for section, lines in content.sections.items():
        if section:
            table.add_row(Text(section, style="bold"))
        for line in lines.itertuples(name=None):
            table.add_row(*map(Text, line))  # never markup: names may have brackets
        table.add_section()
    return table
