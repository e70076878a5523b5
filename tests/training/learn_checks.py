"""The learning half of a step, without engines: every rank calls these. Responses are random instead of sampled, and
the log-probs of the rollout are the policy's own."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from worlds import use_layout

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.data.batch import SequenceBatch, segment_sum
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.checkpoint import save_load
from frpo_nemo.objective import build_objective
from frpo_nemo.processes import world
from frpo_nemo.processes.phases import PhaseTimer
from frpo_nemo.rollout.chat import load_chat
from frpo_nemo.rollout.worker import Rollouts, RolloutWorker, ScoredPrompts
from frpo_nemo.training.frpo import learn, validate
from frpo_nemo.training.run import Run
from frpo_nemo.training.statistics import rollout_statistics, step_statistics

GROUPS, GROUP_SIZE = 6, 4
FIELDS = {"frpo": {"lambda_": 0.5}, "grpo": {}, "dr_grpo": {}}


class Learner:
    """Actor, run and worker for `learn`: a Run without processes and watchdog, a RolloutWorker without engine."""

    actor_class = PolicyActor

    def __init__(self, path: str, objective: str = "frpo", *, run_dir: str = "unused", beta=0.0, tp=1, pp=1, **options):
        overrides = ["model=tiny_fp32", f"model.path={path}", f"model.tensor_model_parallel_size={tp}"]
        overrides += [f"model.pipeline_model_parallel_size={pp}", f"model.sequence_parallel={str(tp > 1).lower()}"]
        overrides += [f"objective={objective}", f"objective.beta={beta}", "data=toy_prompts", "reward=toy"]
        overrides += [f"objective.{key}={value}" for key, value in FIELDS[objective].items()]
        overrides += ["rollout.prompts_per_step=6", "rollout.max_response_tokens=9", f"run_dir={run_dir}"]
        overrides += ["optim.lr=1e-4", "optim.clip_grad=0", "trainer.max_steps=10", "trainer.microbatch_tokens=64"]
        self.cfg = load(FRPORun, compose("frpo", [*overrides, *(f"{k}={v}" for k, v in options.items())]))
        use_layout(self.cfg.model)
        tokens = self.cfg.trainer.microbatch_tokens
        self.actor = self.actor_class(self.cfg.model, self.cfg.optim, microbatch_tokens=tokens)
        self.actor.freeze_reference()
        self.objective = build_objective(self.cfg.objective)
        self.run, self.worker = object.__new__(Run), object.__new__(RolloutWorker)
        self.run.cfg, self.worker.model, self.worker.rollout = self.cfg, self.cfg.model, self.cfg.rollout
        self.run.dir, self.run.rank, self.run.phases = Path(run_dir), world.rank(), PhaseTimer()
        self.run.objective_state, self.worker.measured, self.worker._said = {}, {}, set()

    def rollouts(self, batch: SequenceBatch | None = None) -> Rollouts:
        """`batch`, or random responses, as if this policy had sampled them."""
        batch = random_batch() if batch is None else batch
        batch.token_columns["rollout_logprobs"] = self.actor.get_inference_log_probs(batch)
        one_reward = {"compared": batch.columns["reward"], "partly_scored": torch.zeros(batch.num_sequences)}
        batch.columns |= one_reward
        return Rollouts(batch, ["only"])

    def learn(self, rollouts: Rollouts):
        self.batch_objective = self.objective.for_batch(rollouts.rewards, rollouts.groups, self.run.objective_state)
        return learn(self.run, self.batch_objective, self.worker, self.actor, rollouts, step=1)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.actor.gpt.named_parameters()}

    def gradient(self) -> torch.Tensor:
        """Return the last step's gradient, all parameters together (in a world of one, where nothing is sharded)."""
        return torch.cat([parameter.main_grad.flatten() for parameter in self.actor.gpt.parameters()]).clone()


def random_batch() -> SequenceBatch:
    generator = torch.Generator().manual_seed(0)
    count = GROUPS * GROUP_SIZE

    def draw(size):
        return torch.randint(4, 80, (size,), generator=generator).tolist()

    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return SequenceBatch.from_lists(
        [draw(7) for _ in range(count)],
        [draw(length) for length in lengths],
        group=[index // GROUP_SIZE for index in range(count)],
        task=[0] * count,
        truncated=[False] * count,
        reward=torch.rand(count, generator=generator).double(),
    )


def check_learning(path: str, objective: str) -> float:
    """How much one step raises the log-probs of responses, weighted by (reward - mean of the group)."""
    learner = Learner(path, objective, beta=0.01)
    rollouts = learner.rollouts()
    before = rollouts.batch.token_columns["rollout_logprobs"]
    [result] = learner.learn(rollouts)
    assert result.grad_norm > 0 and torch.isfinite(result.per_sequence["loss"]).all()
    values = step_statistics(learner.objective, rollouts.batch, [result])
    assert all(map(math.isfinite, values.values())), values
    change = learner.actor.get_inference_log_probs(rollouts.batch) - before
    rewards = rollouts.rewards.view(GROUPS, GROUP_SIZE)
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    return (segment_sum(change.double(), rollouts.batch.response_lengths) * centred).sum().item()


def check_two_updates(path: str) -> None:
    """updates_per_rollout=2: each on half of the groups, the second with importance ratios of its own."""
    learner = Learner(path, **{"trainer.updates_per_rollout": 2, "optim.lr": 1e-3})
    rollouts = learner.rollouts()
    first, second = learner.learn(rollouts)
    assert first.per_sequence["loss"].numel() == second.per_sequence["loss"].numel() == GROUPS * GROUP_SIZE // 2
    assert (first.per_token["ratio"] - 1).abs().max() < 1e-5
    assert (second.per_token["ratio"] - 1).abs().max() > 1e-3
    # The second minibatch's advantages come from its rewards and from where the policy is by then.
    on_policy = learner.objective.effective_advantages(rollouts.rewards, rollouts.groups)
    difference = (rollouts.batch.columns["advantage"] - on_policy).abs().view(2, -1).amax(1)
    assert difference[0] == 0 and difference[1] > 1e-4, difference


def check_unscored(path: str, objective: str) -> None:
    """Leaving unscored responses out of the batch gives the same gradient: one of group 0, and all but one of group 1,
    whose last is then without company."""
    unscored = [2, 4, 5, 7]
    with_them, without = Learner(path, objective), Learner(path, objective)
    rollouts = with_them.rollouts()
    rollouts.rewards[unscored] = math.nan
    scored = [i for i in range(GROUPS * GROUP_SIZE) if i not in unscored]
    with_them.learn(rollouts)
    without.learn(Rollouts(rollouts.batch.select(scored), ["only"]))
    assert rollouts.batch.columns["advantage"][[*unscored, 6]].tolist() == [0.0] * 5
    expected, found = without.gradient(), with_them.gradient()
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-6 * expected.norm()


def check_nothing_scored(path: str, run_dir: str) -> None:
    """Training and validation where every reward failed: statistics without means of nothing, weights as they were."""
    learner = Learner(path, run_dir=run_dir)
    rollouts, before = learner.rollouts(), learner.weights()
    rollouts.rewards[:] = math.nan
    results = learner.learn(rollouts)
    values = rollout_statistics(rollouts) | step_statistics(learner.objective, rollouts.batch, results)
    assert all(map(math.isfinite, values.values())), values
    assert values["loss"] == values["gradient_norm"] == 0 and values["share/unscored"] == 1
    assert_unchanged(learner, before)

    recorded = []
    learner.worker.roll_out = lambda *arguments, **options: rollouts
    learner.worker.write_samples = lambda path, rollouts: None
    learner.run.record_validation = lambda step, values, score: recorded.append((values, score))
    validate(learner.run, learner.worker, learner.actor, ScoredPrompts(range(24), None, ["only"]), step=1)
    [(values, score)] = recorded
    assert values["share/unscored"] == 1 and not math.isfinite(score)


def check_non_finite_loss(path: str, run_dir: str, tp: int, pp: int) -> None:
    """A rollout log-prob that is NaN, in an importance weight, makes one sequence's loss NaN."""
    options = {"rollout.importance_correction": "token", "rollout.logprob_gap_threshold": 1e9}
    learner = Learner(path, run_dir=run_dir, tp=tp, pp=pp, **options)
    rollouts, before = learner.rollouts(), learner.weights()
    bad = 9
    place = int(rollouts.batch.response_lengths[:bad].sum())
    good = rollouts.batch.token_columns["rollout_logprobs"][place].item()
    rollouts.batch.token_columns["rollout_logprobs"][place] = math.nan
    learner.worker.check_logprobs = lambda *arguments: None  # would notice it first
    with pytest.raises(RuntimeError, match=r"step 1: the loss of 1 of 24 sequences is not finite.*nonfinite") as caught:
        learner.learn(rollouts)
    assert_unchanged(learner, before)
    if learner.run.rank == 0:
        [row] = saved_rows(run_dir, caught)
        prompt, response = rollouts.batch.unpack()[bad]
        assert (row["index"], row["prompt"], row["response"]) == (bad, prompt, response)

    rollouts.batch.token_columns["rollout_logprobs"][place] = good
    [result] = learner.learn(rollouts)
    assert math.isfinite(result.grad_norm) and result.grad_norm > 0


def check_infinite_gradient(path: str, run_dir: str, tp: int, pp: int) -> None:
    """Rewards of 1e30: their losses are finite, the norm of their gradient is not."""
    learner = Learner(path, "dr_grpo", run_dir=run_dir, tp=tp, pp=pp)
    rollouts, before = learner.rollouts(), learner.weights()
    rollouts.batch.columns["reward"] *= 1e30
    with pytest.raises(RuntimeError, match=r"step 1: gradient norm .*every loss is finite.*nonfinite") as caught:
        learner.learn(rollouts)
    assert_unchanged(learner, before)
    if learner.run.rank == 0:
        assert len(saved_rows(run_dir, caught)) == GROUPS * GROUP_SIZE


def check_masked(path: str, run_dir: str, updates: int = 1, pp: int = 1) -> None:
    """One token of which vLLM's log-prob is 12 nats above the policy's, another 3: the first leaves the loss, is counted,
    and is in the file with its text; it is said once."""
    options = {"rollout.logprob_gap_threshold": 1e9, "trainer.updates_per_rollout": updates}
    learner = Learner(path, run_dir=run_dir, pp=pp, **options)
    learner.worker.tokenizer = load_chat(learner.cfg.model).tokenizer
    rollouts = learner.rollouts()
    sequence, position = 9, 0
    place = int(rollouts.batch.response_lengths[:sequence].sum()) + position
    vllm = rollouts.batch.token_columns["rollout_logprobs"]
    vllm[place] += 12
    vllm[place + 40] += 3
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = learner.learn(rollouts)
        values = step_statistics(learner.objective, rollouts.batch, results)
        learner.learn(rollouts)
    assert values["rollout_mismatch/share_masked"] == pytest.approx(1 / len(vllm))
    assert values["rollout_mismatch/max_abs_logprob_gap"] == pytest.approx(12, abs=1e-3)
    if learner.run.rank == 0:
        [said] = [line for line in printed.getvalue().splitlines() if "left out of the loss" in line]
        assert (
            said.startswith(f"step 1: 1 of {len(vllm)} tokens are left out of the loss") and "by 12.0 at most" in said
        )
        [row] = map(json.loads, Path(run_dir, "masked", "step_00000001.jsonl").read_text().splitlines())
        prompt, response = rollouts.batch.unpack()[sequence]
        assert (row["sequence"], row["position"]) == (sequence, position)
        assert row["token"] == learner.worker.tokenizer.decode(response[0])
        assert row["prompt"] == learner.worker.tokenizer.decode(prompt) and row["response_before"] == ""
        assert row["logprob_vllm"] - row["logprob_trainer"] == pytest.approx(12, abs=0.1), "of the second time"


def weights_of_checkpoint(path: str, run_dir: str) -> dict[str, torch.Tensor]:
    """Return the newest checkpoint, as Hugging Face names and tensors."""
    learner = Learner(path)
    save_load.load(checkpoint_files.newest(run_dir), learner.actor)
    return {name: tensor.clone() for name, tensor in learner.actor.stream_hf_weights()}


def saved_rows(run_dir: str, caught) -> list[dict]:
    [file] = Path(run_dir, "nonfinite").iterdir()
    assert str(file) in str(caught.value)
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_unchanged(learner: Learner, before: dict[str, torch.Tensor]) -> None:
    for name, weight in learner.weights().items():
        assert torch.equal(weight, before[name]), name
