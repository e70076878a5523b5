"""Whole runs of the recipes on the toy task: what they leave behind, and what survives kill -9.

Runs are shared, because vLLM's start is most of each: `reference` is undisturbed; `disturbed` is the same command with
probes, killed three times on its way.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import learn_checks
import pytest
import torch
from picky_reward import BORING, UNBEARABLE
from runs import (
    HERE,
    Job,
    assert_same_bits,
    checkpoints,
    exported,
    probes,
    random_model,
    steps,
    validations,
    without_times,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from traps import TRAPS, set_traps

from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.training.start_record import starts

STEPS, RADIUS = 10, 0.1
PROBE = ["probe=toy", "probe.interval=5", "probe.prompts.0.limit=16"]
PROBE += [
    'probe.prompts.0.path="python:frpo_nemo.examples.toy.rows?part=prompts&seed=0&heldout=1"'
]  # of the demo's world
SECRETS = {"argument": "an-argument-to-hide", "HF_TOKEN": "hf-token-to-hide", "WANDB_API_KEY": "0123456789" * 4}
SECRETS |= {"url": "password-to-hide"}
UMASK = 0o027
RANK_1 = r"rank 1 \(host \S+, pid {pid}\) died in phase \"\w+\" at step \d+"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return a model in a directory full of traps: whoever unpickles or imports something there creates a file `sprung`."""
    path = random_model(tmp_path_factory.mktemp("model") / "base")
    set_traps(Path(path))
    return path


def frpo_overrides(model: str) -> list[str]:
    """Like the demo, but smaller, with sequence parallelism, and with a lambda that depends on earlier steps: a checkpoint
    after steps 4, 8 and 10, validation before the first and after the last."""
    return [
        "--config-name=experiment/demo",
        f"model.path={model}",
        f"reward.variety.target={HERE / 'picky_reward.py'}:variety",
        f"reward.variety.args.api_key={SECRETS['argument']}",
        f"reward.variety.args.judge=https://user:{SECRETS['url']}@localhost/",
        "model.sequence_parallel=true",
        "objective.lambda_=null",
        f"objective.kl_radius={RADIUS}",
        "objective.radius_smoothing=0.5",
        "rollout.prompts_per_step=16",
        "rollout.group_size=4",
        "optim.lr=1e-3",
        "data.validation.0.limit=32",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_interval={STEPS}",
        "trainer.save_interval=4",
    ]


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """Return the run directory of an undisturbed run on TP2, with secrets in its environment and configuration."""
    environment = {name: SECRETS[name] for name in ("HF_TOKEN", "WANDB_API_KEY")} | {"WANDB_MODE": "offline"}
    overrides, run_dir = [*frpo_overrides(model), "logging.wandb_project=test"], tmp_path_factory.mktemp("r") / "run"
    return Job("frpo.py", overrides, run_dir, ranks=2, environment=environment, umask=UMASK).succeed().run_dir


@pytest.fixture(scope="module")
def disturbed(model, tmp_path_factory):
    """Run the same command with probes, four times: rank 1 killed between saves; all ranks inside the save of step 8; all
    ranks between saves again; and through to the end, by the command that the first start wrote down."""
    overrides, run_dir = [*frpo_overrides(model), *PROBE], tmp_path_factory.mktemp("disturbed") / "run"
    found = SimpleNamespace(run_dir=run_dir)

    job = Job("frpo.py", overrides, run_dir, ranks=2)
    job.wait_for_step(5)
    found.listens_on = job.listens_on()
    victim = job.ranks()[1]
    victim.kill()
    killed = time.monotonic()
    found.lost_code, found.lost_pid, found.lost_output = job.wait(), victim.pid, job.output
    found.lost_seconds = time.monotonic() - killed

    job = Job("frpo.py", overrides, run_dir, ranks=2, die_in_save_of=8)
    found.save_code, found.save_output = job.wait(), job.output
    found.after_save = {name: sorted(os.listdir(run_dir / "checkpoints" / name)) for name in checkpoints(run_dir)}
    found.newest = checkpoint_files.newest(run_dir)

    job = Job("frpo.py", overrides, run_dir, ranks=2)
    job.wait_for_step(5)
    job.kill()
    found.killed_output = job.output

    resume = starts(run_dir)[0]["resume"]
    found.last_output = Job("frpo.py", [], run_dir, resume=resume).succeed().output
    return found


def test_a_run_records_every_metric_and_all_are_finite(reference):
    """NaN and infinity are null in the file. The console begins with the plan."""
    assert reference.with_suffix(".log").read_text().startswith("plan: TP2 PP1 DP1, vLLM TP1, fp32")
    rows = steps(reference)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = {
        *(f"{name}/{part}" for name in ("reward", "reward/toy", "reward/variety") for part in ("mean", "std")),
        *(f"reward/task/{task}/{part}" for task in ("harmful", "harmless") for part in ("mean", "std")),
        "objective/lambda",
        "objective/robust_value",
        "objective/worst_case_divergence",
        "objective/effective_sample_size",
        "objective/max_abs_advantage",
        "kl/reference",
        "entropy",
        "response_length/mean",
        "share/truncated",
        "share/unscored",
        "share/partly_scored",
        "share/not_compared",
        "share/clipped",
        "importance_ratio/mean",
        "importance_ratio/max",
        "rollout_mismatch/mean_abs_logprob_gap",
        "rollout_mismatch/max_abs_logprob_gap",
        "rollout_mismatch/share_masked",
        "rollout_mismatch/gap_limit",
        "loss",
        "gradient_norm",
        "learning_rate",
        *(f"seconds/{p}" for p in ("step", "generate", "reward", "gather", "logprobs", "train", "refit", "other")),
        "tokens_per_second",
    }
    for row in rows:
        assert names <= row.keys(), names - row.keys()
        assert all(value is not None and math.isfinite(value) for value in row.values()), row
    assert [row["step"] for row in validations(reference)] == [0, STEPS]
    assert all(value is not None for row in validations(reference) for value in row.values())


def test_the_trainers_logprobs_are_those_that_vllm_sampled_with(reference):
    assert max(row["rollout_mismatch/max_abs_logprob_gap"] for row in steps(reference)) < 1e-4


def test_phases_add_up_to_the_step(reference):
    for row in steps(reference):
        parts = sum(value for name, value in row.items() if name.startswith("seconds/") and name != "seconds/step")
        assert parts == pytest.approx(row["seconds/step"])


def test_a_run_learns_something(reference):
    """The optimizer moves the policy away from the reference: nothing is left out between reward and weights."""
    rows = steps(reference)
    assert rows[0]["kl/reference"] == 0 < rows[-1]["kl/reference"]
    assert all(row["gradient_norm"] > 0 for row in rows)


def test_lambda_follows_the_kl_radius_and_what_smooths_it_is_in_the_checkpoints(reference):
    """The first step has nothing to smooth with, so its worst policies are exactly on the ball; later ones are near it.
    The tests of resumed runs compare their lambda."""
    rows = steps(reference)
    off = [row["objective/worst_case_divergence"] / RADIUS - 1 for row in rows]
    assert abs(off[0]) < 1e-8
    assert 1e-3 < max(abs(x) for x in off[1:]) < 0.5, off
    for name in checkpoints(reference):
        record = checkpoint_files.read(reference / "checkpoints" / name)
        assert record["state"]["memory"] == {"lambda_": rows[record["step"] - 1]["objective/lambda"]}


def test_a_run_leaves_its_description_and_checkpoints(reference):
    assert f"max_steps: {STEPS}" in (reference / "config.yaml").read_text()
    [start] = starts(reference)
    assert start["world_size"] == 2 and "torch" in start["packages"] and start["resumed_from"] is None
    assert start["commit"] is None or re.fullmatch("[0-9a-f]{40}", start["commit"])
    assert start["data"] == checkpoint_files.read(checkpoint_files.newest(reference))["state"]["data"]
    assert start["data"].keys() == {"train", "validation"}
    assert checkpoints(reference) == ["step_00000008", f"step_{STEPS:08d}"]  # keep_last=2
    assert any((reference / "tensorboard").iterdir())


def test_every_start_is_in_the_record_and_its_command_resumes_the_run_from_any_directory(disturbed):
    """The last start was this command, typed in /."""
    first, after_death, again, last = starts(disturbed.run_dir)
    assert [Path(s["resumed_from"] or "none").name for s in (first, after_death, again, last)] == [
        "none",
        "step_00000004",
        "step_00000004",
        "step_00000004",
    ]
    assert "torch.distributed.run --standalone --nproc_per_node 2" in first["resume"]
    assert last["resume"] == first["resume"]


def test_no_secret_is_in_any_file_of_a_run_nor_on_its_console(reference):
    files = [*reference.rglob("*"), reference.with_suffix(".log")]
    assert any(file.suffix == ".wandb" for file in files) and any("tfevents" in file.name for file in files)
    for file in filter(Path.is_file, files):
        content = file.read_bytes()
        for secret in SECRETS.values():
            assert secret.encode() not in content, file
    config = (reference / "config.yaml").read_text()
    assert "api_key: REDACTED" in config and "https://REDACTED@localhost/" in config


def test_a_secret_may_change_between_the_starts_of_a_run(disturbed):
    """The command that is written down has none, so the last start had another one than those before."""
    assert "reward.variety.args.api_key=REDACTED" in starts(disturbed.run_dir)[-1]["command"]
    assert "resumed from" in disturbed.last_output


def test_a_run_directory_has_the_users_umask(reference):
    for path in (reference, *reference.rglob("*")):
        if path.is_symlink():
            continue
        assert path.stat().st_mode & UMASK == 0, path


def test_the_ranks_listen_on_loopback_alone(disturbed):
    assert disturbed.listens_on == {"127.0.0.1"}


def test_no_trap_in_the_models_directory_was_sprung(reference, disturbed, model):
    """Training, resuming, vLLM and the export spring no trap, and the export contains none."""
    assert not (Path(model) / "sprung").exists()
    assert not {file.name for file in (reference / "hf").iterdir()} & set(TRAPS)


def test_a_reward_that_throws_leaves_its_response_unscored_and_is_counted(reference, model):
    """Failures and unscored responses are the same ones; validation's file shows which, and no others."""
    responses = 16 * 4
    for row in steps(reference):
        unscored = row["share/unscored"] * responses
        assert unscored == row["reward_failures/variety/error"] == round(unscored) > 0
        assert "reward_failures/toy/error" not in row
        assert row["share/unscored"] < 0.6
    for sample in samples(reference):
        words = set(sample["response"].split())
        assert (sample["reward"] is None) == bool(UNBEARABLE & words), sample
        assert (sample["reward/variety"] is None) == bool((UNBEARABLE | BORING) & words), sample


def test_a_response_that_one_of_two_rewards_scored_stays_and_is_counted(reference):
    """It is a part of what the tests of killed and resumed runs compare bit for bit."""
    assert all(0 < row["share/partly_scored"] < 0.6 for row in steps(reference))
    for sample in samples(reference):
        if BORING & set(sample["response"].split()) and sample["reward"] is not None:
            assert sample["reward"] == sample["reward/toy"], sample


def test_the_exported_model_is_the_trained_policy(reference, model, workers):
    """transformers computes with hf/ the KL that the run measured in its last validation, and the last checkpoint,
    loaded in one process, holds bit for bit the weights of hf/, which two processes wrote."""
    trained, base = (AutoModelForCausalLM.from_pretrained(path) for path in (reference / "hf", model))
    tokenizer = AutoTokenizer.from_pretrained(reference / "hf")
    kl = 0.0
    for sample in samples(reference):
        prompt, response = (tokenizer.encode(sample[part], return_tensors="pt") for part in ("prompt", "response"))
        kl += sequence_logprob(trained, prompt, response) - sequence_logprob(base, prompt, response)
    expected = validations(reference)[-1]["validation/kl/per_response"]
    assert expected > 1e-3
    assert kl / len(samples(reference)) == pytest.approx(expected, abs=1e-5)
    [loaded] = workers.run(1, learn_checks.weights_of_checkpoint, path=model, run_dir=str(reference))
    assert_same_bits(loaded, exported(reference))


def test_a_rank_that_dies_ends_the_others_within_a_minute_with_its_name_and_phase(disturbed):
    assert disturbed.lost_code != 0
    assert disturbed.lost_seconds < 60
    assert re.search(RANK_1.format(pid=disturbed.lost_pid), disturbed.lost_output), disturbed.lost_output[-3000:]


def test_a_half_written_checkpoint_is_never_picked_up(disturbed):
    assert disturbed.save_code != 0
    [half, whole] = sorted(disturbed.after_save, key=len, reverse=True)
    assert whole == "step_00000004" and half.startswith("step_00000008.tmp-")
    assert any(name.endswith(".distcp") for name in disturbed.after_save[half])
    assert not set(disturbed.after_save[whole]) <= set(disturbed.after_save[half])
    assert disturbed.newest.name == "step_00000004"
    for output in (disturbed.save_output, disturbed.killed_output):
        assert "step_00000004 after step 4" in output


def test_a_run_with_probes_that_was_killed_three_times_ends_with_the_same_bits(disturbed, reference):
    """A probe samples, scores and runs the policy and its reference, and changes nothing."""
    assert "resumed from" in disturbed.last_output
    assert_same_bits(exported(disturbed.run_dir), exported(reference))


def test_what_rounding_does_to_the_model_is_measured_once_in_a_run(disturbed, reference):
    """The validation of step 0 measures it, before any checkpoint: a resumed run stops where an undisturbed one would."""
    records = [
        checkpoint_files.read(run / "checkpoints" / name)
        for run in (reference, disturbed.run_dir)
        for name in checkpoints(run)
    ]
    measured = {record["state"]["measured"]["logprob_gap"] for record in records}
    assert len(measured) == 1 and 0 < measured.pop() < 1e-5
    for log in (reference.with_suffix(".log").read_text(), disturbed.last_output):
        assert log.count("the run stops where their max difference exceeds 0.0001 (fp32)") == 1


def test_the_history_of_a_resumed_run_has_every_step_once_and_the_same_values(disturbed, reference):
    for kind in (steps, validations):
        assert [without_times(row) for row in kind(disturbed.run_dir)] == [
            without_times(row) for row in kind(reference)
        ]
    assert [row["step"] for row in probes(disturbed.run_dir)] == [0, 5, 10]
    assert checkpoints(disturbed.run_dir) == checkpoints(reference), "half-written checkpoints are cleared away"


@pytest.fixture(scope="module")
def elsewhere(reference, model, tmp_path_factory):
    """Continue TP2's checkpoint of step 8 in a single process, which runs during other tests until its result is needed."""
    run_dir = tmp_path_factory.mktemp("elsewhere") / "run"
    shutil.copytree(reference, run_dir, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}", "hf"))
    layout = ["parallel=single", "model.tensor_model_parallel_size=1", "model.sequence_parallel=false"]
    return Job("frpo.py", [*frpo_overrides(model), *layout], run_dir)


def test_grpo_runs_in_the_same_recipe_and_a_signal_ends_it_with_a_checkpoint(model, elsewhere, tmp_path):
    """Plain python, several updates per rollout, options on the command line, SIGUSR1 as Slurm sends it."""
    groups = ["model=tiny_fp32", "data=toy_prompts", "reward=toy", "objective=grpo"]
    sizes = ["rollout.prompts_per_step=8", "rollout.group_size=4", "rollout.max_response_tokens=6"]
    options = [
        "optim.lr=1e-3",
        "trainer.max_steps=500",
        "trainer.updates_per_rollout=2",
        "trainer.microbatch_tokens=512",
    ]
    options.append(f"reward.variety.target={HERE / 'picky_reward.py'}:variety")
    job = Job("frpo.py", [*groups, *sizes, *options, f"model.path={model}"], tmp_path / "run")
    job.wait_for_step(2)
    listens_on = job.listens_on()
    os.kill(job.process.pid, signal.SIGUSR1)
    assert job.wait() == 75, job.output[-3000:]
    rows = steps(job.run_dir)
    last = rows[-1]["step"]
    assert 2 <= last < 500
    assert f"stopped by a signal after step {last}" in job.output
    assert checkpoints(job.run_dir) == [f"step_{last:08d}"]
    assert listens_on == {"127.0.0.1"}
    assert max(row["importance_ratio/max"] for row in rows) > 1.0001, "the second update is off-policy"
    assert max(row["rollout_mismatch/max_abs_logprob_gap"] for row in rows) < 1e-4, "the first one is not"
    assert "objective/robust_value" not in rows[0]

    # Begun without validation; what it prints at its end continues it, with validation switched on.
    [start] = starts(job.run_dir)
    assert f"to continue: {start['resume']}" in job.output and "validation" in start["data"]
    more = [f"trainer.max_steps={last + 1}", "trainer.val_interval=1"]
    Job("frpo.py", more, job.run_dir, resume=start["resume"]).succeed()
    assert [row["step"] for row in validations(job.run_dir)] == [last + 1]


def test_a_run_continues_on_another_layout(elsewhere, reference):
    """The same policy, so the same distance from the reference (on other samples: there is one engine now instead of
    two)."""
    run_dir = elsewhere.succeed().run_dir
    assert "step_00000008 after step 8" in elsewhere.output
    rows, before = steps(run_dir), steps(reference)
    assert [without_times(row) for row in rows[:8]] == [without_times(row) for row in before[:8]]
    assert [row["step"] for row in rows[8:]] == [9, 10]
    for row, other in zip(rows[8:], before[8:], strict=True):
        assert row["rollout_mismatch/max_abs_logprob_gap"] < 1e-4
        assert row["learning_rate"] == other["learning_rate"]
        assert row["kl/reference"] == pytest.approx(other["kl/reference"], rel=0.3)
    weights, others = exported(run_dir), exported(reference)
    distance = max((weights[name] - others[name]).abs().max().item() for name in weights)
    assert distance < 2 * sum(row["learning_rate"] for row in rows[8:]) + 1e-6, "Adam moves a weight by about lr a step"


@pytest.mark.parametrize("objective", ["frpo", "grpo", "dr_grpo"])
def test_every_objective_makes_good_responses_likelier(workers, model, objective):
    [change] = workers.run(1, learn_checks.check_learning, path=model, objective=objective)
    assert change > 0


def test_the_first_update_is_on_policy_and_the_second_is_not(workers, model):
    workers.run(1, learn_checks.check_two_updates, path=model)


@pytest.mark.parametrize("objective", ["frpo", "grpo", "dr_grpo"])
def test_unscored_responses_have_no_influence_on_the_gradient(workers, model, objective):
    workers.run(1, learn_checks.check_unscored, path=model, objective=objective)


def test_a_step_without_any_score_changes_nothing_and_goes_on(workers, model, tmp_path):
    workers.run(1, learn_checks.check_nothing_scored, path=model, run_dir=str(tmp_path))


@pytest.mark.parametrize("layout", [dict(tp=1, pp=1), dict(tp=2, pp=1), dict(tp=1, pp=2)], ids=["one", "TP2", "PP2"])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_keeps_its_sequences(workers, model, tmp_path, layout):
    world = layout["tp"] * layout["pp"]
    workers.run(world, learn_checks.check_non_finite_loss, path=model, run_dir=str(tmp_path), **layout)


@pytest.mark.parametrize("layout", [dict(tp=1, pp=1), dict(tp=2, pp=1), dict(tp=1, pp=2)], ids=["one", "TP2", "PP2"])
def test_a_gradient_that_is_not_finite_stops_before_the_update(workers, model, tmp_path, layout):
    world = layout["tp"] * layout["pp"]
    workers.run(world, learn_checks.check_infinite_gradient, path=model, run_dir=str(tmp_path), **layout)


def samples(run_dir) -> list[dict]:
    """Return responses of the last validation."""
    return [json.loads(line) for line in (run_dir / "validation" / f"step_{STEPS:08d}.jsonl").read_text().splitlines()]


@torch.no_grad()
def sequence_logprob(model, prompt: torch.Tensor, response: torch.Tensor) -> float:
    logits = model(torch.cat([prompt, response], 1)).logits[0, prompt.shape[1] - 1 : -1]
    return torch.log_softmax(logits, -1)[torch.arange(response.shape[1]), response[0]].sum().item()
