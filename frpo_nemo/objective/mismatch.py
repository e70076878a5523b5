"""Measure how far the rollout engine and the trainer, which compute the same policy with different kernels, differ; find the
tokens on which they disagree; and correct for the rest with truncated importance weights (Yao et al. 2025, "Your Efficient
RL Framework Secretly Brings You Off-Policy RL Training")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective.ragged import per_token, token_sum

LEVELS = ("token", "sequence")


@torch.no_grad()
def truncated_importance(
    train_logprobs_R: Tensor,
    rollout_logprobs_R: Tensor,
    lengths_N: Tensor,
    level: str = "token",
    limit: float = 2.0,
) -> Tensor:
    """Return min(pi_train / pi_rollout, limit) per token, detached. [R]

    level "token": each token's own ratio. "sequence": the product of the ratios of the token's whole
    sequence, the same for all its tokens; exact but of high variance. Raises ConfigError for another level or a
    limit that is not positive.
    """
    if level not in LEVELS:
        raise ConfigError(f"level={level!r} of the importance weights must be one of {', '.join(LEVELS)}.")
    if not limit > 0:
        raise ConfigError(f"limit={limit!r} of the importance weights must be above 0.")
    gaps_R = train_logprobs_R - rollout_logprobs_R
    if level == "sequence":
        gaps_R = per_token(token_sum(gaps_R, lengths_N), lengths_N, gaps_R.numel())
    return torch.exp(gaps_R.clamp(max=math.log(limit)))


@torch.no_grad()
def agreement(train_logprobs_R: Tensor, rollout_logprobs_R: Tensor, limit: float) -> Tensor:
    """Return 1 for each token whose two log-probs differ by at most `limit` nats, else 0: a factor of its terms in the
    loss. A NaN counts as agreement, because it must show in the loss. theory.md, section 12. [R]"""
    beyond_R = (train_logprobs_R - rollout_logprobs_R).abs() > limit
    return (~beyond_R).to(train_logprobs_R.dtype)


@torch.no_grad()
def mismatch_statistics(train_logprobs_R: Tensor, rollout_logprobs_R: Tensor) -> dict[str, float]:
    """Return the mean and largest size of the gaps log pi_train - log pi_rollout over all R >= 1 tokens, and the mean
    of the ratios, whose expectation under the rollout's samples is 1."""
    gaps_R = train_logprobs_R.double() - rollout_logprobs_R.double()
    return {
        "mean_abs_logprob_gap": gaps_R.abs().mean().item(),
        "max_abs_logprob_gap": gaps_R.abs().max().item(),
        "mean_ratio": gaps_R.exp().mean().item(),
    }
