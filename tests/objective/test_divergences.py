"""f-divergences: gradients against 40-digit arithmetic over the whole range, worst cases against SciPy's minimum over
the simplex, and the limits in lambda."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    DIVERGENCES,
    GENERATOR,
    differences_of_loss,
    drifted_importance,
    far_drifted_importance,
    precise_gradients,
    ragged_batch,
    repeatable,
    seeds,
    worst_penalised_mean,
)
from torch import Tensor

from frpo_nemo.objective import FRPO
from frpo_nemo.objective.divergence import DIVERGENCES as BY_NAME
from frpo_nemo.objective.divergence import WorstCase
from frpo_nemo.objective.ragged import Groups

each_divergence = pytest.mark.parametrize("f_divergence", DIVERGENCES)
with_and_without_jackknife = pytest.mark.parametrize("jackknife", [True, False])
small_rewards = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=2, max_size=8)  # with ties


def one_group(rewards: Tensor) -> Groups:
    return Groups.of(rewards, torch.zeros(rewards.numel(), dtype=torch.int64))


def gradients(rewards: Tensor, m: Tensor, lambda_: float, f_divergence: str, jackknife: bool) -> Tensor:
    return BY_NAME[f_divergence].gradients(one_group(rewards), rewards, m, lambda_, jackknife)


def worst_case(rewards: Tensor, lambda_: float, f_divergence: str) -> WorstCase:
    return BY_NAME[f_divergence].worst_case(one_group(rewards), rewards, lambda_)


# Gradients


@each_divergence
@with_and_without_jackknife
@pytest.mark.parametrize("lambda_", [0.2, 0.7, 4.0])
def test_gradients_are_finite_differences_of_the_dual(f_divergence, jackknife, lambda_):
    rewards, _ = ragged_batch(int(10 * lambda_), [4])
    m = drifted_importance(1, rewards)
    expected = differences_of_loss(rewards.tolist(), m.tolist(), lambda_, f_divergence, jackknife)
    torch.testing.assert_close(gradients(rewards, m, lambda_, f_divergence, jackknife), expected, rtol=1e-9, atol=1e-10)


@each_divergence
@with_and_without_jackknife
@repeatable(60)
@given(
    rewards=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9),
    log_lambda=st.floats(math.log(0.01), math.log(1000)),
    spread=st.sampled_from([1.0, 1e-2, 1e-5]),
    seed=st.one_of(st.none(), seeds),
)
def test_gradients_agree_with_40_digit_arithmetic_over_the_whole_range(
    f_divergence, jackknife, rewards, log_lambda, spread, seed
):
    lambda_ = math.exp(log_lambda)
    values = torch.tensor(rewards, dtype=torch.float64) * spread
    m = torch.ones_like(values) if seed is None else far_drifted_importance(seed, values)
    actual = gradients(values, m, lambda_, f_divergence, jackknife)
    expected = precise_gradients(values.tolist(), m.tolist(), lambda_, f_divergence, jackknife)
    # chi-squared subtracts rewards / lambda of up to 2e5 from their level; with the jackknife G squares nearly cancel
    scale = max(1.0, expected.abs().max().item()) if f_divergence == "chi_squared" else 1.0
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8 * scale)


@each_divergence
@with_and_without_jackknife
@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-9])
def test_gradients_keep_their_digits_beside_one_response_of_much_larger_importance(f_divergence, jackknife, small):
    rewards = torch.tensor([0.3, 0.0, 1.0, 0.5], dtype=torch.float64)
    m = torch.tensor([1.0, small, small, 2 * small], dtype=torch.float64)
    actual = gradients(rewards, m, 0.5, f_divergence, jackknife)
    expected = precise_gradients(rewards.tolist(), m.tolist(), 0.5, f_divergence, jackknife)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=0)


# The worst case


@each_divergence
@repeatable(150)
@given(rewards=small_rewards, lambda_=st.floats(0.1, 10))
def test_worst_case_is_the_minimum_over_the_simplex(f_divergence, rewards, lambda_):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    worst = worst_case(rewards, lambda_, f_divergence)
    expected = worst_penalised_mean(rewards.numpy(), lambda_, f_divergence)
    assert worst.value_K.item() == pytest.approx(expected, abs=1e-7)

    q = worst.density_M.numpy()
    assert (q >= 0).all()
    assert q.sum() == pytest.approx(len(q), rel=1e-12)
    f, _ = GENERATOR[f_divergence]
    divergence = np.mean(f(np.maximum(q, 1e-300)))
    assert worst.divergence_K.item() == pytest.approx(divergence, abs=1e-12)
    assert np.mean(q * rewards.numpy()) + lambda_ * divergence == pytest.approx(worst.value_K.item(), abs=1e-12)


@repeatable(100)
@given(seeds, st.floats(0.2, 10))
def test_on_policy_gradients_are_functions_of_the_worst_density(seed, lambda_):
    """f*(f'(q)): q itself for the KL, q^2 / 2 for chi-squared."""
    rewards, groups = ragged_batch(seed, [5, 2, 7])
    q_kl, q_chi_squared = (worst_density(rewards, groups, lambda_, name) for name in DIVERGENCES)
    for name, g in (("kl", q_kl), ("chi_squared", q_chi_squared.square() / 2)):
        objective = FRPO(lambda_=lambda_, f_divergence=name, jackknife=False, baseline=False)
        torch.testing.assert_close(-objective.effective_advantages(rewards, groups), g.float())


def worst_density(rewards: Tensor, groups: Tensor, lambda_: float, f_divergence: str) -> Tensor:
    return BY_NAME[f_divergence].worst_case(Groups.of(rewards, groups), rewards, lambda_).density_M


@repeatable(100)
@given(small_rewards)
def test_divergences_agree_to_second_order(rewards):
    """Lambda then means the same for each divergence: values differ only by O(lambda^-2)."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    for lambda_ in (1e2, 1e3):
        kl, chi_squared = (worst_case(rewards, lambda_, name).value_K.item() for name in DIVERGENCES)
        assert kl == pytest.approx(chi_squared, abs=20 / lambda_**2)


# Limits in lambda


@each_divergence
@repeatable(50)
@given(small_rewards)
def test_divergence_at_large_lambda_is_half_the_variance_over_lambda_squared(f_divergence, rewards):
    """It holds to five digits, though the value is 1e-13 next to densities of 1: the radius search reads it there."""
    rewards = torch.tensor(rewards, dtype=torch.float64)
    divergence = worst_case(rewards, 1e6, f_divergence).divergence_K.item()
    assert divergence == pytest.approx(rewards.var(correction=0).item() / 2e12, rel=1e-5, abs=1e-20)


@each_divergence
@repeatable(100)
@given(small_rewards)
def test_small_lambda_puts_all_mass_evenly_on_the_lowest_rewards(f_divergence, rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    worst = worst_case(rewards, 1e-3, f_divergence)
    lowest = rewards == rewards.min()
    torch.testing.assert_close(worst.density_M, lowest.double() / lowest.double().mean(), rtol=1e-12, atol=1e-50)
    assert worst.value_K.item() == pytest.approx(rewards.min().item(), abs=1e-3 * len(rewards))


@each_divergence
@repeatable(100)
@given(small_rewards)
def test_value_rises_with_lambda_from_the_lowest_reward_to_the_mean(f_divergence, rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    values = torch.cat([worst_case(rewards, 10.0**k, f_divergence).value_K for k in range(-6, 7)])
    assert values.diff().ge(-1e-9).all()
    assert values[0].item() == pytest.approx(rewards.min().item(), abs=1e-4)
    assert values[-1].item() == pytest.approx(rewards.mean().item(), abs=1e-4)


def test_two_responses_and_chi_squared_by_hand():
    """nu = min(2 lambda + r_0, (2 lambda + r_0 + r_1) / 2), on both sides of r_1."""
    rewards, groups = torch.tensor([0.0, 1.0]), torch.tensor([4, 4])
    by_hand = [  # lambda, jackknife, g_0 and g_1
        (1.0, False, [1.5**2 / 2, 0.5**2 / 2]),
        (1.0, True, [1.5**2 - 1 / 2, 0.5**2 - 1 / 2]),
        (0.25, False, [2.0, 0.0]),
        (0.25, True, [2**2 - 1 / 2, -1 / 2]),
    ]
    for lambda_, jackknife, g in by_hand:
        objective = FRPO(lambda_=lambda_, f_divergence="chi_squared", jackknife=jackknife)
        expected = torch.tensor([(g[1] - g[0]) / 2, (g[0] - g[1]) / 2])
        torch.testing.assert_close(objective.effective_advantages(rewards, groups), expected)
