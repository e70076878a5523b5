"""Measure how far the rollout engine and the trainer, which compute the same policy with different kernels, differ; find the
tokens on which they disagree; and correct for the rest with bounded importance weights (truncated: Yao et al. 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training"; masked: Liu et al. 2025, "When Speed Kills Stability";
IcePop: the Ring-1T report, arXiv 2510.18855)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from frpo_nemo.objective.ragged import per_token, token_sum

LEVELS = ("token", "sequence", "geometric")


@dataclass(frozen=True)
class MismatchWeights:
    """Weights of tokens for the mismatch: the ratio pi_train / pi_rollout, bounded.

    level "token": each token's own ratio. "sequence": the product of the ratios of the token's sequence, exact but of high
    variance. "geometric": their geometric mean. The last two are the same for all tokens
    of a sequence. Ratios outside [low, high] become the nearer bound (truncated importance sampling), or with `mask` 0, as
    in masked importance sampling (level sequence or geometric) and IcePop (level token).
    """

    level: str = "token"
    low: float = 0.0
    high: float = 2.0
    mask: bool = False

    @torch.no_grad()
    def __call__(
        self,
        train_logprobs_R: Tensor,
        rollout_logprobs_R: Tensor,
        lengths_N: Tensor,
        counted_R: Tensor | None = None,
    ) -> Tensor:
        """Return the weight of every token, detached. counted_R: 0 for a token that is left out, and so must not affect the
        others of its sequence; else 1. A NaN stays one, because it must show in the loss. [R]"""
        gaps_R = train_logprobs_R - rollout_logprobs_R
        counted_R = torch.ones_like(gaps_R) if counted_R is None else counted_R
        gaps_R = torch.where(counted_R == 0, 0.0, gaps_R)
        if self.level != "token":
            gaps_N = token_sum(gaps_R, lengths_N)
            if self.level == "geometric":
                gaps_N = gaps_N / token_sum(counted_R, lengths_N).clamp(min=1)
            gaps_R = per_token(gaps_N, lengths_N, gaps_R.numel())
        log_low, log_high = math.log(self.low) if self.low else -math.inf, math.log(self.high)
        weights_R = torch.exp(gaps_R.clamp(log_low, log_high))  # bounded before exp, which could overflow
        if self.mask:
            weights_R = torch.where((gaps_R < log_low) | (gaps_R > log_high), 0.0, weights_R)
        return weights_R


@torch.no_grad()
def effective_sample_size(weights_R: Tensor) -> float:
    """Return (sum w)^2 / (R sum w^2): the share of the tokens that would be worth as much with equal weights."""
    weights_R = weights_R.double()
    squares = weights_R.square().sum().item()
    return weights_R.sum().item() ** 2 / (weights_R.numel() * squares) if squares else 0.0


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
