"""The end of `make smol`: held-out answers before and after with their intervals, samples, a picture, and evidence that
the exported model is the trained one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from frpo_nemo.examples.demo_report import check_export, print_places
from frpo_nemo.report.comparisons import paired_test, share_interval
from frpo_nemo.report.plots import learning_curve, read_metrics

TITLE = "FRPO on SmolLM2-135M-Instruct"
INSTRUCTIONS = {  # task -> what it asks for
    "sentence": "one sentence",
    "brief": "at most ten words",
    "question": "a question",
    "exclamation": "one sentence with !",
}
NUM_SAMPLES = 3
_QUESTION = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
Sample = dict[str, Any]  # a line of a run's validation files


def report(out: Path, seconds: float) -> None:
    """Print and draw what the run under `out`/frpo achieved."""
    run, console = out / "frpo", Console(soft_wrap=True, highlight=False, markup=False)
    files = sorted((run / "validation").glob("*.jsonl"))
    before, after = ([json.loads(line) for line in file.open()] for file in (files[0], files[-1]))
    picture = learning_curve({"FRPO": run / "metrics.jsonl"}, out / "learning_curve.png", title=TITLE)
    gap = check_export(run, max_model_len=256)
    console.print(answers_table(before, after, read_metrics(run / "metrics.jsonl")))
    console.print(change_sentence(before, after))
    for first, last in samples(before, after):
        console.print(f"\n  {question_of(first)}")
        for label, sample in (("before", first), ("after", last)):
            text = str(sample["response"]).removesuffix("<|im_end|>").strip().replace("\n", "\n              ")
            console.print(f"    {label:7s} {sample['reward']:.0f}  {text}")
    console.print(f"\n{seconds / 60:.0f} minutes in all")
    print_places(console, run, gap, picture)


def answers_table(before: list[Sample], after: list[Sample], metrics: dict) -> Table:
    """Return the share of held-out answers that obey, for each instruction, with 95% intervals, and the KL that it cost."""
    table = Table(title=f"{TITLE}: held-out answers that obey")
    for heading in ("", "prompts", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    groups = {"all instructions": None} | {f"  {text}": task for task, text in INSTRUCTIONS.items()}
    for label, task in groups.items():
        rewards = [[s["reward"] for s in side if task in (None, s["task"])] for side in (before, after)]
        table.add_row(label, str(len(rewards[0])), *map(_share, rewards))
    for label, name, form in (
        ("tokens of an answer", "validation/response_length/mean", ".1f"),
        ("KL to the reference", "validation/kl/per_response", ".2f"),
    ):
        values = metrics[name][1]
        table.add_row(label, "", format(values[0], form), format(values[-1], form))
    return table


def change_sentence(before: list[Sample], after: list[Sample]) -> str:
    """Return how much more is obeyed, with the interval of the paired difference."""
    change = paired_test(*(pd.Series([sample["reward"] for sample in side]) for side in (after, before)))
    interval = "" if math.isnan(change.low) else f", 95% interval {change.low:+.2f} to {change.high:+.2f}"
    return f"{change.mean:+.2f} on the same prompts{interval} (Student's t, {change.n} prompts; shares above: Wilson)"


def samples(before: list[Sample], after: list[Sample]) -> list[tuple[Sample, Sample]]:
    """Return (before, after) of the first prompt of each instruction, whatever was answered."""
    first: dict[object, tuple[Sample, Sample]] = {}
    for pair in zip(before, after, strict=True):
        first.setdefault(pair[0]["task"], pair)
    return list(first.values())[:NUM_SAMPLES]


def question_of(sample: Sample) -> str:
    """Return what was asked, without the rest of the conversation's format."""
    found = _QUESTION.search(str(sample["prompt"]))
    return found[1] if found else str(sample["prompt"])


def _share(rewards: list[float]) -> str:
    low, high = share_interval(round(sum(rewards)), len(rewards))
    return f"{sum(rewards) / len(rewards):.2f} [{low:.2f}, {high:.2f}]"
