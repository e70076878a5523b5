"""Pack a ragged batch into microbatches: choose the sequences of each replica and of each microbatch, and build the model's
input tensors. Pure functions of lengths, so that every rank of a replica decides the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from frpo_nemo.data.batch import KeptTokens, SequenceBatch
from frpo_nemo.megatron.layers import AttentionPlan, PackedSequences


@dataclass
class Microbatch:
    """One packed forward pass.

    indices: places of its sequences in the global batch. tokens, position_ids: int64 [1, T'], T' the padded length
    (divided by CP). slots: int64 [R'], the places of the response tokens here among the microbatch's R (R' = R without CP).
    predictors, targets: int64, R' rounded up, positions whose hidden state predicts a response token, and that token; the
    last is repeated. kept: what they were sampled from. routes: the experts to replay, [T', layers with experts, chosen].
    """

    indices: list[int]
    sequences: SequenceBatch
    tokens: Tensor
    position_ids: Tensor
    packed: PackedSeqParams
    predictors: Tensor
    targets: Tensor
    slots: Tensor
    kept: KeptTokens | None = None
    routes: Tensor | None = None


def split_over_replicas(lengths: list[int], replicas: int) -> list[list[int]]:
    """Return indices for each replica: longest first, each to the replica with the fewest tokens so far. Every sequence goes
    to exactly one replica, and every replica gets one if there are enough."""
    parts: list[list[int]] = [[] for _ in range(replicas)]
    tokens = [0] * replicas
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        target = min(range(replicas), key=lambda r: (tokens[r], r))
        parts[target].append(index)
        tokens[target] += lengths[index]
    return [sorted(part) for part in parts]


def split_into_microbatches(lengths: list[int], token_budget: int) -> list[list[int]]:
    """Split by first-fit decreasing: every microbatch holds at most `token_budget` tokens, or one longer sequence."""
    packs: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        pack = next((number for number, left in enumerate(room) if lengths[index] <= left), len(packs))
        if pack == len(packs):
            packs.append([])
            room.append(token_budget)
        packs[pack].append(index)
        room[pack] -= lengths[index]
    return packs


def most_microbatches(lengths: list[int], shares: list[list[int]], token_budget: int) -> int:
    """Return the number of microbatches of the replica with most. shares: its sequences, of each replica."""
    return max(len(split_into_microbatches([lengths[i] for i in share], token_budget)) for share in shares)


def build_microbatch(
    batch: SequenceBatch,
    indices: list[int],
    *,
    device: torch.device,
    pad_multiple: int = 1,
    row_multiple: int = 1,
    cp_rank: int = 0,
    cp_size: int = 1,
    thd: bool = False,
) -> Microbatch:
    """Pack the sequences at `indices`; without any, return a pack of padding. The pack's length becomes a multiple of
    `pad_multiple` by a segment of padding at its end, the number of predictors one of `row_multiple`; with context parallelism
    each sequence is padded to a multiple of 2 * cp_size too. `thd`: parameters for Transformer Engine's attention instead of
    layers.py's."""
    sequences = batch.select(indices)
    lengths = sequences.lengths.tolist()
    if not indices:
        return _padding(batch.select([]), 2 * pad_multiple, device, thd, cp_size)
    padded = [-(-length // (2 * cp_size)) * 2 * cp_size if cp_size > 1 else length for length in lengths]
    tail = -sum(padded) % pad_multiple
    segments = padded + ([tail] if tail else [])
    starts = torch.tensor([0, *segments]).cumsum(0)

    tokens = torch.zeros(sum(segments), dtype=torch.int64)
    own = torch.tensor(lengths)
    within = torch.cat([torch.arange(length) for length in lengths])
    places = torch.repeat_interleave(starts[: len(lengths)], own) + within
    tokens[places] = sequences.tokens
    positions = torch.cat([torch.arange(segment) for segment in segments])

    is_response = within >= torch.repeat_interleave(sequences.prompt_lengths, own)
    predictors, targets = places[is_response] - 1, sequences.tokens[is_response]
    slots = torch.arange(targets.numel())
    if cp_size > 1:
        shard = context_parallel_shard(segments, cp_rank, cp_size)
        tokens, positions = tokens[shard], positions[shard]
        local = torch.full((sum(segments),), -1, dtype=torch.int64)
        local[shard] = torch.arange(shard.numel())
        here = local[predictors] >= 0
        predictors, targets, slots = local[predictors[here]], targets[here], slots[here]

    rows = torch.arange(slots.numel() + -slots.numel() % row_multiple).clamp(max=slots.numel() - 1)
    packed = _thd_parameters(starts, segments, device) if thd else _local_parameters(positions, padded, device)
    return Microbatch(
        indices=list(indices),
        sequences=to_device(sequences, device),
        tokens=tokens[None].to(device),
        position_ids=positions[None].to(device),
        packed=packed,
        predictors=predictors[rows].to(device),
        targets=targets[rows].to(device),
        slots=slots.to(device),
        kept=None if sequences.kept is None else sequences.kept.select(slots[rows]).to(device),
        routes=None if sequences.routes is None else _routes(sequences.routes, places, sum(segments)).to(device),
    )


def _routes(routes: Tensor, places: Tensor, length: int) -> Tensor:
    """Return the routes of a pack of `length` tokens, whose padding goes to any experts."""
    pack = torch.arange(routes.shape[2], dtype=routes.dtype).expand(length, *routes.shape[1:]).clone()
    pack[places] = routes
    return pack


def _padding(
    nothing: SequenceBatch, length: int, device: torch.device, thd: bool, cp_size: int
) -> Microbatch:
    """Return a microbatch of `length` tokens of padding and no sequence."""
    positions, none = torch.arange(length), torch.zeros(0, dtype=torch.int64, device=device)
    packed = (
        _thd_parameters(torch.tensor([0, length]), [length], device)
        if thd
        else _local_parameters(positions, [length], device)
    )
    tokens, positions = (
        t[None, : length // cp_size].to(device) for t in (torch.zeros(length, dtype=torch.int64), positions)
    )
    routes = None if nothing.routes is None else _routes(nothing.routes, none.cpu(), length).to(device)
    return Microbatch([], to_device(nothing, device), tokens, positions, packed, none, none, none, routes=routes)


def context_parallel_shard(segments: list[int], cp_rank: int, cp_size: int) -> Tensor:
    """Return positions of a pack that context-parallel rank `cp_rank` holds: of each segment's 2 * cp_size equal pieces, the
    cp_rank-th from the front and the cp_rank-th from the back, which balances causal attention (Transformer Engine's
    layout for packed sequences)."""
    pieces, start = [], 0
    for segment in segments:
        piece = segment // (2 * cp_size)
        for which in (cp_rank, 2 * cp_size - 1 - cp_rank):
            pieces.append(torch.arange(start + which * piece, start + (which + 1) * piece))
        start += segment
    return torch.cat(pieces)


def to_device(batch: SequenceBatch, device: torch.device) -> SequenceBatch:
    """Return the batch with every tensor on `device`, without `kept` and `routes`, which a microbatch has itself."""
    return SequenceBatch(
        batch.tokens.to(device),
        batch.lengths.to(device),
        batch.prompt_lengths.to(device),
        {name: column.to(device) for name, column in batch.columns.items()},
        {name: column.to(device) for name, column in batch.token_columns.items()},
    )


def _local_parameters(positions: Tensor, segments: list[int], device: torch.device) -> PackedSequences:
    return PackedSequences(
        qkv_format="sbhd",
        positions=positions.to(device),
        attention=AttentionPlan.of(segments, positions.numel(), device),
    )


def _thd_parameters(starts: Tensor, segments: list[int], device: torch.device) -> PackedSeqParams:
    cu_seqlens = starts.to(torch.int32).to(device)
    longest = max(segments)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
