"""GRPO and Dr. GRPO: advantages against per-group torch.std, the loss against PPO's formula."""

from __future__ import annotations

import math

import pytest
import torch

from frpo_nemo.objective import GRPO, DrGRPO

REWARDS = torch.tensor([1.0, 0.0, 0.5, torch.nan, 2.0, 2.0, 7.0, -1.0])
GROUPS = torch.tensor([5, -2, 5, 5, 5, -2, 8, -2])


def test_advantages_are_centred_and_divided_by_the_sample_std():
    plain, normalised = torch.zeros(8), torch.zeros(8)
    for group in (5, -2):
        chosen = (group == GROUPS) & ~REWARDS.isnan()
        centred = REWARDS[chosen] - REWARDS[chosen].mean()
        plain[chosen], normalised[chosen] = centred, centred / (REWARDS[chosen].std() + 1e-4)  # as in TRL
    torch.testing.assert_close(DrGRPO().effective_advantages(REWARDS, GROUPS), plain)
    torch.testing.assert_close(GRPO().effective_advantages(REWARDS, GROUPS), normalised)


@pytest.mark.parametrize("objective", [GRPO(), DrGRPO()])
def test_equal_rewards_give_exactly_zero(objective):
    rewards, groups = torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64)
    assert objective.effective_advantages(rewards, groups).eq(0).all()


def test_coefficients_and_statistics_match_the_groups_that_take_part():
    objective = GRPO()
    torch.testing.assert_close(
        objective.coefficients(REWARDS, GROUPS), torch.where(REWARDS.isnan() | (GROUPS == 8), 0.0, 1 / 6)
    )
    advantages = objective.effective_advantages(REWARDS, GROUPS)
    assert objective.statistics(REWARDS, GROUPS, advantages) == {
        "max_abs_advantage": advantages.abs().max().item(),
        "share_contributing_groups": pytest.approx(2 / 3),
        "share_zero_spread_groups": 0.0,
    }


@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_equal_ppo_clip_written_out(weighted):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 2, 7, 3, 5])
    old = torch.randn(22, generator=generator, dtype=torch.float64)
    logprobs = (old + 0.5 * torch.randn(22, generator=generator, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.3])
    token_weights = torch.rand(22, generator=generator, dtype=torch.float64) if weighted else None

    ratios, signs = torch.exp(logprobs - old), advantages.repeat_interleave(lengths)
    terms = -torch.minimum(ratios * signs, ratios.clamp(0.9, 1.3) * signs)
    is_clipped = ((ratios > 1.3) & (signs > 0)) | ((ratios < 0.9) & (signs < 0))
    terms = terms if token_weights is None else terms * token_weights
    expected = torch.stack([part.mean() for part in terms.split(lengths.tolist())])
    shares = torch.stack([part.double().mean() for part in is_clipped.split(lengths.tolist())])

    losses, clipped = GRPO(clip_low=0.1, clip_high=0.3).sequence_loss(logprobs, old, lengths, advantages, token_weights)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(clipped, shares)
    assert shares.sum() > 0
    assert not clipped.requires_grad
    actual_gradient = torch.autograd.grad(losses.sum(), logprobs)[0]
    torch.testing.assert_close(actual_gradient, torch.autograd.grad(expected.sum(), logprobs)[0])


def test_a_clipped_ratio_that_overflows_has_gradient_zero():
    logprobs = torch.tensor([200.0], requires_grad=True)
    loss, clipped = DrGRPO().sequence_loss(logprobs, torch.zeros(1), torch.tensor([1]), torch.tensor([1.0]))
    loss.backward()
    assert (loss.item(), clipped.item(), logprobs.grad.item()) == (pytest.approx(-1.2), 1.0, 0.0)


def test_importance_has_no_influence_and_is_not_asked_for():
    assert not GRPO().uses_importance
    expected = GRPO().effective_advantages(REWARDS, GROUPS)
    assert torch.equal(GRPO().effective_advantages(REWARDS, GROUPS, torch.rand(8)), expected)
    assert math.isclose(GRPO().loss_scale, 1.0)
