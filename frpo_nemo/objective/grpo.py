"""Define the baselines GRPO and Dr. GRPO, in the same registry and with the same loss per group as FRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from frpo_nemo.config.option import option
from frpo_nemo.errors import ConfigError
from frpo_nemo.objective.base import Objective
from frpo_nemo.objective.ragged import Groups, per_token, token_mean
from frpo_nemo.objective.registry import register_objective

STD_EPSILON = 1e-4  # TRL's, and so that of the authors' baseline


@register_objective("dr_grpo")
@dataclass(frozen=True, kw_only=True)
class DrGRPO(Objective):
    """Advantages r_i - mean(r) (arXiv 2503.20783, without the std) and PPO's two-sided clip.

    The paper also divides by a constant instead of by the response's length (aggregation=constant); the default is the mean
    over a sequence's tokens for every objective, so that a comparison differs only in the advantages and the clip.
    """

    clip_low: float = option(
        "That ratio counts down to 1 - clip_low for a negative advantage, and up to 1 + clip_high for a positive one.",
        0.2,
        above=0,
        below=1,
    )

    dual_clip: float | None = option(
        "Largest ratio that counts for a negative advantage (dual clip; TRL's delta); null: no bound.",
        None,
        above=1,
    )
    cispo: bool = option(
        "Clipped tokens keep the gradient of their log-prob (CISPO): the ratio, up to 1 + clip_high, only weighs it.",
        False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cispo and (self.dual_clip is not None or self.ratio == "sequence" or self.clip_low != DrGRPO.clip_low):
            raise ConfigError(
                "objective.cispo weighs each token by its ratio, up to 1 + clip_high, so objective.dual_clip, clip_low and "
                "ratio=sequence have no effect; leave them out."
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ConfigError(
                f"objective.dual_clip={self.dual_clip} must be above 1 + objective.clip_high={1 + self.clip_high}."
            )

    def effective_advantages(self, rewards_N: Tensor, groups_N: Tensor, importance_N: Tensor | None = None) -> Tensor:
        """Ignore importance_N. See Objective."""
        groups = Groups.of(rewards_N, groups_N)
        centred_M = groups.centred(rewards_N[groups.members].double())
        return groups.scatter(self._normalised(groups, centred_M), rewards_N.numel())

    def _normalised(self, groups: Groups, centred_M: Tensor) -> Tensor:
        return centred_M

    def reward_weight(self, group_size: int) -> float | None:
        return 1.0

    def sequence_loss(
        self,
        logprobs_R: Tensor,
        old_logprobs_R: Tensor,
        lengths_N: Tensor,
        advantages_N: Tensor,
        token_weights_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return -mean_t min(rho_t A_i, clip(rho_t, 1 - clip_low, 1 + clip_high) A_i). See Objective.

        The minimum bounds rho from above where A > 0 and from below where A < 0. The bound comes before exp, so that
        a ratio that overflows but is clipped has gradient 0 and not NaN. dual_clip also bounds rho from above where A < 0.
        With cispo it is -mean_t min(rho_t, 1 + clip_high) A_i log pi_t, the ratio detached.
        """
        high, low = math.log1p(self.clip_high), math.log1p(-self.clip_low)
        log_ratios_R = self.log_ratios(logprobs_R, old_logprobs_R, lengths_N)
        advantages_R = per_token(advantages_N, lengths_N, log_ratios_R.numel())
        if self.cispo:
            bounded_R = log_ratios_R.clamp(max=high)
            terms_R = -advantages_R * torch.exp(bounded_R.detach()) * logprobs_R
        else:
            dual = math.log(self.dual_clip) if self.dual_clip else math.inf
            bounded_R = torch.where(advantages_R >= 0, log_ratios_R.clamp(max=high), log_ratios_R.clamp(low, dual))
            terms_R = -advantages_R * torch.exp(bounded_R)
        if token_weights_R is not None:
            terms_R = terms_R * token_weights_R
        clipped_R = (bounded_R != log_ratios_R) & (advantages_R != 0)
        return token_mean(terms_R, lengths_N), token_mean(clipped_R.to(log_ratios_R.dtype), lengths_N)


@register_objective("grpo")
@dataclass(frozen=True, kw_only=True)
class GRPO(DrGRPO):
    """Advantages (r_i - mean(r)) / (std(r) + 1e-4) (DeepSeekMath, arXiv 2402.03300) and PPO's two-sided clip.

    std is the sample standard deviation (divisor G - 1), as in TRL and verl; the paper does not state which.
    """

    def reward_weight(self, group_size: int) -> float | None:
        return None  # one over the group's standard deviation

    def _normalised(self, groups: Groups, centred_M: Tensor) -> Tensor:
        std_K = torch.sqrt(groups.sum(centred_M.square()) / (groups.sizes - 1))
        return centred_M / (std_K + STD_EPSILON)[groups.ids]
