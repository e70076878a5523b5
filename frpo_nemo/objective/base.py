"""Define an objective: a frozen dataclass of its settings, with the four methods that a trainer calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from frpo_nemo.config.option import check_values, option
from frpo_nemo.errors import ConfigError
from frpo_nemo.objective.kl import sequence_kl
from frpo_nemo.objective.ragged import Groups, per_token, token_mean


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """N sequences with R response tokens in all, in groups that share a prompt.

    The reward part of the loss is sum_i coefficients[i] * sequence_loss[i]: a plain sum over sequences, so
    any microbatching and any split over ranks gives the same gradient.
    """

    beta: float = option(
        "Weight of the KL to the reference policy, in nats per token; 0: only validation computes it.",
        0.0,
        at_least=0,
    )
    kl_gradient: str = option(
        "Gradient of that KL. k3: of the k3 estimate, as in the authors' code, on average that of KL(reference, policy). "
        "reverse: of KL(policy, reference), as in TRL and NeMo-RL (docs/theory.md, section 9).",
        "k3",
        choices=("k3", "reverse"),
    )
    entropy_bonus: float = option(
        "Weight of the policy's mean entropy, in nats per token, which training raises.", 0.0, at_least=0
    )
    ratio: str = option(
        "Ratio to the rollout policy: each token's own, or for all tokens of a response their geometric mean (GSPO).",
        "token",
        choices=("token", "sequence"),
    )
    aggregation: str = option(
        "Weight of a response in the loss: equal (sequence), by its tokens (token, as DAPO), or by its tokens over "
        "constant_length (constant, as Dr. GRPO).",
        "sequence",
        choices=("sequence", "token", "constant"),
    )
    constant_length: int | None = option(
        "With aggregation=constant: the divisor in tokens, such as rollout.max_response_tokens.", None, at_least=1
    )
    clip_high: float = option(
        "A token's probability over that under the rollout policy counts up to 1 + clip_high.", 0.2, above=0
    )

    absent: ClassVar[Mapping[str, str]] = {}  # fields of other objectives, with the reason why this one has none

    def __post_init__(self) -> None:
        check_values(self, "objective.")
        if (self.aggregation == "constant") != (self.constant_length is not None):
            raise ConfigError(
                "objective.constant_length must be set with objective.aggregation=constant, and only then."
            )
        if self.beta == 0 and self.kl_gradient != "k3":
            raise ConfigError(
                f"objective.kl_gradient={self.kl_gradient} needs objective.beta above 0; set beta, or leave kl_gradient out."
            )

    def for_batch(self, rewards_N: Tensor, groups_N: Tensor, state: MutableMapping[str, float]) -> Objective:
        """Return the objective for one global batch of rollouts. Called first on every batch; returns self unless a
        setting depends on the batch's rewards. state: values that it keeps from one step to the next; the trainer
        starts with an empty mapping and saves it in checkpoints."""
        return self

    @property
    def uses_importance(self) -> bool:
        """Return whether effective_advantages depends on the current policy, and needs `importance` once that has moved."""
        return False

    def importance(self, logprobs_R: Tensor, old_logprobs_R: Tensor, lengths_N: Tensor) -> Tensor:
        """Return the importance of every sequence under the current policy, [N], detached. Called only if
        `uses_importance`."""
        raise NotImplementedError

    def log_ratios(self, logprobs_R: Tensor, old_logprobs_R: Tensor, lengths_N: Tensor) -> Tensor:
        """Return log pi / pi_old of every token, or its mean over the token's sequence. [R], differentiable."""
        log_ratios_R = logprobs_R - old_logprobs_R
        if self.ratio == "token":
            return log_ratios_R
        return per_token(token_mean(log_ratios_R, lengths_N), lengths_N, log_ratios_R.numel())

    def by_length(self, weights_N: Tensor, lengths_N: Tensor) -> Tensor:
        """Return the sequences' weights of their means over tokens, adjusted for `aggregation`. With token, every token
        of a sequence whose weight isn't 0 counts the same, and the sum over the batch stays. [N]"""
        if self.aggregation == "sequence":
            return weights_N
        if self.constant_length is not None:
            return weights_N * lengths_N / self.constant_length
        tokens_N = lengths_N * (weights_N != 0)
        return weights_N.sum() * tokens_N / tokens_N.sum().clamp(min=1)

    @property
    def loss_scale(self) -> float:
        """Return the factor of the whole reward part."""
        return 1.0

    def reward_weight(self, group_size: int) -> float | None:
        """Return the factor of r_i - mean(r) in the loss of a group of `group_size` whose rewards hardly differ; None if it
        depends on the batch. beta / reward_weight is the beta of Dr. GRPO with the same balance of rewards and KL."""
        return None

    @abstractmethod
    def effective_advantages(self, rewards_N: Tensor, groups_N: Tensor, importance_N: Tensor | None = None) -> Tensor:
        """Return float32 [N], 0 for a sequence that takes no part: one without a reward, or whose group has fewer than
        two. rewards_N: float, NaN = unscored. groups_N: int64, any ids. Both hold whole groups. importance_N: see
        uses_importance; None means on-policy (all 1)."""

    @abstractmethod
    def sequence_loss(
        self,
        logprobs_R: Tensor,
        old_logprobs_R: Tensor,
        lengths_N: Tensor,
        advantages_N: Tensor,
        token_weights_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return losses [N], differentiable in logprobs_R, and the share of each sequence's tokens whose ratio is
        at a bound of the clip, [N], detached. Log-probs are float32 or float64, sequence after sequence; lengths_N:
        int64, >= 1, sums to R. token_weights_R multiply the tokens' terms (mismatch.MismatchWeights)."""

    def reference_kl(
        self,
        logprobs_R: Tensor,
        old_logprobs_R: Tensor,
        ref_logprobs_R: Tensor,
        lengths_N: Tensor,
        token_weights_R: Tensor | None = None,
    ) -> Tensor:
        """Return the KL term of each sequence, beta times its share in the loss. [N], differentiable in logprobs_R.
        token_weights_R: see sequence_kl."""
        old = old_logprobs_R if self.kl_gradient == "reverse" else None
        return sequence_kl(logprobs_R, ref_logprobs_R, lengths_N, token_weights_R, old)

    def coefficients(self, rewards_N: Tensor, groups_N: Tensor) -> Tensor:
        """Return the weight of each sequence's loss in the total, over the global batch: loss_scale / (scored members
        of its group * number of groups that take part); 0 for a sequence that takes no part. float32 [N]."""
        groups = Groups.of(rewards_N, groups_N)
        weights_M = self.loss_scale / (groups.sizes * groups.count)[groups.ids].double()
        return groups.scatter(weights_M, rewards_N.numel())

    def statistics(self, rewards_N: Tensor, groups_N: Tensor, advantages_N: Tensor) -> dict[str, float]:
        """Return what to log about one global batch. Shares are of all groups; a mean over no group is left out."""
        groups = Groups.of(rewards_N, groups_N)
        num_groups = torch.unique(groups_N).numel()
        equal_K = groups.max(groups.centred(rewards_N[groups.members].double())) == 0
        return {
            "max_abs_advantage": advantages_N.abs().max().item(),
            "share_contributing_groups": groups.count / num_groups,
            "share_zero_spread_groups": equal_K.sum().item() / num_groups,
        }
