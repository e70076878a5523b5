"""Responses that some of a run's rewards did not score: what is compared, what is logged, what --check says."""

import json
import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scoring_checks import TARGET, scored_rollouts
from tiny_models import make_tiny

from frpo_nemo.config.cli import main
from frpo_nemo.config.options import FRPORun
from frpo_nemo.objective import FRPO, GRPO, DrGRPO
from frpo_nemo.rewards.reward_set import Reward, RewardSet
from frpo_nemo.rollout.worker import Rollouts
from frpo_nemo.training.checks.config import validate_frpo
from frpo_nemo.training.statistics import rollout_statistics

OBJECTIVES = [GRPO(), DrGRPO(), FRPO(lambda_=0.2), FRPO(kl_radius=0.1)]


@pytest.fixture
def scored(workers):
    """Rollouts on two ranks, which must agree."""

    def check(*groups: dict[str, list], weights: dict[str, float], **tasks: list[str]):
        first, second = workers.run(2, scored_rollouts, groups=[*groups], weights=weights, tasks=tasks)
        torch.testing.assert_close(second.batch.columns, first.batch.columns, rtol=0, atol=0, equal_nan=True)
        return first

    return check


def column(rollouts, name: str) -> list[float | None]:
    return [None if math.isnan(value) else value for value in rollouts.batch.columns[name].tolist()]


def test_an_opinion_on_half_of_a_group_moves_nothing_if_it_is_one(scored):
    """Logged are the sums of what was given; the filled ones are compared."""
    one, minus_one = ({"a": [1, 1, 1, 1], "b": [None, None, value, value]} for value in (1, -1))
    rollouts = scored(one, minus_one, weights={"a": 1.0, "b": 2.0})
    assert column(rollouts, "reward") == [1, 1, 3, 3, 1, 1, -1, -1]
    assert column(rollouts, "compared") == [3, 3, 3, 3, -1, -1, -1, -1]
    for objective in OBJECTIVES:
        objective = objective.for_batch(rollouts.rewards, rollouts.groups, {})
        assert objective.effective_advantages(rollouts.rewards, rollouts.groups).eq(0).all()
    logged = rollout_statistics(rollouts)
    assert logged["share/partly_scored"] == 0.5 and logged["share/unscored"] == 0
    assert logged["reward/mean"] == 1 and logged["reward/a/mean"] == 1 and logged["reward/b/mean"] == 0


def test_a_failure_leaves_its_group_and_counts_in_no_mean(scored):
    group = {"a": [1, 0, 1, "fail"], "b": [None, 5, 1, 40]}
    rollouts = scored(group, {"a": [0, 0, 0, 0], "b": [None] * 4}, weights={"a": 1.0, "b": 1.0})
    assert column(rollouts, "reward") == [1, 5, 2, None, 0, 0, 0, 0]
    assert column(rollouts, "compared") == [4, 5, 2, None, 0, 0, 0, 0]
    assert column(rollouts, "partly_scored") == [1, 0, 0, 0, 0, 0, 0, 0]
    assert rollouts.failures == {"a": {"error": 1}}


def test_rewards_of_other_tasks_are_not_missing(scored):
    groups = {"a": [1, 0], "b": [3, 5]}, {"a": [1, 0], "b": [3, 5]}
    rollouts = scored(*groups, weights={"a": 1.0, "b": 1.0}, b=["1"])
    assert column(rollouts, "reward") == column(rollouts, "compared") == [1, 0, 4, 5]
    assert not any(column(rollouts, "partly_scored"))


def test_a_response_that_nothing_compares_leaves_its_group_and_keeps_its_logged_reward(scored):
    rollouts = scored({"a": [1, 1, 1, 1], "b": [0, 1, 1, None]}, weights={"a": 1.0, "b": 1.0})
    assert column(rollouts, "reward") == [1, 2, 2, 1]
    assert column(rollouts, "compared") == [1, 2, 2, None]


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """Return what --check prints for rewards with these tasks, on data with the tasks chat, code and math."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    make_tiny("model", "qwen2", layers=1)
    Path("prompts.jsonl").write_text("".join(f'{{"prompt": "1+1?", "of": "{t}"}}\n' for t in ("math", "chat", "code")))
    options = ["run_dir=run", "model=tiny_fp32", "model.path=model", "objective=grpo", "optim.lr=1e-3"]
    options += [
        "trainer.max_steps=9",
        "data.train=[{path: prompts.jsonl, task_column: of}]",
        "data.max_prompt_tokens=64",
    ]
    options += ["rollout.prompts_per_step=4", "rollout.max_response_tokens=8"]

    def check(**rewards: list[str] | None) -> str:
        given = [f"+reward.{name}.target={TARGET}" for name in rewards] + [
            f"+reward.{name}.args.of=a" for name in rewards
        ]
        given += [f"+reward.{name}.tasks={json.dumps(tasks)}" for name, tasks in rewards.items() if tasks]
        monkeypatch.setattr(sys, "argv", ["frpo.py", "--check", *options, *given])
        main(None, FRPORun, "frpo", validate_frpo)
        return capsys.readouterr().out

    return check


def test_a_check_names_rewards_whose_tasks_overlap_in_part(printed):
    sentence = "reward: the tasks of form, right overlap in part, so totals are different sums: "
    assert sentence + "form for chat, code; form + right for math\n" in printed(form=None, right=["math"])
    some = printed(form=["chat", "code"], right=["math", "code"], other=["math"])
    assert "reward: the tasks of form, right, other overlap in part" in some
    assert "form for chat; form + right for code; right + other for math\n" in some


def test_many_tasks_are_not_all_named():
    rewards = RewardSet([Reward("form", 1.0, None, None), Reward("right", 1.0, frozenset("ab"), None)], [])
    [sentence] = rewards.describe_overlap(set("abcdef"))
    assert sentence.endswith("form + right for a, b; form for c, d, e, ...")


@pytest.mark.parametrize(
    "tasks", [{"a": None, "b": None}, {"a": ["math"], "b": ["chat", "code"]}, {"a": ["math"], "b": ["math"], "c": None}]
)
def test_a_check_names_no_others(printed, tasks):
    named = "overlap in part" in printed(**tasks)
    assert named == ("c" in tasks)


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("keep", [1, 2, 3, math.nan, -1]),
        ("mask", [1, math.nan, 3, math.nan, math.nan]),
        ("zero", [1, 0, 3, math.nan, -1]),
    ],
)
def test_truncated_responses_are_compared_as_the_rule_says(rule, expected):
    """The second and the last two were cut off, one of them unscored; what is logged stays."""
    rewards = torch.tensor([1.0, 2.0, 3.0, math.nan, -1.0], dtype=torch.float64)
    truncated = torch.tensor([False, True, False, True, True])
    columns = {"reward": rewards, "compared": rewards.clone(), "truncated": truncated}
    rollouts = Rollouts(SimpleNamespace(columns=columns), ["only"])
    rollouts.judge_truncated(rule)
    torch.testing.assert_close(rollouts.rewards, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    assert torch.equal(rollouts.batch.columns["reward"][:3], rewards[:3])
