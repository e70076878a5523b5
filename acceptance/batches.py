"""Batches of random sequences, the same on every rank, with the columns that objectives read."""

from __future__ import annotations

import torch

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.objective.base import Objective
from frpo_nemo.training.loss import PolicyLoss

GROUP_SIZE = 4


def ragged(seed: int, groups: int, longest: int, vocabulary: int) -> SequenceBatch:
    """Make `groups` interleaved groups of GROUP_SIZE sequences with 1 to `longest` response tokens and random rewards."""
    generator = torch.Generator().manual_seed(seed)
    count = groups * GROUP_SIZE

    def tokens(high: int) -> list[int]:
        length = int(torch.randint(1, high + 1, (), generator=generator))
        return torch.randint(2, vocabulary, (length,), generator=generator).tolist()

    return SequenceBatch.from_lists(
        [tokens(longest // 4) for _ in range(count)],
        [tokens(longest) for _ in range(count)],
        group=[index % groups for index in range(count)],
        reward=torch.rand(count, generator=generator).double(),
    )


def policy_loss(batch: SequenceBatch, objective: Objective) -> PolicyLoss:
    """Make the objective's loss of the whole batch, and give the batch the columns that it reads. Without a token column
    old_logprobs, the present policy is the one that sampled."""
    rewards, groups = batch.columns["reward"], batch.columns["group"]
    batch.columns["advantage"] = objective.effective_advantages(rewards, groups)
    batch.columns["coefficient"] = objective.coefficients(rewards, groups)
    return PolicyLoss(objective, batch.num_sequences)
