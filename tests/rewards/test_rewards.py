"""What a run may rely on: who scores which response, and that no reward, however bad, harms more than its
response."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.registry import load_target
from frpo_nemo.rewards.reward_set import build_rewards, check_rewards, local_weights

FAULTY = f"{Path(__file__).parent / 'faulty.py'}:"


def config(target, **fields):
    return RewardConfig(target=target, **fields)


def faulty(function, **fields):
    return RewardConfig(target=FAULTY + function, **fields)


def score(rewards, completions, tasks=None, **columns):
    n = len(completions)
    return build_rewards(rewards).score(["p"] * n, completions, tasks or [None] * n, columns)


def nan_as_none(values):
    return [None if math.isnan(v) else v for v in values.tolist()]


def test_total_is_the_weighted_sum_of_the_rewards_that_apply_to_the_task():
    rewards = {
        "value": faulty("score_or_misbehave", weight=2.0),
        "shape": config("format", weight=0.5, tasks=["math"], args={"pattern": "[0-9]+"}),
    }
    scores = score(rewards, ["3", "0.5", "3"], ["math", "math", "chat"])
    assert nan_as_none(scores.total) == [6.5, 1.0, 6.0]
    assert nan_as_none(scores.parts["value"]) == [3.0, 0.5, 3.0]
    assert nan_as_none(scores.parts["shape"]) == [1.0, 0.0, None]
    assert scores.failures == {}


def test_none_is_not_mine_and_a_response_that_nobody_scored_has_no_reward():
    one = score({"a": faulty("score_or_misbehave")}, ["1", "none"])
    assert nan_as_none(one.total) == [1.0, None] and one.failures == {}
    two = score({"a": faulty("score_or_misbehave"), "b": config("format", args={"pattern": "none"})}, ["1", "none"])
    assert nan_as_none(two.total) == [1.0, 1.0]


@pytest.mark.parametrize("isolate", [False, True])
def test_a_bad_response_fails_alone_and_is_never_zero(isolate):
    completions = ["1", "raise", "2", "nan", "text", "0", "leave", "huge", "nameless"]
    rewards = {
        "a": faulty("score_or_misbehave", isolate=isolate),
        "b": config("format", args={"pattern": ".*"}),
    }
    scores = score(rewards, completions)
    assert nan_as_none(scores.parts["a"]) == [1.0, None, 2.0, None, None, 0.0, None, None, None]
    assert nan_as_none(scores.total) == [2.0, None, 3.0, None, None, 1.0, *3 * [None]], (
        "b scored all, but a should have too"
    )
    assert scores.failures == {"a": {"error": 6}}
    assert "no such luck" in scores.messages["a"]


def test_a_hanging_or_dying_worker_costs_its_response_only():
    rewards = build_rewards({"a": faulty("score_or_misbehave", isolate=True, timeout=1.0, workers=2)})
    completions = ["1", "hang", "2", "die", "3", "segfault", "4", "5"]
    start = time.monotonic()
    scores = rewards.score(["p"] * 8, completions, [None] * 8, {})
    assert time.monotonic() - start < 15
    assert nan_as_none(scores.total) == [1.0, None, 2.0, None, 3.0, None, 4.0, 5.0]
    assert scores.failures == {"a": {"timeout": 1, "died": 2}}
    rewards.close()


def test_workers_persist_between_calls_and_are_replaced_when_they_die_idle():
    rewards = build_rewards({"a": faulty("pid", isolate=True, workers=1)})
    pids = [rewards.score(["p"], ["c"], [None], {}).total.item() for _ in range(2)]
    assert pids[0] == pids[1] != os.getpid()
    os.kill(int(pids[0]), signal.SIGKILL)
    time.sleep(0.2)
    assert rewards.score(["p"], ["c"], [None], {}).total.item() not in (pids[0], math.nan)
    rewards.close()


def test_signals_that_ask_the_run_to_stop_cost_no_response_and_still_end_what_a_reward_starts():
    """Slurm may send them to every process of a step."""
    rewards = build_rewards({"a": faulty("score_or_misbehave", isolate=True, timeout=30.0, workers=1)})
    scores = rewards.score(["p"] * 3, ["signal", "terminate children", "1"], [None] * 3, {})
    assert nan_as_none(scores.total) == [6.0, -2.0 * signal.SIGTERM, 1.0], scores.messages
    rewards.close()


def test_hanging_workers_do_not_outlive_a_killed_trainer():
    program = f"""
import os, signal
from frpo_nemo.rewards.isolation import WorkerPool
pool = WorkerPool("a", {FAULTY + "score_or_misbehave"!r}, {{}}, workers=1, timeout=100.0)
pool.call(["p"], ["1"], {{}})
pool._workers[0].give(0, ("p", "hang", {{}}), 100.0)
print(pool._workers[0].process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    worker = Path(f"/proc/{int(out.stdout)}/status")
    deadline = time.monotonic() + 10
    while worker.exists() and "zombie" not in worker.read_text():
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.1)


def test_a_wrong_number_of_values_is_an_error_of_each_response():
    scores = score({"a": faulty("short")}, ["x", "y"])
    assert nan_as_none(scores.total) == [1.0, 1.0], "asked one by one, one value is right"


def test_a_class_keeps_its_state():
    assert nan_as_none(score({"a": faulty("Scaled", args={"factor": 3.0})}, ["ab", ""]).total) == [6.0, 0.0]


def test_what_models_weigh_is_asked_of_built_in_rewards_alone():
    """Constructing somebody's class may take long, or a GPU."""
    rewards = {"a": faulty("Counted"), "b": faulty("Counted", isolate=True), "c": config("exact")}
    assert local_weights(rewards) == []
    counted = load_target(FAULTY + "Counted")
    assert counted.constructed == 0
    score(rewards | {"c": faulty("Counted")}, [])
    assert counted.constructed == 2, "those of this process; one is isolated"


def test_rewards_see_the_columns_of_their_responses_and_the_task():
    rewards = {"a": config("frpo_nemo.examples.toy.toy_reward", tasks=["harmful", "harmless"])}
    scores = score(
        rewards,
        ["SORRY CANT o1", "2 1", "SURE a1 a2 a3"],
        ["harmful", "math", "harmless"],
        answer=["a1 a1 a1", "2 1", "a1 a2 a3"],
        refusal=["SORRY CANT o1", None, "SORRY CANT o20"],
        prompts=["a column of this name is not passed twice"] * 3,
    )
    assert nan_as_none(scores.total) == [1.0, None, pytest.approx(1.0)]


def test_no_responses_are_no_scores():
    assert score({"a": config("math")}, [], answer=[]).total.shape == (0,)


BAD = {
    "unknown name": (config("mth"), "did you mean 'math'"),
    "no such module": (RewardConfig(target="no.such.module"), "No module named 'no'"),
    "no such function": (faulty("nothing"), "has no function 'nothing'"),
    "no such file": (RewardConfig(target="missing/rewards.py:f"), "missing/rewards.py"),
    "no **columns": (faulty("no_columns"), "**columns"),
    "unknown argument": (config("format", args={"patern": "x"}), "no argument 'patern'"),
    "bad pattern": (config("format", args={"pattern": "("}), "rejects its args"),
    "missing pattern": (config("regex"), "regex needs the argument 'pattern'"),
    "length without aim": (config("length", args={"unit": "words"}), "one of max and target"),
    "class without argument": (faulty("Scaled"), "needs the argument 'factor'"),
    "missing column": (config("math", args={"column": "solution"}), "needs 'solution'"),
    "timeout": (config("math", timeout=0.0), "timeout=0.0 must be a number above 0"),
    "workers": (config("math", workers=0), "workers=0 must be a whole number at least 1"),
    "weight": (config("math", weight=math.inf), "weight=inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rewards_are_sentences_before_anything_runs(name):
    reward, sentence = BAD[name]
    with pytest.raises(ConfigError, match="^reward.mine: ") as error:
        check_rewards({"mine": reward}, columns=["question", "answer"])
    assert sentence in str(error.value)


def test_tasks_without_a_reward_and_rewards_without_a_task_are_found():
    rewards = build_rewards({"a": config("exact", tasks=["math", "chat"])})
    rewards.check_tasks({"math", "chat"}, all_rewards=True)
    rewards.check_tasks({"math"}, all_rewards=False)
    for all_rewards in (False, True):
        with pytest.raises(ConfigError, match="no reward applies to the examples of task 'code'"):
            rewards.check_tasks({"math", "chat", "code"}, all_rewards=all_rewards)
    with pytest.raises(ConfigError, match="no example has task 'chat'; the data has math"):
        rewards.check_tasks({"math"}, all_rewards=True)
    with pytest.raises(ConfigError, match="no reward is configured"):
        build_rewards({})
