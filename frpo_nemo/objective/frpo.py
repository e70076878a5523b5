"""FRPO, Fine-tuning Robust Policy Optimization (arXiv 2602.08813), as one effective advantage per sequence.

The loss of a group is not a sum over its sequences, but its gradient is; so nothing here needs a group's
sequences in one microbatch or on one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from frpo_nemo.objective.base import Objective, require_bool, require_choice, require_number
from frpo_nemo.objective.ragged import Groups, token_mean
from frpo_nemo.objective.registry import register_objective

# exp of a log-ratio underflows in float32: a sequence that the policy has all but dropped keeps a finite log.
SMALLEST_IMPORTANCE = 1e-30


@register_objective("frpo")
@dataclass(frozen=True, kw_only=True)
class FRPO(Objective):
    """Maximises the reward that survives later fine-tuning: a soft minimum over the responses to a prompt.

    With w_i = exp(-(r_i - mean r) / lambda_), m_i = mean over response tokens of
    min(pi / pi_old, 1 + clip_high) and u = mean_i w_i m_i, the loss of a group of G is

        log u                                                jackknife=False
        G log u - (G-1) mean_i log u_{-i}                    jackknife=True, without its O(1/G) bias
        ... - mean_i m_i                                     baseline=True, which lowers the variance

    and the total is the scale times the mean over groups. Since w_i > 0 and the loss is minimised, the clip
    acts from above only, whatever the sign of the advantage: this is not PPO's clip.

    As lambda_ grows, lambda_ * A_eff_i tends to r_i - mean(r) (Dr. GRPO), with the jackknife to G / (G-1)
    times that, r_i minus the mean of the others. As lambda_ shrinks, A_eff of a single worst response tends
    to -(2G-2) with the jackknife and to -(G-1) without: watch max_abs_advantage and effective_sample_size.
    """

    lambda_: float  # temperature, in units of reward: small looks at the worst response, large at the mean
    jackknife: bool = True
    baseline: bool = True
    scale: str = "paper"  # of the loss: paper is the authors' max(lambda_, 1), objective is lambda_

    uses_importance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("lambda_", self.lambda_, above=0)
        require_bool("jackknife", self.jackknife)
        require_bool("baseline", self.baseline)
        require_choice("scale", self.scale, ("paper", "objective"))

    @property
    def loss_scale(self) -> float:
        return max(self.lambda_, 1.0) if self.scale == "paper" else self.lambda_

    def effective_advantages(self, rewards_N: Tensor, groups_N: Tensor, importance_N: Tensor | None = None) -> Tensor:
        """A_eff_i = baseline - g_i, such that d (loss of the group) / d m_i = -A_eff_i / G. See Objective."""
        groups = Groups.of(rewards_N, groups_N)
        if importance_N is None:
            importance_N = torch.ones_like(rewards_N)
        gradients_M = self.risk_gradients(groups, rewards_N[groups.members], importance_N[groups.members])
        return groups.scatter(float(self.baseline) - gradients_M, rewards_N.numel())

    def risk_gradients(self, groups: Groups, rewards_M: Tensor, importance_M: Tensor) -> Tensor:
        """g_i = G d (group loss without baseline) / d m_i. float64 [M].

        With h_i = w_i m_i / u (1 on average) and c_j = u / u_{-j} - 1 = (h_j - 1) / (G - h_j):

            g_i = h_i / m_i                                  no jackknife
            g_i = h_i / m_i * (1 - sum_{j != i} c_j)         jackknife
        """
        importance_M = importance_M.double().clamp(min=SMALLEST_IMPORTANCE)
        logits_M = -groups.centred(rewards_M.double()) / self.lambda_ + torch.log(importance_M)
        h_M = groups.relative_exp(logits_M)
        if self.jackknife:
            h_M = h_M * (1 - _jackknife_others(groups, h_M)) - _jackknife_dominant(groups, h_M, logits_M)
        return h_M / importance_M

    @torch.no_grad()
    def importance(self, logprobs_R: Tensor, old_logprobs_R: Tensor, lengths_N: Tensor) -> Tensor:
        """m_i of every sequence under the current policy, for effective_advantages. [N], detached."""
        ratios_R, _ = self._clipped_ratios(logprobs_R, old_logprobs_R)
        return token_mean(ratios_R, lengths_N)

    def sequence_loss(
        self,
        logprobs_R: Tensor,
        old_logprobs_R: Tensor,
        lengths_N: Tensor,
        advantages_N: Tensor,
        token_weights_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-A_eff_i * m_i. See Objective."""
        ratios_R, clipped_R = self._clipped_ratios(logprobs_R, old_logprobs_R)
        if token_weights_R is not None:
            ratios_R = ratios_R * token_weights_R
        return -advantages_N * token_mean(ratios_R, lengths_N), token_mean(clipped_R, lengths_N)

    def _clipped_ratios(self, logprobs_R: Tensor, old_logprobs_R: Tensor) -> tuple[Tensor, Tensor]:
        """min(rho, 1 + clip_high), and 1 where the bound holds, else 0. Bounded before exp could overflow."""
        log_ratios_R, bound = logprobs_R - old_logprobs_R, math.log1p(self.clip_high)
        clipped_R = (log_ratios_R > bound).to(log_ratios_R.dtype)
        return torch.exp(log_ratios_R.clamp(max=bound)), clipped_R

    def statistics(self, rewards_N: Tensor, groups_N: Tensor, advantages_N: Tensor) -> dict[str, float]:
        """Also, averaged over groups: entropic_risk, -lambda log mean exp(-r / lambda), which FRPO maximises;
        and effective_sample_size, (sum g)^2 / sum g^2, out of G."""
        values = super().statistics(rewards_N, groups_N, advantages_N)
        groups = Groups.of(rewards_N, groups_N)
        if groups.count == 0:
            return values
        rewards_M = rewards_N[groups.members].double()
        log_mean_w_K = groups.log_mean_exp(-groups.centred(rewards_M) / self.lambda_)
        gradients_M = float(self.baseline) - advantages_N[groups.members].double()
        values["entropic_risk"] = (groups.mean(rewards_M) - self.lambda_ * log_mean_w_K).mean().item()
        effective_K = groups.sum(gradients_M).square() / groups.sum(gradients_M.square())
        values["effective_sample_size"] = effective_K.mean().item()
        return values


def _dominant(groups: Groups, h_M: Tensor) -> Tensor:
    """The response that holds more than half of its group's weight: at most one per group. bool [M].

    Only for it does G - h_j cancel (and underflow: lambda = 0.01 makes weights of exp(-200000)); for all
    others c_j lies in [-1/G, 1)."""
    return h_M > 0.5 * groups.sizes[groups.ids]


def _jackknife_others(groups: Groups, h_M: Tensor) -> Tensor:
    """sum_{j != i, j not dominant} c_j. [M]"""
    corrections_M = (h_M - 1) / (groups.sizes[groups.ids] - h_M)
    corrections_M = torch.where(_dominant(groups, h_M), 0.0, corrections_M)
    return groups.sum(corrections_M)[groups.ids] - corrections_M


def _jackknife_dominant(groups: Groups, h_M: Tensor, logits_M: Tensor) -> Tensor:
    """h_i c_d for the dominant response d of the group, i != d; 0 for d itself and without one. [M]

    G - h_d is the sum of all other h, so h_i / (G - h_d) is a softmax over the group without d.
    """
    dominant_M = _dominant(groups, h_M)
    excess_K = groups.sum(torch.where(dominant_M, h_M - 1, 0.0))
    rest_M = groups.relative_exp(logits_M.masked_fill(dominant_M, -torch.inf))  # softmax times G
    return (excess_K / groups.sizes)[groups.ids] * rest_M
