"""The KL estimator and the train-rollout weights, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective.kl import k3, sequence_kl
from frpo_nemo.objective.mismatch import mismatch_statistics, truncated_importance


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
