"""FRPO against direct float64 autograd of the group loss, its limits, and its numerical range."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frpo_nemo.objective import FRPO, DrGRPO
from frpo_nemo.objective.ragged import Groups

SWITCHES = list(itertools.product((True, False), (True, False), ("paper", "objective")))
repeatable = settings(deadline=None, max_examples=50, derandomize=True)


# The reference: section 3 of the paper written down naively, one group at a time.


def naive_group_loss(rewards: Tensor, m: Tensor, objective: FRPO) -> Tensor:
    """float64 [G], [G] -> scalar."""
    size = rewards.numel()
    losses = torch.exp(-(rewards - rewards.mean()) / objective.lambda_) * m
    u = losses.mean()
    value = torch.log(u)
    if objective.jackknife:
        left_out = (size * u - losses) / (size - 1)
        value = size * torch.log(u) - (size - 1) * torch.log(left_out).mean()
    return value - m.mean() if objective.baseline else value


def naive_loss(rewards: Tensor, groups: Tensor, m: Tensor, objective: FRPO) -> Tensor:
    """The reward part of the total loss, scalar."""
    values = []
    for group in groups.unique():
        chosen = (groups == group) & ~rewards.isnan()
        if chosen.sum() >= 2:
            values.append(naive_group_loss(rewards[chosen], m[chosen], objective))
    scale = max(objective.lambda_, 1) if objective.scale == "paper" else objective.lambda_
    return scale * torch.stack(values).mean()


def naive_importance(logprobs: Tensor, old: Tensor, lengths: Tensor, objective: FRPO) -> Tensor:
    ratios = torch.minimum(torch.exp(logprobs - old), torch.tensor(1 + objective.clip_high, dtype=torch.float64))
    return torch.stack([part.mean() for part in ratios.split(lengths.tolist())])


def ragged_batch(seed: int, sizes: list[int], missing: float = 0.0) -> tuple[Tensor, Tensor]:
    """float64 rewards in [-1, 1] (NaN where missing) and scattered group ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(10 * len(sizes), generator=generator)[: len(sizes)] - 5
    groups = ids.repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(groups.numel(), generator=generator)]
    rewards = 2 * torch.rand(groups.numel(), generator=generator, dtype=torch.float64) - 1
    rewards[torch.rand(groups.numel(), generator=generator) < missing] = torch.nan
    return rewards, groups


batches = st.builds(ragged_batch, st.integers(0, 10_000), st.lists(st.integers(1, 7), min_size=1, max_size=5))


# Gradients


@pytest.mark.parametrize(("jackknife", "baseline", "scale"), SWITCHES)
@repeatable
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    lambda_=st.floats(0.2, 30),
    off_policy=st.booleans(),
)
def test_gradient_in_importance_equals_autograd_of_the_group_loss(
    jackknife, baseline, scale, seed, sizes, lambda_, off_policy
):
    objective = FRPO(lambda_=lambda_, jackknife=jackknife, baseline=baseline, scale=scale)
    rewards, groups = ragged_batch(seed, [2, *sizes])  # at least one group takes part
    m = 0.3 + torch.rand_like(rewards) if off_policy else torch.ones_like(rewards)
    (expected,) = torch.autograd.grad(naive_loss(rewards, groups, m.requires_grad_(), objective), m)

    members = Groups.of(rewards, groups)
    exact = objective._gradients(members, rewards[members.members], m.detach()[members.members])
    weights = objective.loss_scale / (members.sizes * members.count)[members.ids].double()
    torch.testing.assert_close(weights * (exact - float(baseline)), expected[members.members], rtol=1e-9, atol=1e-10)

    advantages = objective.effective_advantages(rewards, groups, m.detach())
    assert advantages.dtype == torch.float32
    actual = -objective.coefficients(rewards, groups) * advantages
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6 * objective.loss_scale)


@pytest.mark.parametrize(("jackknife", "baseline", "scale"), SWITCHES)
@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_gradient_in_token_logprobs_equals_autograd_of_the_group_loss(jackknife, baseline, scale, drift):
    objective = FRPO(lambda_=0.4, jackknife=jackknife, baseline=baseline, scale=scale, clip_high=0.25)
    rewards, groups = ragged_batch(3, [2, 5, 1, 4, 3], missing=0.2)
    lengths = torch.randint(1, 9, (rewards.numel(),), generator=torch.Generator().manual_seed(1))
    old = torch.randn(int(lengths.sum()), dtype=torch.float64) - 2
    logprobs = (old + drift * torch.randn_like(old)).requires_grad_()
    reference_loss = naive_loss(rewards, groups, naive_importance(logprobs, old, lengths, objective), objective)
    (expected,) = torch.autograd.grad(reference_loss, logprobs)

    advantages = objective.effective_advantages(rewards, groups, objective.importance(logprobs, old, lengths))
    losses, clipped = objective.sequence_loss(logprobs, old, lengths, advantages)
    (actual,) = torch.autograd.grad((objective.coefficients(rewards, groups) * losses).sum(), logprobs)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
    assert (clipped.sum() > 0) == (drift > 0)
    assert not clipped.requires_grad


def test_gradient_does_not_depend_on_the_split_into_microbatches():
    objective = FRPO(lambda_=0.5)
    rewards, groups = ragged_batch(5, [4, 4, 3])
    lengths = torch.arange(1, rewards.numel() + 1)
    old = torch.randn(int(lengths.sum()), dtype=torch.float64)
    logprobs = (old + 0.1).requires_grad_()
    advantages = objective.effective_advantages(rewards, groups)
    weights = objective.coefficients(rewards, groups)

    def gradient(split: list[int]) -> Tensor:
        tokens = [int(part.sum()) for part in lengths.split(split)]
        sizes = (tokens, tokens, split, split)
        columns = (logprobs, old, lengths, advantages)
        parts = zip(*(column.split(size) for column, size in zip(columns, sizes, strict=True)), strict=True)
        losses = torch.cat([objective.sequence_loss(*part)[0] for part in parts])
        return torch.autograd.grad((weights * losses).sum(), logprobs)[0]

    torch.testing.assert_close(gradient([1] * 11), gradient([11]), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient([3, 7, 1]), gradient([11]), rtol=1e-12, atol=0)


# Invariants


@repeatable
@given(batches, st.floats(0.05, 100), st.booleans())
def test_advantages_of_a_group_sum_to_zero_on_policy(batch, lambda_, jackknife):
    rewards, groups = batch
    advantages = FRPO(lambda_=lambda_, jackknife=jackknife).effective_advantages(rewards, groups)
    for group in groups.unique():
        assert advantages[groups == group].double().sum().abs() < 1e-5


@repeatable
@given(batches, st.floats(0.05, 100), st.floats(-100, 100), st.integers(0, 1000))
def test_permutation_relabelling_and_reward_shift_change_nothing(batch, lambda_, shift, seed):
    rewards, groups = batch
    objective = FRPO(lambda_=lambda_)
    order = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(seed))
    expected = objective.effective_advantages(rewards, groups)[order]
    actual = objective.effective_advantages(rewards[order] + shift, 10**12 - 7 * groups[order])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jackknife", [True, False])
@repeatable
@given(batches)
def test_large_lambda_is_grpo_without_std(jackknife, batch):
    """With the jackknife times G / (G-1): r_i minus the mean of the others, the leave-one-out advantage."""
    rewards, groups = batch
    objective, limit = FRPO(lambda_=1e6, scale="objective", jackknife=jackknife), DrGRPO()
    actual = objective.coefficients(rewards, groups) * objective.effective_advantages(rewards, groups)
    expected = limit.coefficients(rewards, groups) * limit.effective_advantages(rewards, groups)
    sizes = torch.tensor([(groups == group).sum() for group in groups])
    if jackknife:
        expected = expected * sizes / (sizes - 1).clamp(min=1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_two_responses_by_hand():
    rewards, groups = torch.tensor([0.0, 1.0]), torch.tensor([4, 4])
    worse = 1 / (1 + math.exp(-1 / 0.5))  # softmax of (-r / lambda)
    plain = FRPO(lambda_=0.5, jackknife=False).effective_advantages(rewards, groups)
    torch.testing.assert_close(plain, torch.tensor([1 - 2 * worse, 2 * worse - 1]))
    # G = 2: g_i = 2 p_i (2 - 1 / (2 p_i)) = 4 p_i - 1
    jackknifed = FRPO(lambda_=0.5).effective_advantages(rewards, groups)
    torch.testing.assert_close(jackknifed, torch.tensor([2 - 4 * worse, 4 * worse - 2]))


@pytest.mark.parametrize("size", [2, 3, 7, 49])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e3 / 3])
def test_equal_rewards_give_exactly_zero(size, value):
    rewards, groups = torch.full((size,), value), torch.zeros(size, dtype=torch.int64)
    for objective in (FRPO(lambda_=0.01), FRPO(lambda_=0.7, jackknife=False), FRPO(lambda_=300.0)):
        assert objective.effective_advantages(rewards, groups).eq(0).all()


@repeatable
@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_unscored_responses_leave_their_group(seed, sizes):
    objective = FRPO(lambda_=0.3)
    rewards, groups = ragged_batch(seed, sizes, missing=0.4)
    scored = ~rewards.isnan()
    for method in (objective.effective_advantages, objective.coefficients):
        everyone = method(rewards, groups)
        assert everyone[~scored].eq(0).all()
        torch.testing.assert_close(everyone[scored], method(rewards[scored], groups[scored]))
    for group in groups.unique():
        if ((groups == group) & scored).sum() < 2:
            assert objective.coefficients(rewards, groups)[groups == group].eq(0).all()
            assert objective.effective_advantages(rewards, groups)[groups == group].eq(0).all()


def test_coefficients_are_the_scale_over_group_size_and_number_of_groups():
    rewards = torch.tensor([1.0, 0.0, 5.0, 1.0, torch.nan, 0.0, 1.0])
    groups = torch.tensor([7, 7, 9, 3, 3, 3, 3])
    expected = torch.tensor([1 / 4, 1 / 4, 0, 1 / 6, 0, 1 / 6, 1 / 6])
    torch.testing.assert_close(FRPO(lambda_=0.5).coefficients(rewards, groups), expected)
    torch.testing.assert_close(FRPO(lambda_=0.5, scale="objective").coefficients(rewards, groups), expected / 2)
    torch.testing.assert_close(FRPO(lambda_=3.0).coefficients(rewards, groups), expected * 3)


def test_a_batch_without_a_comparable_group_gives_zeros():
    rewards, groups = torch.tensor([1.0, torch.nan, torch.nan]), torch.tensor([0, 0, 1])
    objective = FRPO(lambda_=1.0)
    advantages = objective.effective_advantages(rewards, groups)
    assert advantages.tolist() == objective.coefficients(rewards, groups).tolist() == [0, 0, 0]
    assert objective.statistics(rewards, groups, advantages) == {
        "max_abs_advantage": 0.0, "share_contributing_groups": 0.0, "share_zero_spread_groups": 0.0, "lambda": 1.0,
    }  # fmt: skip


def test_infinite_reward_is_refused():
    with pytest.raises(ValueError, match="reward of response 1 is -inf"):
        FRPO(lambda_=1.0).effective_advantages(torch.tensor([0.0, -torch.inf]), torch.tensor([0, 0]))


# Numerical range


def exact_advantages(rewards: list[float], m: list[float], objective: FRPO) -> list[float]:
    """The same formula as in the naive loss, with 60 digits and no subtraction of what dominates."""
    with mpmath.workdps(60):
        size, mean = len(rewards), mpmath.fsum(rewards) / len(rewards)
        w = [mpmath.exp(-(mpmath.mpf(r) - mean) / mpmath.mpf(objective.lambda_)) for r in rewards]
        losses = [a * mpmath.mpf(b) for a, b in zip(w, m, strict=True)]
        u = mpmath.fsum(losses) / size
        left_out = [mpmath.fsum(losses[:i] + losses[i + 1 :]) / (size - 1) for i in range(size)]
        out = []
        for i in range(size):
            inverse = 1 / u
            if objective.jackknife:
                inverse = size / u - mpmath.fsum(1 / left_out[j] for j in range(size) if j != i)
            out.append(float(int(objective.baseline) - w[i] * inverse))
        return out


@pytest.mark.parametrize("jackknife", [True, False])
@repeatable
@given(
    rewards=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9),
    log_lambda=st.floats(math.log(0.01), math.log(1000)),
    spread=st.sampled_from([1.0, 1e-2, 1e-5]),
    seed=st.one_of(st.none(), st.integers(0, 1000)),
)
def test_agrees_with_60_digit_arithmetic_over_the_whole_range(jackknife, rewards, log_lambda, spread, seed):
    objective = FRPO(lambda_=math.exp(log_lambda), jackknife=jackknife)
    values = torch.tensor(rewards, dtype=torch.float64) * spread
    m = torch.ones_like(values)
    if seed is not None:
        m = 1e-3 + torch.rand(m.shape, dtype=m.dtype, generator=torch.Generator().manual_seed(seed))
    members = Groups.of(values, torch.zeros(len(rewards), dtype=torch.int64))
    actual = 1 - objective._gradients(members, values, m)
    expected = torch.tensor(exact_advantages(values.tolist(), m.tolist(), objective), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@repeatable
@given(
    rewards=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40),
    lambda_=st.floats(0.01, 1000),
    group_size=st.integers(2, 9),
    seed=st.integers(0, 1000),
)
def test_finite_in_float32_over_the_whole_range(rewards, lambda_, group_size, seed):
    rewards = torch.tensor(rewards)
    groups = torch.arange(rewards.numel()) // group_size
    importance = 1.2 * torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed))
    importance[::5] = 0.0  # exp underflows
    for jackknife in (True, False):
        objective = FRPO(lambda_=lambda_, jackknife=jackknife)
        for m in (None, importance):
            advantages = objective.effective_advantages(rewards, groups, m)
            assert advantages.isfinite().all()
            statistics = objective.statistics(rewards, groups, advantages)
            assert all(math.isfinite(value) for value in statistics.values())


def test_jackknife_at_small_lambda_is_bounded_by_twice_the_group():
    rewards, groups = torch.tensor([0.0] + [1.0] * 7), torch.zeros(8, dtype=torch.int64)
    objective = FRPO(lambda_=0.01)
    advantages = objective.effective_advantages(rewards, groups)
    torch.testing.assert_close(advantages, torch.tensor([-14.0] + [2.0] * 7))  # g = 2G - 1 and -1
    statistics = objective.statistics(rewards, groups, advantages)
    assert statistics["max_abs_advantage"] == pytest.approx(14)
    assert statistics["effective_sample_size"] == pytest.approx(8**2 / (15**2 + 7))
    assert statistics["robust_value"] == pytest.approx(0.01 * math.log(8))  # the worst reward, softened


# The sequence loss


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_clip_acts_from_above_only_whatever_the_sign(advantage):
    log_ratios = torch.tensor([math.log(0.01), 0.0, math.log(1.19), math.log(1.21), 200.0], requires_grad=True)
    loss, clipped = FRPO(lambda_=1.0).sequence_loss(
        log_ratios, torch.zeros(5), torch.tensor([5]), torch.tensor([advantage])
    )
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([-advantage * (0.01 + 1 + 1.19 + 1.2 + 1.2) / 5]))
    torch.testing.assert_close(log_ratios.grad, -advantage / 5 * torch.tensor([0.01, 1, 1.19, 0, 0]))
    torch.testing.assert_close(clipped, torch.tensor([0.4]))


def test_token_weights_multiply_each_token():
    logprobs, lengths = torch.zeros(5, requires_grad=True), torch.tensor([2, 3])
    weights = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    loss, _ = FRPO(lambda_=1.0).sequence_loss(logprobs, torch.zeros(5), lengths, torch.tensor([1.0, -3.0]), weights)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.5, 1.5]))
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, -1.0, 0.0, 0.5, 1.0]))


def test_lengths_that_do_not_cover_the_tokens_are_refused():
    with pytest.raises(RuntimeError, match="lengths"):
        FRPO(lambda_=1.0).sequence_loss(torch.zeros(5), torch.zeros(5), torch.tensor([2, 2]), torch.zeros(2))


def test_statistics_of_a_mixed_batch():
    objective = FRPO(lambda_=2.0, jackknife=False)
    rewards = torch.tensor([0.0, 1.0, 3.0, 3.0, 9.0])
    groups = torch.tensor([0, 0, 1, 1, 2])
    statistics = objective.statistics(rewards, groups, objective.effective_advantages(rewards, groups))
    p = 1 / (1 + math.exp(-0.5))
    risks = [-2 * math.log((1 + math.exp(-0.5)) / 2), 3.0]
    sizes = [1 / (p**2 + (1 - p) ** 2), 2.0]
    divergence = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert statistics == pytest.approx({
        "max_abs_advantage": 2 * p - 1, "share_contributing_groups": 2 / 3, "share_zero_spread_groups": 1 / 3,
        "robust_value": sum(risks) / 2, "effective_sample_size": sum(sizes) / 2, "lambda": 2.0,
        "worst_case_divergence": divergence / 2,
    })  # fmt: skip
