"""KL of the policy to the frozen reference, from the log-probs of sampled tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from frpo_nemo.objective.ragged import token_mean


def k3(logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
    """Schulman's k3 estimator (joschu.net/blog/kl-approx.html), e^d - d - 1 with d = log pi_ref - log pi of
    each token: unbiased under samples from pi, never negative. [R], differentiable in logprobs_R."""
    difference_R = ref_logprobs_R - logprobs_R
    return torch.expm1(difference_R) - difference_R


def sequence_kl(logprobs_R: Tensor, ref_logprobs_R: Tensor, lengths_N: Tensor) -> Tensor:
    """k3 averaged over each sequence's tokens; lengths_N: int64, >= 1. [N], differentiable in logprobs_R."""
    return token_mean(k3(logprobs_R, ref_logprobs_R), lengths_N)
