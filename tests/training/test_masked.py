"""No token decides a step by rounding: a policy that stands on an edge, where two roundings of the same weights give one
token log-probs that are ten nats apart."""

from __future__ import annotations

import math
from types import SimpleNamespace

import learn_checks
import pytest
import torch
from runs import random_model

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.objective import FRPO, DrGRPO
from frpo_nemo.objective.kl import LINEAR_BEYOND, k3
from frpo_nemo.objective.mismatch import MismatchWeights
from frpo_nemo.training.loss import PolicyLoss

WIDTH, VOCAB, SEQUENCES, LENGTH, BETA, LIMIT = 64, 50, 8, 16, 0.001, 4.0
SHARPNESS, ANSWER, LOGIT_SPREAD = 1e4, 30.0, 8.0


class Edge:
    """One layer: where a feature of its input is above 0, it answers with an activation that outweighs all others. The
    feature of one token, number `place`, is above 0 in fp32 and below in bf16."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.feature = torch.randn(WIDTH, generator=generator)
        self.answer = ANSWER * torch.randn(WIDTH, generator=generator)
        head = LOGIT_SPREAD / WIDTH**0.5 * torch.randn(VOCAB, WIDTH, generator=generator)
        self.head = head.requires_grad_()
        inputs = torch.randn(1 << 16, WIDTH, generator=generator)
        exact, rounded = inputs @ self.feature, self._features(inputs, torch.bfloat16).float()
        on_the_edge = torch.where((exact > 0) & (rounded < 0), torch.minimum(exact, -rounded), 0.0)
        clear = (exact.abs() > 0.5).nonzero().flatten()[: SEQUENCES * LENGTH]
        self.place, self.inputs = 37, inputs[clear]
        self.inputs[self.place] = inputs[on_the_edge.argmax()]
        with torch.no_grad():
            logits = self._logits(torch.float32)
        self.tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        self.tokens[self.place] = logits[self.place].argmax()

    def logprobs(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the log-probs of the tokens that were sampled from the policy in fp32. [R]"""
        return self._logits(dtype).float().log_softmax(-1).gather(1, self.tokens[:, None]).squeeze(1)

    def _features(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return inputs.to(dtype) @ self.feature.to(dtype)

    def _logits(self, dtype: torch.dtype) -> torch.Tensor:
        switch = torch.sigmoid(SHARPNESS * self._features(self.inputs, dtype).float()).to(dtype)
        hidden = self.inputs.to(dtype) + switch[:, None] * self.answer.to(dtype)
        hidden = hidden / hidden.float().square().mean(-1, keepdim=True).sqrt().to(dtype)
        return hidden @ self.head.to(dtype).t()


@pytest.fixture(scope="module")
def edge() -> SimpleNamespace:
    """Return a step's batch, sampled in fp32 by the reference itself, and the policy, which the trainer computes in bf16."""
    policy = Edge()
    with torch.no_grad():
        sampled, trained = policy.logprobs(torch.float32), policy.logprobs(torch.bfloat16)
    rewards = torch.rand(SEQUENCES, generator=torch.Generator().manual_seed(1))
    groups = torch.arange(SEQUENCES) // 4
    objective = FRPO(lambda_=0.5, beta=BETA)
    batch = SequenceBatch.from_lists([[0]] * SEQUENCES, policy.tokens.view(SEQUENCES, LENGTH).tolist())
    batch.columns["advantage"] = objective.effective_advantages(rewards, groups)
    batch.columns["coefficient"] = objective.coefficients(rewards, groups)
    batch.token_columns |= {"rollout_logprobs": sampled, "reference_logprobs": sampled}
    others = torch.arange(SEQUENCES * LENGTH) != policy.place
    return SimpleNamespace(policy=policy, batch=batch, objective=objective, trained=trained, others=others)


def gradient(edge, *, without_the_edge: bool = False, **settings) -> tuple[torch.Tensor, dict]:
    """Return the gradient of the step's loss, and the loss's columns."""
    logprobs = edge.policy.logprobs(torch.bfloat16)
    if without_the_edge:
        logprobs = torch.where(edge.others, logprobs, logprobs.detach())
    out = PolicyLoss(edge.objective, SEQUENCES, **settings)(logprobs, torch.zeros_like(logprobs), edge.batch)
    [found] = torch.autograd.grad(out.losses.sum(), edge.policy.head)
    return found, out.per_token | out.per_sequence


def test_the_edge_is_one_token_on_which_two_roundings_disagree(edge):
    """Else the other tests show nothing. The plain estimator would make it the whole step."""
    gaps = (edge.trained - edge.batch.token_columns["rollout_logprobs"]).abs()
    assert gaps[edge.policy.place] > 8 and gaps[edge.others].max() < 0.5
    estimates = k3(edge.trained, edge.batch.token_columns["reference_logprobs"])
    assert estimates[edge.policy.place] > 1e3 * estimates[edge.others].sum()


def test_a_token_that_vllm_and_the_trainer_disagree_about_leaves_the_loss(edge):
    """What remains is the gradient of all other tokens, bit for bit: their weights are what they were."""
    found, columns = gradient(edge, token_gap_limit=LIMIT)
    expected, _ = gradient(edge, without_the_edge=True)
    assert expected.norm() > 0 and torch.equal(found, expected)
    assert columns["masked"].nonzero().flatten().tolist() == [edge.policy.place]
    assert columns["kl"].max() < 0.01, "nor is it in the KL that is logged"


def test_without_a_limit_it_pulls_with_a_bounded_force(edge):
    """The KL term's gradient beyond the other tokens' is beta (e^5 - 1) / (sequences * their length) per log-prob."""
    logprobs = edge.trained.clone().requires_grad_()
    weightless = SimpleNamespace(columns={}, token_columns=edge.batch.token_columns, response_lengths=None)
    weightless.columns = {name: torch.zeros(SEQUENCES) for name in ("advantage", "coefficient")}
    weightless.response_lengths = edge.batch.response_lengths
    PolicyLoss(edge.objective, SEQUENCES)(logprobs, logprobs, weightless).losses.sum().backward()
    force = -BETA * math.expm1(LINEAR_BEYOND) / (SEQUENCES * LENGTH)
    assert logprobs.grad[edge.policy.place].item() == pytest.approx(force, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_masked_token_has_no_part_in_its_sequences_correction(edge, level):
    """The product of ratios of its sequence would be about e^-10 with it."""
    found, _ = gradient(edge, token_gap_limit=LIMIT, correction=MismatchWeights(level))
    plain, _ = gradient(edge, token_gap_limit=LIMIT)
    assert (found - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_the_weights_multiply_the_gradient_of_the_reward_alone(level, mask):
    """Each token's gradient is its formula: weight times -A c rho / T, plus the KL's, in float64."""
    low, high, lengths = 0.9, 1.1, [3, 1, 4]
    make = torch.Generator().manual_seed(3)
    current, old, rollout, reference = -torch.rand(4, 8, generator=make, dtype=torch.float64)
    current, rollout = old + 0.1 * current, old + 0.3 * (rollout + 0.5)
    batch = SequenceBatch.from_lists([[0]] * 3, [[1] * length for length in lengths])
    batch.columns |= {"advantage": torch.tensor([1.0, -2.0, 0.5]), "coefficient": torch.tensor([0.3, 0.2, 0.5])}
    batch.token_columns |= {"old_logprobs": old, "rollout_logprobs": rollout, "reference_logprobs": reference}
    loss = PolicyLoss(FRPO(lambda_=0.5, beta=BETA), 3, correction=MismatchWeights(level, low, high, mask))
    logprobs = current.clone().requires_grad_()
    out = loss(logprobs, torch.zeros(8), batch)
    out.losses.sum().backward()

    expected, weights = [], []
    for sequence, places in enumerate(torch.arange(8).split(lengths)):
        gaps = (old - rollout)[places].tolist()
        shared = sum(gaps) if level == "sequence" else sum(gaps) / len(gaps)
        for place, gap in zip(places.tolist(), gaps, strict=True):
            ratio = math.exp(gap if level == "token" else shared)
            weight = min(max(ratio, low), high)
            weights.append(weight if weight == ratio or not mask else 0.0)
            rho = math.exp(current[place] - old[place])
            reward = -batch.columns["advantage"][sequence].item() * batch.columns["coefficient"][sequence].item() * rho
            kl = BETA / 3 * (1 - math.exp(reference[place] - current[place]))
            expected.append((weights[-1] * reward + kl) / len(gaps))
    assert 0 < sum(low < weight < high for weight in weights) < 8
    assert out.per_token["weight"].tolist() == pytest.approx(weights)
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [FRPO(lambda_=0.5, ratio="sequence"), DrGRPO(ratio="sequence")])
def test_a_masked_token_has_no_part_in_its_sequences_ratio(kind):
    """Whatever its log-probs are, its own gradient is 0 and the others' do not change."""
    gradients = []
    for moved in (0.0, 12.0):
        batch = SequenceBatch.from_lists([[0]], [[1, 1, 1]])
        batch.columns |= {"advantage": torch.ones(1), "coefficient": torch.ones(1)}
        old = torch.tensor([-1.0, -2.0, -15.0])
        batch.token_columns |= {"old_logprobs": old, "rollout_logprobs": torch.tensor([-1.0, -2.0, -2.0])}
        logprobs = (old + torch.tensor([0.01, 0.02, moved])).requires_grad_()
        PolicyLoss(kind, 1, token_gap_limit=4.0)(logprobs, torch.zeros(3), batch).losses.sum().backward()
        gradients.append(logprobs.grad)
    assert torch.equal(*gradients) and gradients[0][2] == 0 and gradients[0][:2].ne(0).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return random_model(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize("layout", [dict(updates=1), dict(updates=2), dict(updates=1, pp=2)], ids=str)
def test_a_step_counts_what_it_masks_and_shows_it(workers, model, tmp_path, layout):
    workers.run(layout.get("pp", 1), learn_checks.check_masked, path=model, run_dir=str(tmp_path), **layout)
