"""Packing is pure arithmetic on lengths: what it may not lose, split unevenly or mix up."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.layers import AttentionPlan
from frpo_nemo.megatron.packing import (
    build_microbatch,
    context_parallel_shard,
    split_into_microbatches,
    split_over_replicas,
)

LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=60)
CPU = torch.device("cpu")


@given(LENGTHS, st.integers(1, 8))
def test_every_sequence_goes_to_one_replica_and_none_is_left_without(lengths, replicas):
    parts = split_over_replicas(lengths, replicas)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(parts) or len(lengths) < replicas
    tokens = [sum(lengths[i] for i in part) for part in parts]
    assert max(tokens) - min(tokens) <= max(lengths)


@given(LENGTHS, st.integers(1, 1000))
def test_microbatches_hold_every_sequence_within_the_budget(lengths, budget):
    packs = split_into_microbatches(lengths, budget)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[i] for i in pack) <= budget for pack in packs)


@given(LENGTHS)
def test_attention_rectangles_hold_every_token_once_and_are_less_than_half_padding(lengths):
    plan, total = AttentionPlan.of(lengths, sum(lengths), CPU), sum(lengths)
    elements = torch.cat([rows.flatten() for rows in plan.rows])
    assert torch.equal(elements[plan.restore], torch.arange(total))
    for rows in plan.rows:
        assert (rows == total).sum() * 2 < rows.numel()


def example(num_sequences: int, seed: int) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high, (int(torch.randint(1, 20, (), generator=generator)),)).tolist()  # noqa: E731
    return SequenceBatch.from_lists(
        [draw(3, 90) for _ in range(num_sequences)], [draw(3, 90) for _ in range(num_sequences)]
    )


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_rows_are_rounded_up_without_another_sequence_or_response_token(num_sequences, seed):
    """A number of rows that was seen before needs no new kernel (BF16_ROWS). The last response token stands for the rest."""
    batch = example(num_sequences, seed)
    whole = build_microbatch(batch, list(range(num_sequences)), device=CPU)
    padded = build_microbatch(batch, list(range(num_sequences)), device=CPU, pad_multiple=32, row_multiple=32)
    own, tokens = whole.predictors.numel(), whole.tokens.shape[1]
    assert padded.predictors.numel() % 32 == 0 and padded.tokens.shape[1] % 32 == 0
    assert torch.equal(padded.slots, whole.slots)
    for name in ("predictors", "targets"):
        column = getattr(padded, name)
        assert torch.equal(column[:own], getattr(whole, name)) and (column[own:] == column[own - 1]).all()
    for rows, unpadded in zip(padded.packed.attention.rows, whole.packed.attention.rows, strict=True):
        assert torch.equal(rows.clamp(max=tokens), unpadded)
    assert torch.equal(padded.packed.attention.restore[:tokens], whole.packed.attention.restore)


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1, 2, 16]), st.sampled_from([1, 2, 4]))
def test_context_parallel_ranks_together_predict_every_response_token_once(num_sequences, seed, multiple, cp_size):
    """Each rank's predictors name the position before the target, in its own shard of the padded pack."""
    batch = example(num_sequences, seed)
    pad = multiple * (2 * cp_size if cp_size > 1 else 1)
    whole = build_microbatch(batch, list(range(num_sequences)), device=CPU, pad_multiple=pad)
    assert whole.tokens.shape[1] % pad == 0
    seen = {}
    for rank in range(cp_size):
        part = build_microbatch(
            batch, list(range(num_sequences)), device=CPU, pad_multiple=pad, cp_rank=rank, cp_size=cp_size, thd=True
        )
        assert part.tokens.shape == part.position_ids.shape
        if cp_size > 1:
            assert part.tokens.shape[1] * cp_size == int(part.packed.cu_seqlens_q[-1])
        for slot, predictor, target in zip(
            part.slots.tolist(), part.predictors.tolist(), part.targets.tolist(), strict=True
        ):
            assert slot not in seen
            seen[slot] = (part.tokens[0, predictor].item(), part.position_ids[0, predictor].item(), target)
    expected = [
        ((prompt + response)[len(prompt) + i - 1], len(prompt) + i - 1, token)
        for prompt, response in batch.unpack()
        for i, token in enumerate(response)
    ]
    assert [seen[slot] for slot in range(len(expected))] == expected


def test_context_parallel_shard_takes_one_piece_from_the_front_and_its_mirror_from_the_back():
    assert context_parallel_shard([8, 4], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_parallel_shard([8, 4], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
