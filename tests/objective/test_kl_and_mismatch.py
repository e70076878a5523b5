"""The KL estimator and the train-rollout weights, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective.kl import LINEAR_BEYOND, k3, k3_penalty, sequence_kl
from frpo_nemo.objective.mismatch import agreement, mismatch_statistics, truncated_importance


def test_k3_is_unbiased_for_the_kl():
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    reference = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3(policy, reference)).sum(), exact)
    assert k3(policy, reference).ge(0).all()


def test_k3_keeps_its_digits_where_the_policies_nearly_agree():
    gap = 1e-3
    value = k3(torch.tensor([-1.0]), torch.tensor([-1.0]) + gap).item()
    assert value == pytest.approx(gap**2 / 2, rel=1e-3)  # exp(d) - 1 - d would keep one digit in float32


def test_sequence_kl_is_the_token_mean_of_each_sequence_and_differentiable():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -2.0, -2.0], dtype=torch.float64)
    values = sequence_kl(logprobs, reference, torch.tensor([1, 2]))
    expected = [math.exp(-0.5) + 0.5 - 1, (math.e - 2) / 2]
    assert values.tolist() == pytest.approx(expected)
    values.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1 - math.exp(-0.5), 0, (1 - math.e) / 2])


def penalty_and_slope(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the penalty at d = log pi_ref - log pi, and its derivative in d."""
    logprobs = (-difference).requires_grad_()
    penalty = k3_penalty(logprobs, torch.zeros_like(difference))
    penalty.sum().backward()
    return penalty.detach(), -logprobs.grad


def test_the_penalty_is_k3_bit_for_bit_where_the_ratio_is_below_the_bound():
    difference = torch.cat([torch.linspace(-30, LINEAR_BEYOND, 1000), torch.tensor([0.0, 1e-4, -1e-6])])
    logprobs = (-difference).requires_grad_()
    k3(logprobs, torch.zeros_like(difference)).sum().backward()
    penalty, slope = penalty_and_slope(difference)
    assert torch.equal(penalty, k3(-difference, torch.zeros_like(difference)))
    assert torch.equal(slope, -logprobs.grad)


def test_beyond_the_bound_the_penalty_goes_on_along_its_tangent():
    """Value and slope are continuous, and a token that has left is pulled back with all the force there is."""
    edge = torch.tensor([LINEAR_BEYOND, LINEAR_BEYOND + 1e-9], dtype=torch.float64)
    penalty, slope = penalty_and_slope(edge)
    assert penalty[1].item() == pytest.approx(penalty[0].item(), rel=1e-8)
    assert slope[1].item() == pytest.approx(slope[0].item(), rel=1e-8)
    far, slope = penalty_and_slope(torch.tensor([12.0, 90.0, 1000.0], dtype=torch.float64))
    assert slope.tolist() == pytest.approx([math.expm1(LINEAR_BEYOND)] * 3)
    assert far.tolist() == pytest.approx((penalty[0] + slope * (torch.tensor([12.0, 90.0, 1000.0]) - 5)).tolist())


def test_sequence_kl_leaves_out_tokens_of_weight_0_and_keeps_the_weight_of_the_others():
    logprobs, reference = torch.tensor([-1.0, -90.0, -3.0]), torch.tensor([-1.5, -2.0, -2.0])
    values = sequence_kl(logprobs, reference, torch.tensor([2, 1]), torch.tensor([1.0, 0.0, 1.0]))
    assert values.tolist() == pytest.approx([(math.exp(-0.5) + 0.5 - 1) / 2, math.e - 2])


def test_agreement_is_within_the_limit_on_both_sides_and_a_nan_stays_visible():
    train = torch.tensor([-1.0, -1.0, -1.0, -1.0, math.nan, -1.0])
    rollout = torch.tensor([-1.0, -5.0, -5.1, 3.1, -1.0, -math.inf])
    assert agreement(train, rollout, 4.0).tolist() == [1, 1, 0, 0, 1, 0]


TRAIN = torch.tensor([-1.0, -1.0, -0.5, -1.0, 90.0])
ROLLOUT = torch.tensor([-1.2, -0.9, -1.5, -1.0, -10.0])
LENGTHS = torch.tensor([2, 1, 2])


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [math.exp(0.2), math.exp(-0.1), 2.0, 1.0, 2.0]),
        ("sequence", [math.exp(0.1), math.exp(0.1), 2.0, 2.0, 2.0]),
    ],
)
def test_truncated_importance(level, expected):
    weights = truncated_importance(TRAIN.clone().requires_grad_(), ROLLOUT, LENGTHS, level=level)
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad


def test_without_a_gap_the_weights_are_one():
    assert truncated_importance(TRAIN, TRAIN, LENGTHS, level="sequence", limit=3.0).eq(1).all()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"level": "tokens"}, "must be one of token, sequence"), ({"limit": 0.0}, "must be above 0")],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        truncated_importance(TRAIN, ROLLOUT, LENGTHS, **settings)


def test_mismatch_statistics():
    statistics = mismatch_statistics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    ratios = math.exp(0.5) + math.exp(-1)
    expected = {"mean_abs_logprob_gap": 0.75, "max_abs_logprob_gap": 1.0, "mean_ratio": ratios / 2}
    assert statistics == pytest.approx(expected)
