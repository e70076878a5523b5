"""The runner of a forgetting study: what is run, recorded, repeated and refused. One tiny study really runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_study import tiny_study

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import new_model
from frpo_nemo.examples.toy import toy_tokenizer
from frpo_nemo.study.check import check_same_configuration
from frpo_nemo.study.parts import EvaluationConfig, PartConfig, StudyConfig, check_command
from frpo_nemo.study.results import read_results
from frpo_nemo.study.run import ForgettingStudy

SIZES = dict(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_hidden_size=64)
STUDIES = sorted(f"study/{path.stem}" for path in (CONFIGS / "study").glob("*.yaml") if path.stem != "toy")


def test_every_run_has_a_row_with_its_points_and_a_failed_arm_is_a_row_too(study):
    config, rows = study
    written = read_results(Path(config.out) / "results.jsonl")
    assert sorted(written, key=str) == sorted(rows, key=str)
    by_run = {(row["arm"], row["task"]): row for row in rows}
    assert set(by_run) == {("frpo", None), ("frpo", "alpaca"), ("impossible", None)}
    train, alpaca, failed = by_run["frpo", None], by_run["frpo", "alpaca"], by_run["impossible", None]
    assert [point["step"] for point in train["points"]] == [0, 2]
    assert [point["step"] for point in alpaca["points"]] == [0, 1, 2]
    assert train["settings"]["objective"] == {"name": "frpo", "lambda_": 0.5}
    assert f"model.path={config.out}/seed_5/frpo/train/hf" in alpaca["arguments"]
    assert alpaca["points"][0]["kl/exact"] == 0 < alpaca["points"][-1]["kl/exact"]
    assert {"downstream/loss", "downstream/accuracy", "reward/task/harmful/mean"} <= set(alpaca["points"][-1])
    assert failed["status"] == "failed" and "model.sequence_parallel=true needs" in failed["error"]


def test_started_again_it_repeats_the_failed_part_alone(study, monkeypatch):
    config, rows = study
    started = []
    real = ForgettingStudy._start
    monkeypatch.setattr(ForgettingStudy, "_start", lambda self, part: started.append(part.title) or real(self, part))
    again = ForgettingStudy(config, check_command).run()
    assert started == ["seed 5 impossible train"]
    assert [r for r in again if r["status"] == "finished"] == [r for r in rows if r["status"] == "finished"]


def test_an_interrupted_study_goes_on_with_what_has_no_row(study):
    """Killed while its last fine-tuning ran: that part's checkpoints are there, its row is not."""
    config, rows = study
    results = Path(config.out) / "results.jsonl"
    kept = [line for line in results.read_text().splitlines() if json.loads(line)["task"] != "alpaca"]
    results.write_text("".join(f"{line}\n" for line in kept))
    again = ForgettingStudy(tiny_study(config.out, arms={"frpo": config.arms["frpo"]}), check_command).run()
    found, expected = (next(row for row in some if row["task"] == "alpaca") for some in (again, rows))
    assert found["status"] == "finished" and found["points"] == expected["points"]
    assert len(results.read_text().splitlines()) == len(kept) + 1, "the first stage was not run again"


def test_the_recipe_makes_the_page_of_run_directories_alone(study, tmp_path):
    """It finds by itself which run was fine-tuned from which."""
    runs = Path(study[0].out) / "seed_5" / "frpo"
    command = [sys.executable, CONFIGS.parent / "recipes/report.py", runs / "train", runs / "alpaca", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"report: {tmp_path / 'report.html'}\n")
    page = (tmp_path / "report.html").read_text()
    assert "alpaca" in page and "lambda_" in page and "data:image/png" in page


def test_rows_of_arms_that_are_no_longer_named_stay_in_the_file_and_out_of_the_result(study):
    config, rows = study
    alone = tiny_study(config.out, arms={"frpo": config.arms["frpo"]})
    assert ForgettingStudy(alone, check_command).run() == [row for row in rows if row["arm"] == "frpo"]


def test_finished_runs_with_other_settings_are_not_taken_for_these(study):
    config, _ = study
    other = tiny_study(config.out, arms={"frpo": ["objective=frpo", "objective.lambda_=0.7"]})
    with pytest.raises(
        ConfigError, match=r"seed 5 frpo train with other settings: objective\.lambda_=0\.5 then, .*0\.7"
    ):
        ForgettingStudy(other, check_command)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"arms": {"a": ["objective.lamda_=1"]}}, "lamda_"),
        ({"arms": {"a": ["objective=frpo", "objective.lambda_=1", "optim.lrr=1"]}}, r"a train: Unknown key optim\.lrr"),
        ({"arms": {"a": ["objective=grpo", "optim.warmup_ratio=2"]}}, r"seed 5 a train: optim\.warmup_ratio=2"),
        ({"arms": {}}, "arms is empty"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"num_seeds": 2}, "num_seeds=2 must be at most 1, the number of seeds"),
        ({"jobs": 0}, "jobs=0 must be a whole number at least 1"),
        ({"tasks": {"train": PartConfig("sft")}}, "no task called train"),
        ({"tasks": {"a": PartConfig("convert")}}, r"tasks\.a\.recipe=convert must be one of frpo, sft"),
        ({"tasks": {"a": PartConfig("sft", "experiment/nothing")}}, "experiment/nothing"),
        ({"prepare": [PartConfig("none")]}, "there is no recipe none"),
        ({"evaluations": {"e": EvaluationConfig("sft")}}, r"evaluations\.e\.recipe=sft must be evaluate"),
        ({"evaluations": {"e": EvaluationConfig(overrides=["limt=4"])}}, r"Unknown key limt=4.*limit"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ForgettingStudy(tiny_study(tmp_path / "out", **changes), check_command)
    assert not (tmp_path / "out").exists()


SCHEDULE = "optim.min_lr=9"  # found by the recipe's own check alone
PROBE = "probe.prompts=[]"
LAYOUT = "model.tensor_model_parallel_size=2"


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"arms": {"good": ["objective=dr_grpo"], "late": ["objective=dr_grpo", SCHEDULE]}}, "5 late train: optim.min_lr"),
        ({"tasks": {"a": PartConfig("sft", "experiment/forgetting_alpaca", [LAYOUT])}}, "5 arm a: .*does not divide"),
        ({"tasks": {"a": PartConfig("sft", "experiment/forgetting_alpaca", [PROBE])}}, r"5 arm a: probe.*needs probe\.prompts"),
        ({"tasks": {"a": PartConfig("sft", "experiment/forgetting_alpaca", ["probe.interval=0", "probe.prompts=[]"])}},
         r"5 arm a: probe\.interval=0 measures nothing for the report; set it above 0"),
        ({"train": PartConfig("frpo", "experiment/forgetting_train", ["trainer.val_interval=0"])},
         r"5 arm train: trainer\.val_interval=0 measures nothing for the report; set it above 0"),
        ({"evaluations": {"e": EvaluationConfig()}}, "5 arm train e: Nothing to measure"),
        ({"model": "no/such/model"}, "5 arm train: model.path=no/such/model does not exist"),
        ({"processes": 2}, "5 arm train: .*is not the number of processes that started, 2"),
    ],
)  # fmt: skip
def test_what_would_end_a_part_is_told_before_any_has_run(tmp_path, changes, sentence):
    """Later tasks are checked too, whose model doesn't exist yet; the model that a preparation makes isn't needed."""
    whole = {"arms": {"arm": ["objective=dr_grpo"]}}
    ForgettingStudy(tiny_study(tmp_path / "out", **whole), check_command).check()
    study = ForgettingStudy(tiny_study(tmp_path / "out", **whole | changes), check_command)
    with pytest.raises(ConfigError, match=f"^seed {sentence}"):
        study.check()
    assert not (tmp_path / "out").exists()


def test_a_later_task_is_checked_with_the_model_that_stage_one_begins_with(tmp_path):
    new_model(tmp_path / "base", tokenizer=toy_tokenizer(), max_position_embeddings=16, seed=1, **SIZES)
    small = dict(model=str(tmp_path / "base"), prepare=[], arms={"arm": ["objective=dr_grpo"]})
    long = {"tasks": {"a": PartConfig("sft", "experiment/forgetting_alpaca", ["data.max_tokens=32"])}}
    with pytest.raises(ConfigError, match="seed 5 arm a: .*max_position_embeddings=16"):
        ForgettingStudy(tiny_study(tmp_path / "out", **small, **long), check_command).check()


def test_parts_find_configurations_where_the_study_was_found_and_a_file_that_changed_is_told(study, tmp_path):
    """The command line is the same; what is composed for it is not."""
    config, _ = study
    mine = tiny_study(config.out, arms={"frpo": config.arms["frpo"]})
    ForgettingStudy(mine, check_command).check()
    (tmp_path / "experiment").mkdir()
    yaml = (CONFIGS / "experiment/forgetting_train.yaml").read_text()
    (tmp_path / "experiment/forgetting_train.yaml").write_text(yaml)
    ForgettingStudy(mine, check_command, str(tmp_path)).check()
    (tmp_path / "experiment/forgetting_train.yaml").write_text(yaml.replace("lr: 1.0e-3", "lr: 2.0e-3"))
    changed = ForgettingStudy(mine, check_command, str(tmp_path))
    with pytest.raises(ConfigError, match=r"5 frpo train: .*optim.lr=0.002 \(was 0.001\).*rename the arm or task"):
        changed.check()
    named = {part.stage: part.arguments[:2] for part in changed.parts([5])}
    assert named["train"] == ["--config-dir", str(tmp_path)]
    assert named["finetune"] == ["--config-name", "experiment/forgetting_alpaca"]  # which is not there


def test_a_whole_run_had_the_steps_that_it_is_asked_for(study):
    """One that is continued may be given more."""
    train = next(part for part in ForgettingStudy(study[0], check_command).parts([5]) if part.stage == "train")
    longer = replace(train, arguments=[*train.arguments, "trainer.max_steps=3"])
    check_same_configuration(longer, finished=False)
    with pytest.raises(ConfigError, match="has finished with trainer.max_steps=2, and would have 3 now"):
        check_same_configuration(longer, finished=True)


def test_a_configuration_that_a_run_cannot_go_on_with_is_told_with_what_to_do(study, tmp_path):
    """A failed part that had made steps belongs to its configuration: its arm cannot just be corrected."""
    config, _ = study
    run = tmp_path / "out/seed_5/frpo/train"
    shutil.copytree(Path(config.out) / "seed_5/frpo/train", run)
    corrected = tiny_study(tmp_path / "out", arms={"frpo": ["objective=frpo", "objective.lambda_=0.7"]})
    with pytest.raises(ConfigError, match=rf"lambda_=0.7 \(was 0.5\).*rename the arm or task, or remove {run}, so"):
        ForgettingStudy(corrected, check_command).check()
    shutil.rmtree(run)
    ForgettingStudy(corrected, check_command).check()


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_in_configs_are_in_order(name, tmp_path):
    config = load(StudyConfig, compose(name, [f"out={tmp_path / 'out'}"]))
    parts = list(ForgettingStudy(config, check_command).parts(config.seeds))
    assert len({part.directory for part in parts}) == len(parts)
    models = len(config.arms) * (1 + len(config.tasks))
    assert len(parts) == len(config.seeds) * (len(config.prepare) + models * (1 + len(config.evaluations)))
