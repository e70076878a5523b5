"""bf16 and fp32 against transformers: logits, log-probs and the gradient of every parameter.

Two bf16 computations of the same thing differ, and neither is right. So each is compared with transformers in fp32 on
the same weights, and our error is stated as a multiple of transformers' own in bf16.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from acceptance import batches, models, policy, reference
from acceptance.context import Context
from acceptance.reference import Numbers
from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.logprobs import vocab_parallel_logits
from frpo_nemo.training.loss import CompletionLoss


def fp32(context: Context) -> dict:
    """Measure the largest errors, and the relative one of the gradient."""
    exact, ours = transformers(context, torch.float32), own_numbers(context, actor(context, precision="fp32"))
    return {
        "logits_error": (ours.logits - exact.logits).abs().max().item(),
        "logprobs_error": (ours.logprobs - exact.logprobs).abs().max().item(),
        "gradient_error": distance(ours.gradient, exact.gradient),
    }


def local(context: Context) -> dict:
    """Check local layers, also where the product takes Transformer Engine's."""
    with policy.local_layers():
        return default(context)


def default(context: Context) -> dict:
    """Check the layers that the product takes. *_ratio: our error over transformers'."""
    exact, theirs = transformers(context, torch.float32), transformers(context, torch.bfloat16)
    policy_actor = actor(context)
    ours = own_numbers(context, policy_actor)
    return {
        "transformer_engine": int(policy.has_transformer_engine_layers(policy_actor)),
        "logits_ratio": mean_error(ours.logits, exact.logits) / mean_error(theirs.logits, exact.logits),
        "logprobs_ratio": mean_error(ours.logprobs, exact.logprobs) / mean_error(theirs.logprobs, exact.logprobs),
        "gradient_ratio": distance(ours.gradient, exact.gradient) / distance(theirs.gradient, exact.gradient),
        "gradient_cosine": cosine(ours.gradient, exact.gradient),
        "gradient_norm_error": abs(norm(ours.gradient) / norm(exact.gradient) - 1),
        "logprobs_error": mean_error(ours.logprobs, exact.logprobs),
    }


def fp32_logits(context: Context) -> dict:
    """Multiply bf16 states by a bf16 output layer, rounding the product or not. Errors against float64: largest."""
    tokens, hidden_size, vocabulary = context.on(cuda=(512, 2048, 32003), cpu=(64, 64, 131))
    device = "cuda" if context.cuda else "cpu"
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(rows, hidden_size, generator=generator).bfloat16().to(device) for rows in (tokens, vocabulary)
    )
    exact = hidden.double() @ weight.double().t()
    rounded, kept = (
        vocab_parallel_logits(hidden, weight, vocab_size=vocabulary, tp_rank=0, temperature=1.0, in_fp32=in_fp32)
        for in_fp32 in (False, True)
    )
    return {
        "logits_error": (kept - exact).abs().max().item(),
        "rounded_error": (rounded - exact).abs().max().item(),
    }


def batch(context: Context) -> SequenceBatch:
    """Make what the checks of numerics compute on."""
    longest, vocabulary = context.on(cuda=(600, 32003), cpu=(40, 131))
    return batches.ragged(1, groups=4, longest=longest, vocabulary=vocabulary)


def loss(context: Context) -> CompletionLoss:
    """Return the loss that means over the batch's response tokens, in which every token counts."""
    return CompletionLoss(int(batch(context).response_lengths.sum()))


def actor(context: Context, *, lr: float = 1e-4, **model) -> PolicyActor:
    """Make an actor of the small model, for which the batch is several packs. model: further fields of ModelConfig."""
    policy.free()
    config = ModelConfig(path=models.small(context), **model)
    return policy.make_actor(config, OptimizerConfig(lr=lr), microbatch_tokens=context.on(cuda=2048, cpu=128))


def own_numbers(context: Context, policy_actor: PolicyActor) -> Numbers:
    """Compute ours."""
    return policy.numbers(policy_actor, batch(context), loss(context))


@functools.cache
def transformers(context: Context, dtype: torch.dtype) -> Numbers:
    """Compute theirs."""
    return reference.numbers(reference.load(models.small(context), dtype), batch(context), loss(context))


def mean_error(found: Tensor, expected: Tensor) -> float:
    """Return the mean absolute difference."""
    return (found - expected).abs().mean().item()


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of what is expected."""
    return norm(found - expected) / norm(expected)


def cosine(found: Tensor, expected: Tensor) -> float:
    """Return the cosine of the angle between the two."""
    return _dot(found, expected) / (norm(found) * norm(expected))


def norm(vector: Tensor) -> float:
    """Return the Euclidean norm."""
    return _dot(vector, vector) ** 0.5


def _dot(a: Tensor, b: Tensor) -> float:
    """Multiply in fp64: in fp32 a hundred million products add up to something else."""
    return sum((x.double() @ y.double()).item() for x, y in zip(a.split(1 << 24), b.split(1 << 24), strict=True))
