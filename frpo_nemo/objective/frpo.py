"""Compute FRPO, Fine-tuning Robust Policy Optimization (arXiv 2602.08813), as one effective advantage per sequence.

The loss of a group is not a sum over its sequences, but its gradient is; so nothing here needs a group's
sequences in one microbatch or on one rank. docs/theory.md derives every formula.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from frpo_nemo.config.option import option
from frpo_nemo.errors import ConfigError
from frpo_nemo.objective.base import Objective
from frpo_nemo.objective.divergence import DIVERGENCES, Divergence
from frpo_nemo.objective.radius import solve_lambda
from frpo_nemo.objective.ragged import Groups, token_mean
from frpo_nemo.objective.registry import register_objective

# A ratio of probabilities may underflow in float32; with this floor a sequence with almost no probability stays above 0.
SMALLEST_IMPORTANCE = 1e-15


@register_objective("frpo")
@dataclass(frozen=True, kw_only=True)
class FRPO(Objective):
    """Maximise the reward that survives later fine-tuning: a soft minimum over the responses to a prompt.

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

    All this holds for f_divergence="kl"; theory.md (13) has chi_squared. Raises ConfigError for a field out of its range,
    and unless exactly one of lambda_ and kl_radius is given.
    """

    lambda_: float | None = option(
        "Temperature in units of reward: small weighs the worst response of a group, large the mean.",
        None,
        above=0,
    )
    kl_radius: float | None = option(
        "Instead of lambda_: the downstream KL to withstand, in nats per prompt; each batch finds its lambda_ from its "
        "rewards.",
        None,
        at_least=0,
    )
    radius_smoothing: float = option(
        "With kl_radius: weight of the last step's log lambda_ in this one's.", 0.0, at_least=0, below=1
    )
    f_divergence: str = option(
        "How the distance of a fine-tuned policy is measured (docs/theory.md).", "kl", choices=tuple(DIVERGENCES)
    )
    refresh_importance: bool = option(
        "With trainer.updates_per_rollout above 1: importance under the current policy, by a forward pass for each minibatch; "
        "false: 1, an approximation that saves the pass, and works better at large lambda_.",
        True,
    )
    jackknife: bool = option("Remove the bias of order 1 / group_size.", True)
    baseline: bool = option("Subtract the mean importance of the group, which lowers the variance.", True)
    scale: str = option(
        "Factor of the loss: max(lambda_, 1), as in the authors' code (paper), or lambda_ (objective).",
        "paper",
        choices=("paper", "objective"),
    )

    absent = {
        "clip_low": "its ratio is bounded from above only",
        "dual_clip": "its ratio is bounded by 1 + clip_high, whatever the sign of the advantage",
        "cispo": "its loss is linear in the importance of a response, to which a clipped token contributes a constant",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation != "sequence":
            raise ConfigError(
                f"objective.aggregation={self.aggregation} must be sequence for frpo: the importance of a response is the mean "
                "over its tokens."
            )
        if (self.lambda_ is None) == (self.kl_radius is None):
            raise ConfigError("objective.lambda_ or objective.kl_radius must be set: exactly one of the two.")
        if self.kl_radius is not None and self.f_divergence != "kl":
            raise ConfigError(
                f"objective.kl_radius is a radius in KL; with f_divergence={self.f_divergence} give lambda_."
            )
        if self.kl_radius is None and self.radius_smoothing:
            raise ConfigError("objective.radius_smoothing has an effect with kl_radius only; lambda_ is fixed.")

    def for_batch(self, rewards_N: Tensor, groups_N: Tensor, state: MutableMapping[str, float]) -> FRPO:
        """With kl_radius, return a copy with the batch's lambda_, smoothed over steps in log lambda_. A batch without
        differing rewards keeps the last one; on-policy its advantages are 0 with any. theory.md (18). See Objective."""
        if self.kl_radius is None:
            return self
        groups = Groups.of(rewards_N, groups_N)
        last, lambda_ = state.get("lambda_"), solve_lambda(groups, rewards_N[groups.members].double(), self.kl_radius)
        if lambda_ is None:
            return self._with_lambda(1.0 if last is None else last)
        if last is not None:
            lambda_ = math.exp(self.radius_smoothing * math.log(last) + (1 - self.radius_smoothing) * math.log(lambda_))
        state["lambda_"] = lambda_
        return self._with_lambda(lambda_)

    def _with_lambda(self, lambda_: float) -> FRPO:
        return replace(self, lambda_=lambda_, kl_radius=None, radius_smoothing=0.0)

    @property
    def uses_importance(self) -> bool:
        return self.refresh_importance

    @property
    def loss_scale(self) -> float:
        lambda_ = self._known_lambda()
        return max(lambda_, 1.0) if self.scale == "paper" else lambda_

    def reward_weight(self, group_size: int) -> float | None:
        if self.lambda_ is None:
            return None
        return self.loss_scale / self.lambda_ * (group_size / (group_size - 1) if self.jackknife else 1.0)

    def effective_advantages(self, rewards_N: Tensor, groups_N: Tensor, importance_N: Tensor | None = None) -> Tensor:
        """Return A_eff_i = baseline * mean_j m_j g_j - g_i, so that d (loss of the group) / d m_i = -A_eff_i / G. The
        mean is 1 with KL, whatever the rewards. See Objective."""
        groups = Groups.of(rewards_N, groups_N)
        rewards_M = rewards_N[groups.members].double()
        importance_M = torch.ones_like(rewards_M)
        if importance_N is not None:
            importance_M = importance_N[groups.members].double().clamp(min=SMALLEST_IMPORTANCE)
        gradients_M = self._gradients(groups, rewards_M, importance_M)
        level_K = float(self.baseline) * groups.mean(importance_M * gradients_M)
        return groups.scatter(level_K[groups.ids] - gradients_M, rewards_N.numel())

    def _gradients(self, groups: Groups, rewards_M: Tensor, importance_M: Tensor) -> Tensor:
        return self.divergence.gradients(groups, rewards_M, importance_M, self._known_lambda(), self.jackknife)

    @property
    def divergence(self) -> Divergence:
        return DIVERGENCES[self.f_divergence]

    def _known_lambda(self) -> float:
        if self.lambda_ is None:
            raise ValueError("FRPO(kl_radius=...) has no lambda_ before for_batch(rewards, groups, state) finds it.")
        return self.lambda_

    @torch.no_grad()
    def importance(self, logprobs_R: Tensor, old_logprobs_R: Tensor, lengths_N: Tensor) -> Tensor:
        """Return m_i of every sequence under the current policy, for effective_advantages. [N], detached."""
        ratios_R, _ = self._clipped_ratios(logprobs_R, old_logprobs_R, lengths_N)
        return token_mean(ratios_R, lengths_N)

    def sequence_loss(
        self,
        logprobs_R: Tensor,
        old_logprobs_R: Tensor,
        lengths_N: Tensor,
        advantages_N: Tensor,
        token_weights_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return -A_eff_i * m_i. See Objective."""
        ratios_R, clipped_R = self._clipped_ratios(logprobs_R, old_logprobs_R, lengths_N)
        if token_weights_R is not None:
            ratios_R = ratios_R * token_weights_R
        return -advantages_N * token_mean(ratios_R, lengths_N), token_mean(clipped_R, lengths_N)

    def _clipped_ratios(self, logprobs_R: Tensor, old_logprobs_R: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return min(rho, 1 + clip_high), and 1 where that bound applies, else 0. The bound comes before exp, which could
        overflow."""
        log_ratios_R, bound = self.log_ratios(logprobs_R, old_logprobs_R, lengths_N), math.log1p(self.clip_high)
        clipped_R = (log_ratios_R > bound).to(log_ratios_R.dtype)
        return torch.exp(log_ratios_R.clamp(max=bound)), clipped_R

    def statistics(self, rewards_N: Tensor, groups_N: Tensor, advantages_N: Tensor) -> dict[str, float]:
        """Add lambda and, averaged over groups, on-policy: robust_value, which FRPO maximises (with KL the entropic
        risk, -lambda log mean exp(-r / lambda)), and worst_case_divergence, the distance of the worst policy, both of the
        samples as they are, without jackknife; effective_sample_size, (sum g)^2 / sum g^2 out of G."""
        values = super().statistics(rewards_N, groups_N, advantages_N) | {"lambda": self._known_lambda()}
        groups = Groups.of(rewards_N, groups_N)
        if groups.count == 0:
            return values
        rewards_M = rewards_N[groups.members].double()
        worst = self.divergence.worst_case(groups, rewards_M, self._known_lambda())
        values["robust_value"] = worst.value_K.mean().item()
        values["worst_case_divergence"] = worst.divergence_K.mean().item()
        gradients_M = self._gradients(groups, rewards_M, torch.ones_like(rewards_M))
        effective_K = groups.sum(gradients_M).square() / groups.sum(gradients_M.square())
        values["effective_sample_size"] = effective_K.mean().item()
        return values
