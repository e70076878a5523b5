"""Where a job's run lies, on a real Slurm cluster: what the configuration says, with any characters, and how the run goes on
in another job. And which failures of a job are not repeated."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from jobs import ROOT, Faults, SlurmJob
from runs import checkpoints, random_model, steps

SCRIPT = "tests/slurm/quick_sft.sh"
ODD = "it's (a) b[1]{2},lr=1e-6 $x"
ACCUMULATE = "frpo_nemo.megatron.actor:PolicyActor.accumulate_gradient"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return random_model(tmp_path_factory.mktemp("model") / "base")


def overrides(model: str, max_steps: int = 1, config: str = "experiment/demo_sft") -> list[str]:
    return [
        f"--config-name={config}",
        f"model.path={model}",
        f"trainer.max_steps={max_steps}",
        "trainer.save_interval=1",
        "trainer.val_interval=0",
    ]


def start(cluster, run_dir: Path) -> dict:
    """Return what the first start of a run recorded about itself."""
    return json.loads((run_dir / "environment.jsonl").read_text().splitlines()[0])


def test_each_seed_has_the_directory_that_the_configuration_composes(cluster, model, tmp_path):
    """Two jobs with one text for run_dir. One meets a fault in each of two steps: it makes progress, and is not given up."""
    faults = Faults(tmp_path / "faults")
    for step in (2, 3):
        faults.add(f"step_{step}", step=step, where=ACCUMULATE, rank=0)
    where = f"run_dir={tmp_path}/seed_${{trainer.seed}}"
    settings = dict(nodes=1, ranks=1, FRPO_MAX_FAILURES=2)
    first = cluster.submit(
        SCRIPT, *overrides(model, 3), where, "trainer.seed=1", log=tmp_path / "1.log", **settings, **faults.environment
    )
    second = cluster.submit(SCRIPT, *overrides(model), where, "trainer.seed=2", log=tmp_path / "2.log", **settings)
    assert first.succeed() == 2
    assert second.succeed() == 0
    assert f"run_dir={tmp_path}/seed_1, newest checkpoint: step_00000002" in first.output
    assert [row["step"] for row in steps(tmp_path / "seed_1")][-1] == 3
    assert [row["step"] for row in steps(tmp_path / "seed_2")] == [1]
    for number, job in ((1, first), (2, second)):
        assert (tmp_path / f"seed_{number}" / "slurm_finished").read_text() == f"{job.number}\n"


def test_a_run_dir_in_the_users_own_configuration_counts(cluster, model, tmp_path):
    mine = f"# @package _global_\ndefaults: [/experiment/demo_sft, _self_]\nrun_dir: {tmp_path}/mine_${{optim.lr}}\n"
    (tmp_path / "mine.yaml").write_text(mine)
    options = ["--config-dir", str(tmp_path), *overrides(model, config="mine"), "optim.lr=1e-3"]
    job = cluster.submit(SCRIPT, *options, log=tmp_path / "log", nodes=1, ranks=1)
    job.succeed()
    assert checkpoints(tmp_path / "mine_0.001") == ["step_00000001"]


@pytest.mark.parametrize("quoted", [False, True])
def test_any_text_is_a_run_dir_from_the_login_node_to_the_command_that_continues(cluster, model, tmp_path, quoted):
    text = tmp_path / ODD
    own = "run_dir='{}'".format(str(text).replace("'", r"\'")) if quoted else f"run_dir={text}"
    checked = cluster.cluster(
        "exec", "env", f"SBATCH_OUTPUT={tmp_path / 'log'}", "bash", SCRIPT, *overrides(model), own, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert f"run_dir={text}\n" in checked.stdout
    job = SlurmJob(cluster, re.search(r"Submitted batch job (\d+)", checked.stdout)[1], tmp_path / "log")
    job.succeed()
    assert checkpoints(text) == ["step_00000001"]
    assert (text / "slurm_finished").exists()
    if not quoted:
        continue_(cluster, start(cluster, text)["resume"], tmp_path / "log", text)


def test_any_job_name_names_a_run_dir_and_the_run_goes_on_from_it(cluster, model, tmp_path):
    """The configuration names no run_dir; the checkout, where it then lies, has a name with spaces."""
    checkout = tmp_path / "my checkout"
    checkout.mkdir()
    for name in ("frpo_nemo", "recipes", "configs", "slurm", "tests", ".venv"):
        (checkout / name).symlink_to(ROOT / name)
    demo = (ROOT / "configs/experiment/demo_sft.yaml").read_text()
    (tmp_path / "bare.yaml").write_text(demo.replace("run_dir: runs/demo/sft\n", ""))
    options = ["--config-dir", str(tmp_path), *overrides(model, config="bare")]
    script = checkout / SCRIPT
    sbatch = ["sbatch", "--parsable", "--job-name", f"{ODD} ${{y}}", f"--chdir={checkout}", f"--output={tmp_path}/log"]
    number = cluster.slurm(*sbatch, str(script), *options).strip()
    SlurmJob(cluster, number, tmp_path / "log").succeed()
    run_dir = checkout / "runs" / f"{ODD} ${{y}}-{number}"
    assert checkpoints(run_dir) == ["step_00000001"]
    continue_(cluster, start(cluster, run_dir)["resume"], tmp_path / "log", run_dir)


def continue_(cluster, command: str, log: Path, run_dir: Path) -> None:
    """Type the command of the record, with one step more."""
    line = f"export SBATCH_OUTPUT={log}.more; {command} trainer.max_steps=2"
    said = cluster.slurm("bash", "-c", line)
    SlurmJob(cluster, re.search(r"Submitted batch job (\d+)", said)[1], Path(f"{log}.more")).succeed()
    assert [row["step"] for row in steps(run_dir)] == [1, 2]


def test_what_one_node_refuses_alone_is_not_tried_again(cluster, model, tmp_path):
    """node2 lacks the data. The job's own check on node1 cannot know; srun then ends rank 0 for rank 1's exit code 2."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_text('{"prompt": "copy 1", "completion": "1"}\n' * 8)
    cluster.cluster("node-exec", "2", "mount", "-t", "tmpfs", "tmpfs", str(data))
    source = f"data.train=[{{path: '{data}/rows.jsonl', completion: completion}}]"
    options = [*overrides(model), source, "parallel=dp2", f"run_dir={tmp_path}/run"]
    try:
        job = cluster.submit(SCRIPT, *options, log=tmp_path / "log", ranks=1, options=["--nodelist=node1,node2"])
        assert job.wait() == ("FAILED", 0)
    finally:
        cluster.cluster("node-exec", "2", "umount", str(data))
    assert re.search(r"^1: sft.py: .*rows\.jsonl", job.output, re.MULTILINE), job.output
    assert re.search(r"srun: error: node1: task 0: (Terminated|Killed)", job.output)
    assert "the configuration is wrong, see above" in job.output
    assert job.show()["ExitCode"] == "2:0"


def test_a_process_of_a_batch_script_trains_alone(cluster, model, tmp_path):
    """srun has not started it, though the job has two tasks on each of two nodes."""
    command = [str(ROOT / ".venv/bin/python"), "recipes/sft.py", *overrides(model), f"run_dir={tmp_path}/run"]
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/bash\nexec "$@"\n')
    job = cluster.submit(str(script), *command, log=tmp_path / "log")
    job.succeed()
    written = start(cluster, tmp_path / "run")
    assert written["world_size"] == 1 and list(written["files"]) == ["model.path"]
    assert checkpoints(tmp_path / "run") == ["step_00000001"]


def test_a_question_that_slurm_leaves_unanswered_is_asked_again(tmp_path):
    """Once it fails, once its answer is empty."""
    script = f"""source slurm/lib.sh
        sleep() {{ :; }}
        flaky() {{
          echo x >>{tmp_path}/asked
          case $(wc -l <{tmp_path}/asked) in 1) return 1 ;; 2) ;; *) echo it is RUNNING ;; esac
        }}
        ask flaky"""
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "it is RUNNING\n")
    assert (tmp_path / "asked").read_text() == "x\n" * 3
