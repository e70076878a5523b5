"""Fingerprints and log-prob gaps, without vLLM."""

import pytest
import torch

from frpo_nemo.rollout.refit_check import (
    GAP_LIMITS,
    GAP_MULTIPLES,
    GapLimit,
    RefitError,
    Shard,
    check_logprob_gap,
    fingerprint,
    logprob_gap,
)


def tensors():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((7,), (6, 4), (300, 500), (5, 3), (2, 3, 4)):
            yield torch.randn(shape, generator=generator).to(dtype)


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def test_fingerprint_is_of_the_bits_wherever_they_lie():
    for tensor in tensors():
        expected = fingerprint(tensor)
        assert fingerprint(tensor.clone()) == expected
        wider = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
        wider[..., 1:-2] = tensor
        assert fingerprint(wider[..., 1:-2]) == expected  # not contiguous, and not at a word's beginning
        assert fingerprint(torch.full_like(tensor, torch.nan)) == fingerprint(torch.full_like(tensor, torch.nan))
    assert fingerprint(torch.empty(0, 4)) == 0


@pytest.mark.parametrize("bit", [0, 7, 15])
def test_fingerprint_sees_any_one_bit(bit):
    for tensor in tensors():
        flat = bits(tensor).view(-1)
        expected = fingerprint(tensor)
        for position in {0, 1, len(flat) // 2, len(flat) - 1}:
            flat[position] ^= torch.tensor(1 << bit).to(flat.dtype)
            assert fingerprint(tensor) != expected
            flat[position] ^= torch.tensor(1 << bit).to(flat.dtype)
        assert fingerprint(tensor) == expected


def test_fingerprint_sees_sign_flips_and_moves():
    for tensor in tensors():
        expected = fingerprint(tensor)
        assert fingerprint(-tensor) != expected
        assert fingerprint(tensor.roll(1, 0)) != expected
        assert fingerprint(tensor.flip(-1)) != expected
    matrix = torch.randn(8, 8)
    for rows in ([0, 1], [2, 5], [0, 1, 2, 3]):  # the highest bits only, an even number of them
        for columns in ([1, 3], [0, 7]):
            damaged = matrix.clone()
            for row in rows:
                damaged[row, columns] *= -1
            assert fingerprint(damaged) != fingerprint(matrix)


def test_fingerprint_does_not_depend_on_block_size():
    """300 x 500 words take several blocks; the formula takes one."""
    from frpo_nemo.rollout.refit_check import _odd_numbers

    tensor = torch.randn(300, 500)
    columns, rows = _odd_numbers(500, 1, tensor.device), _odd_numbers(300, 2, tensor.device)
    assert fingerprint(tensor) == ((tensor.view(torch.int32).long() * columns).sum(1) * rows).sum()


def test_shard_is_cut_where_it_belongs_or_not_at_all():
    full = torch.arange(24.0).view(6, 4)
    assert torch.equal(Shard(torch.empty(2, 4), start=4).cut(full), full[4:])
    assert torch.equal(Shard(torch.empty(6, 2), dim=1, start=2).cut(full), full[:, 2:])
    assert Shard(torch.empty(3, 4), start=4).cut(full) is None
    assert Shard(torch.empty(2, 5), start=0).cut(full) is None
    assert Shard(torch.empty(4), start=0).cut(full) is None


def test_gap_of_nothing_and_of_nan():
    assert logprob_gap(torch.empty(0), torch.empty(0)) == (0.0, 0.0)
    one = torch.zeros(3)
    with pytest.raises(RefitError, match="sequence 1 of 2"):
        other, limit = torch.tensor([0.0, 0.0, torch.nan]), GapLimit.of("bf16", None)
        check_logprob_gap(one, other, torch.tensor([2, 1]), step=1, limit=limit)


def test_gap_limits_by_precision():
    rollout, lengths = torch.zeros(100), torch.tensor([40, 0, 60])
    almost = torch.zeros(100)
    almost[70] = 5e-4  # one token, far above fp32's rounding
    fp32, bf16, given = GapLimit.of("fp32", 4e-6), GapLimit.of("bf16", 0.01), GapLimit.of("bf16", None, threshold=1e-6)
    with pytest.raises(RefitError, match="step 9: .* the worst is sequence 2 of 3, .* over 60 tokens"):
        check_logprob_gap(rollout, almost, lengths, step=9, limit=fp32)
    mean, largest = check_logprob_gap(rollout, almost, lengths, step=9, limit=bf16)
    assert mean == pytest.approx(5e-6) and largest == pytest.approx(5e-4)
    with pytest.raises(RefitError, match="the mean should be at most 1e-06: rollout.logprob_gap_threshold"):
        check_logprob_gap(rollout, almost, lengths, step=9, limit=given)
    with pytest.raises(RefitError):
        check_logprob_gap(rollout, rollout - 1.1 * bf16.value, lengths, step=9, limit=bf16)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_first_rollout_of_a_run_sets_its_limit(precision):
    """A model that rounds worse than the usual one gets a multiple of its own, but only so far: the first comparison has
    a limit as well. One that rounds better keeps the usual limit."""
    usual, multiple = GAP_LIMITS[precision][1], GAP_MULTIPLES[precision]
    assert GapLimit.of(precision, None).value == multiple * usual
    assert GapLimit.of(precision, 0.9 * usual).value == pytest.approx(0.9 * multiple * usual)
    assert GapLimit.of(precision, 0.1 * usual).value == usual
    assert GapLimit.of(precision, 0.9 * usual, threshold=3.0).value == 3.0
    assert GapLimit.of("fp32", 1e-5) == GapLimit.of("fp32", None), "exact, whatever was measured"
