"""What was not matched between arms is found, and said with numbers; what was matched is not mentioned."""

from __future__ import annotations

from report.studies import FRPO, GRPO, failed_row, finetune_row, train_row

from frpo_nemo.report.differences import differing_settings, not_matched
from frpo_nemo.report.frame import Results


def matched(**changes):
    """Return two arms, two seeds, one task, the same except for the objective; changes: {arm: fields of its train rows}."""
    rows = []
    for arm, objective in (("frpo", FRPO), ("grpo", GRPO)):
        for seed in (1, 2):
            rows.append(train_row(arm, seed, objective, **changes.get(arm, {})))
            rows.append(finetune_row(arm, seed, "math", 0.8, 0.7))
    return rows


def found(rows):
    return not_matched(Results(rows))


def test_arms_that_differ_in_the_objective_alone_are_matched():
    assert found(matched()) == []


def test_settings_are_compared_at_the_same_seed():
    rows = matched()
    for row in rows:
        path = f"python:frpo_nemo.examples.toy.rows?part=prompts&seed={row['seed']}"
        row["settings"] = row["settings"] | {"data": {"train": [{"path": path}]}}
    assert found(rows) == []
    rows[0]["settings"]["data"] = {"train": [{"path": "other"}]}
    assert any(sentence.startswith("Stage one: data.train differs: ") for sentence in found(rows))


def test_other_steps_tokens_and_learning_rates_are_named():
    rows = matched(grpo={"steps": 480, "tokens": 720_000})
    for row in rows:
        if row["arm"] == "frpo" and row["stage"] == "train":
            row["settings"] = row["settings"] | {"optim": {"lr": 5e-4}}
    assert found(rows) == [
        "Stage one: the number of steps differs: 240 (frpo), 480 (grpo).",
        "Stage one: training tokens differ: frpo 360,000, grpo 720,000.",
        "Stage one: optim.lr differs: 0.0005 (frpo), 0.001 (grpo).",
    ]


def test_tokens_within_one_percent_are_matched():
    assert found(matched(grpo={"tokens": 361_000})) == []


def test_another_beta_is_named_and_one_that_is_not_written_is_zero():
    rows = matched()
    for row in rows:
        if row["arm"] == "grpo" and row["stage"] == "train":
            row["settings"] = row["settings"] | {"objective": {"name": "dr_grpo"}}
    assert found(rows) == ["Stage one: beta differs: 0.04 (frpo), 0 (grpo)."]


def test_other_starting_points_and_other_learning_are_named():
    tasks = {"frpo": {"harmful": 0.95}, "grpo": {"harmful": 0.9}}
    rows = matched(**{arm: {"kl": kl, "tasks": tasks[arm]} for arm, kl in (("frpo", 1.0), ("grpo", 0.77))})
    for row in rows:
        if row["arm"] == "grpo" and row["task"]:
            row["points"][-1]["downstream/accuracy"] = 0.5
    assert found(rows) == [
        "KL to the reference at the end of stage one (kl/per_response, nats per response) differs: frpo 1.000, "
        "grpo 0.770.",
        "Reward before fine-tuning (harmful) differs: frpo 0.950, grpo 0.900.",
        "Fine-tuning on math: the accuracy reached differs: frpo 1.000, grpo 0.500.",
    ]


def test_failed_runs_and_missing_seeds_are_named():
    rows = [row for row in matched() if (row["arm"], row["seed"]) != ("frpo", 2)]
    rows.append(failed_row("frpo", 2, FRPO, "exit code 1\nTraceback\nRuntimeError: step 31: the loss is not finite\n"))
    rows.remove(next(row for row in rows if (row["arm"], row["seed"], row["task"]) == ("grpo", 1, "math")))
    assert found(rows) == [
        "frpo, seed 2: stage one failed: RuntimeError: step 31: the loss is not finite",
        "frpo has no fine-tuning on math of seed 2.",
        "grpo has no fine-tuning on math of seed 1.",
        "Means are over the finished seeds of each arm; paired differences use the seeds that both have.",
    ]


def test_a_value_that_one_run_lacks_is_named():
    rows = matched()
    rows[1]["points"][-1]["reward/mean"] = None
    assert found(rows) == [
        "Fine-tuning on math: no finite reward/mean at the end of frpo seed 1; not counted.",
    ]


def test_other_code_and_packages_are_named():
    rows = matched()
    for row in rows:
        row["environment"] = {"commit": f"{row['arm']}0123456789", "packages": {"torch": str(row["seed"])}}
    assert found(rows) == [
        "The runs were made with 2 commits: frpo012345 (frpo), grpo012345 (grpo).",
        "The runs were made with 2 versions of torch: 1, 2.",
    ]


def test_the_table_of_settings_has_what_differs_and_nothing_else():
    assert differing_settings(Results(matched()), "train").T.to_dict() == {
        "objective.name": {"frpo": "frpo", "grpo": "dr_grpo"},
        "objective.lambda_": {"frpo": "0.2", "grpo": "default"},
    }
    assert differing_settings(Results(matched()), "finetune", "math").empty
