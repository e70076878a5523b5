"""The KL estimator and the train-rollout weights, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import FRPO, DrGRPO
from frpo_nemo.objective.kl import LINEAR_BEYOND, k3, k3_penalty, reverse_penalty, sequence_kl
from frpo_nemo.objective.mismatch import MismatchWeights, agreement, effective_sample_size, mismatch_statistics


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


def mean_slope(logits: torch.Tensor, sampler: torch.Tensor, penalty) -> torch.Tensor:
    """Return the expected gradient of penalty(log-probs) in the logits when `sampler`'s probabilities draw the tokens: all
    of the vocabulary is gone through."""
    logits = logits.clone().requires_grad_()
    (sampler.exp() * penalty(logits.log_softmax(-1))).sum().backward()
    return logits.grad


def kl_slope(logits: torch.Tensor, kl) -> torch.Tensor:
    logits = logits.clone().requires_grad_()
    kl(logits.log_softmax(-1)).backward()
    return logits.grad


def kl_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.exp() * (first - second)).sum()


@pytest.mark.parametrize("drift", [0.0, 0.7])
def test_reverse_has_the_gradient_of_the_kl_and_k3_that_of_the_other_direction(drift):
    """By enumeration of a vocabulary of 7; with drift, the samples are an older policy's."""
    generator = torch.Generator().manual_seed(1)
    logits, reference, moved = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    reference, old = reference.log_softmax(-1), (logits + drift * moved).log_softmax(-1)
    forward, reverse = (kl_slope(logits, kl) for kl in (lambda p: kl_of(reference, p), lambda p: kl_of(p, reference)))
    found = mean_slope(logits, old, lambda p: reverse_penalty(p, reference, old))
    torch.testing.assert_close(found, reverse, rtol=1e-12, atol=1e-14)
    if not drift:
        torch.testing.assert_close(mean_slope(logits, old, lambda p: k3(p, reference)), forward, rtol=1e-12, atol=1e-14)
        assert (forward - reverse).norm() > 0.1 * reverse.norm()
    values = reverse_penalty(logits.log_softmax(-1), reference, old)
    torch.testing.assert_close((old.exp() * values).sum(), kl_of(logits.log_softmax(-1), reference))


def test_over_a_tree_reverse_has_the_gradient_of_the_kl_at_the_visited_places():
    """All 27 sequences of 3 tokens of a vocabulary of 3. The gradient is that of mean_t KL at the places which the policy
    visits; how a token moves the later places is left out, and is the whole difference from the gradient of the KL of
    sequences."""
    generator = torch.Generator().manual_seed(2)
    prefixes = [(), *((a,) for a in range(3)), *((a, b) for a in range(3) for b in range(3))]
    logits = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    place = {prefix: index for index, prefix in enumerate(prefixes)}
    policy = logits.log_softmax(-1)

    def tokens_of(table: torch.Tensor, sequence: tuple) -> torch.Tensor:
        return torch.stack([table[place[sequence[:t]], token] for t, token in enumerate(sequence)])

    sequences = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    probability = torch.stack([tokens_of(policy, y).sum().exp() for y in sequences])
    objective = FRPO(lambda_=1.0, beta=0.1, kl_gradient="reverse")
    own = torch.cat([tokens_of(policy, y) for y in sequences])
    references = torch.cat([tokens_of(reference, y) for y in sequences])
    terms = objective.reference_kl(own, own.detach(), references, torch.full((27,), 3))
    [found] = torch.autograd.grad((probability.detach() * terms).sum(), logits, retain_graph=True)

    visited = torch.zeros(len(prefixes), dtype=torch.float64)
    for sequence, weight in zip(sequences, probability, strict=True):
        for t in range(3):
            visited[place[sequence[:t]]] += weight.detach()
    kl_at_places = (policy.exp() * (policy - reference)).sum(-1)
    [at_places] = torch.autograd.grad((visited * kl_at_places).sum() / 3, logits, retain_graph=True)
    torch.testing.assert_close(found, at_places, rtol=1e-12, atol=1e-14)

    ratios = torch.stack([(tokens_of(policy, y) - tokens_of(reference, y)).sum() for y in sequences])
    [of_sequences] = torch.autograd.grad((probability * ratios).sum() / 3, logits, retain_graph=True)
    later = torch.zeros((), dtype=torch.float64)  # the score of each token times the KL at the places after it
    for sequence, weight in zip(sequences, probability, strict=True):
        scores = tokens_of(policy, sequence)
        for t in range(3):
            after = sum(kl_at_places[place[sequence[:s]]].detach() for s in range(t + 1, 3))
            later = later + weight.detach() * scores[t] * after / 3
    [of_later] = torch.autograd.grad(later, logits)
    torch.testing.assert_close(found + of_later, of_sequences, rtol=1e-12, atol=1e-14)
    assert of_later.norm() > 0.05 * of_sequences.norm()


def test_reverse_stays_finite_and_exact_far_from_the_reference():
    logprobs = torch.tensor([-1000.0, -30.0, -0.1], requires_grad=True)
    reference = torch.tensor([-0.5, -0.5, -300.0])
    penalty = reverse_penalty(logprobs, reference, logprobs.detach())
    penalty.sum().backward()
    assert penalty.isfinite().all()
    assert logprobs.grad.tolist() == pytest.approx([-999.5, -29.5, 299.9])


def test_a_gradient_of_the_kl_without_a_kl_is_refused():
    with pytest.raises(
        ConfigError, match=r"objective\.kl_gradient=reverse needs objective\.beta above 0"
    ):
        DrGRPO(kl_gradient="reverse")
    with pytest.raises(ConfigError, match="kl_gradient"):
        DrGRPO(beta=0.1, kl_gradient="k2")


def test_agreement_is_within_the_limit_on_both_sides_and_a_nan_stays_visible():
    train = torch.tensor([-1.0, -1.0, -1.0, -1.0, math.nan, -1.0])
    rollout = torch.tensor([-1.0, -5.0, -5.1, 3.1, -1.0, -math.inf])
    assert agreement(train, rollout, 4.0).tolist() == [1, 1, 0, 0, 1, 0]


TRAIN = torch.tensor([-1.0, -1.0, -0.5, -1.0, 90.0])
ROLLOUT = torch.tensor([-1.2, -0.9, -1.5, -1.0, -10.0])
LENGTHS = torch.tensor([2, 1, 2])


RATIOS = {  # at TRAIN and ROLLOUT
    "token": [math.exp(0.2), math.exp(-0.1), math.exp(1.0), 1.0, math.inf],
    "sequence": [math.exp(0.1)] * 2 + [math.exp(1.0)] + [math.inf] * 2,
    "geometric": [math.exp(0.05)] * 2 + [math.exp(1.0)] + [math.exp(50)] * 2,
}


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("low, high", [(0.0, 2.0), (0.95, 2.0), (1.05, 3.0), (0.0, math.inf)])
@pytest.mark.parametrize("level", RATIOS)
def test_ratios_beyond_a_bound_are_the_bound_or_0(level, low, high, mask):
    weights = MismatchWeights(level, low, high, mask)(TRAIN.clone().requires_grad_(), ROLLOUT, LENGTHS)
    beyond = [0.0 if mask else min(max(ratio, low), high) for ratio in RATIOS[level]]
    expected = [ratio if low <= ratio <= high else bound for ratio, bound in zip(RATIOS[level], beyond, strict=True)]
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-5, atol=0)
    assert not weights.requires_grad


@pytest.mark.parametrize("level", RATIOS)
@pytest.mark.parametrize("mask", [False, True])
def test_without_a_gap_the_weights_are_one_and_a_nan_stays_visible(level, mask):
    weigh = MismatchWeights(level, 0.5, 3.0, mask)
    assert weigh(TRAIN, TRAIN, LENGTHS).eq(1).all()
    assert weigh(TRAIN, torch.where(TRAIN == 90, math.nan, TRAIN), LENGTHS).isnan().any()


@pytest.mark.parametrize("level", RATIOS)
def test_a_token_that_is_left_out_moves_no_other_token(level):
    weigh, place = MismatchWeights(level, 0.0, 100.0), torch.tensor([0.0, 1, 1, 1, 1])
    found = weigh(TRAIN, ROLLOUT, LENGTHS, place)
    alone = weigh(TRAIN[1:], ROLLOUT[1:], torch.tensor([1, 1, 2]))
    torch.testing.assert_close(found[1:], alone)


def test_the_effective_sample_size_is_the_share_of_tokens_with_equal_weights():
    assert effective_sample_size(torch.full((7,), 0.3)) == pytest.approx(1)
    assert effective_sample_size(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1 / 4)
    assert effective_sample_size(torch.tensor([1.0, 2.0])) == pytest.approx(9 / 10)
    assert effective_sample_size(torch.zeros(3)) == 0


def test_mismatch_statistics():
    statistics = mismatch_statistics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]))
    ratios = math.exp(0.5) + math.exp(-1)
    expected = {"mean_abs_logprob_gap": 0.75, "max_abs_logprob_gap": 1.0, "mean_ratio": ratios / 2}
    assert statistics == pytest.approx(expected)
