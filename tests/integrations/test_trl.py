"""FRPOTrainer: its gradient is that of the paper's group loss, however TRL cuts the batch; what it refuses."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_checks as checks
from tiny_models import make_tiny
from trl import GRPOConfig
from trl_checks import NUM_SEQUENCES, group_loss_gradient, relative_error, sequences_in_order, settings, train

from frpo_nemo.errors import ConfigError
from frpo_nemo.integrations.trl import FRPOConfig, FRPOTrainer
from frpo_nemo.objective import build_objective

HERE = Path(__file__).parent
ALL_ROWS = list(range(NUM_SEQUENCES))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen3", "qwen3", layers=2)


def rows_of_steps(trainer) -> list[list[int]]:
    """Return the sequences of each optimizer step of one pass over the generation batch."""
    microbatches, per_step = trainer._buffered_inputs, trainer.args.gradient_accumulation_steps
    starts = range(0, len(microbatches), per_step)
    return [sum((batch["row"].tolist() for batch in microbatches[start : start + per_step]), []) for start in starts]


def expected_gradients(model, trainer, steps) -> list[dict]:
    rows = rows_of_steps(trainer) * trainer.num_iterations
    return [
        group_loss_gradient(model, trainer, weights, steps.weights[0], step_rows)
        for weights, step_rows in zip(steps.weights, rows, strict=True)
    ]


def test_the_example_is_hard(model, tmp_path):
    """Ragged responses, one unscored, groups that straddle microbatches."""
    trainer, _ = train(model, settings(tmp_path))
    sequences, rewards = sequences_in_order(trainer)
    assert len({len(response) for _, response in sequences}) > 4
    assert 1 <= rewards.isnan().sum() <= 3
    assert any(
        len({row // checks.GROUP_SIZE for row in batch["row"].tolist()}) > 1 for batch in trainer._buffered_inputs
    )


CUTS = {
    "four microbatches": dict(),
    "one microbatch": dict(per_device_train_batch_size=12, gradient_accumulation_steps=1),
    "two updates of the whole batch": dict(num_iterations=2, max_steps=2),
    "two updates of half a batch": dict(gradient_accumulation_steps=2, steps_per_generation=4, max_steps=2),
    "two passes of two updates": dict(
        gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2, max_steps=4
    ),
    "two passes with k3's own gradient": dict(num_iterations=2, max_steps=2, use_bias_correction_kl=False),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_gradient_is_that_of_the_group_loss_however_the_batch_is_cut(model, tmp_path, cut):
    trainer, steps = train(model, settings(tmp_path, **cut))
    if trainer.args.max_steps > 1:
        assert trainer.state.log_history[1]["clip_ratio/high_mean"] > 0.05
    for gradient, expected in zip(steps.gradients, expected_gradients(model, trainer, steps), strict=True):
        assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("wrong", [dict(frpo_jackknife=False), dict(frpo_refresh_importance=False), dict(beta=0.11)])
def test_the_comparison_notices_a_wrong_objective(model, tmp_path, wrong):
    trainer, steps = train(model, settings(tmp_path, num_iterations=2, max_steps=2, **wrong))
    assert relative_error(steps.gradients[1], expected_gradients(model, trainer, steps)[1]) > 1e-3


def test_an_evaluation_between_two_updates_changes_nothing(model, tmp_path):
    evaluation = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    args = settings(tmp_path, num_iterations=2, max_steps=2, **evaluation)
    trainer, steps = train(model, args, eval_dataset=checks.Dataset.from_dict({"prompt": checks.PROMPTS}))
    evaluations = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(evaluations) == 2
    assert all(math.isfinite(entry["eval_loss"]) for entry in evaluations)
    assert relative_error(steps.gradients[1], expected_gradients(model, trainer, steps)[1]) < 1e-5


def test_effective_advantages_are_those_of_the_objective(model, tmp_path):
    trainer, _ = train(model, settings(tmp_path))
    _, rewards = sequences_in_order(trainer)
    groups = torch.arange(NUM_SEQUENCES) // checks.GROUP_SIZE
    expected = build_objective({"name": "frpo", "lambda_": checks.LAMBDA}).effective_advantages(rewards, groups)
    for batch in trainer._buffered_inputs:
        torch.testing.assert_close(batch["advantages"], expected[batch["row"]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(trainer._logs["advantages"]), expected, rtol=1e-5, atol=1e-6)


def test_gradients_on_two_processes_are_those_on_one(model, tmp_path):
    """The program also stops if FRPOTrainer has imported anything of the packages that only the rest of ours needs."""
    out = tmp_path / "gradients.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run(
        [*command, str(HERE / "trl_checks.py"), model, str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    _, steps = train(model, settings(tmp_path, num_iterations=2, max_steps=2))
    for gradient, expected in zip(torch.load(out), steps.gradients, strict=True):
        assert relative_error(gradient, expected) < 1e-5


class GivenMismatch(FRPOTrainer):
    """Uses given ratios as TRL's correction for vLLM's log-probs: one per token, or one per sequence."""

    by_token = True

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        shape = batch["completion_ids"].shape if self.by_token else (len(inputs), 1)
        batch["importance_sampling_ratio"] = 2 * torch.rand(shape)
        return batch


class GivenSequenceMismatch(GivenMismatch):
    by_token = False


@pytest.mark.parametrize("trainer_class", [GivenMismatch, GivenSequenceMismatch])
def test_the_correction_for_vllm_multiplies_each_tokens_gradient(model, tmp_path, trainer_class):
    trainer, steps = train(model, settings(tmp_path), trainer_class=trainer_class)
    mismatch = {}
    for batch in trainer._buffered_inputs:
        ratios = batch["importance_sampling_ratio"].expand_as(batch["completion_mask"])
        for row, ratio, mask in zip(batch["row"].tolist(), ratios, batch["completion_mask"].bool(), strict=True):
            mismatch[row] = ratio[mask].double()
    expected = group_loss_gradient(model, trainer, steps.weights[0], steps.weights[0], ALL_ROWS, mismatch)
    assert relative_error(steps.gradients[0], expected) < 1e-5


def test_a_masked_truncated_completion_leaves_its_group(model, tmp_path):
    def reward_of_finished(completion_ids, **_):
        rewards = checks.partial_reward(completion_ids)
        return [reward if ids[-1] == checks.EOS else None for reward, ids in zip(rewards, completion_ids, strict=True)]

    _, masked = train(model, settings(tmp_path, beta=0.0, mask_truncated_completions=True))
    _, unscored = train(model, settings(tmp_path, beta=0.0), reward_funcs=reward_of_finished)
    assert relative_error(masked.gradients[0], unscored.gradients[0]) < 1e-5


def short(completion_ids: list[list[int]], **_) -> list[float | None]:
    """Return the length of a short response; None for a long one."""
    return [None if len(ids) > 6 else float(len(ids)) for ids in completion_ids]


def one_for_short(completion_ids: list[list[int]], **_) -> list[float | None]:
    return [None if reward is None else 1.0 for reward in short(completion_ids)]


def test_several_rewards_are_summed_by_weight_and_one_that_is_missing_is_the_mean_of_its_group(model, tmp_path):
    args = settings(tmp_path, reward_weights=[1.0, 0.5])
    trainer, _ = train(model, args, reward_funcs=[checks.partial_reward, short])
    sequences, partial = sequences_in_order(trainer)
    lengths = torch.tensor([len(ids) if len(ids) <= 6 else math.nan for _, ids in sequences], dtype=torch.float64)
    expected, missing = torch.zeros(NUM_SEQUENCES, dtype=torch.float64), torch.zeros(NUM_SEQUENCES)
    for part in (partial, 0.5 * lengths):
        groups = part.view(-1, checks.GROUP_SIZE)
        assert not groups.isnan().all(1).any(), "the example has a group without that reward"
        expected += part.where(~part.isnan(), groups.nanmean(1).repeat_interleave(checks.GROUP_SIZE))
        missing += part.isnan()
    assert set(missing.tolist()) == {0, 1, 2}
    expected[missing == 2] = math.nan
    torch.testing.assert_close(trainer._rollout.rewards_N, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    logged = trainer.state.log_history[0]
    assert logged["frpo/share_partly_scored"] == (missing == 1).double().mean()
    assert logged["frpo/share_not_compared"] == 0


def test_a_reward_that_is_equal_wherever_it_was_given_changes_no_gradient(model, tmp_path):
    _, without = train(model, settings(tmp_path))
    trainer, steps = train(model, settings(tmp_path), reward_funcs=[checks.partial_reward, one_for_short])
    assert trainer.state.log_history[0]["frpo/share_partly_scored"] > 0.3
    assert relative_error(steps.gradients[0], without.gradients[0]) < 1e-5


def test_a_masked_completions_rewards_fill_no_other(model, tmp_path):
    """It is out of the comparison as a whole: another value of its reward changes nothing."""
    gradients = []
    for value in (0.0, 100.0):

        def short_or_cut(completion_ids, value=value, **_):
            rewards = short(completion_ids)
            return [r if ids[-1] == checks.EOS else value for r, ids in zip(rewards, completion_ids, strict=True)]

        args = settings(tmp_path, mask_truncated_completions=True)
        _, steps = train(model, args, reward_funcs=[checks.partial_reward, short_or_cut])
        gradients.append(steps.gradients[0])
    assert relative_error(*gradients) < 1e-6


def test_lambda_of_a_kl_radius_continues_from_a_checkpoint(model, tmp_path):
    options = dict(frpo_lambda=None, frpo_kl_radius=0.05, frpo_radius_smoothing=0.9, max_steps=3, save_steps=2)
    trainer, _ = train(model, settings(tmp_path, save_strategy="steps", **options))
    lambdas = [entry["frpo/lambda"] for entry in trainer.state.log_history if "frpo/lambda" in entry]
    assert len(set(lambdas)) == 3

    resumed = checks.build(model, settings(tmp_path, save_strategy="steps", **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.log_history[2]["frpo/lambda"] == lambdas[2]


def test_training_steps_with_trls_own_generation(model, tmp_path):
    def letters(completions, **_):
        return [sum(character in "aeiou" for character in text) / 12 for text in completions]

    args = settings(
        tmp_path,
        max_steps=3,
        learning_rate=1e-3,
        optim="adamw_torch",
        generation_kwargs={"sequence_bias": [[[1], 3.0]]},
    )
    steps = checks.Steps()
    trainer = checks.build(model, args, rollout_func=None, reward_funcs=letters, callbacks=[steps])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 3
    for name in ("loss", "reward", "kl", "entropy", "completions/mean_length", "frpo/effective_sample_size"):
        assert all(math.isfinite(entry[name]) for entry in logged)
    assert logged[0]["completions/min_length"] < logged[0]["completions/max_length"]
    last = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    assert 1e-4 < relative_error(last, steps.weights[0]) < 1


REFUSED = {
    "loss_type": "dapo",
    "epsilon": 0.2,
    "delta": 1.5,
    "importance_sampling_level": "sequence",
    "scale_rewards": "group",
    "multi_objective_aggregation": "normalize_then_sum",
    "off_policy_mask_threshold": 0.5,
    "top_entropy_quantile": 0.2,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "epsilon_high": None,
    "beta": -1.0,
    "frpo_lambda": 0.0,
    "frpo_kl_radius": 0.1,  # besides frpo_lambda
    "frpo_f_divergence": "js",
    "frpo_scale": "batch",
}


@pytest.mark.parametrize(("option", "value"), REFUSED.items())
def test_an_option_that_frpo_cannot_follow_is_refused_in_one_sentence(tmp_path, option, value):
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, **{option: value})
    message = str(error.value)
    assert option in message
    assert not re.search(r"objective\.\w", message)  # the objective's own name of the field
    assert "\n" not in message and message.endswith(".")


def test_an_optimizer_step_over_two_generation_batches_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="steps_per_generation=4 must be a multiple of gradient_accumulation_steps=8"):
        settings(tmp_path, gradient_accumulation_steps=8, steps_per_generation=4)


def test_scale_rewards_false_is_the_same_as_none(tmp_path):
    assert settings(tmp_path, scale_rewards=False).scale_rewards == "none"


def test_a_grpo_config_is_refused(model, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ConfigError, match="must be a FRPOConfig, not GRPOConfig"):
        checks.build(model, args)


def test_a_load_balancing_loss_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(vocab_size=131, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = AutoConfig.for_model("mixtral", num_key_value_heads=1, num_local_experts=2, **sizes)
    mixture = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="router_aux_loss_coef=.* must be 0.0"):
        checks.build(mixture, settings(tmp_path, beta=0.0))
    checks.build(mixture, settings(tmp_path, beta=0.0, router_aux_loss_coef=0.0))


def test_options_can_be_given_on_the_command_line(tmp_path):
    from trl import TrlParser

    words = f"--output_dir {tmp_path} --frpo_lambda 0.3 --frpo_jackknife false --bf16 false --use_cpu true".split()
    (args,) = TrlParser(FRPOConfig).parse_args_and_config(words)
    assert (args.build_objective().lambda_, args.build_objective().jackknife) == (0.3, False)


def test_the_package_imports_without_trl():
    without_trl = "import sys; sys.modules['trl'] = None; import frpo_nemo.integrations"
    subprocess.run([sys.executable, "-c", without_trl], check=True)
