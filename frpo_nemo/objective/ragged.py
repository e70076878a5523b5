"""Reduce over the two ragged layouts: groups of sequences (scattered, arbitrary ids) and the tokens of
sequences (contiguous). All computations of an objective per prompt go through `Groups`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The sequences that take part: those with a reward, in a group that has at least two of them.

    M sequences of the batch's N take part, in K groups. members: int64 [M], their positions in the batch;
    ids: int64 [M], the group of each, 0..K-1; sizes: int64 [K], scored members per group, each >= 2.
    """

    members: Tensor
    ids: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, rewards_N: Tensor, groups_N: Tensor) -> Groups:
        """Find the groups. rewards_N: float, NaN = could not be scored. groups_N: int64, any ids, in any order. Raises
        ValueError for an infinite reward, which would turn its whole group into NaN."""
        if torch.isinf(rewards_N).any():
            where = int(torch.isinf(rewards_N).nonzero()[0])
            raise ValueError(
                f"The reward of response {where} is {rewards_N[where].item()}; rewards must be finite, "
                "and None (NaN) for a response that could not be scored."
            )
        scored = (~torch.isnan(rewards_N)).nonzero().squeeze(1)
        _, ids, sizes = torch.unique(groups_N[scored], return_inverse=True, return_counts=True)
        comparable = sizes >= 2
        keep = comparable[ids]
        new_ids = torch.cumsum(comparable, 0) - 1
        return cls(scored[keep], new_ids[ids[keep]], sizes[comparable])

    @property
    def count(self) -> int:
        """Return K."""
        return self.sizes.numel()

    def sum(self, values_M: Tensor) -> Tensor:
        """[M] -> [K]."""
        zeros = torch.zeros(self.count, dtype=values_M.dtype, device=values_M.device)
        return zeros.index_add_(0, self.ids, values_M)

    def mean(self, values_M: Tensor) -> Tensor:
        """[M] -> [K]."""
        return self.sum(values_M) / self.sizes

    def max(self, values_M: Tensor) -> Tensor:
        """[M] -> [K]."""
        lowest = torch.full((self.count,), -torch.inf, dtype=values_M.dtype, device=values_M.device)
        return lowest.scatter_reduce_(0, self.ids, values_M, "amax")

    def centred(self, values_M: Tensor) -> Tensor:
        """Subtract the group's mean; exactly 0 in a group of equal values, however the mean rounds. [M]"""
        below_top = values_M - self.max(values_M)[self.ids]
        return below_top - self.mean(below_top)[self.ids]

    def relative_exp(self, values_M: Tensor) -> Tensor:
        """Return exp(v_i) / mean over the group of exp(v): exactly 1 in a group of equal values.

        A value of -inf gives a member of weight 0; at least one value of each group is finite. [M]
        """
        exponentials = torch.exp(values_M - self.max(values_M)[self.ids])
        return exponentials / self.mean(exponentials)[self.ids]

    def log_mean_exp(self, values_M: Tensor) -> Tensor:
        """Return the log of the group's mean of exp(v). [M] -> [K]."""
        top = self.max(values_M)
        return top + torch.log(self.mean(torch.exp(values_M - top[self.ids])))

    def scatter(self, values_M: Tensor, num_sequences: int) -> Tensor:
        """Put values back into the batch: float32 [num_sequences], 0 for every sequence that takes no part."""
        out = torch.zeros(num_sequences, dtype=torch.float32, device=values_M.device)
        out[self.members] = values_M.float()
        return out


def token_mean(values_R: Tensor, lengths_N: Tensor) -> Tensor:
    """Average over each sequence's tokens, [R] -> [N], differentiable. lengths_N: >= 1, sums to R."""
    return torch.segment_reduce(values_R, "mean", lengths=lengths_N)


def token_sum(values_R: Tensor, lengths_N: Tensor) -> Tensor:
    """Sum over each sequence's tokens, [R] -> [N], differentiable. lengths_N sums to R."""
    return torch.segment_reduce(values_R, "sum", lengths=lengths_N)


def per_token(values_N: Tensor, lengths_N: Tensor, num_tokens: int) -> Tensor:
    """Repeat each sequence's value for each of its tokens, [N] -> [R = num_tokens]."""
    return torch.repeat_interleave(values_N, lengths_N, output_size=num_tokens)
