"""Histories that survive a resume, consoles that stay short, and phases that add up."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from frpo_nemo.processes.phases import PhaseTimer
from frpo_nemo.training.logging import MetricsLogger


def logger(run_dir, **kwargs):
    return MetricsLogger(run_dir, **{"max_steps": 10, "tensorboard": False, **kwargs})


def history(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_on_disk_at_once_and_what_is_not_finite_is_null(tmp_path):
    with logger(tmp_path) as log:
        log.log(1, {"reward/mean": torch.tensor(0.5), "kl/reference": math.nan, "loss": math.inf})
        [record] = history(tmp_path)  # before close
    assert record["step"] == 1 and record["reward/mean"] == 0.5 and abs(record["time"] - time.time()) < 60
    assert record["kl/reference"] is None and record["loss"] is None


def test_validation_is_a_line_of_its_own(tmp_path):
    with logger(tmp_path) as log:
        log.log(0, {"reward/mean": 0.25}, kind="validation")
    assert history(tmp_path)[0]["validation/reward/mean"] == 0.25


def test_resume_drops_what_was_logged_beyond_the_checkpoint(tmp_path):
    with logger(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"reward/mean": 0.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rewa')  # killed while writing
    with logger(tmp_path, resume_step=3) as log:
        log.log(4, {"reward/mean": 1.0})
    assert [(record["step"], record["reward/mean"]) for record in history(tmp_path)] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 1),
    ]
    with logger(tmp_path) as log:
        log.log(1, {"reward/mean": 2.0})
    assert [record["reward/mean"] for record in history(tmp_path)] == [2.0]


def test_a_disabled_logger_leaves_no_trace(tmp_path):
    with logger(tmp_path / "run", enabled=False, tensorboard=True) as log:
        log.log(1, {"reward/mean": 0.0})
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_surviving_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logger(tmp_path, tensorboard=True) as log:
        for step in range(1, 6):
            log.log(step, {"reward/mean": 0.0})
    with logger(tmp_path, tensorboard=True, resume_step=3) as log:
        log.log(4, {"reward/mean": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(event.step, event.value) for event in events] == [(1, 0), (2, 0), (3, 0), (4, 1)]


def test_console_without_a_terminal_prints_short_lines_and_never_floods(tmp_path, capsys):
    with logger(tmp_path, max_steps=10_000) as log:
        for step in range(1, 10_001):
            log.log(step, {"reward/mean": 0.5, "loss": -1.0, "seconds/step": 0.001, "unlisted/metric": 1.0})
        log.log(10_000, {"reward/mean": 0.75, "reward/std": 0.1}, kind="validation")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "loss", "reward", "seconds", "ETA"]
    assert lines[1].split()[:4] == ["1", "-1.0000", "0.500", "0.00"]  # the first step at once
    assert lines[-2].split()[0] == "10000" and lines[-2].split()[-1] == "0:00:00"
    assert lines[-1].split() == ["10000", "validation:", "reward/mean", "0.7500"]
    assert 200 < len(lines) < 230 and max(map(len, lines)) < 100
    assert len(history(tmp_path)) == 10_001


def test_console_on_a_terminal_has_a_bar_with_eta(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with logger(tmp_path, max_steps=4, resume_step=2) as log:
        log.log(3, {"reward/mean": 0.5})
        log.log(4, {"reward/mean": 0.5})
    out = capsys.readouterr().out
    assert "4/4" in out and "ETA" in out and out.count("reward") == 1


def test_wandb_offline_continues_under_one_id(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, name, step_metric):
            calls.append((name, step_metric))

        def log(self, values):
            calls.append(values)

        def finish(self):
            calls.append("finish")

    import wandb

    def init(**kwargs):
        calls.append(kwargs)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    for resume_step in (None, 1, None):
        with logger(tmp_path, wandb_project="p", wandb_name="n", config={"a": 1}, resume_step=resume_step) as log:
            log.log((resume_step or 0) + 1, {"reward/mean": 0.5})
    first, second, fresh = (call for call in calls if "project" in call)
    assert first["id"] == second["id"] != fresh["id"]
    assert (first["project"], first["name"], first["config"], first["resume"]) == (
        "p",
        "n",
        {"a": 1},
        "allow",
    )
    assert {"step": 2, "reward/mean": 0.5} in calls and ("*", "step") in calls


class Recorder:
    def __init__(self):
        self.entered = []

    def enter(self, phase, step):
        self.entered.append((phase, step))


def test_phases_add_up_to_the_step():
    phases = PhaseTimer()
    with phases("generate"):
        time.sleep(0.02)
        with phases("refit"):  # nested: its time is its own
            time.sleep(0.01)
    time.sleep(0.01)
    with phases("generate"):
        time.sleep(0.01)
    seconds = phases.pop()
    total = seconds.pop("seconds/step")
    assert set(seconds) == {"seconds/generate", "seconds/refit", "seconds/other"}
    assert total == pytest.approx(sum(seconds.values()))
    assert seconds["seconds/generate"] >= 0.03 and seconds["seconds/refit"] >= 0.01 and seconds["seconds/other"] >= 0.01
    again = phases.pop()
    assert set(again) == {"seconds/other", "seconds/step"} and again["seconds/step"] < 0.01


def test_the_watchdog_hears_of_phases_and_keeps_the_one_that_raised():
    recorder = Recorder()
    phases = PhaseTimer(recorder)
    phases.step = 3
    with phases("validate"), phases("generate"):
        pass
    assert recorder.entered == [("validate", 3), ("generate", 3), ("validate", 3), ("other", 3)]
    with pytest.raises(KeyError), phases("reward"):
        raise KeyError
    assert recorder.entered[-1] == ("reward", 3)
    phases.pop()


def test_phases_synchronise_on_cuda_only(monkeypatch):
    synchronised = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronised.append(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    phases = PhaseTimer()
    with phases("a"):
        pass
    assert synchronised == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with phases("a"):
        pass
    assert synchronised == [1]
