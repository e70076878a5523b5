"""Rows: read from results.jsonl, and made from run directories."""

from __future__ import annotations

import json

import pytest
from report.studies import FRPO, GRPO, train_row

from frpo_nemo.errors import ConfigError
from frpo_nemo.report.runs import rows_of_runs
from frpo_nemo.study.results import read_results, row_of_run


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_run(path, *, model, objective=None, seed=1, max_steps=2, data="rows.jsonl", records):
    """Return a run directory as the recipes leave it."""
    path.mkdir(parents=True)
    lines = [f"run_dir: {path}", f"model: {{path: {model}}}", "optim: {lr: 1.0e-3}"]
    lines += [f"data: {{train: [{{path: '{data}'}}]}}", f"trainer: {{max_steps: {max_steps}, seed: {seed}}}"]
    lines += [f"objective: {json.dumps(objective)}"] if objective else []
    (path / "config.yaml").write_text("\n".join(lines) + "\n")
    (path / "environment.jsonl").write_text(
        json.dumps({"commit": "first"})
        + "\n"
        + json.dumps({"commit": "abc", "packages": {"torch": "2"}, "python": "3"})
        + "\n"
    )
    write_lines(path / "metrics.jsonl", records)
    return path


def stage_one_records(reward=0.8):
    step = {"loss": 0.1, "tokens_per_second": 500.0, "seconds/step": 2.0}
    return [
        {"step": 0, "time": 1.0, "validation/reward/mean": 0.5, "validation/kl/per_response": 0.0},
        {"step": 1, "time": 2.0, **step},
        {"step": 2, "time": 3.0, "validation/reward/mean": reward, "validation/kl/per_response": 1.5},
        {"step": 2, "time": 3.0, **step},
    ]


def finetune_records(after=0.6):
    return [
        {"step": 0, "time": 1.0, "probe/reward/mean": 0.8, "probe/kl/exact": 0.0},
        {"step": 0, "time": 1.0, "validation/loss": 2.0},
        {"step": 1, "time": 2.0, "loss": 1.0, "tokens_per_second": 100.0, "seconds/step": 0.5},
        {"step": 2, "time": 3.0, "probe/reward/mean": after, "probe/kl/exact": None},
        {"step": 2, "time": 3.0, "validation/loss": 0.5, "validation/reward/mean": 0.9},
        {"step": 2, "time": 3.0, "loss": 1.0, "tokens_per_second": 100.0, "seconds/step": 0.5},
    ]


def test_a_stage_one_run_becomes_a_row_of_its_validations(tmp_path):
    run = write_run(tmp_path / "r", model="m", objective=FRPO, records=stage_one_records())
    row = row_of_run(run, arm="a", seed=7, stage="train")
    assert (row["arm"], row["seed"], row["stage"], row["task"]) == ("a", 7, "train", None)
    assert (row["status"], row["error"], row["run_dir"]) == ("finished", None, str(run))
    assert (row["steps"], row["tokens"], row["seconds"]) == (2, 2000, 4.0)
    assert row["points"] == [
        {"step": 0, "reward/mean": 0.5, "kl/per_response": 0.0},
        {"step": 2, "reward/mean": 0.8, "kl/per_response": 1.5},
    ]
    assert row["settings"]["objective"] == FRPO and row["settings"]["max_steps"] == 2
    assert row["environment"] == {"commit": "abc", "packages": {"torch": "2"}}
    assert json.loads(json.dumps(row)) == row


def test_a_finetune_run_becomes_a_row_of_its_probes_with_the_validation_as_downstream(tmp_path):
    run = write_run(tmp_path / "r", model="m", records=finetune_records())
    row = row_of_run(run, arm="a", seed=1, stage="finetune", task="math")
    first, last = row["points"]
    assert first == {"step": 0, "reward/mean": 0.8, "kl/exact": 0.0, "downstream/loss": 2.0}
    assert last == {"step": 2, "reward/mean": 0.6, "kl/exact": None, "downstream/loss": 0.5, "downstream/reward": 0.9}
    assert "model" not in row["settings"]  # every arm begins with its own


def test_a_run_that_stopped_early_failed_and_says_where(tmp_path):
    run = write_run(tmp_path / "r", model="m", objective=FRPO, max_steps=9, records=stage_one_records())
    row = row_of_run(run, arm="a", seed=1, stage="train")
    assert (row["status"], row["error"]) == ("failed", "stopped after step 2 of 9")


def test_a_run_that_died_at_once_is_a_row_with_its_error(tmp_path):
    row = row_of_run(tmp_path / "never", arm="a", seed=1, stage="train", error="ConfigError: no")
    assert (row["status"], row["error"], row["points"]) == ("failed", "ConfigError: no", [])


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_a_directory_that_is_no_run_is_refused(tmp_path, missing):
    run = write_run(tmp_path / "r", model="m", objective=FRPO, records=stage_one_records())
    (run / missing).unlink()
    with pytest.raises(ConfigError, match=f"r .*has no {missing}|r .*: it has no {missing}"):
        row_of_run(run, arm="a", seed=1, stage="train")


def test_a_finished_run_without_measurements_is_refused(tmp_path):
    run = write_run(tmp_path / "r", model="m", objective=FRPO, records=stage_one_records()[1:2], max_steps=1)
    with pytest.raises(ConfigError, match="nothing to report: it ran without trainer.val_interval"):
        row_of_run(run, arm="a", seed=1, stage="train")


def test_runs_that_exist_are_arms_by_directory_and_fine_tuning_belongs_to_the_run_it_began_from(tmp_path):
    frpo = write_run(tmp_path / "frpo", model="m", objective=FRPO, records=stage_one_records())
    grpo = write_run(tmp_path / "grpo", model="m", objective=GRPO, records=stage_one_records())
    later = [
        write_run(tmp_path / name / "math", model=run / "hf", records=finetune_records())
        for name, run in (("after_frpo", frpo), ("after_grpo", grpo))
    ]
    rows = rows_of_runs([frpo, *later])  # grpo is found by itself
    assert [(r["arm"], r["stage"], r["task"]) for r in rows] == [
        ("frpo", "train", None),
        ("grpo", "train", None),
        ("frpo", "finetune", "math"),
        ("grpo", "finetune", "math"),
    ]


def test_seeds_of_one_objective_are_one_arm_with_its_settings_as_name(tmp_path):
    runs = [
        write_run(tmp_path / f"{name}_{seed}", model="m", objective=objective, seed=seed, records=stage_one_records())
        for name, objective in (("frpo", FRPO), ("grpo", GRPO))
        for seed in (1, 2)
    ]
    rows = rows_of_runs(runs)
    assert [(row["arm"], row["seed"]) for row in rows] == [
        ("frpo lambda=0.2 beta=0.04", 1),
        ("frpo lambda=0.2 beta=0.04", 2),
        ("dr_grpo beta=0.04", 1),
        ("dr_grpo beta=0.04", 2),
    ]


def test_fine_tunings_on_the_same_data_in_directories_of_other_names_are_one_task(tmp_path):
    runs = [write_run(tmp_path / n, model=f"{n}/hf", data="math.jsonl", records=finetune_records()) for n in ("a", "b")]
    rows = rows_of_runs(runs)
    assert [row["task"] for row in rows] == ["math.jsonl", "math.jsonl"]
    assert [row["arm"] for row in rows] == ["a/hf", "b/hf"]  # where they began: those runs are not here


def test_a_run_without_rewards_and_probes_cannot_be_reported(tmp_path):
    run = write_run(
        tmp_path / "sft", model="m", records=[{"step": 1, "time": 1.0, "loss": 1.0, "validation/loss": 2.0}]
    )
    with pytest.raises(ConfigError, match="sft has no probe/ metrics"):
        rows_of_runs([run])


def test_results_are_read_and_a_line_that_is_still_written_is_left_out(tmp_path):
    path = write_lines(tmp_path / "results.jsonl", [train_row("a", 1, FRPO), train_row("b", 1, GRPO)])
    with path.open("a") as file:
        file.write('{"arm": "c"')
    assert [row["arm"] for row in read_results(path)] == ["a", "b"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stage": "probe"}, "line 1: stage='probe' must be train, finetune or evaluate"),
        ({"task": "math"}, "line 1: task='math'; a finetune row names its task, a train row has null"),
        ({"status": "ok"}, "line 1: status='ok' must be finished or failed"),
        ({"points": []}, "line 1: a finished run needs points"),
        ({"points": [{"step": 2}, {"step": 1}]}, r"the steps of its points must increase, but are \[2, 1\]"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, change, message):
    path = write_lines(tmp_path / "results.jsonl", [train_row("a", 1, FRPO) | change])
    with pytest.raises(ConfigError, match=message):
        read_results(path)


def test_lines_that_are_no_rows_and_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="line 1 lacks arm, seed"):
        read_results(write_lines(tmp_path / "a.jsonl", [{"step": 1}]))
    (tmp_path / "b.jsonl").write_text("nonsense\n")
    with pytest.raises(ConfigError, match="b.jsonl, line 1 is not JSON"):
        read_results(tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="does not exist"):
        read_results(tmp_path / "c.jsonl")
