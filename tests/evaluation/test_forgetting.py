"""The runner of a forgetting study: what is run, recorded, repeated and refused. One tiny study really runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_study import tiny_study

from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.forgetting import ForgettingStudy
from frpo_nemo.evaluation.parts import EvaluationConfig, PartConfig, ServerConfig, StudyConfig, check_command
from frpo_nemo.evaluation.results import read_results
from frpo_nemo.training.cli import CONFIGS, compose
from frpo_nemo.training.schema import load

STUDIES = sorted(f"study/{path.stem}" for path in (CONFIGS / "study").glob("*.yaml") if path.stem != "world")


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
        ({"arms": {"a": ["objective=frpo", "objective.lambda_=1", "optim.lrr=1"]}}, r"Unknown key optim\.lrr"),
        ({"arms": {}}, "arms is empty"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"num_seeds": 2}, "num_seeds=2 must be from 1 to 1"),
        ({"jobs": 0}, "jobs=0 must be at least 1"),
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


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_in_configs_are_in_order(name, tmp_path):
    config = load(StudyConfig, compose(name, [f"out={tmp_path / 'out'}"]))
    parts = list(ForgettingStudy(config, check_command).parts(config.seeds))
    assert len({part.directory for part in parts}) == len(parts)
    models = len(config.arms) * (1 + len(config.tasks))
    assert len(parts) == len(config.seeds) * (len(config.prepare) + models * (1 + len(config.evaluations)))


def test_options_are_documented_with_their_defaults():
    text = (CONFIGS / "forgetting.yaml").read_text()
    for name, field in StudyConfig.__dataclass_fields__.items():
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "" if isinstance(default, PartConfig) else default if default == "???" else json.dumps(default)
        assert f"# {name}: {shown}".rstrip() in text, name
    for name in (*PartConfig.__dataclass_fields__, *ServerConfig.__dataclass_fields__):
        assert re.search(rf"^#   (- |  ){name}: ", text, re.MULTILINE), name
