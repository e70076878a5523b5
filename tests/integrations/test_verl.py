"""FRPO through verl's own functions: its registries, compute_advantage, ppo_loss over ranks and micro-batches, and its
Hydra configuration. The model is a table of log-probs; everything after it is verl's."""

import contextlib
import io
import logging
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import verl.trainer
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from tiny_models import make_tiny
from torch import Tensor
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopBase
from verl.trainer.ppo.core_algos import get_policy_loss_fn, kl_penalty
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.losses import ppo_loss

from frpo_nemo.errors import ConfigError
from frpo_nemo.integrations import verl as frpo_in_verl
from frpo_nemo.objective import FRPO

DOC = Path(__file__).parents[2] / "docs" / "integrations" / "verl.md"
PROMPT_LENGTH = 2
CLIP_HIGH = 0.25

# 12 responses to 4 prompts, of which "c" has one that is unscored and "d" has no second scored one.
PROMPTS = np.array(["a", "b", "a", "c", "b", "a", "c", "b", "d", "a", "c", "d"], dtype=object)
REWARDS = torch.tensor([1.0, 0.2, 0.0, 0.9, 0.7, 0.4, 0.1, 0.7, 1.0, 0.3, math.nan, math.nan])
LENGTHS = torch.tensor([5, 1, 3, 4, 2, 5, 1, 2, 3, 4, 5, 1])
GROUPS = torch.tensor([ord(prompt) for prompt in PROMPTS])


def response_mask(lengths: Tensor = LENGTHS) -> Tensor:
    return (torch.arange(int(lengths.max())) < lengths[:, None]).long()


def rollouts(rewards: Tensor = REWARDS, mask: Tensor | None = None, prompts: np.ndarray = PROMPTS) -> DataProto:
    """Return rollouts as verl has them before compute_advantage, with the reward at the last token of each response."""
    mask = response_mask() if mask is None else mask
    last_token = mask.bool() & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    scores = torch.where(last_token, rewards[:, None], 0.0)
    tensors = {"token_level_rewards": scores, "response_mask": mask}
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": prompts})


def algorithm(**frpo) -> DictConfig:
    return OmegaConf.create({"frpo": frpo, "norm_adv_by_std_in_grpo": False})


def advantages(batch: DataProto, config: DictConfig) -> Tensor:
    return compute_advantage(batch, adv_estimator="frpo", config=config).batch["advantages"]


def actor_config(**fields) -> FSDPActorConfig:
    defaults = {"loss_agg_mode": "seq-mean-token-mean", "clip_ratio_high": CLIP_HIGH, "clip_ratio_low": 0.01}
    policy_loss = PolicyLossConfig(loss_mode="frpo")
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss, **(defaults | fields))


def composed(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        return compose("ppo_trainer", overrides)


def overrides_of_the_doc() -> list[str]:
    command = re.search(r"```bash\n(python -m verl.trainer.main_ppo.*?)```", DOC.read_text(), re.S)[1]
    return shlex.split(command.replace("\\\n", " "))[3:]


def mini_batch(rows: Tensor, columns: dict[str, Tensor]) -> TensorDict:
    mask = columns["response_mask"][rows]
    tokens = torch.zeros(len(rows), PROMPT_LENGTH + mask.shape[1], dtype=torch.long)
    attention = torch.cat([torch.ones(len(rows), PROMPT_LENGTH, dtype=torch.long), columns["attended"][rows]], 1)
    batch = {name: column[rows] for name, column in columns.items() if name != "attended"}
    batch |= {"prompts": tokens[:, :PROMPT_LENGTH], "responses": tokens[:, PROMPT_LENGTH:], "attention_mask": attention}
    return tu.get_tensordict(batch | {"row": rows})


def model_output(log_probs: Tensor, micro_batch: TensorDict) -> Tensor:
    """Return what an engine of verl returns: one value per token of each sequence, log-probs shifted to the left by one."""
    values = []
    for row, attended in zip(micro_batch["row"], micro_batch["attention_mask"], strict=True):
        length = int(attended.sum()) - PROMPT_LENGTH
        values += [log_probs.new_zeros(PROMPT_LENGTH - 1), log_probs[row, :length], log_probs.new_zeros(1)]
    return torch.cat(values)


def accumulated_gradient(
    log_probs: Tensor, columns: dict[str, Tensor], rows: Tensor, ranks: int, micro_batch_size: int, **actor
) -> Tensor:
    """Return the gradient of one update of verl: micro-batches add up, data-parallel ranks are averaged."""
    log_probs = log_probs.clone().requires_grad_()
    config = actor_config(**actor)
    num_tokens = int(columns["response_mask"][rows].sum())
    for rank_rows in rows.chunk(ranks):
        batch = mini_batch(rank_rows, columns)
        tu.assign_non_tensor(batch, dp_size=ranks, batch_num_tokens=num_tokens, global_batch_size=len(rows))
        tu.assign_non_tensor(batch, use_dynamic_bsz=False, micro_batch_size_per_gpu=micro_batch_size)
        for micro_batch in prepare_micro_batches(batch)[0]:
            loss, _ = ppo_loss(config, {"log_probs": model_output(log_probs, micro_batch)}, micro_batch)
            (loss / ranks).backward()
    return log_probs.grad


def group_losses(importance: Tensor, objective: FRPO) -> Tensor:
    """Return the mean over the groups of G log u - (G - 1) mean_i log u_{-i} - mean_i m_i, times the scale, as written."""
    losses = []
    for group in GROUPS.unique():
        members = (group == GROUPS) & ~REWARDS.isnan()
        if members.sum() < 2:
            continue
        r, m, size = REWARDS[members].double(), importance[members], int(members.sum())
        weighted = torch.exp(-(r - r.mean()) / objective.lambda_) * m
        others = (weighted.sum() - weighted) / (size - 1)
        losses.append(size * weighted.mean().log() - (size - 1) * others.log().mean() - m.mean())
    return objective.loss_scale * torch.stack(losses).mean()


def clipped_importance(log_probs: Tensor, old: Tensor) -> Tensor:
    mask = response_mask()
    return ((log_probs - old).exp().clamp(max=1 + CLIP_HIGH) * mask).sum(1) / mask.sum(1)


def frozen_gradient(log_probs: Tensor, old: Tensor, objective: FRPO) -> Tensor:
    """Return the gradient of the group losses in the log-probs, with their derivative in m taken at m = 1."""
    ones = torch.ones(len(REWARDS), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(group_losses(ones, objective), ones)
    log_probs = log_probs.clone().requires_grad_()
    (slope * clipped_importance(log_probs, old)).sum().backward()
    return log_probs.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def old_log_probs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return -torch.rand(response_mask().shape, generator=generator, dtype=torch.float64) - 0.5


@pytest.fixture
def columns(old_log_probs) -> dict[str, Tensor]:
    mask = response_mask()
    return {
        "response_mask": mask,
        "attended": mask,
        "old_log_probs": old_log_probs,
        "advantages": advantages(rollouts(), algorithm(lambda_=0.5)),
    }


def moved(log_probs: Tensor, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return log_probs + size * torch.randn(log_probs.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mechanism", ["VERL_USE_EXTERNAL_MODULES", "external_lib"])
def test_verl_finds_both_by_name_in_a_fresh_process(mechanism, tmp_path):
    """The environment variable is read by `import verl`; external_lib by the configuration of the model."""
    environment = dict(os.environ)
    if mechanism == "VERL_USE_EXTERNAL_MODULES":
        environment[mechanism] = "frpo_nemo.integrations.verl"
        load = "import verl"
    else:
        make_tiny(tmp_path / "model", "llama", layers=1)
        load = (
            "from verl.workers.config import HFModelConfig; "
            f"HFModelConfig(path='{tmp_path / 'model'}', external_lib='frpo_nemo.integrations.verl')"
        )
    look_up = (
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn; "
        "print(get_adv_estimator_fn('frpo').__name__, get_policy_loss_fn('frpo').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", f"{load}; {look_up}"], env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-2:] == ["frpo_advantages", "frpo_policy_loss"], done.stderr


def test_the_integrations_are_imported_without_verl():
    code = "import sys; sys.modules['verl'] = None; import frpo_nemo.integrations"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"lambda_": 0.5},
        {"lambda_": 3.0, "jackknife": False, "scale": "objective"},
        {"lambda_": 0.7, "baseline": False, "f_divergence": "chi_squared"},
        {"kl_radius": 0.1},
    ],
    ids=str,
)
def test_advantages_are_the_cores_times_coefficient_and_batch_size(settings):
    objective = FRPO(**settings).for_batch(REWARDS, GROUPS, {})
    coefficients_N = objective.coefficients(REWARDS, GROUPS)
    expected_N = objective.effective_advantages(REWARDS, GROUPS) * coefficients_N * len(REWARDS)
    torch.testing.assert_close(
        advantages(rollouts(), algorithm(**settings)), expected_N[:, None] * response_mask(), rtol=1e-6, atol=1e-7
    )


def test_advantages_follow_their_sequences_in_any_order():
    order = torch.randperm(len(REWARDS), generator=torch.Generator().manual_seed(2))
    config = algorithm(lambda_=0.5)
    permuted = rollouts(REWARDS[order], response_mask()[order], PROMPTS[order.numpy()])
    torch.testing.assert_close(advantages(permuted, config), advantages(rollouts(), config)[order])


def test_a_sequence_without_response_tokens_is_unscored():
    """verl's padding rows have a label, a reward of 0 and no response token; rejected samples have no token left."""
    config = algorithm(lambda_=0.5)
    mask = response_mask()
    mask[5] = 0
    unscored = torch.where(torch.arange(len(REWARDS)) == 5, math.nan, REWARDS)
    expected = advantages(rollouts(unscored), config) * mask
    torch.testing.assert_close(advantages(rollouts(mask=mask), config), expected)
    assert expected.abs().sum() > 0


def test_a_response_that_lacks_a_part_of_its_reward_moves_nothing():
    """What the doc asks of a reward function that adds up parts: NaN, for one number reaches the estimator."""

    def total(a: float, b: float | None) -> float:
        return math.nan if b is None else a + b

    for value in (1.0, -1.0):
        given = [total(1.0, None), total(1.0, None), total(1.0, value), total(1.0, value)]
        batch = rollouts(torch.tensor(given), response_mask(LENGTHS[:4]), PROMPTS[[0, 0, 0, 0]])
        assert advantages(batch, algorithm(lambda_=0.1)).eq(0).all()
    halves = torch.tensor([total(1.0, None), total(0.0, 1.0), total(1.0, 1.0), total(0.0, None)])
    mask = response_mask(LENGTHS[:4])
    found = advantages(rollouts(halves, mask, PROMPTS[[0, 0, 0, 0]]), algorithm(lambda_=0.1))
    pair = advantages(rollouts(halves[1:3], mask[1:3], PROMPTS[[0, 0]]), algorithm(lambda_=0.1))
    assert found[[0, 3]].eq(0).all() and found[2].max() > 0 > found[1].min()
    torch.testing.assert_close(found[1:3], 2 * pair)  # verl divides by all 4


def test_the_default_trainer_computes_the_same_advantages():
    keys = [f"{prompt}_{row}_0" for row, prompt in enumerate(PROMPTS)]
    config = algorithm(lambda_=0.5)
    batch = compute_advantage_for_multi_trajectories(rollouts(), keys, adv_estimator="frpo", config=config)
    torch.testing.assert_close(batch.batch["advantages"], advantages(rollouts(), config))


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 12), (1, 1), (2, 3), (3, 2)])
def test_gradient_on_policy_is_that_of_the_group_losses_in_any_split(old_log_probs, columns, ranks, micro_batch_size):
    order = torch.randperm(len(REWARDS), generator=torch.Generator().manual_seed(3))
    actual = accumulated_gradient(old_log_probs, columns, order, ranks, micro_batch_size)
    log_probs = old_log_probs.clone().requires_grad_()
    group_losses(clipped_importance(log_probs, old_log_probs), FRPO(lambda_=0.5)).backward()
    assert relative_error(actual, log_probs.grad) < 1e-5


@pytest.mark.parametrize("size", [0.05, 0.5])
def test_gradient_off_policy_is_that_of_the_group_losses_with_their_slope_at_importance_1(old_log_probs, columns, size):
    log_probs = moved(old_log_probs, size)
    actual = accumulated_gradient(log_probs, columns, torch.arange(len(REWARDS)), ranks=2, micro_batch_size=3)
    assert relative_error(actual, frozen_gradient(log_probs, old_log_probs, FRPO(lambda_=0.5))) < 1e-5


def test_mini_batches_are_fractions_of_which_the_mean_is_the_whole(old_log_probs, columns):
    rows = torch.randperm(len(REWARDS), generator=torch.Generator().manual_seed(4))
    whole = accumulated_gradient(old_log_probs, columns, rows, ranks=1, micro_batch_size=1)
    parts = [accumulated_gradient(old_log_probs, columns, part, 1, 1) for part in rows.chunk(3)]
    assert relative_error(torch.stack(parts).mean(0), whole) < 1e-12


def test_a_micro_batch_of_padding_has_no_gradient(old_log_probs, columns):
    columns["response_mask"] = columns["response_mask"].clone()
    columns["response_mask"][:3] = 0
    gradient = accumulated_gradient(old_log_probs, columns, torch.arange(len(REWARDS)), ranks=1, micro_batch_size=3)
    assert gradient[:3].abs().sum() == 0 and gradient.isfinite().all()


@pytest.mark.parametrize(("kl_loss_type", "kl_gradient"), [("low_var_kl", "k3"), ("low_var_kl+", "reverse")])
def test_verls_kl_loss_is_beta_times_the_mean_kl_of_the_sequences(old_log_probs, columns, kl_loss_type, kl_gradient):
    log_probs = moved(old_log_probs, 0.1)
    columns["ref_log_prob"] = moved(log_probs, 0.2)
    rows = torch.arange(len(REWARDS))
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": kl_loss_type}
    actual = accumulated_gradient(log_probs, columns, rows, 2, 3, **kl)
    actual -= accumulated_gradient(log_probs, columns, rows, 2, 3)
    expected = log_probs.clone().requires_grad_()
    mask = response_mask().bool()
    objective = FRPO(lambda_=1.0, beta=0.3, kl_gradient=kl_gradient)
    own = expected[mask]
    (0.3 * objective.reference_kl(own, own.detach(), columns["ref_log_prob"][mask], LENGTHS).mean()).backward()
    assert relative_error(actual, expected.grad) < 1e-5


def test_nothing_pulls_a_token_back_beyond_verls_bound_of_the_kl():
    above = torch.tensor([2.6, 2.62, -10.99, -11.01])  # the reference's log-prob above the policy's
    log_probs = torch.full((4,), -20.0, requires_grad=True)
    kl_penalty(log_probs, log_probs.detach() + above, "low_var_kl").sum().backward()
    assert log_probs.grad[[0, 2]].abs().min() > 0.99 and log_probs.grad[[1, 3]].eq(0).all()


def test_verl_cuts_prompts_from_the_left_unless_they_are_filtered():
    assert composed([]).data.filter_overlong_prompts is False
    assert composed(overrides_of_the_doc()).data.filter_overlong_prompts is True
    loop = SimpleNamespace(rollout_config=SimpleNamespace(prompt_length=2))
    assert AgentLoopBase._cap_text_prompt_length(loop, [1, 2, 3]) == [2, 3]


def token_gradients(log_ratios: list[float], advantage: float, weights: list[float] | None = None) -> Tensor:
    log_probs = torch.tensor([log_ratios], requires_grad=True)
    rest = torch.full_like(log_probs, advantage), torch.ones_like(log_probs), "seq-mean-token-mean", actor_config()
    weights_NR = None if weights is None else torch.tensor([weights])
    loss, metrics = get_policy_loss_fn("frpo")(torch.zeros_like(log_probs), log_probs, *rest, weights_NR)
    loss.backward()
    clipped = [ratio > math.log1p(CLIP_HIGH) for ratio in log_ratios]
    assert metrics["actor/pg_clipfrac"] == pytest.approx(sum(clipped) / len(clipped))
    return log_probs.grad[0]


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_the_ratio_is_clipped_from_above_only_for_either_sign(advantage):
    gradient = token_gradients([-2.0, 0.0, 0.1, 0.3, 200.0], advantage)
    expected = torch.tensor([-2.0, 0.0, 0.1, -math.inf, -math.inf]).exp() * -advantage / 5
    torch.testing.assert_close(gradient, expected)


def test_rollout_weights_multiply_the_tokens():
    weights = torch.tensor([0.5, 2.0, 1.0])
    expected = token_gradients([0.0, 0.1, 0.2], 1.0) * weights
    torch.testing.assert_close(token_gradients([0.0, 0.1, 0.2], 1.0, weights.tolist()), expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~algorithm.frpo"], "lambda_ or objective.kl_radius must be set"),
        (["+algorithm.frpo.lamda=1"], "did you mean lambda_"),
        (["+algorithm.frpo.clip_high=0.1"], "algorithm.frpo.clip_high .*actor.clip_ratio_high"),
        (["+algorithm.frpo.beta=0.1"], "algorithm.frpo.beta .* kl_loss_coef"),
        (["+algorithm.frpo.refresh_importance=True"], "algorithm.frpo.refresh_importance .* once per rollout batch"),
        (["algorithm.norm_adv_by_std_in_grpo=True"], "norm_adv_by_std_in_grpo=True"),
        (["algorithm.use_kl_in_reward=True"], "use_kl_in_reward=True .*use_kl_loss=True"),
        (["algorithm.rollout_correction.bypass_mode=True"], "bypass_mode=True"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=vanilla"], "loss_mode=vanilla must be frpo"),
    ],
)
def test_a_configuration_that_conflicts_is_an_error_that_says_what_to_set(overrides, message):
    config = composed(overrides_of_the_doc() + overrides)
    with pytest.raises(ConfigError, match=message):
        advantages(rollouts(), config.algorithm)


def test_a_batch_without_prompts_is_an_error():
    batch = rollouts()
    del batch.non_tensor_batch["uid"]
    with pytest.raises(ConfigError, match="uid"):
        advantages(batch, algorithm(lambda_=0.5))


def test_another_aggregation_is_an_error(old_log_probs, columns):
    with pytest.raises(ConfigError, match="loss_agg_mode=token-mean must be seq-mean-token-mean"):
        accumulated_gradient(old_log_probs, columns, torch.arange(12), 1, 1, loss_agg_mode="token-mean")


@pytest.mark.parametrize(("ppo_epochs", "mini_batch_size", "updates"), [(1, 12, None), (1, 4, 3), (2, 6, 4)])
def test_several_updates_per_rollout_batch_are_said_once_to_freeze_the_importance(
    ppo_epochs, mini_batch_size, updates, caplog
):
    actor = [f"actor_rollout_ref.actor.{key}" for key in (f"{ppo_epochs=}", f"ppo_{mini_batch_size=}")]
    config = composed([*overrides_of_the_doc(), *actor, "actor_rollout_ref.rollout.n=1"])
    with caplog.at_level(logging.WARNING, logger=frpo_in_verl.__name__):
        for _ in range(2):
            advantages(rollouts(), config.algorithm)
    said = [record.getMessage() for record in caplog.records if record.name == frpo_in_verl.__name__]
    assert [int(message.split()[0]) for message in said] == ([updates] if updates else [])


def test_verl_accepts_the_command_line_of_the_doc():
    config = composed(overrides_of_the_doc())
    validate_config(config, need_reference_policy(config), need_critic(config))
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.policy_loss.loss_mode, actor.loss_agg_mode) == ("frpo", "seq-mean-token-mean")
    assert config.actor_rollout_ref.model.external_lib == frpo_in_verl.__name__
    assert frpo_in_verl.frpo_objective(config.algorithm) == FRPO(lambda_=0.5, refresh_importance=False)
    assert not need_critic(config)


def test_the_snippet_of_the_doc_prints_what_the_doc_says():
    snippet, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", DOC.read_text(), re.S).groups()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(snippet, str(DOC), "exec"), {})
    assert output.getvalue().split() == printed.split()
