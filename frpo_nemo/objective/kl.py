"""Estimate the KL of the policy to the reference from the log-probs of sampled tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from frpo_nemo.objective.ragged import token_mean

LINEAR_BEYOND = 5.0  # nats by which the reference's log-prob exceeds the policy's: a ratio of 148


def k3(logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
    """Return Schulman's k3 estimator (joschu.net/blog/kl-approx.html), e^d - d - 1 with d = log pi_ref - log pi of
    each token: unbiased under samples from pi, never negative. [R], differentiable in logprobs_R."""
    difference_R = ref_logprobs_R - logprobs_R
    return torch.expm1(difference_R) - difference_R


def k3_penalty(logprobs_R: Tensor, ref_logprobs_R: Tensor) -> Tensor:
    """Return k3 where d <= LINEAR_BEYOND, and beyond it the tangent at that point, so that no token's gradient exceeds
    e^5 - 1 and none is 0 there. theory.md, section 9. [R], differentiable in logprobs_R."""
    difference_R = ref_logprobs_R - logprobs_R
    # Not clamp, whose slope at the bound itself is 0 from torch 2.14 on.
    bounded_R = torch.where(difference_R > LINEAR_BEYOND, LINEAR_BEYOND, difference_R)
    slope = math.expm1(LINEAR_BEYOND)
    tangent_R = slope * (difference_R - LINEAR_BEYOND) + (slope - LINEAR_BEYOND)
    return torch.where(difference_R > LINEAR_BEYOND, tangent_R, torch.expm1(bounded_R) - bounded_R)


def reverse_penalty(logprobs_R: Tensor, ref_logprobs_R: Tensor, old_logprobs_R: Tensor) -> Tensor:
    """Return rho k3_penalty with the gradient of rho k3, rho = pi / pi_old: -rho d for each token's log-prob. Under samples
    from pi_old its mean is that of KL(pi, pi_ref) of each position, which k3's own gradient is not. theory.md (20).
    old_logprobs_R: detached. [R], differentiable in logprobs_R."""
    current_R = logprobs_R.detach()
    ratios_R = torch.exp(current_R - old_logprobs_R)
    slopes_R = ratios_R * (current_R - ref_logprobs_R)
    # The slope is written down: autograd would find it as a difference of two terms of size e^d.
    return ratios_R * k3_penalty(current_R, ref_logprobs_R) + slopes_R * (logprobs_R - current_R)


def sequence_kl(
    logprobs_R: Tensor,
    ref_logprobs_R: Tensor,
    lengths_N: Tensor,
    token_weights_R: Tensor | None = None,
    old_logprobs_R: Tensor | None = None,
) -> Tensor:
    """Return k3_penalty, or with old_logprobs_R reverse_penalty, times the tokens' weights if given, averaged over each
    sequence's tokens. lengths_N: int64, >= 1. [N], differentiable in logprobs_R."""
    if old_logprobs_R is None:
        penalties_R = k3_penalty(logprobs_R, ref_logprobs_R)
    else:
        penalties_R = reverse_penalty(logprobs_R, ref_logprobs_R, old_logprobs_R)
    return token_mean(penalties_R if token_weights_R is None else penalties_R * token_weights_R, lengths_N)
