"""The job scripts on a real Slurm cluster of three nodes, as a user submits them. Nodes have no GPUs here, and processes
meet with gloo; everything else is what happens on a cluster. All faults: fault_matrix.py, docs/reliability.md."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from jobs import ROOT, Faults
from runs import Job, checkpoints, exported, random_model, steps, without_times

STEPS = 5
ENGINE = "frpo_nemo.rollout.engine:RolloutEngine"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return random_model(tmp_path_factory.mktemp("model") / "base")


def frpo_overrides(model: str) -> list[str]:
    return [
        "--config-name=experiment/demo",
        f"model.path={model}",
        f"reward.variety.target={ROOT / 'tests' / 'training' / 'picky_reward.py'}:variety",
        "rollout.prompts_per_step=16",
        "rollout.group_size=4",
        "rollout.enforce_eager=true",
        f"trainer.max_steps={STEPS}",
        "trainer.val_interval=0",
        "trainer.save_interval=1",
    ]


@pytest.mark.parametrize(
    "script", ["frpo_7b", "frpo_70b", "sft_7b", "sft_70b", "convert", "serve", "recipe", "forgetting"]
)
def test_slurm_accepts_each_script(cluster, script):
    """Its options are valid, and the cluster could run it on the two nodes that we offer."""
    nodes = ["--nodes=2"] if script.endswith("b") else []
    done = cluster.cluster("exec", "sbatch", "--test-only", *nodes, f"slurm/{script}.sh", check=False)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_a_wrong_override_ends_the_job_before_anything_is_loaded(cluster, model, tmp_path):
    job = cluster.submit("slurm/sft_7b.sh", f"model.path={model}", "trainer.max_stepz=3", log=tmp_path / "log")
    assert job.wait() == ("FAILED", 0)
    assert job.show()["ExitCode"] == "2:0"
    assert "Unknown key trainer.max_stepz=3; the nearest valid key is trainer.max_steps" in job.output
    assert "nothing was started" in job.output


def test_a_job_that_the_signal_always_stops_before_a_checkpoint_gives_up(cluster, model, tmp_path):
    """node2 cannot report to the preflight, which therefore still waits for it when the signal comes."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cluster.cluster("node-exec", "2", "mount", "-t", "tmpfs", "tmpfs", str(run_dir))
    overrides = ["--config-name=experiment/demo_sft", f"model.path={model}", "parallel=dp2", f"run_dir={run_dir}"]
    settings = dict(log=tmp_path / "log", ranks=1, options=["--nodelist=node1,node2"], FRPO_PATIENCE=400)
    try:
        job = cluster.submit("slurm/sft_7b.sh", *overrides, **settings, FRPO_MAX_FAILURES=2)
        for restart in (0, 1):
            job.wait_until(lambda said=f"restart {restart} on": said in job.output)
            job.signal()
        assert job.wait() == ("FAILED", 1)
    finally:
        cluster.cluster("node-exec", "2", "umount", str(run_dir))
    assert "requeued (failed start 1 of 2 without a new checkpoint; newest: none)" in job.output
    assert (
        "the time limit came before training began; giving up after 2 failed starts without a new checkpoint "
        "(newest: none). To continue: the same" in job.output
    )


def test_two_jobs_do_not_share_a_run_dir(cluster, model, tmp_path):
    overrides = [
        "--config-name=experiment/demo_sft",
        f"model.path={model}",
        "parallel=dp2",
        f"++run_dir='{tmp_path / 'run'}'",
    ]
    held = cluster.submit("slurm/sft_7b.sh", log=tmp_path / "log", options=["--hold"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm_job").write_text(held.number)
    job = cluster.submit("slurm/sft_7b.sh", *overrides, log=tmp_path / "other.log", ranks=1)
    assert job.wait() == ("FAILED", 0)
    assert f"belongs to job {held.number}, which is still in the queue" in job.output
    held.cancel()


def test_a_cancelled_job_stays_cancelled(cluster, model, tmp_path):
    """Its processes end as if they had failed, and a failed job would requeue itself."""
    overrides = [
        "--config-name=experiment/demo_sft",
        f"model.path={model}",
        "parallel=dp2",
        f"run_dir={tmp_path / 'run'}",
    ]
    job = cluster.submit("slurm/sft_7b.sh", *overrides, log=tmp_path / "log", ranks=1)
    job.wait_until(lambda: "preflight: 2 nodes and 2 ranks are well" in job.output)
    job.cancel()
    assert job.wait() == ("CANCELLED", 0)


def test_nodes_without_their_gpus_are_named_and_the_job_gives_up(cluster, model, tmp_path):
    """All nodes lack them, so none is excluded. A failed start is tried again, but not forever."""
    overrides = [
        "--config-name=experiment/demo_sft",
        f"model.path={model}",
        "parallel=dp2",
        f"run_dir={tmp_path / 'run'}",
    ]
    gpus = ["--gpus-per-node=2"]
    job = cluster.submit(
        "slurm/sft_7b.sh", *overrides, log=tmp_path / "log", ranks=1, options=gpus, FRPO_MAX_FAILURES=2
    )
    assert job.wait() == ("FAILED", 1)
    for node in ("node1", "node2"):
        assert f"preflight: {node}: shows 0 GPUs, 2 were asked for" in job.output
    assert "requeued (failed start 1 of 2 without a new checkpoint; newest: none)" in job.output
    assert "giving up after 2 failed starts without a new checkpoint" in job.output


def test_a_node_that_does_not_share_the_disk_is_excluded(cluster, model, tmp_path):
    """node2 has a disk of its own where the others have run_dir. The job goes to node1 and node3, and ends there."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    hidden = ["mount", "-t", "tmpfs", "tmpfs", str(run_dir)]
    cluster.cluster("node-exec", "2", *hidden)
    overrides = ["--config-name=experiment/demo_sft", f"model.path={model}", "parallel=dp2", "trainer.max_steps=2"]
    try:
        settings = dict(log=tmp_path / "log", ranks=1, options=["--nodelist=node1,node2"], FRPO_PATIENCE=20)
        job = cluster.submit("slurm/sft_7b.sh", *overrides, f"run_dir={run_dir}", **settings)
        assert job.succeed() == 1
    finally:
        cluster.cluster("node-exec", "2", "umount", str(run_dir))
    assert re.search(r"preflight: node2: no report in \d+ s", job.output)
    assert job.show()["ExcNodeList"] == "node2"
    assert "restart 1 on node[1,3]" in job.output
    assert [row["step"] for row in steps(run_dir)] == [1, 2]


def test_where_too_few_nodes_would_be_left_none_is_excluded(cluster, model, tmp_path):
    """The same, but the job needs all three nodes."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    cluster.cluster("node-exec", "2", "mount", "-t", "tmpfs", "tmpfs", str(run_dir))
    overrides = ["--config-name=experiment/demo_sft", f"model.path={model}", f"run_dir={run_dir}"]
    settings = dict(log=tmp_path / "log", nodes=3, ranks=1, FRPO_PATIENCE=20, FRPO_MAX_FAILURES=1)
    try:
        job = cluster.submit("slurm/sft_7b.sh", *overrides, **settings)
        assert job.wait() == ("FAILED", 0)
    finally:
        cluster.cluster("node-exec", "2", "umount", str(run_dir))
    assert re.search(r"preflight: node2: no report in \d+ s", job.output)
    assert "without node2 the partition has 2 nodes, too few for this job: none is excluded" in job.output
    assert "giving up after 1 failed starts" in job.output


@pytest.fixture(scope="module")
def of_experts(tmp_path_factory) -> list[str]:
    """Return the options of a run with a mixture whose experts two ranks share, over two nodes in a job."""
    model = random_model(tmp_path_factory.mktemp("mixture") / "base", family="qwen3_moe", ffn_hidden_size=64)
    split = ["model.sequence_parallel=true", "model.expert_model_parallel_size=2"]
    return [*frpo_overrides(model), *split, "rollout.routing_replay=true"]


@pytest.fixture(scope="module")
def undisturbed(of_experts, tmp_path_factory) -> Path:
    """Return the same run without Slurm: two ranks of torchrun."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    return Job("frpo.py", of_experts, run_dir, ranks=2).succeed().run_dir


def test_a_job_that_meets_faults_ends_with_the_weights_of_one_that_meets_none(cluster, of_experts, undisturbed, tmp_path):
    """Rank 1 is killed in generation of step 2; its node in step 3; Slurm's signal comes in step 4. Each time the
    job requeues itself, or Slurm does, and the run goes on from the newest checkpoint."""
    run_dir, faults = tmp_path / "run", Faults(tmp_path / "faults")
    faults.add("kill", step=2, where=f"{ENGINE}.generate", delay=0.02)
    faults.add("node", step=3, where=f"{ENGINE}.generate", action="mark")
    faults.add("signal", step=4, where=f"{ENGINE}.generate", action="mark")
    overrides = [*of_experts, f"run_dir={run_dir}"]
    job = cluster.submit("slurm/frpo_7b.sh", *overrides, log=tmp_path / "log", ranks=1, **faults.environment)
    job.wait_until(lambda: faults.happened("node"))
    nodes = cluster.slurm("scontrol", "show", "hostnames", job.show()["NodeList"]).split()
    for node in nodes:
        number = node.removeprefix("node")
        sockets = cluster.cluster("node-exec", number, "ss", "-ltnpH").stdout.splitlines()
        heard_at = {line.split()[3].rpartition(":")[0] for line in sockets if '"python' in line}
        assert heard_at == {f"10.77.0.{number}"}, "the ranks listen where the others reach them and nowhere else"
    cluster.cluster("kill-node", nodes[1])
    job.wait_until(lambda: faults.happened("signal"))
    job.signal()
    job.wait_until(lambda: "the time limit is near" in job.output)
    faults.release("signal")
    assert job.succeed() == 3
    cluster.up()

    said = job.output
    assert re.search(r'watchdog: rank 1 \(host node\d, pid \d+\) died in phase "generate" at step 2', said)
    assert "stopped by a signal after step 4" in said
    resumed = re.findall(r"restart (\d) on .*newest checkpoint: (\S+)", said)
    assert resumed == [("0", "none"), ("1", "step_00000001"), ("2", "step_00000002"), ("3", "step_00000004")]
    assert checkpoints(run_dir)[-1] == f"step_{STEPS:08d}"
    weights, wanted = exported(run_dir), exported(undisturbed)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    last = {row["step"]: without_times(row) for row in steps(run_dir)}
    assert last == {row["step"]: without_times(row) for row in steps(undisturbed)}
    starts = [json.loads(line) for line in (run_dir / "environment.jsonl").read_text().splitlines()]
    assert [start["restart"] for start in starts] == [0, 1, 2, 3]
    assert all(start["resume"].startswith(f"cd '{ROOT}' && sbatch --nodes=2") for start in starts)


def test_a_checkpoint_is_converted_by_a_job(cluster, undisturbed, tmp_path):
    out = tmp_path / "hf"
    arguments = [f"input={undisturbed}", f"base={undisturbed / 'hf'}", f"out={out}"]
    job = cluster.submit("slurm/convert.sh", *arguments, log=tmp_path / "log", nodes=1, ranks=1, options=["--mem=0"])
    assert job.succeed() == 0
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "hf" / "model.safetensors").read_bytes()


def test_the_login_node_checks_before_it_submits(cluster, model, tmp_path):
    """`bash slurm/frpo_7b.sh ...` refuses a wrong configuration without a job."""
    environment = f"PATH={cluster.directory / 'bin'}:/usr/bin:/bin"
    command = [
        "env",
        environment,
        f"SBATCH_OUTPUT={tmp_path / 'log'}",
        "bash",
        "slurm/sft_7b.sh",
        f"model.path={model}",
    ]
    wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "tensor_model_parallel_size=4 does not divide num_attention_heads=2" in wrong.stderr
    assert cluster.slurm("squeue", "-h") == ""
    right = [*command, "--config-name=experiment/demo_sft", "model.tensor_model_parallel_size=1"]
    submitted = subprocess.run(right, cwd=ROOT, capture_output=True, text=True)
    assert "configuration OK for 1 x 8 processes" in submitted.stdout
    number = re.search(r"Submitted batch job (\d+)", submitted.stdout)[1]
    assert number in cluster.slurm("squeue", "-h")
    cluster.slurm("scancel", number)
