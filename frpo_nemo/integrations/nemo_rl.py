"""FRPO in NeMo-RL: an advantage estimator and a loss function with the signatures that its GRPO trainer expects.

Written against NVIDIA-NeMo/RL 0.6.0 at commit 7ea279a (August 2026). Both classes read one place of its configuration,
`loss_fn`; nemo_rl itself is imported only where one of its own enums is needed. How to plug them in:
docs/integrations/nemo_rl.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import FRPO, build_objective
from frpo_nemo.objective.kl import k3
from frpo_nemo.objective.mismatch import MismatchWeights

# NeMo-RL's loss settings that would change what FRPO computes, with the values that change nothing.
NEUTRAL = {
    "token_level_loss": (False,),
    "disable_ppo_ratio": (False,),
    "sequence_level_importance_ratios": (False,),
    "use_cispo": (False,),
    "ratio_clip_c": (None,),
    "positive_example_nll_weight": (0.0,),
    "use_kl_in_reward": (False,),
    "use_on_policy_kl_approximation": (False,),
    "reference_policy_kl_type": ("k3",),
    "kl_input_clamp_value": (None,),
    "kl_output_clamp_value": (None,),
    "truncated_importance_sampling_type": (None, "tis", "icepop"),
}
# Fields of FRPO that NeMo-RL's configuration already has a name for.
NAMED_BY_NEMO_RL = {"clip_high": "ratio_clip_max", "beta": "reference_policy_kl_penalty"}

# The metrics of FRPOLossFn, by the count that each is divided by.
SEQUENCE_MEANS = ("loss", "kl_penalty")
TOKEN_MEANS = (
    "probs_ratio",
    "probs_ratio_clamped",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "sampling_importance_ratio",
    "approx_entropy",
)
NOT_NORMALIZED = (
    "num_valid_samples",
    "probs_ratio_min",
    "probs_ratio_max",
    "probs_ratio_clamped_min",
    "probs_ratio_clamped_max",
)


class FRPOAdvantageEstimator:
    """Turns the rewards of a rollout batch into FRPO's effective advantages, for FRPOLossFn.

    They carry the scale of the loss and the weights of the groups, so that NeMo-RL's division by the number of
    valid sequences gives FRPO's total loss; with several updates per rollout batch, on average over the updates.
    """

    def __init__(self, estimator_config: Any, loss_config: Any):
        """estimator_config: accepted because NeMo-RL passes it, not read. loss_config: ClippedPGLossConfig with an extra
        key `frpo`, a mapping of FRPO's fields. Raises ConfigError for what FRPO cannot do."""
        self.objective = frpo_objective(loss_config)
        self.objective_state: dict[str, float] = {}
        self.last_metrics: dict[str, float] = {}

    def compute_advantage(self, prompt_ids: Tensor, rewards: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        """prompt_ids: int64 [N, L], padded; equal rows are one group. rewards: float [N], NaN = unscored. mask: [N, T],
        token_mask * sample_mask. Returns float32 [N, T], one value per row: 0 for a sequence that takes no part.

        A sequence whose row of the mask is 0 leaves its group, as an unscored one does: the loss will not see it,
        and the gradients of a group balance only over the members that the loss sees.
        """
        sample_mask_N = mask[:, 1:].float().amax(dim=1)
        rewards_N = rewards.float().masked_fill(sample_mask_N == 0, math.nan)
        _, groups_N = torch.unique(prompt_ids, dim=0, return_inverse=True)
        objective = self.objective.for_batch(rewards_N, groups_N, self.objective_state)
        advantages_N = objective.effective_advantages(rewards_N, groups_N)
        statistics = objective.statistics(rewards_N, groups_N, advantages_N)
        self.last_metrics = {f"frpo/{name}": value for name, value in statistics.items()}
        weighted_N = advantages_N * objective.coefficients(rewards_N, groups_N) * sample_mask_N.sum()
        return weighted_N.unsqueeze(1).expand(mask.shape)


class FRPOLossFn:
    """FRPO's loss of a microbatch, a part of the sum over the global batch: the ratio is clipped from above only, the
    mean is over each sequence's tokens, the division by global counts. A `LossFunction` of NeMo-RL in structure."""

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False):
        """Take NeMo-RL's ClippedPGLossFn arguments; cfg: see FRPOAdvantageEstimator."""
        self.objective = frpo_objective(cfg)
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        self.force_on_policy_ratio = cfg.force_on_policy_ratio
        self.corrects_mismatch = cfg.use_importance_sampling_correction
        self.mismatch_weights = _mismatch_weights(cfg)

    @property
    def reference_policy_kl_penalty(self) -> float:
        """Return a nonzero value: under top-k or top-p NeMo-RL then adds the unfiltered log-probs that the KL needs."""
        return self.objective.beta

    @property
    def loss_type(self) -> Any:
        """LossType.SEQUENCE_LEVEL."""
        from nemo_rl.algorithms.loss.interfaces import LossType

        return LossType.SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        """LossInputType.LOGPROB."""
        from nemo_rl.algorithms.loss.interfaces import LossInputType

        return LossInputType.LOGPROB

    @property
    def metric_normalizations(self) -> dict[str, Any]:
        """Return the global count that each metric is divided by, as MetricNormalizer."""
        from nemo_rl.algorithms.loss.interfaces import MetricNormalizer

        return {
            **dict.fromkeys(SEQUENCE_MEANS, MetricNormalizer.SEQUENCES),
            **dict.fromkeys(TOKEN_MEANS, MetricNormalizer.TOKENS),
            **dict.fromkeys(NOT_NORMALIZED, MetricNormalizer.NONE),
        }

    def __call__(
        self,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
        *,
        next_token_logprobs: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """next_token_logprobs: float [B, T-1], of tokens 1..T-1 of data's [B, T] rows. The counts: scalars, over the
        global batch. Returns the loss, scalar, and metrics, to be summed over microbatches (extrema: taken).

        Reads token_mask, sample_mask [B], advantages, generation_logprobs, prev_logprobs unless force_on_policy_ratio,
        and reference_policy_logprobs if the KL has a weight."""
        sample_mask_B = data["sample_mask"]
        mask = data["token_mask"][:, 1:] * sample_mask_B.unsqueeze(1) > 0
        tokens = {name: data[name][:, 1:][mask] for name in self._token_fields()}
        tokens["logprobs"] = next_token_logprobs[mask]
        tokens["unfiltered"] = data.get("curr_logprobs_unfiltered", next_token_logprobs)[mask]
        if self.force_on_policy_ratio:
            tokens["prev_logprobs"] = tokens["logprobs"].detach()

        lengths_B = mask.sum(dim=1)
        present = lengths_B > 0  # a packed microbatch may be one sequence that is masked
        num_sequences = global_valid_seqs.clamp(min=1)
        rewards, kl = self._summed_over_sequences(tokens, lengths_B[present], sample_mask_B[present])
        loss = (rewards + self.objective.beta * kl) / num_sequences
        return loss, {
            "loss": loss.item(),
            "kl_penalty": (kl / num_sequences).item(),
            "num_valid_samples": sample_mask_B.sum().item(),
            **self._token_metrics(tokens, global_valid_toks.clamp(min=1)),
        }

    def _token_fields(self) -> list[str]:
        fields = ["advantages", "generation_logprobs"]
        if not self.force_on_policy_ratio:
            fields.append("prev_logprobs")
        if self.objective.beta > 0:
            fields.append("reference_policy_logprobs")
        return fields

    def _summed_over_sequences(
        self, tokens: dict[str, Tensor], lengths_N: Tensor, sample_mask_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the reward part and the KL to the reference, scalars."""
        logprobs_R, old_R = tokens["logprobs"], tokens["prev_logprobs"]
        if logprobs_R.numel() == 0:
            return logprobs_R.sum(), logprobs_R.new_zeros(())
        # NeMo-RL may overwrite single tokens' advantages with penalties, so they count per token: FRPO's loss is
        # linear in them, and with equal ones this is its -A_eff times the mean of the clipped ratios.
        weights_R = tokens["advantages"]
        if self.corrects_mismatch:
            generation_R = tokens["generation_logprobs"]
            weights_R = weights_R * self.mismatch_weights(old_R, generation_R, lengths_N)
        ones_N = torch.ones_like(lengths_N, dtype=logprobs_R.dtype)
        losses_N, _ = self.objective.sequence_loss(logprobs_R, old_R, lengths_N, ones_N, weights_R)
        if self.objective.beta == 0:
            return (sample_mask_N * losses_N).sum(), logprobs_R.new_zeros(())
        # NeMo-RL weighs k3 by pi / pi.detach(), also in a minibatch after the first.
        unfiltered_R, reference_R = tokens["unfiltered"], tokens["reference_policy_logprobs"]
        kl_N = self.objective.reference_kl(unfiltered_R, unfiltered_R.detach(), reference_R, lengths_N)
        return (sample_mask_N * losses_N).sum(), (sample_mask_N * kl_N).sum()

    @torch.no_grad()
    def _token_metrics(self, tokens: dict[str, Tensor], num_tokens: Tensor) -> dict[str, float]:
        """Return, under NeMo-RL's names, this microbatch's part of means over tokens, and its extrema."""
        logprobs_R, old_R, generation_R = tokens["logprobs"], tokens["prev_logprobs"], tokens["generation_logprobs"]
        mixture_R = torch.logaddexp(old_R, generation_R) - math.log(2)
        ratios = {"probs_ratio": torch.exp(logprobs_R - old_R)}
        ratios["probs_ratio_clamped"] = ratios["probs_ratio"].clamp(max=1 + self.objective.clip_high)
        per_token = {
            **ratios,
            "token_mult_prob_error": torch.exp((generation_R - old_R).abs()),
            "gen_kl_error": k3(generation_R, old_R),
            "policy_kl_error": k3(old_R, generation_R),
            "js_divergence_error": (k3(mixture_R, old_R) + k3(mixture_R, generation_R)) / 2,
            "sampling_importance_ratio": torch.exp(old_R - generation_R),
            "approx_entropy": -torch.exp(logprobs_R - generation_R) * logprobs_R,
        }
        metrics = {name: (values_R.sum() / num_tokens).item() for name, values_R in per_token.items()}
        for name, ratios_R in ratios.items():
            # The sentinels for no tokens, which NeMo-RL leaves out when it takes extrema over microbatches.
            metrics[f"{name}_min"] = ratios_R.min().item() if ratios_R.numel() else math.inf
            metrics[f"{name}_max"] = ratios_R.max().item() if ratios_R.numel() else -math.inf
        return metrics


def _mismatch_weights(loss_config: Any) -> MismatchWeights:
    """Return the weights of NeMo-RL's truncated_importance_sampling_*. Raises ConfigError where NeMo-RL's own loss refuses."""
    prefix = "truncated_importance_sampling"
    kind, low, high = (getattr(loss_config, f"{prefix}_{name}") for name in ("type", "ratio_min", "ratio"))
    if kind is None:
        return MismatchWeights(high=math.inf)
    if not loss_config.use_importance_sampling_correction:
        raise ConfigError(f"loss_fn.{prefix}_type={kind} needs loss_fn.use_importance_sampling_correction=true.")
    if high is None or high <= 0:
        raise ConfigError(f"loss_fn.{prefix}_ratio={high} must be above 0 with loss_fn.{prefix}_type={kind}.")
    if low is None and kind == "icepop":
        raise ConfigError(f"loss_fn.{prefix}_ratio_min must be set with loss_fn.{prefix}_type=icepop.")
    if low is not None and not 0 <= low <= high:
        raise ConfigError(f"loss_fn.{prefix}_ratio_min={low} must be between 0 and loss_fn.{prefix}_ratio={high}.")
    return MismatchWeights(low=low or 0.0, high=high, mask=kind == "icepop")


def frpo_objective(loss_config: Any) -> FRPO:
    """Return the FRPO of NeMo-RL's `loss_fn`: its key `frpo`, with clip_high and beta under NeMo-RL's own names. Raises
    ConfigError for a setting that FRPO would ignore."""
    for field, allowed in NEUTRAL.items():
        value = getattr(loss_config, field)
        if value not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ConfigError(f"loss_fn.{field}={value!r} has no meaning for FRPO; it must be {wanted}.")
    _mismatch_weights(loss_config)
    fields = getattr(loss_config, "frpo", None)
    if not isinstance(fields, Mapping):
        raise ConfigError(f"loss_fn.frpo={fields!r} must be a mapping of FRPO's settings, such as lambda_: 0.5.")
    for field, name in NAMED_BY_NEMO_RL.items():
        if field in fields:
            raise ConfigError(f"loss_fn.frpo.{field} must be given as loss_fn.{name}, which NeMo-RL reads as well.")
    if fields.get("refresh_importance"):
        raise ConfigError(
            "loss_fn.frpo.refresh_importance must be false: NeMo-RL computes advantages once per rollout."
        )
    if fields.get("entropy_bonus"):
        raise ConfigError("loss_fn.frpo.entropy_bonus must be 0: NeMo-RL passes no differentiable entropy to the loss.")
    if "kl_gradient" in fields:
        raise ConfigError(
            "loss_fn.frpo.kl_gradient cannot be set: NeMo-RL's KL always has the gradient called reverse."
        )
    named = {field: getattr(loss_config, name) for field, name in NAMED_BY_NEMO_RL.items()}
    if named["beta"] != 0:
        named["kl_gradient"] = "reverse"
    try:
        return cast(FRPO, build_objective({"name": "frpo", "refresh_importance": False, **fields, **named}))
    except ConfigError as error:
        raise ConfigError(f"In NeMo-RL's configuration, where objective is loss_fn.frpo: {error}") from error
