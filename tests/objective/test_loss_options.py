"""The options of the losses that TRL's and verl's users expect: each against its published formula, by autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import FRPO, GRPO, DrGRPO, build_objective

LENGTHS = torch.tensor([3, 1, 5, 2])
ADVANTAGES = torch.tensor([1.0, -2.0, -0.5, 0.7], dtype=torch.float64)
PARTS = LENGTHS.tolist()


def drifted(spread: float = 0.6) -> tuple[Tensor, Tensor]:
    """Return log-probs of the present policy, with gradient, and of the one that sampled. [R] each."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(int(LENGTHS.sum()), generator=generator, dtype=torch.float64)
    return (old + spread * torch.randn(old.shape, generator=generator, dtype=torch.float64)).requires_grad_(), old


def assert_same(objective, expected_of) -> None:
    """Compare losses and gradient with those of `expected_of(log-probs, old log-probs, advantage) -> loss of a sequence`."""
    logprobs, old = drifted()
    losses, _ = objective.sequence_loss(logprobs, old, LENGTHS, ADVANTAGES)
    [found] = torch.autograd.grad(losses.sum(), logprobs)
    parts = zip(logprobs.split(PARTS), old.split(PARTS), ADVANTAGES, strict=True)
    expected = torch.stack([expected_of(own, before, advantage) for own, before, advantage in parts])
    [gradient] = torch.autograd.grad(expected.sum(), logprobs)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)
    assert found.eq(0).any() and found.ne(0).any(), "some tokens are clipped"


@pytest.mark.parametrize("kind", [DrGRPO, GRPO])
def test_the_sequence_ratio_is_gspos(kind):
    """arXiv 2507.18071, (5) and (7): s = (pi / pi_old)^(1 / T), clipped as a whole."""

    def gspo(own, old, advantage):
        s = torch.exp((own.sum() - old.sum()) / len(own))
        return -torch.minimum(s * advantage, s.clamp(1 - 0.05, 1 + 0.1) * advantage)

    assert_same(kind(ratio="sequence", clip_low=0.05, clip_high=0.1), gspo)


def test_with_frpo_the_sequence_ratio_is_the_importance():
    objective = FRPO(lambda_=0.5, ratio="sequence", clip_high=0.1)

    def importance(own, old):
        return torch.exp((own.sum() - old.sum()) / len(own)).clamp(max=1.1)

    assert_same(objective, lambda own, old, advantage: -advantage * importance(own, old))
    logprobs, old = drifted()
    parts = zip(logprobs.split(PARTS), old.split(PARTS), strict=True)
    expected = torch.stack([importance(own, before) for own, before in parts]).detach()
    torch.testing.assert_close(objective.importance(logprobs, old, LENGTHS), expected)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    """arXiv 2506.13585, (4) and (5): -sg(min(rho, 1 + clip_high)) A log pi."""
    objective = DrGRPO(cispo=True, clip_high=0.1)
    logprobs, old = drifted()
    losses, clipped = objective.sequence_loss(logprobs, old, LENGTHS, ADVANTAGES)
    [found] = torch.autograd.grad(losses.sum(), logprobs)
    weights = torch.exp(logprobs.detach() - old).clamp(max=1.1)
    expected = -weights * ADVANTAGES.repeat_interleave(LENGTHS) / LENGTHS.repeat_interleave(LENGTHS)
    torch.testing.assert_close(found, expected)
    assert found.ne(0).all() and clipped.gt(0).any()


def test_the_two_sided_clip_has_a_bound_for_each_sign():
    def ppo(own, old, advantage):
        rho = torch.exp(own - old)
        return -torch.minimum(rho * advantage, rho.clamp(1 - 0.3, 1 + 0.1) * advantage).mean()

    assert_same(DrGRPO(clip_low=0.3, clip_high=0.1), ppo)


def test_the_dual_clip_bounds_the_ratio_of_negative_advantages():
    """arXiv 1912.09729, (5): max(min(rho A, clip(rho) A), c A) where A < 0; TRL's delta is the same bound."""

    def dual(own, old, advantage):
        rho = torch.exp(own - old)
        ppo = torch.minimum(rho * advantage, rho.clamp(0.8, 1.2) * advantage)
        return -(torch.maximum(ppo, 1.3 * advantage) if advantage < 0 else ppo).mean()

    assert_same(DrGRPO(dual_clip=1.3), dual)


def test_aggregation_weighs_responses_by_their_tokens():
    """Of sums over tokens: all divided by the tokens of the batch (DAPO), or each by a constant (Dr. GRPO)."""
    weights = torch.tensor([0.25, 0.25, 0.0, 0.25])  # the third takes no part
    by_token = DrGRPO(aggregation="token").by_length(weights, LENGTHS)
    torch.testing.assert_close(by_token, 0.75 * torch.tensor([3.0, 1.0, 0.0, 2.0]) / 6)
    constant = DrGRPO(aggregation="constant", constant_length=10).by_length(weights, LENGTHS)
    torch.testing.assert_close(constant, 0.25 * torch.tensor([3.0, 1.0, 0.0, 2.0]) / 10)
    assert DrGRPO().by_length(weights, LENGTHS) is weights
    assert DrGRPO(aggregation="token").by_length(torch.zeros(4), LENGTHS).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"name": "frpo", "lambda_": 1, "aggregation": "token"},
            "aggregation=token must be sequence for frpo: the importance",
        ),
        ({"name": "frpo", "lambda_": 1, "cispo": True}, "objective.cispo is not a field of frpo: its loss is linear"),
        (
            {"name": "frpo", "lambda_": 1, "dual_clip": 3.0},
            "objective.dual_clip is not a field of frpo: its ratio is bounded",
        ),
        (
            {"name": "frpo", "lambda_": 1, "clip_low": 0.2},
            "objective.clip_low is not a field of frpo: its ratio is bounded",
        ),
        ({"name": "grpo", "aggregation": "constant"}, "objective.constant_length must be set with"),
        ({"name": "grpo", "constant_length": 512}, "objective.constant_length must be set with"),
        ({"name": "grpo", "dual_clip": 1.1}, "dual_clip=1.1 must be above 1 . objective.clip_high=1.2"),
        ({"name": "grpo", "cispo": True, "dual_clip": 3.0}, "objective.cispo weighs each token by its ratio"),
        ({"name": "grpo", "cispo": True, "clip_low": 0.5}, "objective.cispo weighs each token by its ratio"),
        ({"name": "dr_grpo", "ratio": "tokens"}, "objective.ratio=tokens .*did you mean token"),
    ],
)
def test_options_that_exclude_each_other_are_refused_in_a_sentence(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_objective(fields)
