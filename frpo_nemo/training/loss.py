"""Define the losses that the actor differentiates: summands per sequence of a sum over the global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from frpo_nemo.data.batch import SequenceBatch, segment_sum
from frpo_nemo.megatron.actor import Losses
from frpo_nemo.objective.base import Objective
from frpo_nemo.objective.mismatch import MismatchWeights, agreement
from frpo_nemo.objective.ragged import token_mean


@dataclass(frozen=True)
class PolicyLoss:
    """An objective's loss over a minibatch of `num_sequences` in all (of which a microbatch sees some).

    Reads the columns advantage, coefficient and, if there is one, share (of a sequence in the KL term and the entropy bonus;
    else all are equal), and the token columns rollout_logprobs, reference_logprobs (if the
    objective has a KL term) and old_logprobs (off-policy; without it the current policy is the old one).
    token_gap_limit: nats by which vLLM and Megatron may differ on a token that counts in the loss; None: any.
    correction: weights for the mismatch between vLLM and Megatron.
    """

    objective: Objective
    num_sequences: int
    token_gap_limit: float | None = None
    correction: MismatchWeights | None = None

    def __call__(self, logprobs: Tensor, entropy: Tensor, sequences: SequenceBatch) -> Losses:
        lengths = sequences.response_lengths
        old = sequences.token_columns.get("old_logprobs", logprobs.detach())
        counted, weights = self._token_weights(old, sequences)
        # A token that is left out must not move the others through a ratio of the whole sequence either.
        shown = torch.where(counted == 0, old, logprobs)
        losses, clipped = self.objective.sequence_loss(shown, old, lengths, sequences.columns["advantage"], weights)
        losses = losses * sequences.columns["coefficient"]
        per_sequence = {"clipped": clipped}
        share = sequences.columns.get("share", 1 / self.num_sequences)
        if self.objective.beta > 0:
            reference = sequences.token_columns["reference_logprobs"]
            kl = self.objective.reference_kl(logprobs, old, reference, lengths, counted)
            losses = losses + self.objective.beta * kl * share
            per_sequence["kl"] = kl.detach()
        if self.objective.entropy_bonus > 0:
            losses = losses - self.objective.entropy_bonus * token_mean(entropy * counted, lengths) * share
        per_token = {"ratio": torch.exp(logprobs.detach() - old), "masked": 1 - counted}
        if self.correction is not None:
            per_token["weight"] = weights
        return Losses(losses, per_sequence, per_token)

    def _token_weights(self, old: Tensor, sequences: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return factors [R] of the tokens' KL terms, which are 0 or 1, and of their reward terms."""
        counted = torch.ones_like(old)
        if self.token_gap_limit is None and self.correction is None:
            return counted, counted
        rollout = sequences.token_columns["rollout_logprobs"]
        if self.token_gap_limit is not None:
            counted = agreement(old, rollout, self.token_gap_limit)
        if self.correction is None:
            return counted, counted
        return counted, counted * self.correction(old, rollout, sequences.response_lengths, counted)


@dataclass(frozen=True)
class CompletionLoss:
    """Loss of supervised training: mean cross-entropy over the `num_tokens` completion tokens of the global batch."""

    num_tokens: int

    def __call__(self, logprobs: Tensor, entropy: Tensor, sequences: SequenceBatch) -> Losses:
        return Losses(-segment_sum(logprobs, sequences.response_lengths) / self.num_tokens)
