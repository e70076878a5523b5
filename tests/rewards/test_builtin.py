"""The built-in rewards, by example."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.rewards.builtin import exact_answer, format_match, length_penalty, one_boxed, regex_search
from frpo_nemo.rewards.math_answers.grade import math_answer
from frpo_nemo.rewards.reward_set import build_rewards

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    "gold, completion, right",
    [
        ("She sold 48/2 = 24.\n#### 72", "48 + 24 = <<48+24=72>>72\n#### 72", 1),
        ("#### 1,200", "The answer is 1200.", 1),
        ("#### 72", "#### 72\nAnd then 8 more", 1),
        ("#### 72", "#### 73", 0),
        ("#### 72", "I do not know", 0),
        ("#### 72", "", 0),
        ("#### -3", "so we get \\boxed{-3}", 1),
        ("0.5", "\\boxed{\\frac{1}{2}}", 1),
        ("\\frac{1}{2}", "It is $0.5$", 1),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "Thus $(3, \\pi/2)$.", 1),
        ("$x^2 - 1$", "\\boxed{(x-1)(x+1)}", 1),
        ("$18", "18 dollars", 1),
        ("\\$18.90", "\\boxed{\\$18.90}", 1),
    ],
)
def test_math(gold, completion, right):
    assert math_answer(None, [completion], answer=[gold]) == [right]


def test_math_refuses_a_gold_answer_without_mathematics():
    with pytest.raises(ValueError, match="holds no mathematics"):
        math_answer(None, ["1"], answer=["#### "])


def test_math_that_never_ends_is_killed():
    rewards = build_rewards({"m": RewardConfig(target="math", timeout=2.0, workers=1)})
    endless = "$\\boxed{(((9^9)^9)^9)^{9^{9^{9}}}}$"
    scores = rewards.score(["p"] * 2, [endless, "\\boxed{2}"], [None] * 2, {"answer": ["2", "2"]})
    rewards.close()
    assert scores.total.isnan().tolist() == [True, False]
    assert scores.failures == {"m": {"timeout": 1}}


@pytest.mark.parametrize("name, solution", [("gsm8k/test.jsonl", "answer"), ("math500/test.jsonl", "solution")])
def test_math_accepts_the_published_solutions(name, solution):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()[:100]]
    scores = math_answer(None, [row[solution] for row in rows], answer=[row["answer"] for row in rows])
    assert scores == [1.0] * 100


@pytest.mark.parametrize(
    "gold, completion, right",
    [
        ("#### 1,200", "so\n#### $1200.", 1),
        ("Paris", " Paris. ", 1),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{2}}", 1),
        ("0.5", "\\boxed{\\frac{1}{2}}", 0),
        ("3 1 2", "3  1 2\n", 1),
        ("1,2", "12", 0),
        ("72.0", "72", 0),
        (72.0, "#### 72", 1),
        (72.0, "72.0", 1),
        (72, "72.", 1),
        (72, "seventy-two", 0),
        (1e22, "10000000000000000000000", 1),
        (9007199254740993, "9007199254740992", 0),
        (Decimal("1.50"), "$1.5", 1),
    ],
)
def test_exact(gold, completion, right):
    assert exact_answer(None, [completion], column="gold", gold=[gold]) == [right]


def test_format_matches_all_and_regex_searches():
    pattern = "<think>.*</think>.*"
    texts = ["<think>a\nb</think> c", "well, <think>a</think>", ""]
    assert format_match(None, texts, pattern=pattern) == [1.0, 0.0, 0.0]
    assert regex_search(None, texts, pattern=pattern) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "text, one",
    [
        ("so \\boxed{5}.", 1),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", 1),
        ("\\boxed{\\left\\{ 1, 2 \\right.}", 1),
        ("\\boxed {5}", 1),
        ("\\boxed{5} or \\boxed{5}", 0),
        ("\\boxed{\\boxed{5}}", 0),
        ("\\boxed{5} or \\boxed 6", 0),
        ("\\boxed{\\frac{1}{2}", 0),
        ("\\boxed{5\\}", 0),
        ("\\boxed 5, that is {5}", 0),
        ("\\boxed}5{", 0),
        ("\\boxed", 0),
        ("\\boxed{ }", 0),
        ("{5}", 0),
        ("", 0),
    ],
)
def test_exactly_one_box(text, one):
    assert one_boxed(None, [text]) == [one]


def test_boxed_format_gives_published_solutions_1_but_for_those_with_two_boxes():
    path = DATA / "math500" / "test.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["solution"].count("\\boxed") == 2 or "\\$" in row["answer"]] + rows[:40]
    choice = OmegaConf.load(Path(__file__).parents[2] / "configs" / "reward" / "boxed_format.yaml")
    rewards = build_rewards({name: RewardConfig(**options) for name, options in choice.items()})
    texts = [row["solution"] for row in rows] + ["It is \\boxed{-17}.", "It is -17."]
    answers = [row["answer"] for row in rows] + ["2", "2"]
    scores = rewards.score(["p"] * len(texts), texts, [None] * len(texts), {"answer": answers})
    rewards.close()
    boxes = [text.count("\\boxed") for text in texts[:-2]]
    assert boxes.count(2) == 8 and boxes.count(1) >= 40
    expected = [1.0 if count == 1 else 0.8 for count in boxes] + [0.2, 0.0]
    assert scores.total.tolist() == pytest.approx(expected)


def test_length():
    texts = ["one", "one two three", "one two three four five six"]
    assert length_penalty(None, texts, max=3, unit="words") == [0.0, 0.0, -1.0]
    assert length_penalty(None, texts, max=2, soft=4, unit="words") == [0.0, -0.25, -1.0]
    assert length_penalty(None, texts, target=3, unit="words") == pytest.approx([-2 / 3, 0.0, -1.0])
    assert length_penalty(None, ["abc"], max=2, unit="characters") == [-1.0]
    assert length_penalty(None, ["abc"], max=2, response_tokens=[2]) == [0.0]
    with pytest.raises(ValueError, match="target=0 must be at least 1"):
        length_penalty(None, [], target=0, response_tokens=[])
