"""FRPO inside verl: importing this module registers the advantage estimator "frpo" and the policy loss "frpo".

The estimator runs on verl's driver over the whole rollout batch and folds the weight of each sequence into its
advantage; the loss sees one micro-batch. Written against verl 0.9.1; how to run it: docs/integrations/verl.md.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.utils.torch_functional import masked_mean
from verl.workers.config import ActorConfig

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import FRPO, build_objective

LOSS_AGG_MODE = "seq-mean-token-mean"

# Fields of FRPO that have their own place in verl, or that need what verl does not do.
NOT_HERE = {
    "name": "the name is frpo",
    "clip_high": "set actor_rollout_ref.actor.clip_ratio_high",
    "beta": "set actor_rollout_ref.actor.use_kl_loss=True, kl_loss_coef and kl_loss_type=low_var_kl",
    "entropy_bonus": "set actor_rollout_ref.actor.entropy_coeff",
    "ratio": "the loss takes each token's own ratio",
    "kl_gradient": "set actor_rollout_ref.actor.kl_loss_type: low_var_kl for k3, low_var_kl+ for reverse",
    "refresh_importance": "verl computes advantages once per rollout batch, so the importance stays 1",
    "radius_smoothing": "verl's checkpoints cannot keep the last step's lambda_",
}

log = logging.getLogger(__name__)


@register_adv_est("frpo")
@torch.no_grad()
def frpo_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: DictConfig,
    index: Iterable[Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return advantages and, the same tensor, returns: float32 [N, R], one value per sequence at its response tokens.

    token_level_rewards: float [N, R], summed per sequence; a NaN is an unscored sequence, and so is one whose row of
    response_mask [N, R] is 0 (verl's padding rows, rejected samples). index: N labels of the prompts, in any order.
    config: verl's `algorithm` section, with FRPO's fields below `frpo`. Raises ConfigError for what FRPO cannot do.

    The value is A_eff * coefficient * N. verl divides by the sequences of a mini-batch, padding included, so the
    mean of the losses of all mini-batches is FRPO's total loss; with one mini-batch they are equal.
    """
    objective = frpo_objective(config)
    _check_algorithm(config)
    if index is None:
        raise ConfigError("algorithm.adv_estimator=frpo needs non_tensor_batch['uid'], the prompt of each response.")
    sections = _neighbours(config)
    if sections is not None:
        _check_neighbours(sections, token_level_rewards.shape[0])

    rewards_N = token_level_rewards.sum(-1).masked_fill(response_mask.sum(-1) == 0, math.nan)
    groups_N = _numbered(index).to(rewards_N.device)
    objective = objective.for_batch(rewards_N, groups_N, {})
    weights_N = objective.coefficients(rewards_N, groups_N) * rewards_N.numel()
    advantages_N = objective.effective_advantages(rewards_N, groups_N) * weights_N
    advantages_NR = advantages_N.unsqueeze(-1) * response_mask
    return advantages_NR, advantages_NR


@register_policy_loss("frpo")
def frpo_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return -A min(ratio, 1 + clip_ratio_high) of a micro-batch, aggregated by verl over each sequence's tokens, then over
    the mini-batch's sequences; and metrics. All tensors: [n, R]; rollout_is_weights multiply the tokens' terms.

    The bound holds for either sign of A, unlike PPO's clip. The ratio is bounded before exp, so that one that overflows but
    is clipped has gradient 0 and not NaN. Raises ConfigError for a loss_agg_mode other than seq-mean-token-mean.
    """
    if loss_agg_mode != LOSS_AGG_MODE:
        raise ConfigError(
            f"actor_rollout_ref.actor.loss_agg_mode={loss_agg_mode} must be {LOSS_AGG_MODE} for "
            "policy_loss.loss_mode=frpo: its importance of a sequence is the mean over the sequence's tokens."
        )
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    log_ratio, bound = log_prob - old_log_prob, math.log1p(high)
    losses = -advantages * torch.exp(log_ratio.clamp(max=bound))
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    loss = agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info)
    metrics = {
        "actor/pg_clipfrac": masked_mean((log_ratio > bound).float(), response_mask).item(),
        "actor/ppo_kl": masked_mean(-log_ratio.detach(), response_mask).item(),
    }
    return loss, metrics


def frpo_objective(config: Mapping[str, Any]) -> FRPO:
    """Return the objective of verl's `algorithm` section: FRPO's fields are the keys of algorithm.frpo. Raises ConfigError
    for a wrong field or value, or one that has another place in verl's configuration."""
    fields = dict(config.get("frpo") or {})
    for field, instead in NOT_HERE.items():
        if field in fields:
            raise ConfigError(f"algorithm.frpo.{field} cannot be set in verl: {instead}.")
    try:
        return cast(FRPO, build_objective({"name": "frpo", "refresh_importance": False, **fields}))
    except ConfigError as error:
        raise ConfigError(f"In verl's configuration, where objective is algorithm.frpo: {error}") from error


def _check_algorithm(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings by which verl would also change the rewards or the policy loss."""
    if config.get("use_kl_in_reward"):
        raise ConfigError(
            "algorithm.use_kl_in_reward=True changes the rewards that FRPO compares; set it to False and use "
            "actor_rollout_ref.actor.use_kl_loss=True."
        )
    if config.get("norm_adv_by_std_in_grpo"):
        raise ConfigError(
            "algorithm.norm_adv_by_std_in_grpo=True has no meaning for adv_estimator=frpo, which divides by no "
            "standard deviation; set it to False."
        )
    if (config.get("rollout_correction") or {}).get("bypass_mode"):
        raise ConfigError(
            "algorithm.rollout_correction.bypass_mode=True replaces FRPO's policy loss or its old log-probs; set it "
            "to False and correct with rollout_is=token or sequence."
        )


def _neighbours(config: DictConfig) -> DictConfig | None:
    """Return actor_rollout_ref, which is next to `algorithm` in a whole verl configuration; None for `algorithm` alone."""
    try:
        return OmegaConf.select(config, "..actor_rollout_ref")
    except ConfigKeyError:  # raised where there is no parent
        return None


def _check_neighbours(sections: DictConfig, num_sequences: int) -> None:
    """Raise ConfigError if the estimator runs with another policy loss; warn once if m stays 1 for several updates."""
    actor = sections.actor
    if actor.policy_loss.loss_mode != "frpo":
        raise ConfigError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={actor.policy_loss.loss_mode} must be frpo when "
            "algorithm.adv_estimator is: FRPO's ratio is clipped from above only."
        )
    updates = actor.ppo_epochs * (num_sequences // (actor.ppo_mini_batch_size * sections.rollout.n))
    if updates > 1:
        _say_once_that_importance_is_frozen(updates)


@functools.cache
def _say_once_that_importance_is_frozen(updates: int) -> None:
    log.warning(
        "%d updates per rollout batch: FRPO's advantages keep the importance at 1, its value before the first update. "
        "Exact with actor.ppo_epochs=1 and actor.ppo_mini_batch_size=data.train_batch_size.",
        updates,
    )


def _numbered(labels: Iterable[Any]) -> Tensor:
    """Return 0, 1, ... in order of first appearance. int64 [N]."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(label, len(numbers)) for label in labels], dtype=torch.int64)
