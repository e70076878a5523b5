"""The answers of a judge as YAML gives them."""

import math
from functools import partial

import pytest
import yaml

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.chat_judge import ChatJudge
from frpo_nemo.rewards.models.choices import read_choices
from frpo_nemo.rewards.models.judge import Judge
from frpo_nemo.rewards.reward_set import check_rewards

REMOTE = {"url": "http://127.0.0.1:1"}


@pytest.fixture(params=["judge", "chat_judge"])
def judge(request, models):
    make, model = {"judge": (Judge, models["judge"]), "chat_judge": (ChatJudge, "m")}[request.param]
    return partial(make, model, template="{response}", remote=REMOTE)


@pytest.mark.parametrize("text", ["{yes: 1, no: 0}", "{Yes: 1}", "{safe: 1, off: 0}", "{true: 1}", "{no: 1, x: 2}"])
def test_words_that_yaml_reads_as_something_else_are_refused_with_what_to_write(judge, text):
    with pytest.raises(
        ConfigError, match=r'choices: an answer is (True|False), .* in quotes, such as \{"yes": 1.0, "no"'
    ):
        judge(choices=yaml.safe_load(text))


def test_such_a_configuration_is_refused_before_a_run(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [frpo, _self_]\n"
        'reward: {mine: {target: chat_judge, args: {model: m, template: "{response}", choices: {yes: 1.0, no: 0.0},'
        " remote: {url: 'http://127.0.0.1:1'}}}}\n"
    )
    needed = [
        "run_dir=run",
        "model.path=x",
        "optim.lr=1e-3",
        "trainer.max_steps=3",
        "objective.lambda_=1",
    ]
    needed += ["rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "data.train=[{path: x}]"]
    cfg = load(FRPORun, compose("mine", needed, str(tmp_path)))
    with pytest.raises(
        ConfigError, match="^reward.mine: choices: an answer is True, which is how YAML reads yes, on or true"
    ):
        check_rewards(cfg.reward)


REFUSED = {
    "nothing": ({None: 1.0}, "an answer is None, which is how YAML reads null"),
    "a fraction": ({0.5: 1.0}, "the answer 0.5 isn't text"),
    "a word as value": ({"s": "high"}, "the value of 's' is 'high'; it must be a finite number"),
    "yes as value": ({"s": True}, "the value of 's' is True"),
    "no number": ({"s": math.nan}, "the value of 's' is nan"),
    "twice": ({1: 0.0, "1": 1.0}, "an answer is given twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_answers_and_values_that_would_be_guessed_are_refused(judge, case):
    choices, words = REFUSED[case]
    with pytest.raises(ConfigError, match=f"^choices: {words}"):
        judge(choices=choices)


def test_words_in_quotes_and_whole_numbers_are_answers():
    assert read_choices(yaml.safe_load('{"yes": 1, no-one: 0.5, 3: -1}')) == {"yes": 1.0, "no-one": 0.5, "3": -1.0}


def test_a_chat_judges_answers_must_differ_in_more_than_case():
    with pytest.raises(ConfigError, match="'yes' differs from another answer only in case|'Yes' differs"):
        ChatJudge("m", template="{response}", remote=REMOTE, choices={"Yes": 1, "yes": 0})
    ChatJudge("m", template="{response}", remote=REMOTE, choices={"Yes": 1, "yes": 1})
