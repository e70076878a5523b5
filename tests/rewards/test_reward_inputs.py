"""What a reward is given: copies of its own, columns that are no options, and the modules beside its file."""

import copy
import sys

import pytest

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.templates import read_template
from frpo_nemo.rewards.registry import load_target
from frpo_nemo.rewards.reward_set import build_rewards, check_rewards

CHANGING = """
def appends_to_prompts(prompts, completions, **columns):
    for prompt, completion in zip(prompts, completions):
        prompt.append({"role": "assistant", "content": completion})
    return [float(len(prompt)) for prompt in prompts]

def edits_messages(prompts, completions, **columns):
    for prompt in prompts:
        prompt[-1]["content"] += "!"
    return [float(prompt[-1]["content"].count("!")) for prompt in prompts]

def pops_golds(completions, answer, **columns):
    return [float(len(golds)) for golds in answer if golds.pop()]

def empties_lists(prompts, completions, answer, task, **columns):
    count = len(completions)
    for values in (prompts, completions, answer, task):
        values.clear()
    return [float(count)] * count

def empties_lists_and_fails_together(prompts, completions, **columns):
    if len(completions) == 1:
        return [1.0]
    while completions:
        completions.pop()
    raise ValueError("one by one, please")

def grows_its_argument(completions, *, seen, **columns):
    seen.extend(completions)
    return [float(len(seen))] * len(completions)

class Grows:
    def __init__(self, seen):
        seen.append("constructed")
        self.length = float(len(seen))

    def __call__(self, completions, **columns):
        return [self.length] * len(completions)
"""


@pytest.fixture
def changing(tmp_path):
    (tmp_path / "changing.py").write_text(CHANGING)
    return lambda name, **options: RewardConfig(target=f"{tmp_path}/changing.py:{name}", **options)


CHANGES = {  # reward -> what each of three responses to one prompt gets, every time
    "appends_to_prompts": 2.0,
    "edits_messages": 1.0,
    "pops_golds": 1.0,
    "empties_lists": 3.0,
    "empties_lists_and_fails_together": 1.0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_reward_may_change_what_it_is_given_and_no_other_response_sees_it(changing, name):
    """The other response may be its own, a later step's or another reward's."""
    prompt, golds = [{"role": "user", "content": "hi"}], ["a", "b"]
    before = copy.deepcopy((prompt, golds))
    rewards = build_rewards({"first": changing(name), "second": changing(name)})
    for _ in range(2):
        scores = rewards.score([prompt] * 3, ["x", "y", "z"], [None] * 3, {"answer": [golds] * 3})
        assert scores.failures == {}, scores.said
        assert [part.tolist() for part in scores.parts.values()] == [[CHANGES[name]] * 3] * 2
    assert (prompt, golds) == before, "the data set's own"


def test_a_reward_may_change_its_arguments_and_has_the_same_ones_in_the_next_call(changing):
    seen = []
    configs = {name: changing(name, args={"seen": seen}) for name in ("grows_its_argument", "Grows")}
    for _ in range(2):
        rewards = build_rewards(configs)
        for _ in range(2):
            assert rewards.score(["p"], ["c"], [None], {}).total.tolist() == [2.0]


# -- columns and options


@pytest.mark.parametrize("name", ["unit", "target", "soft", "max"])
def test_no_column_is_an_option_of_a_built_in_reward(name):
    for target in ("length", "frpo_nemo.rewards.builtin.length_penalty"):
        rewards = build_rewards({"r": RewardConfig(target=target, args={"max": 1, "unit": "words"})})
        scores = rewards.score(["p"], ["a b"], [None], {"response_tokens": [9], name: ["kg"]})
        assert scores.failures == {} and scores.total.tolist() == [-1.0]


@pytest.mark.parametrize("target", ["format", "frpo_nemo.rewards.builtin.regex_search"])
def test_an_argument_that_is_missing_is_asked_for_also_where_a_column_has_its_name(target):
    for columns in (None, ["pattern"]):
        with pytest.raises(ConfigError, match=f"^reward.r: {target} needs the argument 'pattern' .args."):
            check_rewards({"r": RewardConfig(target=target)}, columns=columns)
    check_rewards({"r": RewardConfig(target="frpo_nemo.examples.toy.toy_reward")}, columns=["answer", "refusal"])


@pytest.mark.parametrize("target", ["exact", "math"])
def test_a_column_named_column_is_not_where_the_gold_answer_is(target):
    rewards = build_rewards({"r": RewardConfig(target=target)})
    scores = rewards.score(["p"] * 2, ["5", "6"], [None] * 2, {"answer": ["5", "5"], "column": ["z", "answer"]})
    rewards.close()
    assert scores.failures == {} and scores.total.tolist() == [1.0, 0.0]


def test_parameters_of_a_function_of_ones_own_are_columns_as_in_trl(tmp_path):
    (tmp_path / "own.py").write_text("def f(completions, *, level=0, **columns): return [float(n) for n in level]")
    rewards = build_rewards({"r": RewardConfig(target=f"{tmp_path}/own.py:f")})
    assert rewards.score(["p"] * 2, ["c"] * 2, [None] * 2, {"level": [3, 4]}).total.tolist() == [3.0, 4.0]


UNREACHABLE = {
    "an option": (RewardConfig(target="exact", args={"column": "column"}), "the column 'column'"),
    "completions": (RewardConfig(target="exact", args={"column": "completions"}), "the column 'completions'"),
    "of a judge": (
        RewardConfig(
            target="chat_judge",
            args={
                "model": "m",
                "choices": {"a": 1},
                "template": "{x}{response}",
                "columns": {"x": "prompts"},
                "remote": {"url": "http://127.0.0.1:1"},
            },
        ),
        "the column 'prompts'",
    ),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_a_column_that_cannot_reach_a_reward_is_refused(case):
    config, words = UNREACHABLE[case]
    with pytest.raises(ConfigError, match=f"^reward.r: .* cannot be given {words}.* rename the column"):
        check_rewards({"r": config}, columns=["answer", "column", "completions", "prompts"])


def test_the_task_is_the_examples_own_or_else_the_datas(tmp_path):
    (tmp_path / "own.py").write_text("def f(completions, task, **columns): return [float(len(t or '')) for t in task]")
    rewards = build_rewards({"r": RewardConfig(target=f"{tmp_path}/own.py:f")})
    assert rewards.score(["p"] * 2, ["c"] * 2, ["abc", None], {"task": ["d", "de"]}).total.tolist() == [3.0, 2.0]
    assert rewards.score(["p"] * 2, ["c"] * 2, ["abc", None], {}).total.tolist() == [3.0, 0.0]


# -- files


@pytest.fixture
def own_imports():
    """Forgets what a test imports."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(directory, **files):
    for name, text in files.items():
        file = directory / f"{name.replace('__in__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory


POSTPONED = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

@dataclass
class Score:
    weights: ClassVar[dict[str, float]] = {"a": 2.0}
    right: bool
    notes: list[str] = field(default_factory=list)

class Pair(NamedTuple):
    first: Score
    second: Score | None = None

def f(completions, **columns):
    return [Pair(Score("a" in c)).first.right * Score.weights["a"] for c in completions]
"""


@pytest.mark.parametrize("isolate", [False, True])
def test_a_reward_file_with_dataclasses_and_postponed_annotations_is_read(tmp_path, isolate):
    target = f"{write(tmp_path, own=POSTPONED)}/own.py:f"
    rewards = build_rewards({"r": RewardConfig(target=target, isolate=isolate)})
    assert rewards.score(["p"] * 2, ["a", "b"], [None] * 2, {}).total.tolist() == [2.0, 0.0]
    rewards.close()


SIBLINGS = dict(
    own="from own_helper import one\nimport own_package.part\n"
    "def f(completions, **columns):\n    import own_late\n"
    "    return [one + own_package.part.two + own_late.four] * len(completions)",
    own_helper="from own_deep import one",
    own_deep="one = 1.0",
    own_late="four = 4.0",
    own_package__in____init__="",
    own_package__in__part="two = 2.0",
)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_reward_file_imports_the_modules_beside_it(tmp_path, own_imports, isolate):
    target = f"{write(tmp_path, **SIBLINGS)}/own.py:f"
    check_rewards({"r": RewardConfig(target=target)})
    rewards = build_rewards({"r": RewardConfig(target=target, isolate=isolate)})
    assert rewards.score(["p"], ["a"], [None], {}).total.tolist() == [7.0]
    rewards.close()


def test_modules_of_one_name_beside_two_reward_files_are_not_taken_for_each_other(tmp_path, own_imports):
    text = "from own_shared import value\ndef f(completions, **columns): return [value] * len(completions)"
    first, second = (
        write(tmp_path / name, own=text, own_shared=f"value = {value}") for name, value in (("a", 1.0), ("b", 2.0))
    )
    assert load_target(f"{first}/own.py:f")(completions=["c"]) == [1.0]
    with pytest.raises(
        ConfigError, match="own.py imports own_shared, a module in its own directory, .*: rename own_shared.py"
    ):
        load_target(f"{second}/own.py:f")


def test_a_module_beside_a_reward_file_does_not_replace_a_library(tmp_path, own_imports):
    deep = write(tmp_path, own="import own_helper", own_helper="import yaml", yaml="", json="")
    with pytest.raises(ConfigError, match="own.py imports yaml, .* rename yaml.py"):
        load_target(f"{deep}/own.py:f")
    fine = write(tmp_path / "fine", own="import json\nf = json.loads", json="loads = None", yaml="")
    assert load_target(f"{fine}/own.py:f")("5") == 5


def test_a_reward_file_that_fails_is_said_each_time_and_read_again_when_it_is_mended(tmp_path):
    file = tmp_path / "own.py"
    for text, words in (
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError"),
        ("f(", "SyntaxError"),
    ):
        file.write_text(text)
        for _ in range(2):
            with pytest.raises(ConfigError, match=f"cannot be imported: {words}"):
                load_target(f"{file}:f")
    file.write_text("def f(**columns): return []")
    assert load_target(f"{file}:f")() == []


def test_a_reward_file_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(write(tmp_path, own="def f(**columns): return [1.0]")))
    assert load_target("~/own.py:f")() == [1.0]


def test_a_judge_is_shown_lists_and_dicts_as_json_and_nothing_where_a_value_is_missing():
    template = read_template("{gold}|{response}", None, "", {"gold": "answer"})
    values = ["it's", None, ["a", None], {"ground_truth": "é", "n": 1.50}, 7, 0.25, True, float("nan")]
    texts = template.fill_all(["p"] * len(values), ["r"] * len(values), {"answer": values})
    shown = [text.removesuffix("|r") for text in texts]
    assert shown == ["it's", "", '["a", null]', '{"ground_truth": "é", "n": 1.5}', "7", "0.25", "true", ""]
