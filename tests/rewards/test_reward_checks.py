"""What a run is told about its rewards before anything loads, and that the run itself then agrees; and what it tells of
those that fail."""

import json
from operator import attrgetter

import pytest
from recorded_judge import RecordedJudge
from tiny_models import make_tiny
from transformers import AutoTokenizer

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun, RewardConfig, SourceConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.reward_set import build_rewards, check_rewards, check_waits
from frpo_nemo.rollout.worker import ScoredPrompts, failure_lines
from frpo_nemo.training.checks.config import validate_frpo

NEEDED = ["run_dir=run", "optim.lr=1e-3", "trainer.max_steps=3", "objective.lambda_=1", "model=tiny_fp32"]
NEEDED += ["rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "data.train=[{path: x}]"]
ONE = {"one": RewardConfig(target="length", tasks=["a"], args={"max": 9})}
BOTH = ONE | {"other": RewardConfig(target="length", tasks=["b"], args={"max": 9})}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Makes the configuration of a run of a tiny model on sources of these names: prompts of the task a, of the task b, of
    both where those of b are too long, and others of the task a."""
    root = tmp_path_factory.mktemp("run")
    make_tiny(root / "tiny", "llama")
    rows = {"a": [("1+1?", "a")], "b": [("2*3?", "b")], "l": [("7-2?", "a"), ("b" * 99, "b")], "o": [("8/4?", "a")]}
    for name, pairs in rows.items():
        lines = [json.dumps({"prompt": prompt, "task": task}) + "\n" for prompt, task in pairs]
        (root / f"{name}.jsonl").write_text("".join(lines))
    source = {name: SourceConfig(path=str(root / f"{name}.jsonl"), task_column="task") for name in rows}

    def make(reward, train, validation="", probe_reward=None, probe=""):
        cfg = load(FRPORun, compose("frpo", [*NEEDED, "reward=toy", f"model.path={root}/tiny"]))
        cfg.reward, cfg.data.max_prompt_tokens, cfg.probe.max_response_tokens = reward, 64, 16
        cfg.data.train, cfg.data.validation = [source[n] for n in train], [source[n] for n in validation]
        if probe:
            cfg.probe.interval, cfg.probe.reward, cfg.probe.prompts = 1, probe_reward, [source[n] for n in probe]
        return cfg

    return make


def served(target, **remote):
    args = {"model": "gpt", "template": "{response}", "choices": {"no": 1}} if target == "chat_judge" else {}
    return RewardConfig(target=target, args=args | {"remote": {"url": "http://127.0.0.1:1", **remote}})


def test_servers_that_stay_away_one_after_another_are_given_up_before_the_watchdog_ends_the_run():
    rewards = {"a": served("chat_judge", patience=100, timeout=20), "b": served("moderation", patience=30)}
    check_waits(rewards, 211, "reward")
    with pytest.raises(ConfigError) as error:
        check_waits(rewards, 210, "reward")
    assert str(error.value) == (
        "trainer.phase_timeout=210 must be above 210, the seconds (patience + timeout) after which unreachable servers are "
        "given up, one after another: reward.a.args.remote, reward.b.args.remote."
    )
    check_waits({"c": RewardConfig(target="length"), "mine": RewardConfig(target="some.of:mine")}, 1e-9, "reward")


@pytest.mark.parametrize("at", ["reward", "probe.reward"])
def test_the_papers_rewards_may_all_be_served(at):
    """Judge, moderation and reward model, with what a run has by default."""
    options = ["safety.args.judge.template_file=x", "safety.args.judge.remote.url=judge.url"]
    options += ["helpfulness.args.remote.url=reward.url"]
    group = ["reward=safety"] if at == "reward" else ["reward=toy", "probe=safety"]
    cfg = load(FRPORun, compose("frpo", [*NEEDED, "model.path=x", *group, *(f"{at}.{option}" for option in options)]))
    rewards = attrgetter(at)(cfg)
    check_waits(rewards, cfg.trainer.phase_timeout, at)
    with pytest.raises(ConfigError) as error:
        check_waits(rewards, 1000, at)
    keys = ("safety.args.judge.remote", "safety.args.moderation.remote", "helpfulness.args.remote")
    assert str(error.value).endswith(f": {', '.join(f'{at}.{key}' for key in keys)}.")


def test_a_run_and_its_probes_are_checked_for_how_long_they_may_wait(run):
    judge = {"judge": served("chat_judge")}
    for cfg, key in (
        (run(judge, "a"), "reward.judge.args.remote"),
        (run(ONE, "a", probe_reward=judge, probe="b"), "probe.reward.judge.args.remote"),
    ):
        validate_frpo(cfg, 1)
        cfg.trainer.phase_timeout = 400
        with pytest.raises(
            ConfigError, match=f"trainer.phase_timeout=400 must be above 480.* one after another: {key}"
        ):
            validate_frpo(cfg, 1)


def test_a_served_model_in_a_worker_has_the_time_to_wait_for_its_server():
    config = served("moderation", patience=30, timeout=5)
    config.isolate, config.timeout = True, 35
    check_rewards({"m": config})
    config.timeout = 34
    with pytest.raises(
        ConfigError, match="reward.m: timeout=34 must be at least 35, patience \\+ timeout of args.remote"
    ):
        check_rewards({"m": config})


def test_training_data_need_every_task_of_a_reward_and_validation_and_probes_do_not(run):
    """The check and the run agree, also where all prompts of a task are too long."""
    for cfg in (run(BOTH, "ab", validation="b", probe_reward=BOTH, probe="o"), run(BOTH, "l")):
        validate_frpo(cfg, 1)
        rewards, tokenizer = build_rewards(cfg.reward), AutoTokenizer.from_pretrained(cfg.model.path)
        for sources in filter(None, (cfg.data.train, cfg.data.validation, cfg.probe.prompts)):
            assert ScoredPrompts.load(sources, rewards, tokenizer, cfg.data.max_prompt_tokens).tasks
    with pytest.raises(ConfigError, match="reward.other.tasks: no example has task 'b'; the data has a"):
        validate_frpo(run(BOTH, "a", validation="b"), 1)
    for cfg in (run(ONE, "a", validation="b"), run(ONE, "a", probe_reward=ONE, probe="b")):
        with pytest.raises(ConfigError, match="no reward applies to the examples of task 'b'"):
            validate_frpo(cfg, 1)


def test_what_a_reward_fails_for_is_told_once_for_each_kind_and_again_when_it_scored_nothing():
    reported = set()
    too_long, away = {"error": "too long"}, {"died": "no answer"}
    assert failure_lines([{"a": too_long}, {}], set(), reported) == [
        "reward a failed for some responses, which stay unscored. First error: too long"
    ]
    assert failure_lines([{"a": too_long}], set(), reported) == []
    hidden = "reward a failed for some responses, which stay unscored. First died: no answer"
    assert failure_lines([{"a": too_long}, {"a": too_long | away}], set(), reported) == [hidden]
    for _ in range(2):
        (line,) = failure_lines([{"a": away}, {"a": away}], {"a"}, reported)
        assert line == "reward a failed for all of its responses, which stay unscored. First died: no answer"


def test_scores_keep_the_first_message_of_each_kind():
    """A failure of every response must not hide that a server is away."""
    server = RecordedJudge(lambda body, n: "maybe", lives=1)
    judge = served("chat_judge", patience=0, concurrency=1)
    judge.args["remote"]["url"] = server.url
    scores = build_rewards({"r": judge}).score(["p"] * 3, ["r"] * 3, [None] * 3, {})
    server.close()
    assert scores.failures == {"r": {"error": 1, "died": 2}} and set(scores.said["r"]) == {"error", "died"}
    assert scores.messages["r"] == scores.said["r"]["error"] == "the judge answers something else: 'maybe'"
