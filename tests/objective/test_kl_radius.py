"""lambda from a KL radius: against the primal worst case by SciPy, a 40-digit root, and the ends of the range; what is
kept from batch to batch."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import drifted_importance, precise_lambda, repeatable, seeds, worst_mean_in_the_ball
from torch import Tensor

from frpo_nemo.objective import FRPO, GRPO
from frpo_nemo.objective.divergence import DIVERGENCES, WorstCase
from frpo_nemo.objective.ragged import Groups

UNSCORED = torch.nan
grades = st.integers(-4, 4).map(lambda n: n / 4)  # with ties, also of the lowest
prompts = st.lists(st.lists(grades, min_size=2, max_size=5), min_size=1, max_size=4)
share_of_attainable = st.one_of(st.floats(1e-3, 0.95), st.sampled_from([0.99, 0.999]))


def as_batch(prompts: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return float64 rewards and group ids, interleaved, with an unscored response and a prompt that has one response only."""
    rewards = torch.tensor([r for group in prompts for r in group] + [UNSCORED, 7.0], dtype=torch.float64)
    groups = torch.tensor([x for x, group in enumerate(prompts) for _ in group] + [0, 99])
    order = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(0))
    return rewards[order], groups[order]


def attainable(prompts: list[list[float]]) -> float:
    """Return the mean KL with all mass on the lowest rewards."""
    return float(np.mean([math.log(len(group) / group.count(min(group))) for group in prompts]))


def solved(prompts: list[list[float]], radius: float, **fields) -> FRPO:
    return FRPO(kl_radius=radius, **fields).for_batch(*as_batch(prompts), {})


def worst_case(prompts: list[list[float]], lambda_: float) -> WorstCase:
    rewards, groups = as_batch(prompts)
    members = Groups.of(rewards, groups)
    return DIVERGENCES["kl"].worst_case(members, rewards[members.members], lambda_)


def dual_value(prompts: list[list[float]], objective: FRPO, radius: float) -> float:
    rewards, groups = as_batch(prompts)
    statistics = objective.statistics(rewards, groups, objective.effective_advantages(rewards, groups))
    return statistics["robust_value"] - objective.lambda_ * radius


# Inside the range


@repeatable(50)
@given(prompts, share_of_attainable)
def test_dual_value_is_the_worst_mean_reward_in_the_ball(prompts, share):
    assume(attainable(prompts) > 0)
    radius = share * attainable(prompts)
    objective = solved(prompts, radius)
    groups = [np.array(group) for group in prompts]
    assert dual_value(prompts, objective, radius) == pytest.approx(worst_mean_in_the_ball(groups, radius), abs=1e-5)


@repeatable(100)
@given(prompts, st.one_of(share_of_attainable, st.floats(1e-8, 1e-3)))
def test_lambda_is_the_root_of_the_kl(prompts, share):
    assume(attainable(prompts) > 0)
    radius = max(1e-8, share * attainable(prompts))
    expected = precise_lambda([np.array(group) for group in prompts], radius)
    assert solved(prompts, radius).lambda_ == pytest.approx(expected, rel=1e-8)


@repeatable(100)
@given(seeds, st.floats(-8, math.log10(0.999)))
def test_the_worst_policies_are_at_the_radius_and_their_mean_is_the_dual_value(seed, log_share):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randn(size, generator=generator).tolist() for size in (2, 5, 3, 16)]
    radius = 10**log_share * attainable(prompts)
    objective = solved(prompts, radius)
    worst = worst_case(prompts, objective.lambda_)
    assert worst.divergence_K.mean().item() == pytest.approx(radius, rel=1e-8)
    mean_reward_K = worst.value_K - objective.lambda_ * worst.divergence_K
    assert mean_reward_K.mean().item() == pytest.approx(dual_value(prompts, objective, radius), abs=1e-9)


@repeatable(50)
@given(share=st.floats(0.05, 0.95))
def test_lambda_is_found_where_differences_are_tiny_beside_the_rewards(share):
    prompts = [[0.0, 1e-14, 1e-10], [1000.1] * 7]
    radius = share * attainable(prompts)
    worst = worst_case(prompts, solved(prompts, radius).lambda_)
    assert worst.divergence_K.mean().item() == pytest.approx(radius, rel=1e-8)


@repeatable(100)
@given(prompts, share_of_attainable)
def test_the_dual_is_largest_at_lambda(prompts, share):
    assume(attainable(prompts) > 0)
    radius = share * attainable(prompts)
    lambda_ = solved(prompts, radius).lambda_
    best, *others = (
        worst_case(prompts, factor * lambda_).value_K.mean().item() - factor * lambda_ * radius
        for factor in (1, 0.9, 1.1, 0.5, 2)
    )
    assert best >= max(others) - 1e-12


@repeatable(100)
@given(prompts, share_of_attainable, st.floats(-100, 100), st.floats(0.01, 100), seeds)
def test_lambda_ignores_order_and_shift_and_scales_with_the_rewards(prompts, share, shift, factor, seed):
    assume(attainable(prompts) > 0)
    objective = FRPO(kl_radius=share * attainable(prompts))
    rewards, groups = as_batch(prompts)
    lambda_ = objective.for_batch(rewards, groups, {}).lambda_
    order = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(seed))
    moved = objective.for_batch(factor * (rewards[order] + shift), 1000 - 3 * groups[order], {})
    assert moved.lambda_ == pytest.approx(factor * lambda_, rel=1e-8)


@repeatable(60)
@given(prompts)
def test_a_larger_radius_gives_a_smaller_lambda(prompts):
    assume(attainable(prompts) > 0)
    radii = [0, *(share * attainable(prompts) for share in (1e-6, 0.01, 0.3, 0.9)), 10]
    lambdas = [solved(prompts, radius).lambda_ for radius in radii]
    assert all(larger > smaller for larger, smaller in zip(lambdas, lambdas[1:], strict=False))


# The ends


@pytest.mark.parametrize("scale", ["paper", "objective"])
@pytest.mark.parametrize("jackknife", [True, False])
@repeatable(60)
@given(prompts=prompts, factor=st.sampled_from([1e-3, 1.0, 1e3]))
def test_radius_zero_is_grpo_without_std(scale, jackknife, prompts, factor):
    prompts = [[factor * r for r in group] for group in prompts]
    assume(attainable(prompts) > 0)
    rewards, groups = as_batch(prompts)
    objective = solved(prompts, 0.0, scale=scale, jackknife=jackknife)
    advantages = objective.loss_scale * objective.effective_advantages(rewards, groups)
    for group in groups.unique():
        mine = (groups == group) & ~rewards.isnan()
        size = int(mine.sum())
        if size >= 2:
            expected = rewards[mine] - rewards[mine].mean()
            expected = expected * size / (size - 1) if jackknife else expected
            torch.testing.assert_close(advantages[mine].double(), expected, rtol=1e-4, atol=1e-4 * factor)


@repeatable(100)
@given(prompts, st.sampled_from([1.0, 1.001, 1.5, 100.0]))
def test_a_radius_that_all_mass_on_the_lowest_attains_gives_their_mean(prompts, share):
    assume(attainable(prompts) > 0)
    radius = share * attainable(prompts)
    objective = solved(prompts, radius)
    lowest = float(np.mean([min(group) for group in prompts]))
    assert dual_value(prompts, objective, radius) == pytest.approx(lowest, abs=1e-5 * (1 + radius))

    rewards, groups = as_batch(prompts)
    members = Groups.of(rewards, groups)
    scored = rewards[members.members]
    is_lowest = (scored == -members.max(-scored)[members.ids]).double()
    density = worst_case(prompts, objective.lambda_).density_M
    torch.testing.assert_close(density, is_lowest / members.mean(is_lowest)[members.ids], rtol=1e-9, atol=1e-12)


@repeatable(100)
@given(seeds, st.floats(0, 5), st.floats(-3, 3))
def test_every_radius_and_size_of_rewards_gives_finite_advantages(seed, radius, log_size):
    generator = torch.Generator().manual_seed(seed)
    rewards = 10**log_size * torch.randn(40, generator=generator)
    groups = torch.randint(6, (40,), generator=generator)
    objective = FRPO(kl_radius=radius).for_batch(rewards, groups, {})
    for m in (None, drifted_importance(seed, rewards)):
        assert objective.effective_advantages(rewards, groups, m).isfinite().all()


# From batch to batch

WITHOUT_DIFFERENCES = [
    (torch.tensor([0.5, 0.5, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])),
    (torch.tensor([0.5, UNSCORED, 2.0]), torch.tensor([0, 0, 1])),
    (torch.full((7,), 0.1, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)),  # whose sum rounds
]
FIRST = as_batch([[0.0, 1.0, 0.5], [2.0, 1.0]])
SECOND = as_batch([[3.0, 1.0, 0.5, 0.5], [2.0, -1.0]])


@pytest.mark.parametrize("batch", WITHOUT_DIFFERENCES)
@pytest.mark.parametrize(("memory", "lambda_"), [({}, 1.0), ({"lambda_": 0.3}, 0.3)])
def test_without_differing_rewards_lambda_stays_and_advantages_are_zero(batch, memory, lambda_):
    objective = FRPO(kl_radius=0.1, radius_smoothing=0.5).for_batch(*batch, memory)
    assert objective.lambda_ == lambda_
    assert objective.effective_advantages(*batch).eq(0).all()


@pytest.mark.parametrize("batch", WITHOUT_DIFFERENCES)
def test_a_batch_without_differing_rewards_has_no_part_in_the_average(batch):
    objective = FRPO(kl_radius=0.1, radius_smoothing=0.9)
    memory = {}
    objective.for_batch(*batch, memory)
    assert objective.for_batch(*FIRST, memory) == objective.for_batch(*FIRST, {})


def test_log_lambda_is_averaged_over_batches_in_memory():
    alone = [FRPO(kl_radius=0.1).for_batch(*batch, {}).lambda_ for batch in (FIRST, SECOND)]
    objective, memory = FRPO(kl_radius=0.1, radius_smoothing=0.75), {}
    assert objective.for_batch(*FIRST, memory).lambda_ == alone[0]
    average = math.exp(0.75 * math.log(alone[0]) + 0.25 * math.log(alone[1]))
    assert objective.for_batch(*SECOND, memory).lambda_ == pytest.approx(average, rel=1e-12)
    third = math.exp(0.75 * math.log(average) + 0.25 * math.log(alone[0]))
    assert objective.for_batch(*FIRST, memory).lambda_ == pytest.approx(third, rel=1e-12)


def test_without_smoothing_memory_has_no_influence():
    objective = FRPO(kl_radius=0.1)
    fresh, later = (objective.for_batch(*FIRST, memory).lambda_ for memory in ({}, {"lambda_": 123.0}))
    assert later == pytest.approx(fresh, rel=1e-12)


def test_memory_continues_bitwise_through_json():
    objective, memory = FRPO(kl_radius=0.07, radius_smoothing=0.9), {}
    for batch in (FIRST, SECOND, FIRST):
        objective.for_batch(*batch, memory)
    restored = json.loads(json.dumps(memory))
    assert objective.for_batch(*SECOND, restored).lambda_ == objective.for_batch(*SECOND, memory).lambda_


def test_the_solved_objective_differs_in_lambda_only():
    fields = {"jackknife": False, "baseline": False, "scale": "objective", "clip_high": 0.3, "beta": 0.04}
    objective = FRPO(kl_radius=0.1, **fields).for_batch(*FIRST, {})
    assert objective == FRPO(lambda_=objective.lambda_, **fields)


@pytest.mark.parametrize("objective", [FRPO(lambda_=0.5), FRPO(lambda_=2.0, f_divergence="chi_squared"), GRPO()])
def test_an_objective_without_radius_is_the_same_for_every_batch(objective):
    memory = {}
    assert objective.for_batch(*FIRST, memory) is objective
    assert memory == {}


def test_a_radius_that_no_batch_has_resolved_is_refused():
    objective = FRPO(kl_radius=0.1)
    rewards, groups = FIRST
    for use in (
        lambda: objective.loss_scale,
        lambda: objective.effective_advantages(rewards, groups),
        lambda: objective.coefficients(rewards, groups),
        lambda: objective.statistics(rewards, groups, torch.zeros(rewards.shape)),
    ):
        with pytest.raises(ValueError, match="no lambda_ before for_batch"):
            use()
