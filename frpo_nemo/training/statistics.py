"""Compute what is logged about a step from the global batch: plain means over plain tensors, no reductions by name."""

from __future__ import annotations

import torch
from torch import Tensor

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import StepResult
from frpo_nemo.objective.base import Objective
from frpo_nemo.objective.mismatch import effective_sample_size, mismatch_statistics
from frpo_nemo.rollout.worker import Rollouts


def rollout_statistics(rollouts: Rollouts) -> dict[str, float]:
    """Return rewards as they were scored, in all, per task and per reward function, without filled parts; lengths; truncated,
    unscored, partly scored and failed responses."""
    columns, lengths = rollouts.batch.columns, rollouts.batch.response_lengths.double()
    values = _mean_and_std("reward", columns["reward"])
    if len(rollouts.tasks) > 1:
        for index, task in enumerate(rollouts.tasks):
            values |= _mean_and_std(f"reward/task/{task}", columns["reward"][columns["task"] == index])
    parts = [name for name in columns if name.startswith("reward/")]
    for name in parts if len(parts) > 1 else ():
        values |= _mean_and_std(name, columns[name])
    more = {}
    if "thought_tokens" in columns:
        more["thought_length/mean"] = columns["thought_tokens"].mean().item()
        more["share/unfinished_thoughts"] = columns["unfinished_thoughts"].mean().item()
    if rollouts.batch.kept is not None:
        more["kept_tokens/mean"] = rollouts.batch.kept.counts.double().mean().item()
    failures = {
        f"reward_failures/{reward}/{kind}": float(count)
        for reward, kinds in rollouts.failures.items()
        for kind, count in kinds.items()
    }
    return (
        values
        | failures
        | more
        | {
            "response_length/mean": lengths.mean().item(),
            "response_length/max": lengths.max().item(),
            "share/truncated": columns["truncated"].double().mean().item(),
            "share/unscored": columns["reward"].isnan().double().mean().item(),
            "share/partly_scored": columns["partly_scored"].double().mean().item(),
        }
    )


def scored_counts(rollouts: Rollouts) -> dict[str, float]:
    """Return how many responses each reward scored. With its std, this gives the standard error of its mean."""
    parts = {name: values for name, values in rollouts.batch.columns.items() if name.startswith("reward/")}
    return {f"scored/{name.removeprefix('reward/')}": float((~values.isnan()).sum()) for name, values in parts.items()}


def step_statistics(objective: Objective, batch: SequenceBatch, results: list[StepResult]) -> dict[str, float]:
    """Return the objective's own statistics, the share of scored responses that it leaves out, and statistics of the
    updates: means over all minibatches."""
    columns = batch.columns
    stats = objective.statistics(columns["compared"], columns["group"], columns["advantage"])
    values = {f"objective/{name}": value for name, value in stats.items()}
    left_out = columns["compared"].isnan() & ~columns["reward"].isnan()
    ratios = torch.cat([r.per_token["ratio"] for r in results])
    values |= {
        "loss": sum(r.per_sequence["loss"].sum().item() for r in results) / len(results),
        "gradient_norm": sum(r.grad_norm for r in results) / len(results),
        "learning_rate": results[-1].learning_rate,
        "entropy": torch.cat([r.per_token["entropy"] for r in results]).mean().item(),
        "share/not_compared": left_out.double().mean().item(),
        "share/clipped": torch.cat([r.per_sequence["clipped"] for r in results]).mean().item(),
        "importance_ratio/mean": ratios.mean().item(),
        "importance_ratio/max": ratios.max().item(),
    }
    if "kl" in results[0].per_sequence:
        values["kl/reference"] = torch.cat([r.per_sequence["kl"] for r in results]).mean().item()
    gaps = mismatch_statistics(sampling_logprobs(batch, results), batch.token_columns["rollout_logprobs"])
    gaps["share_masked"] = torch.cat([r.per_token["masked"] for r in results]).mean().item()
    if "weight" in results[0].per_token:
        gaps["effective_sample_size"] = effective_sample_size(torch.cat([r.per_token["weight"] for r in results]))
    return values | {f"rollout_mismatch/{name}": value for name, value in gaps.items()}


def sampling_logprobs(batch: SequenceBatch, results: list[StepResult]) -> Tensor:
    """Return the trainer's log-probs [R] under the policy that sampled: from the pass before the first update, or from
    the only minibatch's forward pass."""
    return batch.token_columns.get("old_logprobs", results[0].per_token["logprobs"])


def _mean_and_std(name: str, values: Tensor) -> dict[str, float]:
    """Return mean and sample standard deviation of the values that aren't NaN; empty if there are none."""
    values = values[~values.isnan()].double()
    if values.numel() == 0:
        return {}
    spread = values.std().item() if values.numel() > 1 else 0.0
    return {f"{name}/mean": values.mean().item(), f"{name}/std": spread}
