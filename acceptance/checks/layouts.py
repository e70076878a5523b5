"""The first training step in a layout, against transformers in fp32 on one device: loss, gradient norm and entropy, and
the log-probs after the update, which are wrong if any rank's part of it is."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from acceptance import batches, models, policy, reference
from acceptance.checks import parity
from acceptance.context import Context
from frpo_nemo.config.options import OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.objective import build_objective
from frpo_nemo.processes import world
from frpo_nemo.training.loss import PolicyLoss

TENSOR_PARALLEL = dict(tensor_model_parallel_size=2, sequence_parallel=True)


def dp2(context: Context) -> dict:
    return in_both_precisions(context)


def tp2(context: Context) -> dict:
    return in_both_precisions(context, **TENSOR_PARALLEL)


def pp2(context: Context) -> dict:
    return in_both_precisions(context, pipeline_model_parallel_size=2)


def tp2_pp2_dp2(context: Context) -> dict:
    return in_both_precisions(context, pipeline_model_parallel_size=2, **TENSOR_PARALLEL)


def cp2(context: Context) -> dict:
    return first_step(context, "bf16", context_parallel_size=2)


def tp2_cp2_dp2(context: Context) -> dict:
    return first_step(context, "bf16", context_parallel_size=2, **TENSOR_PARALLEL)


def in_both_precisions(context: Context, **layout) -> dict:
    """Take the step in fp32, which shows small faults, and in bf16, which runs use."""
    return first_step(context, "fp32", **layout) | first_step(context, "bf16", **layout)


def first_step(context: Context, precision: str, **layout) -> dict:
    """Measure relative errors. losses: of the single sequences, because their sum is near zero. after: of the log-probs after
    the update, relative to what it changes. What the layout leaves of the world is data-parallel."""
    expected = _expected(context)
    actor = parity.actor(context, lr=_learning_rate(context), precision=precision, **layout)
    result = actor.train_step(expected.batch, expected.loss, update=0, total_updates=1)
    after = actor.get_inference_log_probs(expected.batch)
    moved = parity.mean_error(expected.after, expected.before)
    return {
        f"{precision}_losses": parity.distance(result.per_sequence["loss"], expected.losses),
        f"{precision}_gradient_norm": _relative(result.grad_norm, expected.gradient_norm),
        f"{precision}_entropy": _relative(result.per_token["entropy"].mean().item(), expected.entropy),
        f"{precision}_after": parity.mean_error(after, expected.after) / moved,
    }


@dataclass(frozen=True)
class _Expected:
    """What rank 0 computed with transformers. losses: of the sequences. before, after: log-probs [R] around the update."""

    batch: SequenceBatch
    loss: PolicyLoss
    losses: Tensor
    gradient_norm: float
    entropy: float
    before: Tensor
    after: Tensor


@functools.cache
def _expected(context: Context) -> _Expected:
    path = models.small(context)
    found = _by_transformers(context, path) if world.rank() == 0 else None
    policy.free()
    return world.gather_objects(found)[0]


def _by_transformers(context: Context, path: str) -> _Expected:
    """Take one step off-policy, so that the loss depends on the policy. The old policy's log-probs are the present ones with
    noise. It is small, so that hardly any ratio comes near the clip, where rounding would decide."""
    model, batch = reference.load(path, torch.float32), parity.batch(context)
    before = reference.logprobs(model, batch)
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    batch.token_columns["old_logprobs"] = before + 0.05 * noise
    loss = batches.policy_loss(batch, build_objective({"name": "frpo", "lambda_": 0.5}))
    numbers = reference.numbers(model, batch, loss)
    optim = OptimizerConfig(lr=_learning_rate(context))
    torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
    betas = (optim.adam_beta1, optim.adam_beta2)
    torch.optim.AdamW(model.parameters(), optim.lr, betas, optim.adam_eps, optim.weight_decay).step()
    return _Expected(
        batch,
        loss,
        numbers.losses,
        parity.norm(numbers.gradient),
        numbers.entropy.mean().item(),
        before,
        reference.logprobs(model, batch),
    )


def _learning_rate(context: Context) -> float:
    """Return a rate at which the update shows in bf16."""
    return context.on(cuda=1e-4, cpu=1e-3)


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)
