"""FRPO in TRL: `FRPOConfig` and `FRPOTrainer`, for GRPOConfig and GRPOTrainer.

TRL generates, scores, computes log-probs and steps; frpo_nemo.objective provides the advantages, the weights and the
loss. TRL may spread a group over microbatches and processes, because FRPO's gradient is a sum over sequences.
docs/integrations/trl.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import FRPO
from frpo_nemo.objective.parts import compared_rewards, partly_scored
from frpo_nemo.objective.ragged import token_mean

MEMORY_FILE = "frpo_memory.json"  # in a checkpoint: what the objective keeps from step to step

# The option of FRPOConfig for each field of the objective.
OPTIONS = {
    "lambda_": "frpo_lambda",
    "kl_radius": "frpo_kl_radius",
    "radius_smoothing": "frpo_radius_smoothing",
    "f_divergence": "frpo_f_divergence",
    "jackknife": "frpo_jackknife",
    "baseline": "frpo_baseline",
    "scale": "frpo_scale",
    "refresh_importance": "frpo_refresh_importance",
    "clip_high": "epsilon_high",
    "beta": "beta",
}

# Options of GRPOConfig that contradict FRPO: the only value that agrees with it, and why.
FIXED = {
    "loss_type": ("frpo", "the loss is FRPO's"),
    "epsilon": (None, "FRPO clips from above only, at epsilon_high"),
    "delta": (None, "FRPO clips from above only, at epsilon_high"),
    "importance_sampling_level": ("token", "FRPOTrainer clips each token's ratio, then takes the mean over the sequence"),
    "scale_rewards": ("none", "FRPO's lambda is in units of reward, which a division by the spread would take away"),
    "multi_objective_aggregation": ("sum_then_normalize", "FRPO's risk is of one reward, the weighted sum"),
    "off_policy_mask_threshold": (None, "FRPO's loss has no off-policy mask"),
    "top_entropy_quantile": (1.0, "FRPO's importance is a mean over all tokens of a response"),
    "entropy_coef": (0.0, "FRPOTrainer has no entropy bonus"),
    "use_adaptive_entropy": (False, "FRPOTrainer has no entropy bonus"),
}

# Inputs of a vision-language model in addition to token ids, by their names in TRL's batches.
MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


@dataclass
class FRPOConfig(GRPOConfig):
    """GRPOConfig with FRPO's settings, frpo_*; frpo_nemo.objective.FRPO explains each.

    TRL's `beta`, `use_bias_correction_kl`, `epsilon_high` and `num_iterations` keep their meaning. Raises ConfigError for an
    option that FRPO cannot follow (FIXED), a value out of range, or an optimizer step that would span two generation batches.
    """

    frpo_lambda: float | None = field(
        default=FRPO.lambda_,
        metadata={"help": "Temperature, in units of reward: small looks at the worst response, large at the mean."},
    )
    frpo_kl_radius: float | None = field(
        default=FRPO.kl_radius,
        metadata={"help": "Instead of frpo_lambda: radius in nats per prompt, from which each batch finds its lambda."},
    )
    frpo_radius_smoothing: float = field(
        default=FRPO.radius_smoothing,
        metadata={"help": "With frpo_kl_radius: weight of the last batch's log lambda in this one's."},
    )
    frpo_f_divergence: str = field(
        default=FRPO.f_divergence, metadata={"help": "Distance of the adversary: kl or chi_squared."}
    )
    frpo_jackknife: bool = field(default=FRPO.jackknife, metadata={"help": "Remove the O(1/G) bias of the group loss."})
    frpo_baseline: bool = field(default=FRPO.baseline, metadata={"help": "Subtract the baseline: lower variance."})
    frpo_scale: str = field(
        default=FRPO.scale, metadata={"help": "Scale of the loss: paper, max(lambda, 1), or objective, lambda."}
    )
    frpo_refresh_importance: bool = field(
        default=FRPO.refresh_importance,
        metadata={
            "help": "With several optimizer steps per generation: compute the advantages again before each, which costs "
            "a forward pass over the generation batch. False: keep the first ones, an approximation."
        },
    )

    loss_type: str = field(default="frpo", metadata={"help": "Always frpo."})
    epsilon: float | None = field(default=None, metadata={"help": "Not used: FRPO has no lower clip."})
    epsilon_high: float = field(
        default=FRPO.clip_high, metadata={"help": "A token's probability ratio counts up to 1 + epsilon_high."}
    )
    scale_rewards: str = field(default="none", metadata={"help": "Always none."})

    def __post_init__(self):
        super().__post_init__()
        for option, (value, reason) in FIXED.items():
            if getattr(self, option) != value:
                given = getattr(self, option)
                raise ConfigError(f"{option}={given!r} must be {value!r} in FRPOConfig: {reason}.")
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ConfigError(
                f"steps_per_generation={self.steps_per_generation} must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: the batch of an optimizer step comes from one generation batch."
            )
        self.build_objective()

    def build_objective(self) -> FRPO:
        """Return the objective of these options. Raises ConfigError, which names the options, for a wrong value."""
        try:
            kl_gradient = "reverse" if self.beta and self.use_bias_correction_kl else "k3"
            return FRPO(kl_gradient=kl_gradient, **{name: getattr(self, option) for name, option in OPTIONS.items()})
        except ConfigError as error:
            message = str(error)
            for name, option in OPTIONS.items():
                message = message.replace(f"objective.{name}", option)
            raise ConfigError(message) from None


@dataclass(frozen=True)
class Rollout:
    """The generation batch that is being trained on: N sequences over all processes, in TRL's order."""

    objective: FRPO  # for this batch
    rewards_N: Tensor
    groups_N: Tensor
    rows: Tensor  # int64: places of this process's sequences in the N


class FRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages and loss are FRPO's; `args` must be a FRPOConfig. Written for TRL 1.16.0.

    Overridden: `_calculate_rewards` (keeps the gathered rewards of every function), `_generate_and_score_completions`
    (replaces the advantages), `_prepare_inputs` (computes them again between optimizer steps), `_compute_loss`;
    `_save_checkpoint` and `_load_optimizer_and_scheduler` (what frpo_kl_radius with smoothing keeps).

    A completion without a reward (every reward function gave None) or without a token that counts (by
    mask_truncated_completions) leaves its group. A reward that some functions did not give is filled, as
    `compared_rewards` says. Raises ConfigError for another config, and for a mixture-of-experts model with a
    load-balancing loss.
    """

    _tag_names = ["trl", "frpo"]
    _name = "FRPO"
    _paper: dict[str, str] = {}

    def __init__(self, model, reward_funcs=None, args: FRPOConfig | None = None, **kwargs):
        if not isinstance(args, FRPOConfig):
            raise ConfigError(f"args of FRPOTrainer must be a FRPOConfig, not {type(args).__name__}.")
        self.frpo = args.build_objective()
        self.frpo_state: dict[str, float] = {}
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        if self.aux_loss_enabled:
            raise ConfigError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} must be 0.0 with FRPOTrainer, whose loss has no "
                "load-balancing term."
            )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._latest_parts = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._latest_parts

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        training = self.model.training
        lengths_N = self.accelerator.gather(_loss_mask(batch).sum(dim=1))
        parts_NP = self._latest_parts.masked_fill((lengths_N == 0).unsqueeze(1), torch.nan)
        all_rows = torch.arange(len(parts_NP), device=parts_NP.device)
        groups_N = all_rows // (self.num_generations if training else self.num_generations_eval)
        rewards_N = compared_rewards(parts_NP, self.reward_weights.to(parts_NP.device), groups_N)

        objective = self.frpo.for_batch(rewards_N, groups_N, self.frpo_state if training else dict(self.frpo_state))
        advantages_N = objective.effective_advantages(rewards_N, groups_N)
        rows = all_rows[self.accelerator.process_index * len(inputs) :][: len(inputs)]
        # Relative to a plain mean over the N sequences, which the trainer's averages over microbatches and processes
        # amount to.
        weights_N = objective.coefficients(rewards_N, groups_N) * len(rewards_N)
        batch |= {"row": rows, "advantages": advantages_N[rows], "weights": weights_N[rows]}
        if training:
            self._rollout = Rollout(objective, rewards_N, groups_N, rows)
        left_out_N = rewards_N.isnan() & ~parts_NP.isnan().all(dim=1)
        shares = {"partly_scored": partly_scored(parts_NP, groups_N), "not_compared": left_out_N}
        statistics = {f"share_{name}": mask_N.double().mean().item() for name, mask_N in shares.items()}
        self._log_batch(objective.statistics(rewards_N, groups_N, advantages_N) | statistics, advantages_N)
        return batch

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and self._rollout.objective.uses_importance and self._policy_has_moved():
            self._refresh_advantages()  # in the buffered batches, which include inputs
        return inputs

    def _policy_has_moved(self) -> bool:
        """Return whether an optimizer step begins that isn't the first one of its generation batch."""
        steps = self._step % (self.args.steps_per_generation * self.num_iterations)
        return steps != 0 and steps % self.args.gradient_accumulation_steps == 0

    @torch.no_grad()
    def _refresh_advantages(self) -> None:
        """Compute advantages under the present policy, from the importance of all sequences of the generation batch."""
        rollout = self._rollout
        importance_n = torch.ones(len(rollout.rows), device=rollout.rows.device)
        for batch in self._buffered_inputs:
            spans_BT = _spans(batch)
            logprobs_BT, _ = self._forward(self.model, batch)
            logprobs_R, old_logprobs_R = logprobs_BT[spans_BT], batch["old_per_token_logps"][spans_BT]
            importance_B = rollout.objective.importance(logprobs_R, old_logprobs_R, spans_BT.sum(dim=1))
            importance_n[batch["row"] - rollout.rows[0]] = importance_B
        importance_N = self.accelerator.gather(importance_n)
        advantages_N = rollout.objective.effective_advantages(rollout.rewards_N, rollout.groups_N, importance_N)
        for batch in self._buffered_inputs:
            batch["advantages"] = advantages_N[batch["row"]]

    def _compute_loss(self, model, inputs):
        """Return this microbatch's part of a plain mean over the sequences of the optimizer step. Trainer adds up the
        parts of its microbatches, and data parallelism averages over processes."""
        spans_BT = _spans(inputs)
        lengths_B = spans_BT.sum(dim=1)
        logprobs_BT, entropies_BT = self._forward(model, inputs)
        logprobs_R = logprobs_BT[spans_BT]
        # TRL leaves out the old log-probs where the policy is the old one.
        old_BT, mismatch_BT = inputs.get("old_per_token_logps"), inputs.get("importance_sampling_ratio")
        old_logprobs_R = logprobs_R.detach() if old_BT is None else old_BT[spans_BT]
        mismatch_R = None if mismatch_BT is None else mismatch_BT.expand_as(logprobs_BT)[spans_BT]  # [B, T] or [B, 1]

        losses_B, clipped_B = self.frpo.sequence_loss(
            logprobs_R, old_logprobs_R, lengths_B, inputs["advantages"], mismatch_R
        )
        losses_B = losses_B * inputs["weights"]
        shares = {"clip_ratio/high_mean": clipped_B, "entropy": token_mean(entropies_BT[spans_BT].detach(), lengths_B)}
        if self.beta:
            reference_R = inputs["ref_per_token_logps"][spans_BT]
            kl_B = self.frpo.reference_kl(logprobs_R, old_logprobs_R, reference_R, lengths_B)
            kl_B = kl_B * _loss_mask(inputs).any(dim=1)
            losses_B = losses_B + self.beta * kl_B
            shares["kl"] = kl_B.detach()
        self._log_means(shares)
        return losses_B.mean() / (self.current_gradient_accumulation_steps if self.model.training else 1)

    def _forward(self, model, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies at the completions' positions, [B, T] each."""
        logprobs_BT, entropies_BT, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            **{name: inputs[name] for name in MODEL_INPUTS if name in inputs},
        )
        return logprobs_BT, entropies_BT

    def _log_batch(self, statistics: dict[str, float], advantages_N: Tensor) -> None:
        for name, value in statistics.items():
            self._metrics[self._mode][f"frpo/{name}"].append(value)
        logged = self._logs["advantages"]  # one per completion; TRL has just put its own advantages there
        for _ in range(min(len(advantages_N), len(logged))):
            logged.pop()
        logged.extend(advantages_N.tolist())

    def _log_means(self, values: dict[str, Tensor]) -> None:
        """Log means over the sequences of all processes."""
        means = self.accelerator.reduce(torch.stack([value.mean() for value in values.values()]), reduction="mean")
        for name, mean in zip(values, means.tolist(), strict=True):
            self._metrics[self._mode][name].append(mean)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            directory = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (directory / MEMORY_FILE).write_text(json.dumps(self.frpo_state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.frpo_state = json.loads(Path(checkpoint, MEMORY_FILE).read_text())


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """Return which completion tokens the model wrote (rather than a tool) and count. bool [B, T]"""
    mask_BT = inputs["completion_mask"].bool()
    return mask_BT & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask_BT


def _spans(inputs: dict[str, Any]) -> Tensor:
    """Return the loss mask, plus the first position of each sequence that has no token in it, whose weight is 0, so that
    every mean over a sequence is defined. bool [B, T]"""
    mask_BT = _loss_mask(inputs)
    first_BT = torch.zeros_like(mask_BT).index_fill(1, torch.tensor([0], device=mask_BT.device), True)
    return mask_BT | (first_BT & ~mask_BT.any(dim=1, keepdim=True))
