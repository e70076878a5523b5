"""Train with FRPO or a GRPO baseline, the whole loop: generate, score, learn, refit, in that order and nothing else.

The objects used here handle phases (sleep and wake of the engine, timing, the watchdog), not the loop.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from frpo_nemo.config.options import FRPORun
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.data.prompts import PromptSampler
from frpo_nemo.megatron.actor import NonFiniteLoss, PolicyActor, StepResult
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.groups import start_model_parallel
from frpo_nemo.objective import Objective, build_objective
from frpo_nemo.objective.mismatch import MismatchWeights, agreement
from frpo_nemo.planning.compiling import compiles_on_cpu
from frpo_nemo.processes import world
from frpo_nemo.rewards.reward_set import build_rewards
from frpo_nemo.rollout.worker import Rollouts, RolloutWorker, ScoredPrompts
from frpo_nemo.training.loss import PolicyLoss
from frpo_nemo.training.masked import save_masked
from frpo_nemo.training.probe import VALIDATION, Probe, distance_from_reference
from frpo_nemo.training.run import Run
from frpo_nemo.training.statistics import rollout_statistics, sampling_logprobs, step_statistics


def train(cfg: FRPORun) -> bool:
    """Run the job that `cfg` (FRPORun, validated) describes, in every process of the world. Returns False if a
    signal ended it early."""
    with Run(cfg) as run:
        objective = build_objective(cfg.objective)
        with run.phases("load"):
            worker = RolloutWorker(
                cfg.model,
                cfg.rollout,
                run.phases,
                seed=cfg.trainer.seed,
                max_model_len=longest_sequence(cfg),
                enforce_eager=_enforce_eager(cfg),
                moment=run.moment,
                measured=run.measured,
            )
            training, held_out = load_prompts(cfg, worker)
            probe = Probe(cfg, worker) if cfg.probe.interval else None
            start_model_parallel(cfg.model, cfg.trainer.seed)
            actor = PolicyActor(
                cfg.model,
                cfg.optim,
                microbatch_tokens=cfg.trainer.microbatch_tokens,
                temperature=cfg.rollout.temperature,
                seed=cfg.trainer.seed,
            )
            if objective.beta > 0 or cfg.trainer.val_interval or probe:
                actor.freeze_reference()  # the model with which training began; a checkpoint may hold a later one
        run.attach(
            actor,
            train=training.prompts,
            validation=held_out.prompts if held_out else None,
            probe=probe.scored.prompts if probe else None,
        )
        sampler = PromptSampler(len(training.prompts), cfg.rollout.prompts_per_step, cfg.trainer.seed, cfg.data.shuffle)
        worker.refit(actor)
        worker.prove(actor, training.prompts, run.step, cfg.rollout.max_response_tokens)
        if run.step == 0:
            measure(run, worker, actor, held_out, probe, 0)

        for step in run.steps():
            rollouts = worker.roll_out(
                training,
                sampler.indices(step - 1),
                samples=cfg.rollout.group_size,
                max_tokens=cfg.rollout.max_response_tokens,
                seed_step=step,
            )
            rollouts.require_scores()
            rollouts.judge_truncated(cfg.rollout.truncated)
            batch_objective = objective.for_batch(rollouts.rewards, rollouts.groups, run.objective_state)
            results = learn(run, batch_objective, worker, actor, rollouts, step)
            worker.refit(actor)
            values = rollout_statistics(rollouts) | step_statistics(batch_objective, rollouts.batch, results)
            values["rollout_mismatch/gap_limit"] = worker.gap_limit.value
            measure(run, worker, actor, held_out, probe, step)
            if cfg.trainer.reference_interval and step % cfg.trainer.reference_interval == 0:
                actor.update_reference(cfg.trainer.reference_mix)
            run.record(step, values, int(rollouts.batch.lengths.sum()))
        if run.finished:
            run.export()
        training.rewards.close()
        if probe:
            probe.close()
        worker.close()
    return run.finished


def load_prompts(cfg: FRPORun, worker: RolloutWorker) -> tuple[ScoredPrompts, ScoredPrompts | None]:
    """Return (training prompts, validation prompts or None), with the same rewards. The second does not depend on
    val_interval: its fingerprint is in the checkpoints, and a resumed run may begin to validate."""
    rewards = build_rewards(cfg.reward)
    training = ScoredPrompts.load(cfg.data.train, rewards, worker.chat, cfg.data.max_prompt_tokens)
    if not cfg.data.validation:
        return training, None
    return training, ScoredPrompts.load(cfg.data.validation, rewards, worker.chat, cfg.data.max_prompt_tokens)


def _enforce_eager(cfg: FRPORun) -> bool | None:
    if torch.cuda.is_available():
        return cfg.rollout.enforce_eager
    compiles = compiles_on_cpu(cfg, Architecture.from_hf(cfg.model.path), dist.get_world_size())
    return not all(world.gather_objects(compiles))  # nodes may differ


def longest_sequence(cfg: FRPORun) -> int:
    """Return the tokens of the longest prompt and response that the engine may see."""
    probe = cfg.probe.max_response_tokens if cfg.probe.interval else 0
    return cfg.data.max_prompt_tokens + max(cfg.rollout.max_response_tokens, probe)


def learn(
    run: Run[FRPORun], objective: Objective, worker: RolloutWorker, actor: PolicyActor, rollouts: Rollouts, step: int
) -> list[StepResult]:
    """Do one optimizer update for each of updates_per_rollout minibatches of whole groups.

    With several, the log-probs of the rollout's policy are computed first, and an objective that uses importance gets it
    for each minibatch under the current policy; with one, both are known without a forward pass.
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
    results, advantages = [], torch.zeros(batch.num_sequences)
    for number, indices in enumerate(minibatches(rollouts.groups, updates)):
        minibatch = batch.select(indices)
        importance = None
        if number > 0 and objective.uses_importance:
            with run.phases("logprobs"):
                current = actor.get_inference_log_probs(minibatch)
            old = minibatch.token_columns["old_logprobs"]
            if cfg.rollout.token_gap_limit is not None:  # as in the loss, a token that is left out moves no other
                counted = agreement(old, minibatch.token_columns["rollout_logprobs"], cfg.rollout.token_gap_limit)
                current = torch.where(counted == 0, old, current)
            importance = objective.importance(current, old, minibatch.response_lengths)
        rewards, groups = minibatch.columns["compared"], minibatch.columns["group"]
        minibatch.columns["advantage"] = objective.effective_advantages(rewards, groups, importance)
        lengths, count = minibatch.response_lengths, minibatch.num_sequences
        minibatch.columns["coefficient"] = objective.by_length(objective.coefficients(rewards, groups), lengths)
        minibatch.columns["share"] = objective.by_length(torch.full((count,), 1 / count), lengths)
        with run.phases("train"):
            per_sequence, per_token = actor.accumulate_gradient(minibatch, policy_loss(cfg, objective, minibatch))
            if updates == 1:  # this forward pass had the weights with which vLLM sampled
                worker.check_logprobs(step, batch, per_token["logprobs"])
            results.append(
                update(run, actor, minibatch, (per_sequence, per_token), step, (step - 1) * updates + number)
            )
        advantages[indices] = minibatch.columns["advantage"]
    batch.columns["advantage"] = advantages
    save_masked(run, worker, batch, sampling_logprobs(batch, results), step)
    return results


def policy_loss(cfg: FRPORun, objective: Objective, minibatch: SequenceBatch) -> PolicyLoss:
    rollout, correction = cfg.rollout, None
    if rollout.importance_correction != "none":
        correction = MismatchWeights(
            level=rollout.importance_correction,
            low=rollout.importance_floor,
            high=rollout.importance_limit,
            mask=rollout.importance_outside == "mask",
        )
    return PolicyLoss(objective, minibatch.num_sequences, rollout.token_gap_limit, correction)


def update(
    run: Run[FRPORun], actor: PolicyActor, minibatch: SequenceBatch, columns: tuple, step: int, number: int
) -> StepResult:
    """Do one optimizer step, update `number` of the run, with the gradient of `minibatch`, which gave `columns`."""
    trainer = run.cfg.trainer
    try:
        return actor.optimizer_step(
            *columns, update=number, total_updates=trainer.max_steps * trainer.updates_per_rollout
        )
    except NonFiniteLoss as error:
        path = run.save_offenders(step, minibatch, error)
        raise RuntimeError(f"step {step}: {error}; weights are unchanged, sequences saved in {path}") from error


def measure(run: Run[FRPORun], worker: RolloutWorker, actor: PolicyActor, held_out, probe: Probe | None, step: int) -> None:
    """Run what is due after `step`: validation on held-out prompts, and the probe of an earlier stage's skill."""
    if held_out and run.validation_due(step):
        validate(run, worker, actor, held_out, step)
    if probe:
        probe.run_if_due(run, actor, step, refit=False)


def validate(run: Run[FRPORun], worker: RolloutWorker, actor: PolicyActor, held_out: ScoredPrompts, step: int) -> None:
    """Measure the reward of one response to each held-out prompt, and the KL from the reference. Samples as in training, with
    the same randomness at every step."""
    with run.phases("validate"):
        everything, limit = range(len(held_out.prompts)), run.cfg.rollout.max_response_tokens
        rollouts = worker.roll_out(held_out, everything, samples=1, max_tokens=limit, seed_step=VALIDATION)
        values = rollout_statistics(rollouts) | distance_from_reference(worker, actor, rollouts, step)
        if run.rank == 0:
            worker.write_samples(run.dir / "validation" / f"step_{step:08d}.jsonl", rollouts)
    run.record_validation(step, values, score=values.get("reward/mean", math.nan))  # absent: nothing could be scored


def minibatches(groups: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Cut a batch into `count` parts of whole groups. Returns the indices of each part's sequences."""
    ids = torch.unique(groups)
    return [torch.isin(groups, part).nonzero().flatten() for part in ids.tensor_split(count)]
