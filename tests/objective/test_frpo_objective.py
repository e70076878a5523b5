"""FRPO as a trainer calls it: its gradient is autograd's of the group loss, for every switch; invariants; float32 range;
the sequence loss. Divergences on their own, the bias and the KL radius have files of their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import DIVERGENCES, batch_loss, batches, drifted_importance, group_sizes, ragged_batch, repeatable, seeds
from torch import Tensor

from frpo_nemo.objective import FRPO, GRPO, DrGRPO

SWITCHES = [
    {"f_divergence": f_divergence, "jackknife": jackknife, "baseline": baseline, "scale": scale}
    for f_divergence, jackknife, baseline, scale in itertools.product(
        DIVERGENCES, (True, False), (True, False), ("paper", "objective")
    )
]
every_switch = pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
each_divergence = pytest.mark.parametrize("f_divergence", DIVERGENCES)
with_and_without_jackknife = pytest.mark.parametrize("jackknife", [True, False])


def clipped_importance(logprobs: Tensor, old: Tensor, lengths: Tensor, clip_high: float) -> Tensor:
    ratios = torch.minimum(torch.exp(logprobs - old), torch.tensor(1 + clip_high, dtype=torch.float64))
    return torch.stack([part.mean() for part in ratios.split(lengths.tolist())])


# Gradients


@every_switch
@repeatable(50)
@given(
    seed=seeds,
    sizes=group_sizes,
    missing=st.sampled_from([0.0, 0.3]),
    lambda_=st.floats(0.2, 30),
    off_policy=st.booleans(),
)
def test_gradient_in_importance_equals_autograd_of_the_group_loss(switches, seed, sizes, missing, lambda_, off_policy):
    objective = FRPO(lambda_=lambda_, **switches)
    rewards, groups = ragged_batch(seed, sizes, missing)
    m = drifted_importance(seed, rewards) if off_policy else torch.ones_like(rewards)
    expected = -torch.autograd.grad(batch_loss(rewards, groups, m.requires_grad_(), objective), m)[0]

    advantages = objective.effective_advantages(rewards, groups, m.detach())
    assert advantages.dtype == torch.float32
    actual = (objective.coefficients(rewards, groups) * advantages).double()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * objective.loss_scale)


@every_switch
@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_gradient_in_token_logprobs_equals_autograd_of_the_group_loss(switches, drift):
    objective = FRPO(lambda_=0.4, clip_high=0.25, **switches)
    rewards, groups = ragged_batch(3, [2, 5, 1, 4, 3], missing=0.2)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (rewards.numel(),), generator=generator)
    old, noise = torch.randn(2, int(lengths.sum()), dtype=torch.float64, generator=generator)
    logprobs = (old + drift * noise).requires_grad_()
    m = clipped_importance(logprobs, old, lengths, clip_high=0.25)
    (expected,) = torch.autograd.grad(batch_loss(rewards, groups, m, objective), logprobs)

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


@each_divergence
@with_and_without_jackknife
@repeatable(50)
@given(batches, st.floats(0.05, 100))
def test_advantages_of_a_group_sum_to_zero_on_policy(f_divergence, jackknife, batch, lambda_):
    rewards, groups = batch
    objective = FRPO(lambda_=lambda_, jackknife=jackknife, f_divergence=f_divergence)
    advantages = objective.effective_advantages(rewards, groups)
    for group in groups.unique():
        mine = advantages[groups == group].double()
        assert mine.sum().abs() <= 1e-6 * (1 + mine.abs().sum())


@every_switch
@repeatable(50)
@given(batches, st.floats(0.05, 100), st.floats(-100, 100), seeds, st.booleans())
def test_permutation_relabelling_and_reward_shift_change_nothing(switches, batch, lambda_, shift, seed, off_policy):
    rewards, groups = batch
    objective = FRPO(lambda_=lambda_, **switches)
    m = drifted_importance(seed, rewards) if off_policy else torch.ones_like(rewards)
    order = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(seed))
    expected = objective.effective_advantages(rewards, groups, m)[order]
    actual = objective.effective_advantages(rewards[order] + shift, 10**12 - 7 * groups[order], m[order])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@every_switch
@repeatable(50)
@given(seed=seeds, others=group_sizes, lambda_=st.floats(0.05, 100))
def test_advantages_of_a_group_do_not_depend_on_the_other_groups(switches, seed, others, lambda_):
    objective = FRPO(lambda_=lambda_, **switches)
    rewards, groups = ragged_batch(seed, [3, *others])
    together = objective.effective_advantages(rewards, groups)
    for group in groups.unique():
        mine = groups == group
        alone = objective.effective_advantages(rewards[mine], groups[mine])
        torch.testing.assert_close(together[mine], alone, rtol=1e-6, atol=1e-6)


@each_divergence
@with_and_without_jackknife
@repeatable(50)
@given(batch=batches)
def test_large_lambda_is_grpo_without_std(f_divergence, jackknife, batch):
    """The jackknife multiplies by G / (G-1): r_i minus the mean of the others, the leave-one-out advantage."""
    rewards, groups = batch
    objective = FRPO(lambda_=1e6, scale="objective", jackknife=jackknife, f_divergence=f_divergence)
    limit = DrGRPO()
    actual = objective.coefficients(rewards, groups) * objective.effective_advantages(rewards, groups)
    expected = limit.coefficients(rewards, groups) * limit.effective_advantages(rewards, groups)
    if jackknife:
        sizes = torch.tensor([((groups == group) & ~rewards.isnan()).sum() for group in groups])
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


@each_divergence
@with_and_without_jackknife
@pytest.mark.parametrize("lambda_", [0.01, 0.7, 300.0])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e3 / 3])
def test_groups_of_equal_rewards_get_exactly_zero(f_divergence, jackknife, lambda_, value):
    objective = FRPO(lambda_=lambda_, jackknife=jackknife, f_divergence=f_divergence)
    for size in (2, 3, 7, 49):
        rewards, groups = torch.full((size,), value, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        beside = torch.cat([rewards, torch.arange(5.0)]), torch.cat([groups, torch.ones(5, dtype=torch.int64)])
        advantages = objective.effective_advantages(rewards, groups)
        assert advantages.eq(0).all()
        assert objective.statistics(rewards, groups, advantages)["share_zero_spread_groups"] == 1
        assert objective.effective_advantages(*beside)[:size].eq(0).all()


def test_off_policy_a_group_of_equal_rewards_is_driven_from_importance_one():
    """The slope of log mean m - mean m, which is largest where the mean of m is 1."""
    rewards, groups = torch.full((4,), 0.3), torch.zeros(4, dtype=torch.int64)
    importance = torch.tensor([0.8, 0.9, 1.1, 0.7])
    advantages = FRPO(lambda_=0.5, jackknife=False).effective_advantages(rewards, groups, importance)
    torch.testing.assert_close(advantages, (1 - 1 / importance.mean()).expand(4))


@every_switch
def test_equal_rewards_in_a_group_get_equal_advantages(switches):
    rewards, groups = torch.tensor([0.1, 0.7, 0.1, 0.7, 0.7, 0.3]), torch.zeros(6, dtype=torch.int64)
    for lambda_ in (0.01, 0.5, 20.0):
        advantages = FRPO(lambda_=lambda_, **switches).effective_advantages(rewards, groups)
        assert advantages[0] == advantages[2]
        assert advantages[1] == advantages[3] == advantages[4]
        assert advantages[0] <= advantages[5] <= advantages[1]


@each_divergence
@repeatable(50)
@given(seed=seeds, sizes=group_sizes)
def test_unscored_responses_leave_their_group(f_divergence, seed, sizes):
    objective = FRPO(lambda_=0.3, f_divergence=f_divergence)
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


@every_switch
@repeatable(50)
@given(
    rewards=st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=40),
    log_lambda=st.floats(math.log(0.01), math.log(1000)),
    group_size=st.integers(2, 9),
    seed=seeds,
)
def test_finite_in_float32_over_the_whole_range(switches, rewards, log_lambda, group_size, seed):
    objective = FRPO(lambda_=math.exp(log_lambda), **switches)
    rewards = torch.tensor(rewards)
    groups = torch.arange(rewards.numel()) // group_size
    importance = 1.2 * torch.rand(rewards.shape, generator=torch.Generator().manual_seed(seed))
    importance[::5] = 0.0  # exp underflows
    for m in (None, importance):
        advantages = objective.effective_advantages(rewards, groups, m)
        assert advantages.isfinite().all()
        statistics = objective.statistics(rewards, groups, advantages)
        assert all(math.isfinite(value) for value in statistics.values())


@each_divergence
def test_small_lambda_without_jackknife_looks_at_the_worst_response_only(f_divergence):
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 2.0]), torch.zeros(4, dtype=torch.int64)
    objective = FRPO(lambda_=0.01, jackknife=False, baseline=False, f_divergence=f_divergence)
    q = 4.0
    g = {"kl": q, "chi_squared": q**2 / 2}[f_divergence]
    torch.testing.assert_close(objective.effective_advantages(rewards, groups), torch.tensor([0.0, -g, 0.0, 0.0]))


def test_jackknife_at_small_lambda_is_bounded_by_twice_the_group():
    rewards, groups = torch.tensor([0.0] + [1.0] * 7), torch.zeros(8, dtype=torch.int64)
    objective = FRPO(lambda_=0.01)
    advantages = objective.effective_advantages(rewards, groups)
    torch.testing.assert_close(advantages, torch.tensor([-14.0] + [2.0] * 7))  # g = 2G - 1 and -1
    statistics = objective.statistics(rewards, groups, advantages)
    assert statistics["max_abs_advantage"] == pytest.approx(14)
    assert statistics["effective_sample_size"] == pytest.approx(8**2 / (15**2 + 7))
    assert statistics["robust_value"] == pytest.approx(0.01 * math.log(8))  # the worst reward, softened


def test_jackknife_at_small_lambda_rewards_the_second_worst_the_most():
    """It is the worst of the group without the worst."""
    rewards, groups = torch.arange(8.0), torch.zeros(8, dtype=torch.int64)
    advantages = FRPO(lambda_=0.01).effective_advantages(rewards, groups)
    torch.testing.assert_close(advantages, torch.tensor([-14.0, 8.0] + [1.0] * 6))


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


def test_frozen_importance_is_not_asked_for():
    assert FRPO(lambda_=1.0).uses_importance
    assert not FRPO(lambda_=1.0, refresh_importance=False).uses_importance


@pytest.mark.parametrize("jackknife", [True, False])
@pytest.mark.parametrize("f_divergence", ["kl", "chi_squared"])
@pytest.mark.parametrize("scale, lambda_", [("paper", 0.5), ("paper", 5.0), ("objective", 0.5)])
def test_the_reward_weight_is_the_slope_of_the_advantages_where_rewards_hardly_differ(
    jackknife, f_divergence, scale, lambda_
):
    objective = FRPO(lambda_=lambda_, f_divergence=f_divergence, jackknife=jackknife, scale=scale)
    rewards = 1e-4 * torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0, -2.5, 0.0, 1.5], dtype=torch.float64)
    advantages = (
        objective.loss_scale * objective.effective_advantages(rewards, torch.zeros(8, dtype=torch.int64)).double()
    )
    centred = rewards - rewards.mean()
    slope = (advantages @ centred / (centred @ centred)).item()
    assert slope == pytest.approx(objective.reward_weight(8), rel=1e-3)
    assert DrGRPO().reward_weight(8) == 1
    assert FRPO(kl_radius=0.1).reward_weight(8) is None and GRPO().reward_weight(8) is None
