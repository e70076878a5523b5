"""End points, comparisons, sweeps, and the page that shows them."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.studies import FRPO, GRPO, failed_row, finetune_row, like_real, train_row, two_arms
from rich.console import Console

from frpo_nemo.examples.demo_report import forgetting_sentence
from frpo_nemo.report.comparisons import comparisons, explain_tests
from frpo_nemo.report.frame import Results
from frpo_nemo.report.page import print_summary, write_report
from frpo_nemo.report.sweeps import baselines_of, find_sweeps, outcomes
from frpo_nemo.report.tables import comparison_table, distance_table, evaluation_table, reward_table

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """What a page says and refers to; fails at tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.sources, self.tags = [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def report(rows, tmp_path) -> Page:
    return Page(write_report(rows, tmp_path / "out").read_text("utf-8"))


def test_end_points_are_means_over_the_finished_seeds():
    tasks = {1: {"harmful": (1.0, 0.6)}, 2: {"harmful": (0.8, 0.6)}}
    rows = [finetune_row("a", seed, "math", 0.9, 0.9 - 0.1 * seed, kl=seed, tasks=tasks[seed]) for seed in (1, 2)]
    rows += [train_row("a", seed, FRPO, kl=0.5 * seed) for seed in (1, 2)] + [failed_row("a", 3, FRPO, "boom")]
    results = Results(rows)
    rewards = reward_table(results, "math").sections
    assert rewards["all prompts"].loc["a"].tolist() == [
        "2 (1 failed)",
        "0.900 ± 0.000",
        "0.750 ± 0.071",
        "0.150 ± 0.071",
    ]
    assert rewards["harmful"].loc["a"].tolist()[1:] == ["0.900 ± 0.141", "0.600 ± 0.000", "0.300 ± 0.141"]
    distances = distance_table(results, "math").sections[""].loc["a"]
    assert distances.tolist()[1:] == ["0.750 ± 0.354", "1.500 ± 0.707", "1.000 ± 0.000"]


def test_the_demo_says_what_each_arm_lost_and_that_it_is_one_seed():
    rows = [train_row("GRPO", 0, GRPO, kl=0.86), train_row("FRPO", 0, FRPO, kl=1.17)]
    rows += [
        finetune_row("GRPO", 0, "alpaca", 0.9, 0.8, tasks={"harmful": (0.97, 0.58)}),
        finetune_row("FRPO", 0, "alpaca", 0.9, 0.8, tasks={"harmful": (1.0, 0.96)}),
    ]
    said = forgetting_sentence(Results(rows))
    assert "GRPO lost 0.39 of its 0.97" in said and "FRPO lost 0.04 of its 1.00" in said
    assert "one seed" in said and "0.86 (GRPO)" in said and "1.17 (FRPO)" in said


def test_comparisons_are_paired_by_seed_against_every_baseline():
    rows = two_arms({1: 0.6, 2: 0.9, 3: 0.8}, {1: 0.5, 2: 0.7, 3: 0.5, 4: 0.1})
    rows += [finetune_row("plain", seed, "alpaca", 0.9, 0.9) for seed in (1, 2)]  # without an objective: no comparison
    found = comparisons(Results(rows)).set_index(["kind", "task", "arm", "baseline"])
    assert [name for name in found.index if name[0] != "stage one"] == [
        ("after", "alpaca", "frpo", "grpo"),
        ("lost", "alpaca", "frpo", "grpo"),
    ]
    after, lost = found.loc["after"].iloc[0], found.loc["lost"].iloc[0]
    assert (after["n"], after["mean"], after["std"], after["wins"]) == (3, pytest.approx(0.2), pytest.approx(0.1), 3)
    assert (lost["mean"], lost["losses"]) == (pytest.approx(-0.2), 3)


def test_holms_family_is_all_pairs_on_all_tasks_of_one_reward_and_kind():
    rows = two_arms({1: 0.6, 2: 0.9, 3: 0.8}, {1: 0.5, 2: 0.7, 3: 0.5})
    rows += [finetune_row("frpo", seed, "math", 0.9, 0.8 + 0.01 * seed**2) for seed in (1, 2, 3)]
    rows += [finetune_row("grpo", seed, "math", 0.9, 0.8) for seed in (1, 2, 3)]
    found = comparisons(Results(rows))
    after = found[found["kind"] == "after"].sort_values("t_p")
    assert after["family"].tolist() == [2, 2] and set(after["task"]) == {"alpaca", "math"}
    small, large = after["t_p"]
    assert after["t_holm"].tolist() == pytest.approx([2 * small, max(2 * small, large)])
    assert after["wilcoxon_holm"].tolist() == pytest.approx([0.5, 0.5])  # 2 * 2 / 2**3


def explained(rows):
    results = Results(rows)
    return explain_tests(results, comparisons(results))


def test_few_seeds_are_said_to_be_too_few_for_wilcoxon():
    three = explained(two_arms({1: 0.6, 2: 0.9, 3: 0.8}, {1: 0.5, 2: 0.7, 3: 0.5}))
    assert any("fewer than 6 seeds" in text and "at n = 3 its smallest p-value is 0.25" in text for text in three)
    six = explained(two_arms(dict.fromkeys(range(6), 0.6), dict.fromkeys(range(6), 0.5)))
    assert not any("fewer than" in text for text in six)


def test_one_seed_has_neither_spread_nor_test():
    rows = two_arms({1: 0.6}, {1: 0.5})
    lines = comparison_table(comparisons(Results(rows)), "after", "alpaca").sections["all prompts"]
    assert lines.loc["frpo − grpo"].tolist() == ["1", "+0.100", "–", "1/1", "–", "–", "–", "–", "–"]
    lines = reward_table(Results(rows), "alpaca").sections["all prompts"]
    assert lines.loc["frpo"].tolist() == ["1", "0.900", "0.600", "0.300"]
    assert "One seed has no spread, so nothing can be tested with it." in explained(rows)


def test_failed_arms_stay_in_the_tables():
    rows = two_arms({1: 0.6, 2: 0.7}, {1: 0.5, 2: 0.5}) + [failed_row("frpo_0.1", s, FRPO, "boom") for s in (1, 2)]
    rows += [failed_row("grpo", 3, GRPO, "boom")]
    cells = reward_table(Results(rows), "alpaca").sections["all prompts"]
    assert cells["seeds"].to_dict() == {"frpo": "2", "grpo": "2 (1 failed)", "frpo_0.1": "failed"}


def test_arms_that_differ_in_one_field_are_a_sweep_in_its_order():
    results = Results(like_real(seeds=(1,)))
    found = {(sweep.field, sweep.label): (sweep.values, sweep.arms) for sweep in find_sweeps(results)}
    assert found == {
        ("lambda_", "frpo, beta 0.04"): ((0.2, 0.5, 2.0), ("frpo_0.2", "frpo_0.5", "frpo_2")),
        ("beta", "dr_grpo"): ((0.01, 0.04), ("grpo_beta_.01", "grpo")),
        ("beta", "frpo, lambda 0.2"): ((0.002, 0.04), ("frpo_0.2_beta_.002", "frpo_0.2")),
    }
    assert baselines_of(results, ("frpo_0.2", "frpo_0.5")) == ["grpo", "grpo_std"]  # those with their beta


def test_arms_that_differ_in_more_are_no_sweep():
    row = train_row("b", 1, FRPO | {"lambda_": 0.5}) | {
        "settings": {"objective": FRPO | {"lambda_": 0.5}, "max_steps": 9}
    }
    assert find_sweeps(Results([train_row("a", 1, FRPO), row])) == []
    assert find_sweeps(Results([train_row("a", 1, FRPO), train_row("b", 1, FRPO)])) == []


def test_a_frontier_has_reward_kept_against_kl_and_the_other_reward():
    rows = []
    for arm, value, kept in (("b", 0.5, 0.6), ("a", 0.2, 0.8)):
        for seed in (1, 2):
            rows.append(train_row(arm, seed, FRPO | {"lambda_": value}, kl=value * seed, tasks={"x": 0.9, "y": kept}))
            rows.append(finetune_row(arm, seed, "math", 0.9, 0.5, tasks={"x": (0.9, kept - 0.1 * seed), "y": (1, 1)}))
    results = Results(rows)
    (sweep,) = find_sweeps(results)
    assert (sweep.arms, sweep.values) == (("a", "b"), (0.2, 0.5))
    found = outcomes(results, "math").loc["a"]
    assert found["after reward/task/x/mean", "mean"] == pytest.approx(0.65)
    assert found["before reward/task/y/mean", "mean"] == pytest.approx(0.8)
    assert found["kl"].to_dict() == pytest.approx({"mean": 0.3, "std": 0.2 / math.sqrt(2)})


def test_the_page_stands_alone_with_every_picture_and_a_caption_for_each(tmp_path):
    page = report(like_real(seeds=(1, 2)), tmp_path)
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("img") == page.tags.count("figcaption") == len(list((tmp_path / "out").glob("*.png"))) == 13
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    assert "significant" not in page.text
    for heading in (
        "Reward against KL",
        "Before and after fine-tuning on alpaca",
        "Stage one",
        "Sweeps",
        "By training step",
    ):
        assert heading in page.text
    assert "What was not matched between arms" in page.text and "Configurations" in page.text
    assert "Stage one: beta differs" in page.text


def test_evaluations_have_a_table_with_each_score_before_and_after_every_task(tmp_path):
    def evaluated(arm, task, score, **more):
        row = dict(arm=arm, seed=1, stage="evaluate", task=task, evaluation="harm", status="finished", error=None)
        return row | dict(settings={}, points=[], scores={"probe/reward/mean": score, "probe/reward/std": 0.3}) | more

    failed = evaluated("grpo", "alpaca", 0.0, status="failed", error="cuda\nout of memory", scores={})
    rows = [evaluated("frpo", None, 0.9), evaluated("grpo", None, 0.8), evaluated("frpo", "alpaca", 0.7), failed]
    rows = [*two_arms({1: 0.8}, {1: 0.6}), *rows]
    table = evaluation_table(Results(rows), "harm")
    assert table.headings == ["arm", "stage one", "after alpaca"]
    [scores] = table.sections.values()
    assert list(table.sections) == ["reward/mean"]
    assert scores.T.to_dict("list") == {"frpo": ["0.900", "0.700"], "grpo": ["0.800", "– (1 failed)"]}
    text = report(rows, tmp_path).text
    assert "Evaluation harm" in text
    assert "grpo, seed 1: evaluation harm after fine-tuning on alpaca failed: out of memory" in text
    assert Results(rows).rows == rows[:4]


def test_names_and_errors_are_escaped(tmp_path):
    rows = [train_row("<b>&", 1, FRPO), failed_row("<b>&", 2, FRPO, "Error: <script>alert(1)</script>")]
    page = report(rows, tmp_path)
    assert "Error: <script>alert(1)</script>" in page.text and "script" not in page.tags


def test_a_study_of_failures_alone_is_reported(tmp_path):
    page = report([failed_row("frpo", 1, FRPO, "boom"), failed_row("grpo", 1, GRPO, "bang")], tmp_path)
    assert "frpo, seed 1: stage one failed: boom" in page.text
    assert "2 runs, of which 0 finished." in page.text and page.tags.count("img") == 0


def test_without_a_baseline_the_page_says_so(tmp_path):
    page = report([train_row("frpo", 1, FRPO), finetune_row("frpo", 1, "a/b c", 0.9, 0.8)], tmp_path)
    assert "There are no paired differences: they need FRPO and a baseline at a common seed" in page.text
    assert (tmp_path / "out" / "landscape_a_b_c.png").exists()


def test_the_terminal_has_the_end_points_and_what_was_not_matched():
    out = io.StringIO()
    print_summary(two_arms({1: 0.6, 2: 0.7}, {1: 0.5}), Console(file=out, width=120))
    cells = [cell.strip() for line in out.getvalue().splitlines() if "0.650" in line for cell in line.split("│")]
    assert cells == ["", "frpo", "2", "0.900 ± 0.000", "0.650 ± 0.071", "0.250 ± 0.071", ""]
    assert "not matched: grpo has no fine-tuning on alpaca of seed 2." in out.getvalue()


def run_recipe(*arguments):
    command = [sys.executable, str(ROOT / "recipes" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_recipe_reports_a_study_directory_in_place(tmp_path):
    rows = two_arms({1: 0.6, 2: 0.7}, {1: 0.5, 2: 0.5})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_recipe(tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"report: {tmp_path / 'report.html'}" in result.stdout
    assert (tmp_path / "landscape_alpaca.png").exists()


def test_the_recipe_says_in_one_sentence_what_is_wrong(tmp_path):
    result = run_recipe(tmp_path / "nothing")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "is not a run's directory: it has no config.yaml." in result.stderr
    assert result.stderr.count("\n") == 1
