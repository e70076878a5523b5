"""FRPO, or a GRPO baseline: the whole loop. Generate, score, learn, refit, in that order and nothing else.

Phases (sleep and wake of the engine, timing, the watchdog) belong to the objects named here, not to the loop.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from frpo_nemo.data.batch import SequenceBatch, segment_sum
from frpo_nemo.megatron import distributed
from frpo_nemo.megatron.actor import NonFiniteLoss, PolicyActor, StepResult
from frpo_nemo.objective import build_objective
from frpo_nemo.objective.kl import sequence_kl
from frpo_nemo.training.loss import PolicyLoss
from frpo_nemo.training.rollouts import Rollouts, RolloutWorker
from frpo_nemo.training.run import Run
from frpo_nemo.training.statistics import rollout_statistics, step_statistics


def train(cfg) -> None:
    """Run the job that `cfg` (FRPORun, validated) describes, in every process of the world."""
    with Run(cfg) as run:
        objective = build_objective(cfg.objective)
        with run.phases("load"):
            worker = RolloutWorker(cfg, run.phases)
            distributed.start_model_parallel(cfg.model, cfg.trainer.seed)
            actor = PolicyActor(
                cfg.model,
                cfg.optim,
                microbatch_tokens=cfg.trainer.microbatch_tokens,
                temperature=cfg.rollout.temperature,
            )
            if objective.beta > 0 or cfg.trainer.val_interval:
                actor.freeze_reference()  # before a checkpoint is loaded: it is the model that training began with
        run.attach(actor, worker.fingerprints())
        worker.refit(actor)
        if run.validation_due(run.step) and run.step == 0:
            validate(run, worker, actor, 0)

        for step in run.steps():
            rollouts = worker.generate(step, actor)
            goal = objective.for_batch(rollouts.rewards, rollouts.groups, run.memory)
            results = learn(run, goal, worker, actor, rollouts, step)
            worker.refit(actor)
            values = rollout_statistics(rollouts, worker.tasks) | step_statistics(goal, rollouts.batch, results)
            if run.validation_due(step):
                validate(run, worker, actor, step)
            run.record(step, values, int(rollouts.batch.lengths.sum()))
        if run.finished:
            run.export()
        worker.close()


def learn(
    run: Run, objective, worker: RolloutWorker, actor: PolicyActor, rollouts: Rollouts, step: int
) -> list[StepResult]:
    """One optimizer update for each of updates_per_rollout minibatches of whole groups.

    With several, the log-probs of the rollout's policy are computed first, and an objective that uses importance gets it
    for each minibatch under the policy of that moment; with one, both are known without a forward pass.
    """
    cfg, batch = run.cfg, rollouts.batch
    updates = cfg.trainer.updates_per_rollout
    actor.prepare_for_training()
    with run.phases("logprobs"):
        if objective.beta > 0:
            batch.token_columns["reference_logprobs"] = actor.get_init_policy_logprobs(batch)
        if updates > 1:
            batch.token_columns["old_logprobs"] = actor.get_inference_log_probs(batch)
            worker.check_logprobs(step, batch, batch.token_columns["old_logprobs"])
    # Before the first update, the policy's log-probs must be those that vLLM sampled with.
    check = partial(worker.check_logprobs, step, batch) if updates == 1 else None
    results, advantages = [], torch.zeros(batch.num_sequences)
    for number, indices in enumerate(minibatches(rollouts.groups, updates)):
        minibatch = batch.select(indices)
        importance = None
        if number > 0 and objective.uses_importance:
            with run.phases("logprobs"):
                current = actor.get_inference_log_probs(minibatch)
            old = minibatch.token_columns["old_logprobs"]
            importance = objective.importance(current, old, minibatch.response_lengths)
        with run.phases("train"):
            number += (step - 1) * updates
            results.append(update(run, objective, actor, minibatch, importance, step, number, check))
        advantages[indices] = minibatch.columns["advantage"]
    batch.columns["advantage"] = advantages
    return results


def update(
    run: Run, objective, actor, minibatch: SequenceBatch, importance, step: int, number: int, check
) -> StepResult:
    """One gradient and optimizer step over a minibatch of whole groups."""
    rewards, groups = minibatch.columns["reward"], minibatch.columns["group"]
    minibatch.columns["advantage"] = objective.effective_advantages(rewards, groups, importance)
    minibatch.columns["coefficient"] = objective.coefficients(rewards, groups)
    rollout, trainer = run.cfg.rollout, run.cfg.trainer
    loss = PolicyLoss(objective, minibatch.num_sequences, rollout.importance_correction, rollout.importance_limit)
    try:
        return actor.train_step(
            minibatch,
            loss,
            update=number,
            total_updates=trainer.max_steps * trainer.updates_per_rollout,
            check=check,
        )
    except NonFiniteLoss as error:
        path = run.save_offenders(step, minibatch, error)
        raise RuntimeError(f"step {step}: {error}; weights are unchanged, sequences saved in {path}") from error


def validate(run: Run, worker: RolloutWorker, actor: PolicyActor, step: int) -> None:
    """Reward on held-out prompts, and the KL from the reference on the same responses."""
    with run.phases("validate"):
        rollouts = worker.validate(step, actor)
        values = rollout_statistics(rollouts, worker.tasks)
        batch = rollouts.batch
        current, reference = actor.get_inference_log_probs(batch), actor.get_init_policy_logprobs(batch)
        worker.check_logprobs(step, batch, current)
        values["kl/reference"] = sequence_kl(current, reference, batch.response_lengths).mean().item()
        # Responses are samples of the policy, so the mean log-ratio of whole ones estimates KL(policy, reference).
        values["kl/per_response"] = segment_sum(current - reference, batch.response_lengths).mean().item()
        actor.finish_inference()
        if run.rank == 0:
            worker.write_samples(run.dir / "validation" / f"step_{step:08d}.jsonl", rollouts)
    run.record_validation(step, values, score=values.get("reward/mean", math.nan))  # absent: nothing could be scored


def minibatches(groups: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Cut a batch into `count` parts of whole groups: the indices of each part's sequences."""
    ids = torch.unique(groups)
    return [torch.isin(groups, part).nonzero().flatten() for part in ids.tensor_split(count)]
