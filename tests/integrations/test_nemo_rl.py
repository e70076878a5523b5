"""FRPO under NeMo-RL's conventions: signatures, masks, the shift by one token, and division by global counts.

NeMo-RL cannot be installed beside this project; what is asserted of it was recorded from NVIDIA-NeMo/RL 0.6.0, commit
7ea279a, files nemo_rl/algorithms/advantage_estimator.py and nemo_rl/algorithms/loss/.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from frpo_nemo.errors import ConfigError
from frpo_nemo.integrations.nemo_rl import (
    NOT_NORMALIZED,
    SEQUENCE_MEANS,
    TOKEN_MEANS,
    FRPOAdvantageEstimator,
    FRPOLossFn,
)
from frpo_nemo.objective import FRPO

DOC = Path(__file__).parents[2] / "docs" / "integrations" / "nemo_rl.md"
CLIPPED_PG_LOSS_CONFIG = {  # the fields of ClippedPGLossConfig and their defaults
    "disable_ppo_ratio": False,
    "token_level_loss": True,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}
CORRECTED = {"use_importance_sampling_correction": True}
FOR_FRPO = {"token_level_loss": False, "kl_input_clamp_value": None, "kl_output_clamp_value": None}
CLIPPED_PG_METRICS = [  # the keys that ClippedPGLossFn returns, without the positive examples' NLL of VAPO
    "loss",
    "probs_ratio",
    "probs_ratio_clamped",
    "probs_ratio_min",
    "probs_ratio_max",
    "probs_ratio_clamped_min",
    "probs_ratio_clamped_max",
    "kl_penalty",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "sampling_importance_ratio",
    "num_valid_samples",
    "approx_entropy",
]
PROMPT = 3  # tokens of the prompt, in rows of LENGTH
LENGTH = 9


def loss_config(frpo: dict | None = None, **fields) -> SimpleNamespace:
    settings = {**CLIPPED_PG_LOSS_CONFIG, **FOR_FRPO, "reference_policy_kl_penalty": 0.0, **fields}
    return SimpleNamespace(**settings, frpo={"lambda_": 0.5} if frpo is None else frpo)


def advantages_of(config, prompts: Tensor, rewards: Tensor, token_mask: Tensor, sample_mask: Tensor) -> Tensor:
    """Compute advantages as grpo_train does."""
    return FRPOAdvantageEstimator(None, config).compute_advantage(
        prompt_ids=prompts,
        rewards=rewards,
        mask=token_mask * sample_mask.unsqueeze(-1),
        repeated_batch={"total_reward": rewards},
        logprobs_policy=None,
        logprobs_reference=None,
    )


class Rollouts:
    """Three prompts of four responses, interleaved, of different lengths, one of them in two turns."""

    def __init__(self, seed: int = 0):
        make = torch.Generator().manual_seed(seed)
        self.groups = torch.arange(12) % 3
        self.prompts = torch.randint(0, 50, (3, PROMPT), generator=make)[self.groups]
        self.rewards = torch.rand(12, generator=make)
        self.lengths = torch.randint(1, LENGTH - PROMPT + 1, (12,), generator=make)
        place = torch.arange(LENGTH)
        self.token_mask = ((place >= PROMPT) & (place < PROMPT + self.lengths.unsqueeze(1))).long()
        self.token_mask[0] = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1, 0])
        self.sample_mask = torch.ones(12)
        self.current = -torch.rand(12, LENGTH - 1, generator=make, dtype=torch.float64)  # next_token_logprobs
        columns = torch.cat([torch.zeros(12, 1, dtype=torch.float64), self.current], dim=1)
        self.prev_logprobs = columns.clone()
        self.generation_logprobs = columns + 0.1 * torch.randn(12, LENGTH, generator=make, dtype=torch.float64)
        self.reference_policy_logprobs = columns + 0.3 * torch.randn(12, LENGTH, generator=make, dtype=torch.float64)

    def data(self, advantages: Tensor) -> dict[str, Tensor]:
        names = ("token_mask", "sample_mask", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs")
        return {"advantages": advantages, **{name: getattr(self, name) for name in names}}

    def advantages(self, config) -> Tensor:
        return advantages_of(config, self.prompts, self.rewards, self.token_mask, self.sample_mask)

    def train(self, config, sizes: tuple[int, ...] = (12,), advantages: Tensor | None = None):
        """Loss, gradient at `current`, and each microbatch's metrics; sizes: sequences per microbatch."""
        advantages = self.advantages(config) if advantages is None else advantages
        sequences = self.sample_mask.sum()
        tokens = (self.token_mask[:, 1:] * self.sample_mask.unsqueeze(-1)).sum()
        current, loss_fn, total, metrics = self.current.clone().requires_grad_(), FRPOLossFn(config), 0.0, []
        ends = torch.tensor(sizes).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            part = {name: column[start:end] for name, column in self.data(advantages).items()}
            loss, values = loss_fn(part, sequences, tokens, next_token_logprobs=current[start:end])
            loss.backward()
            total += loss.item()
            metrics.append(values)
        return total, current.grad, metrics


def group_loss(rollouts: Rollouts, current: Tensor, objective: FRPO) -> Tensor:
    """Return the paper's loss, group by group, in float64, with the KL to the reference: what training should minimise."""
    valid = rollouts.sample_mask > 0
    means, kls = [], []
    for row in range(12):
        tokens = [t for t in range(1, LENGTH) if rollouts.token_mask[row, t]]
        ratios = torch.stack([torch.exp(current[row, t - 1] - rollouts.prev_logprobs[row, t]) for t in tokens])
        means.append(ratios.clamp(max=1 + objective.clip_high).mean())
        gaps = torch.stack([rollouts.reference_policy_logprobs[row, t] - current[row, t - 1] for t in tokens])
        own = torch.stack([current[row, t - 1] for t in tokens])
        kls.append((torch.exp(own - own.detach()) * (torch.exp(gaps) - gaps - 1)).mean())  # as NeMo-RL weighs k3
    losses = []
    for group in range(3):
        members = [i for i in range(12) if rollouts.groups[i] == group and valid[i] and rollouts.rewards[i].isfinite()]
        rewards, m = rollouts.rewards[members].double(), torch.stack([means[i] for i in members])
        size = len(members)
        weighted = torch.exp(-(rewards - rewards.mean()) / objective.lambda_) * m
        loss = torch.log(weighted.mean())
        if objective.jackknife:
            left_out = (weighted.sum() - weighted) / (size - 1)
            loss = size * loss - (size - 1) * torch.log(left_out).mean()
        losses.append(loss - m.mean() if objective.baseline else loss)
    kl = torch.stack([kls[i] for i in range(12) if valid[i]]).mean()
    return max(objective.lambda_, 1.0) * torch.stack(losses).mean() + objective.beta * kl


def test_parameters_have_the_names_and_the_order_of_nemo_rl():
    def parameters(function) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(FRPOAdvantageEstimator) == ["estimator_config", "loss_config"]
    assert parameters(FRPOAdvantageEstimator.compute_advantage) == ["self", "prompt_ids", "rewards", "mask", "kwargs"]
    assert parameters(FRPOLossFn) == ["cfg", "use_fused_linear_logprobs"]
    # LossFunction.__call__(self, data, global_valid_seqs, global_valid_toks, **kwargs), where the kwargs of a loss
    # on log-probs are next_token_logprobs.
    called = ["self", "data", "global_valid_seqs", "global_valid_toks", "next_token_logprobs"]
    assert parameters(FRPOLossFn.__call__) == called


@pytest.mark.parametrize("settings", [{"lambda_": 0.5}, {"lambda_": 2.0, "jackknife": False, "baseline": False}])
def test_advantages_are_the_cores_times_the_scale_of_the_loss(settings):
    rollouts = Rollouts()
    objective = FRPO(**settings)
    advantages = rollouts.advantages(loss_config(settings))
    expected = objective.effective_advantages(rollouts.rewards, rollouts.groups) * objective.loss_scale
    assert advantages.shape == (12, LENGTH) and advantages.dtype == torch.float32
    assert torch.equal(advantages, advantages[:, :1].expand(-1, LENGTH))
    torch.testing.assert_close(advantages[:, 0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("jackknife", [True, False])
@pytest.mark.parametrize("lambda_", [0.3, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_microbatches_sum_to_the_gradient_of_the_group_loss(jackknife, lambda_, beta):
    rollouts = Rollouts()
    rollouts.sample_mask[4] = 0
    rollouts.rewards[8] = torch.nan
    config = loss_config({"lambda_": lambda_, "jackknife": jackknife}, reference_policy_kl_penalty=beta)
    current = rollouts.current.clone().requires_grad_()
    group_loss(rollouts, current, FRPO(lambda_=lambda_, jackknife=jackknife, beta=beta)).backward()
    losses = []
    for sizes in ((12,), (5, 7), (1,) * 12):
        loss, gradient, _ = rollouts.train(config, sizes)
        torch.testing.assert_close(gradient, current.grad, rtol=1e-5, atol=1e-8)
        losses.append(loss)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-8)


def test_the_clip_is_from_above_for_either_sign_of_the_advantage():
    rollouts = Rollouts()
    rollouts.prev_logprobs[0::2] -= 0.5  # ratio 1.65
    rollouts.prev_logprobs[1::2] += 0.5  # ratio 0.61
    advantages = rollouts.advantages(loss_config())
    _, gradient, metrics = rollouts.train(loss_config())
    assert all(advantages[rows, 0].sign().unique().numel() == 2 for rows in (slice(0, 12, 2), slice(1, 12, 2)))
    assert torch.all(gradient[0::2] == 0)
    assert torch.all((gradient[1::2] != 0) == (rollouts.token_mask[1::2, 1:] == 1))
    assert metrics[0]["probs_ratio_clamped_max"] == pytest.approx(1.2)
    assert metrics[0]["probs_ratio_clamped_min"] == pytest.approx(torch.tensor(-0.5).exp().item())


def test_column_t_of_the_batch_belongs_to_column_t_minus_1_of_the_logprobs():
    rollouts = Rollouts()
    _, before, _ = rollouts.train(loss_config())
    assert torch.equal(before != 0, rollouts.token_mask[:, 1:] == 1)
    rollouts.prev_logprobs[3, PROMPT] += 0.25
    _, after, _ = rollouts.train(loss_config())
    assert (before != after).nonzero().tolist() == [[3, PROMPT - 1]]
    assert (after / before)[3, PROMPT - 1].item() == pytest.approx(torch.tensor(-0.25).exp().item())


@pytest.mark.parametrize("left_out", ["masked", "unscored", "without tokens"])
def test_a_sequence_that_is_left_out_leaves_its_group(left_out):
    rollouts = Rollouts()
    if left_out == "masked":
        rollouts.sample_mask[4] = 0
    elif left_out == "unscored":
        rollouts.rewards[4] = torch.nan
    else:
        rollouts.token_mask[4] = 0
    _, gradient, _ = rollouts.train(loss_config())
    rest = torch.arange(12) != 4
    objective = FRPO(lambda_=0.5)
    expected = objective.effective_advantages(rollouts.rewards[rest], rollouts.groups[rest])
    assert torch.all(gradient[4] == 0)
    advantages = rollouts.advantages(loss_config())[:, 0]
    ratio = advantages[rest] / expected
    members = (rollouts.groups == rollouts.groups[4])[rest]
    assert advantages[4] == 0
    torch.testing.assert_close(ratio[members], (ratio[~members][0] * 4 / 3).expand(3))


def test_groups_are_prompts_that_are_equal_in_every_token():
    prompts = torch.tensor([[1, 5], [5, 1], [3, 3]]).repeat(2, 1)  # equal means
    rewards = torch.tensor([0.0, 0.2, 0.4, 1.0, 0.2, 0.5])
    ones = torch.ones(6, 4)
    advantages = advantages_of(loss_config(), prompts, rewards, ones, torch.ones(6))[:, 0]
    expected = FRPO(lambda_=0.5).effective_advantages(rewards, torch.arange(6) % 3)
    torch.testing.assert_close(advantages, expected)
    assert advantages[1] == advantages[4] == 0


def test_a_penalty_on_one_tokens_advantage_changes_that_token_alone():
    rollouts = Rollouts()
    advantages = rollouts.advantages(loss_config()).clone()
    _, before, _ = rollouts.train(loss_config(), advantages=advantages)
    advantages[2, PROMPT] = -5.0
    _, after, _ = rollouts.train(loss_config(), advantages=advantages)
    assert (before != after).nonzero().tolist() == [[2, PROMPT - 1]]
    length = rollouts.token_mask[2].sum().item()
    assert after[2, PROMPT - 1].item() == pytest.approx(5.0 / length / 12)


def test_a_microbatch_of_masked_sequences_adds_nothing():
    rollouts = Rollouts()
    rollouts.sample_mask[6:] = 0
    loss, gradient, metrics = rollouts.train(loss_config(reference_policy_kl_penalty=0.1), (6, 6))
    assert metrics[1]["loss"] == 0 and loss == metrics[0]["loss"]
    assert torch.all(gradient[6:] == 0) and gradient[:6].abs().max() > 0
    assert metrics[1]["probs_ratio_min"] == float("inf") and metrics[1]["probs_ratio_max"] == float("-inf")


def test_metrics_are_nemo_rls_and_sum_over_microbatches():
    rollouts = Rollouts()
    config = loss_config(reference_policy_kl_penalty=0.1)
    _, _, (whole,) = rollouts.train(config)
    _, _, parts = rollouts.train(config, (5, 7))
    assert sorted(whole) == sorted(CLIPPED_PG_METRICS) == sorted((*SEQUENCE_MEANS, *TOKEN_MEANS, *NOT_NORMALIZED))
    for name in (*SEQUENCE_MEANS, *TOKEN_MEANS, "num_valid_samples"):
        assert sum(part[name] for part in parts) == pytest.approx(whole[name], abs=1e-7), name
    mask = rollouts.token_mask == 1
    gaps = (rollouts.prev_logprobs - rollouts.generation_logprobs)[mask]
    assert whole["token_mult_prob_error"] == pytest.approx(gaps.abs().exp().mean().item())
    assert whole["sampling_importance_ratio"] == pytest.approx(gaps.exp().mean().item())
    assert whole["gen_kl_error"] == pytest.approx((gaps.exp() - 1 - gaps).mean().item())


def test_forced_on_policy_ratio_needs_no_prev_logprobs():
    rollouts = Rollouts()
    loss, gradient, _ = rollouts.train(loss_config())
    rollouts.prev_logprobs.zero_()  # NeMo-RL's placeholder
    forced = rollouts.train(loss_config(force_on_policy_ratio=True))
    assert forced[0] == pytest.approx(loss, abs=1e-12)
    assert torch.equal(forced[1], gradient)


@pytest.mark.parametrize(("kind", "low", "high"), [(None, None, None), ("tis", None, 1.05), ("icepop", 0.95, 1.05)])
def test_importance_sampling_correction_weighs_tokens(kind, low, high):
    rollouts = Rollouts()
    _, plain, _ = rollouts.train(loss_config())
    corrected = loss_config(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type=kind,
        truncated_importance_sampling_ratio=high,
        truncated_importance_sampling_ratio_min=low,
    )
    _, gradient, _ = rollouts.train(corrected)
    weights = torch.exp(rollouts.prev_logprobs - rollouts.generation_logprobs)[:, 1:]
    if kind == "tis":
        weights = weights.clamp(max=high)
    if kind == "icepop":
        weights = weights * ((weights >= low) & (weights <= high))
    torch.testing.assert_close(gradient, plain * weights)


def test_a_kl_radius_solves_lambda_from_each_batch_and_remembers_it():
    rollouts = Rollouts()
    radius = {"kl_radius": 0.2, "radius_smoothing": 0.5}
    estimator = FRPOAdvantageEstimator(None, loss_config(radius))
    memory: dict[str, float] = {}
    for rewards in (rollouts.rewards, rollouts.rewards.square()):
        advantages = estimator.compute_advantage(rollouts.prompts, rewards, rollouts.token_mask)
        objective = FRPO(**radius).for_batch(rewards, rollouts.groups, memory)
        expected = objective.effective_advantages(rewards, rollouts.groups) * objective.loss_scale
        torch.testing.assert_close(advantages[:, 0], expected, rtol=1e-6, atol=0)
    assert estimator.objective_state == memory and 0 < memory["lambda_"] < float("inf")
    assert {"frpo/max_abs_advantage", "frpo/effective_sample_size"} <= set(estimator.last_metrics)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"token_level_loss": True}, "token_level_loss"),
        ({"use_cispo": True}, "use_cispo"),
        ({"reference_policy_kl_type": "k2"}, "reference_policy_kl_type"),
        ({"kl_output_clamp_value": 10.0}, "kl_output_clamp_value"),
        ({"truncated_importance_sampling_type": "seq-mask-tis"}, "truncated_importance_sampling_type"),
        ({"truncated_importance_sampling_type": "tis"}, "needs loss_fn.use_importance_sampling_correction"),
        (CORRECTED | {"truncated_importance_sampling_type": "tis"}, "truncated_importance_sampling_ratio=None must be above 0"),
        (
            CORRECTED | {"truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio": 2.0},
            "truncated_importance_sampling_ratio_min must be set",
        ),
        ({"frpo": {"lambda_": 0.5, "beta": 0.1}}, "reference_policy_kl_penalty"),
        ({"frpo": {"lambda_": 0.5, "refresh_importance": True}}, "refresh_importance"),
        ({"frpo": 0.5}, "loss_fn.frpo"),
        ({"frpo": {"lambda_": -1.0}}, "objective is loss_fn.frpo: objective.lambda_=-1.0"),
    ],
)
def test_settings_that_frpo_would_ignore_are_refused_by_name(fields, name):
    with pytest.raises(ConfigError, match=name):
        FRPOLossFn(loss_config(**fields))
    with pytest.raises(ConfigError, match=name):
        FRPOAdvantageEstimator(None, loss_config(**fields))


def test_the_snippet_of_the_doc_prints_what_the_doc_says():
    snippet, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", DOC.read_text(), re.S).groups()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(snippet, str(DOC), "exec"), {})
    assert output.getvalue().split() == printed.split()
