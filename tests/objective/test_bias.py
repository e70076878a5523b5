"""The bias of order 1/G of a group's value and gradient, and that the jackknife removes it.

Rewards with two or three values make every group of G a vector of counts: expectations are finite sums over multinomial
probabilities, without sampling noise."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from oracles import chi_squared_nu
from torch import Tensor

from frpo_nemo.objective.divergence import DIVERGENCES
from frpo_nemo.objective.ragged import Groups

GROUP_SIZES = (8, 16, 32, 64)
BINARY = ([0.0, 1.0], [0.4, 0.6])
GRADED = ([0.0, 0.5, 1.0], [0.3, 0.5, 0.2])
# chi-squared: lambda >= the spread of rewards keeps every response below nu, in every group. Below that the value as
# a function of the counts has kinks, and no clean power of G.
CASES = [("kl", 1.0, BINARY), ("kl", 0.7, GRADED), ("chi_squared", 1.0, BINARY), ("chi_squared", 1.0, GRADED)]
each_case = pytest.mark.parametrize(("f_divergence", "lambda_", "distribution"), CASES)


@cache
def all_counts(size: int, outcomes: int) -> Tensor:
    """Return every way to share `size` responses among `outcomes` rewards, int64 [C, outcomes]."""
    if outcomes == 1:
        return torch.tensor([[size]])
    parts = [(first, all_counts(size - first, outcomes - 1)) for first in range(size + 1)]
    return torch.cat([torch.cat([torch.full((len(rest), 1), first), rest], 1) for first, rest in parts])


def multinomial(counts: Tensor, probabilities: Tensor) -> Tensor:
    ways = torch.lgamma(counts.sum(1) + 1.0) - torch.lgamma(counts + 1.0).sum(1)
    return torch.exp(ways + (counts * torch.log(probabilities)).sum(1))


def slope(errors: list[float]) -> float:
    """Return the slope of log |bias| against log G."""
    return np.polyfit(np.log(GROUP_SIZES), np.log(np.abs(errors)), 1)[0]


def as_float64(*lists: list[float]) -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.float64) for values in lists]


# The value V, with its jackknife G V - (G-1) mean_j V_{-j}


def values_of(counts: Tensor, rewards: Tensor, lambda_: float, f_divergence: str) -> Tensor:
    """Return V of a group for each row of counts, [C]."""
    groups, rewards_M = expanded(counts, rewards)
    return DIVERGENCES[f_divergence].worst_case(groups, rewards_M, lambda_).value_K


def expanded(counts: Tensor, rewards: Tensor) -> tuple[Groups, Tensor]:
    rewards_M = rewards.repeat(len(counts)).repeat_interleave(counts.flatten())
    return Groups.of(rewards_M, torch.arange(len(counts)).repeat_interleave(counts.sum(1))), rewards_M


def value_bias(size: int, jackknife: bool, f_divergence: str, lambda_: float, distribution: tuple) -> float:
    rewards, probabilities = as_float64(*distribution)
    counts = all_counts(size, len(rewards)).double()
    values = values_of(counts.long(), rewards, lambda_, f_divergence)
    if jackknife:
        left_out = torch.zeros_like(values)
        for outcome in range(len(rewards)):
            has_one = counts[:, outcome] > 0
            fewer = counts[has_one].long()
            fewer[:, outcome] -= 1
            share = counts[has_one, outcome] / size
            left_out[has_one] += share * values_of(fewer, rewards, lambda_, f_divergence)
        values = size * values - (size - 1) * left_out
    mean = (multinomial(counts, probabilities) * values).sum().item()
    return mean - value_of_distribution(rewards, probabilities, lambda_, f_divergence)


def value_of_distribution(rewards: Tensor, probabilities: Tensor, lambda_: float, f_divergence: str) -> float:
    if f_divergence == "kl":
        return -lambda_ * math.log((probabilities * torch.exp(-rewards / lambda_)).sum())
    mean = (probabilities * rewards).sum()  # all below nu: mean - variance / (2 lambda)
    return (mean - (probabilities * (rewards - mean).square()).sum() / (2 * lambda_)).item()


@each_case
def test_bias_of_the_value_falls_like_one_over_group_size(f_divergence, lambda_, distribution):
    errors = [value_bias(size, False, f_divergence, lambda_, distribution) for size in GROUP_SIZES]
    assert slope(errors) == pytest.approx(-1, abs=0.1)
    assert min(errors) > 0  # optimistic: a worst case over a sample is not as bad


@pytest.mark.parametrize(("f_divergence", "lambda_", "distribution"), CASES[:2])
def test_with_the_jackknife_the_bias_of_the_kl_value_falls_like_its_square(f_divergence, lambda_, distribution):
    errors = [value_bias(size, True, f_divergence, lambda_, distribution) for size in GROUP_SIZES]
    assert slope(errors) == pytest.approx(-2, abs=0.1)


@pytest.mark.parametrize(("f_divergence", "lambda_", "distribution"), CASES[2:])
def test_with_the_jackknife_the_chi_squared_value_is_unbiased(f_divergence, lambda_, distribution):
    """While all responses are below nu it is the mean minus variance / (2 lambda), and (14) makes the variance the
    unbiased one."""
    for size in GROUP_SIZES:
        assert value_bias(size, True, f_divergence, lambda_, distribution) == pytest.approx(0, abs=1e-11)


def test_bias_of_the_kl_value_for_normal_rewards_by_monte_carlo():
    """E exp(-r / lambda) is known: exp(1 / (2 lambda^2)). The bias is (exp(lambda^-2) - 1) lambda / (2 G) + ..."""
    size, lambda_, repeats = 8, 2.0, 40_000
    rewards = torch.randn(repeats, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def values(rewards_KG: Tensor) -> Tensor:
        groups = torch.arange(len(rewards_KG)).repeat_interleave(rewards_KG.shape[1])
        members = Groups.of(rewards_KG.flatten(), groups)
        return DIVERGENCES["kl"].worst_case(members, rewards_KG.flatten(), lambda_).value_K

    exact, plain = -1 / (2 * lambda_), values(rewards)
    without = [values(torch.cat([rewards[:, :j], rewards[:, j + 1 :]], 1)) for j in range(size)]
    jackknifed = size * plain - (size - 1) * torch.stack(without).mean(0)
    error = (plain.std() / math.sqrt(repeats)).item()
    first_order = lambda_ * (math.exp(lambda_**-2) - 1) / (2 * size)
    assert plain.mean().item() - exact == pytest.approx(first_order, abs=4 * error)
    assert first_order > 8 * error
    assert jackknifed.mean().item() == pytest.approx(exact, abs=4 * error)


# The gradient, which is what training sees: of a policy with one logit per reward


def gradient_bias(size: int, jackknife: bool, f_divergence: str, lambda_: float, distribution: tuple) -> float:
    """Return the norm of E[mean_i g_i d log pi(y_i)] minus the gradient of -V / lambda of the distribution itself."""
    rewards, probabilities = as_float64(*distribution)
    counts = all_counts(size, len(rewards))
    groups, rewards_M = expanded(counts, rewards)
    g_M = DIVERGENCES[f_divergence].gradients(groups, rewards_M, torch.ones_like(rewards_M), lambda_, jackknife)
    outcomes_M = torch.searchsorted(rewards, rewards_M)
    scores_MA = torch.eye(len(rewards), dtype=torch.float64)[outcomes_M] - probabilities
    estimates_CA = torch.zeros(counts.shape, dtype=torch.float64).index_add_(0, groups.ids, g_M[:, None] * scores_MA)
    mean_A = (multinomial(counts.double(), probabilities)[:, None] * estimates_CA).sum(0) / size

    if f_divergence == "kl":
        g_A = torch.exp(-rewards / lambda_) / (probabilities * torch.exp(-rewards / lambda_)).sum()
    else:
        nu = chi_squared_nu(rewards, probabilities * len(rewards), lambda_)
        g_A = ((nu - rewards) / lambda_).clamp(min=0).square() / 2
    exact_A = probabilities * (g_A - (probabilities * g_A).sum())
    return (mean_A - exact_A).norm().item()


@each_case
@pytest.mark.parametrize(("jackknife", "power"), [(False, -1), (True, -2)])
def test_bias_of_the_gradient_falls_like_one_over_group_size_and_with_jackknife_its_square(
    f_divergence, lambda_, distribution, jackknife, power
):
    errors = [gradient_bias(size, jackknife, f_divergence, lambda_, distribution) for size in GROUP_SIZES]
    assert slope(errors) == pytest.approx(power, abs=0.1)
