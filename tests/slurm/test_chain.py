"""A study as a chain of jobs, on a real Slurm cluster: what starts when, what a failed part takes with it, what a second call
submits. The trainings are small supervised ones, the later ones with probes; slurm/forgetting.sh is what a user types."""

from __future__ import annotations

import json
import re

import pytest
from jobs import SlurmJob

from frpo_nemo.study.results import read_results

STUDY = """
# @package _global_
defaults:
  - /forgetting
  - _self_

seeds: [5]
prepare:
  - recipe: new_model
    overrides: ["out={dir}/base", source=toy, hidden_size=64, num_layers=2, num_heads=2, ffn_hidden_size=64,
                max_position_embeddings=64]
    sbatch: [--gpus-per-node=0]
model: "{dir}/base"
train:
  recipe: sft
  config: experiment/forgetting_reference
  overrides:
    - &steps trainer.max_steps=2
    - trainer.val_interval=2
    - "data.validation=[{path: 'python:frpo_nemo.examples.toy.rows?part=alpaca&seed=5', completion: completion, limit: 8}]"
    - &server logging.wandb_name={out}/servers/judge.url  # an option that nobody reads: the part names the server
  script: tests/slurm/quick_sft.sh
arms: {}
tasks:
  math:
    recipe: sft
    config: experiment/forgetting_math
    overrides: [*steps, trainer.val_interval=0, probe.interval=2, "probe.prompts.0.limit=8", *server]
    script: tests/slurm/quick_sft.sh
servers:
  judge: {model: a_model, script: tests/slurm/idle_server.sh}
sbatch: [--mem=4G]
"""
FAILS = "optim.lr=7"  # quick_sft.sh: found wrong on the node only
WRONG = "model.sequence_parallel=true"  # found by the recipe's check: it needs tensor parallelism


@pytest.fixture
def forgetting(cluster, tmp_path):
    """Return a function from arguments of slurm/forgetting.sh to the finished process."""
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "chain.yaml").write_text(STUDY)
    study = ["--config-dir", str(configs), "--config-name", "chain", f"out={tmp_path / 'out'}"]
    return lambda *more: cluster.cluster("exec", "bash", "slurm/forgetting.sh", *more, *study, check=False)


def arms(**overrides: str) -> str:
    """Return an override, one or none, for each arm."""
    lists = {name: [override] if override else [] for name, override in overrides.items()}
    return f"arms={{{', '.join(f'{name}: {values}' for name, values in lists.items())}}}"


def test_a_study_goes_on_where_a_failed_arm_broke_its_chain(cluster, forgetting, tmp_path):
    out = tmp_path / "out"

    def submit(arms: str) -> dict[str, SlurmJob]:
        """Return {name: job} of what a call submitted"""
        done = forgetting(arms)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"^job (\d+)  (\S+)", done.stdout, re.MULTILINE)
        return {name: SlurmJob(cluster, number, out / f"{name}.log") for number, name in found}

    first = submit(arms(good="optim.lr=1e-3", mended=FAILS, never=FAILS))
    runs = [f"seed_5/{arm}/{run}" for arm in ("good", "mended", "never") for run in ("train", "math")]
    assert list(first) == ["servers/judge", "seed_5/prepare_0", *runs, "report"]
    for arm in ("mended", "never"):
        assert first[f"seed_5/{arm}/train"].wait() == ("FAILED", 0)
        assert first[f"seed_5/{arm}/math"].wait() == ("CANCELLED", 0)
    assert first["report"].show()["JobState"] == "PENDING"

    # While the good arm runs: its jobs, finished or not, and the server stay, and a new report waits for all.
    second = submit(arms(good="optim.lr=1e-3", mended="", never=FAILS))
    assert list(second) == [*runs[2:], "report"]
    assert first["report"].wait() == ("CANCELLED", 0)
    assert first["servers/judge"].show()["JobState"] == "RUNNING"
    assert second["report"].wait() == ("FAILED", 0)  # some parts have not finished
    assert first["servers/judge"].wait() == ("CANCELLED", 0)
    assert f"given: {out}/servers/judge.url a_model" in first["servers/judge"].output

    rows = read_results(out / "results.jsonl")
    finished = {(row["arm"], row["task"]) for row in rows if row["status"] == "finished"}
    assert finished == {("good", None), ("good", "math"), ("mended", None), ("mended", "math")}
    (failed,) = [row for row in rows if row["status"] == "failed"]
    assert failed["arm"] == "never" and failed["task"] is None
    page = (out / "report.html").read_text()
    assert "never, seed 5: stage one failed: 0: sft.py: data source" in page
    assert "not started: seed 5 never math" in second["report"].output

    jobs = [json.loads(line)["name"] for line in (out / "jobs.jsonl").read_text().splitlines()]
    assert jobs == [*first, *second]

    other = forgetting(arms(good="optim.lr=1e-4"))
    assert other.returncode == 2
    assert "seed 5 good train with other settings: optim.lr=1e-3 then, optim.lr=1e-4 now" in other.stderr


def test_where_a_configuration_is_wrong_or_slurm_refuses_a_job_nothing_is_submitted(cluster, forgetting, tmp_path):
    before = cluster.slurm("squeue", "-h", "-t", "all")
    wrong = forgetting(arms(good="", wrong=WRONG))
    assert wrong.returncode == 2
    assert "seed 5 wrong train: model.sequence_parallel=true needs" in wrong.stderr
    refused = forgetting(arms(good=""), "tasks.math.sbatch=['--partition=none']")
    assert refused.returncode == 1
    assert "invalid partition specified: none" in refused.stderr
    assert cluster.slurm("squeue", "-h", "-t", "all") == before
    assert not (tmp_path / "out").exists()
