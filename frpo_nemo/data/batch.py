"""Hold sequences in the one data format: they are ragged and stay ragged. Nothing here pads.

A batch is flat token ids plus lengths plus columns; a column holds one value per sequence, a token column one
value per *response* token. Prompt tokens never carry a loss, so they have no column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KeptTokens:
    """The tokens that each of R response tokens was sampled from. counts: int64 [R], >= 1. ids: int32 [sum(counts)]."""

    counts: Tensor
    ids: Tensor

    @classmethod
    def from_lists(cls, kept: Sequence[Sequence[int]]) -> KeptTokens:
        """Join the kept ids of each response token."""
        counts = torch.tensor([len(ids) for ids in kept], dtype=torch.int64)
        return cls(counts, torch.tensor([i for ids in kept for i in ids], dtype=torch.int32))

    def select(self, positions: Tensor) -> KeptTokens:
        """Return those of the response tokens at `positions`, in that order."""
        return KeptTokens(self.counts[positions], self.ids[ragged_positions(self.counts, positions)])

    def to(self, device: torch.device) -> KeptTokens:
        return KeptTokens(self.counts.to(device), self.ids.to(device))


@dataclass
class SequenceBatch:
    """N sequences, each a prompt followed by a response.

    tokens: int64 [T], sequence after sequence. lengths, prompt_lengths: int64 [N], in tokens, T = sum(lengths).
    columns: name -> [N]. token_columns: name -> [R], R = sum(lengths - prompt_lengths), in the order of tokens. kept: where
    sampling was from a part of the vocabulary, of the R response tokens; None: from all of it. routes: the experts that vLLM
    chose for each token, [T, layers with experts, chosen], of a small integer type; None: not recorded.
    """

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    token_columns: dict[str, Tensor] = field(default_factory=dict)
    kept: KeptTokens | None = None
    routes: Tensor | None = None

    @classmethod
    def from_lists(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], **columns
    ) -> SequenceBatch:
        """Join token id lists pair by pair; keyword arguments become per-sequence columns."""
        flat = [token for prompt, response in zip(prompts, responses, strict=True) for token in (*prompt, *response)]
        prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        response_lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)
        return cls(
            torch.tensor(flat, dtype=torch.int64),
            prompt_lengths + response_lengths,
            prompt_lengths,
            {name: torch.as_tensor(values) for name, values in columns.items()},
        )

    @property
    def num_sequences(self) -> int:
        return self.lengths.numel()

    @property
    def response_lengths(self) -> Tensor:
        """Return int64 [N], in tokens."""
        return self.lengths - self.prompt_lengths

    def select(self, indices: Sequence[int] | Tensor) -> SequenceBatch:
        """Return the sequences at `indices`, in that order."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        tokens, everything = (ragged_positions(lengths, indices) for lengths in (self.response_lengths, self.lengths))
        return SequenceBatch(
            self.tokens[everything],
            self.lengths[indices],
            self.prompt_lengths[indices],
            {name: column[indices] for name, column in self.columns.items()},
            {name: column[tokens] for name, column in self.token_columns.items()},
            None if self.kept is None else self.kept.select(tokens),
            None if self.routes is None else self.routes[everything],
        )

    def unpack(self) -> list[tuple[list[int], list[int]]]:
        """Return (prompt ids, response ids) of every sequence, as Python lists."""
        out, start = [], 0
        flat = self.tokens.tolist()
        for length, prompt_length in zip(self.lengths.tolist(), self.prompt_lengths.tolist(), strict=True):
            out.append((flat[start : start + prompt_length], flat[start + prompt_length : start + length]))
            start += length
        return out


def segment_ids(lengths: Tensor) -> Tensor:
    """Return the index of the segment to which every element of a ragged layout belongs. int64 [sum(lengths)]."""
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum each segment's values: [sum(lengths)] -> [N]. Differentiable."""
    return torch.zeros(lengths.numel(), dtype=values.dtype, device=values.device).index_add(
        0, segment_ids(lengths), values
    )


def segment_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Average each segment's values: [sum(lengths)] -> [N]; 0 for an empty segment. Differentiable."""
    return segment_sum(values, lengths) / lengths.clamp(min=1)


def ragged_positions(lengths: Tensor, indices: Tensor) -> Tensor:
    """Return the flat positions of the chosen segments, segment after segment."""
    starts = torch.cumsum(lengths, 0) - lengths
    chosen = lengths[indices]
    offsets = torch.arange(int(chosen.sum())) - torch.repeat_interleave(torch.cumsum(chosen, 0) - chosen, chosen)
    return torch.repeat_interleave(starts[indices], chosen) + offsets
