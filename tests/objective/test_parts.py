"""Several rewards of which some responses lack some: a missing one moves no policy by itself, whatever the objective."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import group_sizes, ragged_batch, repeatable, seeds
from torch import Tensor

from frpo_nemo.objective import FRPO, GRPO, DrGRPO
from frpo_nemo.objective.parts import compared_rewards, partly_scored

NAN = math.nan
OBJECTIVES = {
    "grpo": GRPO(),
    "dr_grpo": DrGRPO(),
    "frpo": FRPO(lambda_=0.3),
    "frpo without jackknife": FRPO(lambda_=0.3, jackknife=False),
    "frpo without baseline": FRPO(lambda_=0.3, baseline=False),
    "frpo, chi_squared": FRPO(lambda_=0.3, f_divergence="chi_squared"),
    "frpo, kl_radius": FRPO(kl_radius=0.1),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
EACH_ITS_OWN = {"a": [1, 0, NAN, NAN], "b": [NAN, NAN, 3, 5]}


def one_group(**parts: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return parts [N, P], weights of 1, and one group."""
    columns = torch.tensor([*parts.values()], dtype=torch.float64).T
    return columns, torch.ones(len(parts)), torch.zeros(len(columns), dtype=torch.int64)


def random_parts(seed: int, sizes: list[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ragged groups with ties; in each group every part has its own share of missing values, from none to all."""
    generator = torch.Generator().manual_seed(seed)
    _, groups = ragged_batch(seed, sizes)
    parts = torch.stack([ragged_batch(seed + 1 + part, sizes)[0] for part in range(count)], 1)
    for group, part in itertools.product(groups.unique(), range(count)):
        share = torch.randint(0, 5, (1,), generator=generator) / 4
        missing = (torch.rand(groups.shape, generator=generator) < share) & (groups == group)
        parts[missing, part] = NAN
    return parts, 4 * torch.rand(count, generator=generator) - 2, groups


def advantages_and_coefficients(objective, rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    objective = objective.for_batch(rewards, groups, {})
    return objective.effective_advantages(rewards, groups), objective.coefficients(rewards, groups)


@pytest.mark.parametrize("value", [1, -1, 0, 7])
@every_objective
def test_a_reward_that_half_of_a_group_lacks_moves_nothing_if_it_is_equal(objective, value):
    """Counted as 0, it would: 1 against and -1 for those that lack it."""
    rewards = compared_rewards(*one_group(a=[1, 1, 1, 1], b=[NAN, NAN, value, value]))
    assert rewards.tolist() == [1 + value] * 4
    advantages, _ = advantages_and_coefficients(objective, rewards, torch.zeros(4, dtype=torch.int64))
    assert advantages.tolist() == [0 if getattr(objective, "baseline", True) else -1] * 4


def with_one_more(seed: int, parts: Tensor, weights: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return a further reward that is equal wherever a group has it."""
    generator = torch.Generator().manual_seed(seed)
    ids, places = groups.unique(return_inverse=True)
    equal = (6 * torch.rand(ids.numel(), generator=generator, dtype=torch.float64) - 3)[places]
    equal[torch.rand(groups.shape, generator=generator) < torch.rand(1, generator=generator)] = NAN
    return torch.cat([parts, equal[:, None]], 1), torch.cat([weights, torch.tensor([-1.5])])


# Where nothing differs, one more response makes one more group that counts, in which equal rewards have advantages of 0 but
# for FRPO without baseline: that changes the lambda of a radius.
@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"frpo without baseline", "frpo, kl_radius"}))
@repeatable(60)
@given(seed=seeds, sizes=group_sizes, count=st.integers(1, 4))
def test_a_reward_that_is_equal_wherever_a_group_has_it_changes_no_advantage(name, seed, sizes, count):
    """Whoever had a reward before, and whoever has none but that one."""
    parts, weights, groups = random_parts(seed, sizes, count)
    before = compared_rewards(parts, weights, groups)
    after = compared_rewards(*with_one_more(seed, parts, weights, groups), groups)
    expected, _ = advantages_and_coefficients(OBJECTIVES[name], before, groups)
    advantages, _ = advantages_and_coefficients(OBJECTIVES[name], after, groups)
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-5)


@every_objective
@repeatable(40)
@given(seed=seeds, sizes=group_sizes, count=st.integers(1, 4))
def test_where_every_response_had_a_reward_it_changes_no_weight_and_no_lambda_either(objective, seed, sizes, count):
    parts, weights, groups = random_parts(seed, sizes, count)
    parts[:, 0] = parts[:, 0].where(~parts.isnan().all(1), 0.5)
    before = compared_rewards(parts, weights, groups)
    after = compared_rewards(*with_one_more(seed, parts, weights, groups), groups)
    expected, changed = (advantages_and_coefficients(objective, rewards, groups) for rewards in (before, after))
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)


def written_out(parts: list[list[float]], weights: list[float]) -> list[float]:
    """Apply the rule to one group, response by response."""
    columns = [[p for p in column if not math.isnan(p)] for column in zip(*parts, strict=True)]
    differ = [
        weight * max(c, default=0) != weight * min(c, default=0) for c, weight in zip(columns, weights, strict=True)
    ]
    wanted = differ if any(differ) else [True] * len(columns)
    rewards = []
    for row in parts:
        filled = [sum(c) / len(c) if math.isnan(p) and c else p for p, c in zip(row, columns, strict=True)]
        total = sum(weight * p for p, weight in zip(filled, weights, strict=True) if not math.isnan(p))
        takes_part = any(wanted and not math.isnan(p) for p, wanted in zip(row, wanted, strict=True))
        rewards.append(total if takes_part else NAN)
    return rewards


@repeatable(100)
@given(seed=seeds, sizes=group_sizes, count=st.integers(1, 4))
def test_rewards_are_those_of_the_rule_written_out_group_by_group(seed, sizes, count):
    parts, weights, groups = random_parts(seed, sizes, count)
    expected = torch.zeros(groups.shape, dtype=torch.float64)
    for group in groups.unique():
        members = groups == group
        expected[members] = torch.tensor(written_out(parts[members].tolist(), weights.tolist()), dtype=torch.float64)
    torch.testing.assert_close(compared_rewards(parts, weights, groups), expected, equal_nan=True)


@repeatable(50)
@given(seed=seeds, sizes=group_sizes, count=st.integers(1, 4))
def test_a_group_that_has_all_of_its_rewards_is_their_weighted_sum_bit_for_bit(seed, sizes, count):
    """The same holds for a group that lacks some rewards as a whole, because they are not for its task."""
    parts, weights, groups = random_parts(seed, sizes, count)
    for group in groups.unique():
        some_lack = parts[groups == group].isnan().any(0)
        parts[:, some_lack] = parts[:, some_lack].where((groups != group)[:, None], NAN)
    total = sum((weights.double()[part] * parts[:, part]).nan_to_num() for part in range(count))
    expected = total.where(~parts.isnan().all(1), NAN)
    torch.testing.assert_close(compared_rewards(parts, weights, groups), expected, rtol=0, atol=0, equal_nan=True)
    assert not partly_scored(parts, groups).any()


def test_responses_are_compared_with_those_that_have_the_same_rewards():
    rewards = compared_rewards(*one_group(**EACH_ITS_OWN))
    assert rewards.tolist() == [1 + 4, 0 + 4, 0.5 + 3, 0.5 + 5]
    assert partly_scored(*one_group(**EACH_ITS_OWN)[::2]).all()


def test_a_response_that_nothing_compares_with_its_group_leaves_it():
    """It has neither of the rewards that differ; what it has says the same of all."""
    b_differs = one_group(a=[1, 1, 1, 1], b=[NAN, 0, 1, NAN])
    assert compared_rewards(*b_differs).nan_to_num(-9).tolist() == [-9, 1, 2, -9]
    alone = one_group(a=[1, 0, NAN, 1], b=[NAN, NAN, 7, NAN])
    assert compared_rewards(*alone).nan_to_num(-9).tolist() == [8, 7, -9, 8]
    weightless = b_differs[0], torch.tensor([1.0, 0.0]), b_differs[2]
    assert compared_rewards(*weightless).tolist() == [1, 1, 1, 1]


def test_a_missing_part_of_equal_ones_is_exactly_equal_however_their_mean_rounds():
    """0.1 + 0.1 + 0.1 is not 3 * 0.1; a spread of 1e-17 would be one, for lambda from a KL radius."""
    rewards = compared_rewards(*one_group(a=[0, 0, 0, 0], b=[0.1, 0.1, 0.1, NAN]))
    assert rewards.unique().numel() == 1


@pytest.mark.parametrize("judged", [2, 3, 5, 6])
def test_missing_at_random_shrinks_what_a_reward_says_and_does_not_turn_it(judged):
    """The mean over all ways to lack it, theory.md (22): (judged - 1) / (G - 1) of the centred reward."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.2, -3.0, 0.4], dtype=torch.float64)
    total, ways = torch.zeros(6), list(itertools.combinations(range(6), judged))
    for chosen in ways:
        part = torch.full((6,), NAN, dtype=torch.float64)
        part[[*chosen]] = rewards[[*chosen]]
        parts = torch.stack([torch.arange(6.0, dtype=torch.float64), part], 1)
        compared = compared_rewards(parts, torch.ones(2), torch.zeros(6, dtype=torch.int64)) - parts[:, 0]
        total += (compared - compared.mean()).float() / len(ways)
    torch.testing.assert_close(total, ((judged - 1) / 5 * (rewards - rewards.mean())).float())


def test_nothing_at_all_has_no_reward():
    assert compared_rewards(*one_group(a=[NAN, NAN], b=[NAN, NAN])).isnan().all()
    empty = torch.zeros(0, 2), torch.ones(2), torch.zeros(0, dtype=torch.int64)
    assert compared_rewards(*empty).shape == partly_scored(*empty[::2]).shape == (0,)
