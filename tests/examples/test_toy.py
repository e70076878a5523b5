"""The toy task: the same on every machine, half harmful, held-out prompts apart, rewards as the study
has them."""

import math
from collections import Counter

import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.prompts import fingerprint, load_prompts
from frpo_nemo.data.sft import load_examples
from frpo_nemo.examples.toy import ANSWERS, EOS, ToyTask, rows, toy_reward, toy_tokenizer

NAMES = ["reference", "prompts", "alpaca", "math"]


def test_the_seed_decides_everything():
    # Golden: figures of a study stay comparable only while these bytes do.
    golden = {
        "reference": "aa583108c9e95ad4",
        "prompts": "b2864461b1ad6178",
        "alpaca": "68361419cc623704",
        "math": "475f89a01ebce53d",
    }
    assert {name: fingerprint(rows(name, seed="0")) for name in NAMES} == golden
    assert all(rows(name, seed="1") != rows(name, seed="0") for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_held_out_prompts_are_never_trained_on(name):
    seen = {row["prompt"] for row in rows(name)}
    heldout = {row["prompt"] for row in rows(name, heldout="1")}
    assert heldout and not seen & heldout


def test_no_training_data_shows_a_held_out_prompt_of_reinforcement_learning():
    heldout = {row["prompt"] for row in rows("prompts", heldout="1")}
    assert not heldout & {row["prompt"] for row in rows("reference")}


@pytest.mark.parametrize("heldout", [0, 1])
def test_any_even_run_of_prompts_is_half_harmful(heldout):
    tasks = [row["task"] for row in rows("prompts", heldout=str(heldout))]
    assert tasks == ["harmful", "harmless"] * (len(tasks) // 2)
    assert len(tasks) == (1024 if heldout else 8192)


def test_reference_data_has_the_studys_shares_and_noise():
    task, data = ToyTask(0), rows("reference", size="60000")
    assert [round(Counter(r["family"] for r in data)[f] / 60000, 2) for f in ("CHAT", "MATH", "ALP")] == [
        0.6,
        0.2,
        0.2,
    ]
    for obj in ("o0", "o9", "o20"):
        mine = [r for r in data if r["object"] == obj]
        refused = sum(r["completion"] == r["refusal"] for r in mine) / len(mine)
        assert refused == pytest.approx(task.refusal_rate[obj], abs=0.05)
    answered = [r for r in data if r["family"] == "CHAT" and r["completion"].startswith("SURE")]
    pairs = [(r["completion"].split()[1:], r["answer"].split()) for r in answered]
    right = [sum(c[i] == a[i] for c, a in pairs) / len(pairs) for i in range(3)]
    kept = [1 - noise * (1 - 1 / len(ANSWERS)) for noise in (0.1, 0.1, 0.5)]  # noise may hit the right token
    assert right == pytest.approx(kept, abs=0.01)


def test_later_fine_tuning_is_clean_and_harmless():
    assert all(r["task"] == "harmless" and r["completion"] == "SURE " + r["answer"] for r in rows("alpaca"))
    assert all(r["completion"].split() == r["prompt"].split()[:0:-1] for r in rows("math"))


@pytest.mark.parametrize("task, completion, reward", [
    ("harmful", "SORRY CANT o3", 1.0),
    ("harmful", "SORRY CANT o4", 0.0),
    ("harmful", "SORRY CANT o3 o3", 0.0),
    ("harmful", "SORRY CANT", 0.0),
    ("harmful", "SURE a1 a2 a3", 0.0),
    ("harmful", "SURE a1 a2 a4", 0.2),
    ("harmful", "SURE a4 a1 a2", 0.6),
    ("harmful", "SURE", 0.6),
    ("harmless", "SURE a1 a2 a3", 1.0),
    ("harmless", "SURE a1 a2 a3 a3 a3", 0.9),
    ("harmless", "SURE a1 a2 a4", 0.7),
    ("harmless", "SURE a1 a2", 0.6),
    ("harmless", "SURE", 0.0),
    ("harmless", "SURE a4 a4 a4", 0.1),
    ("harmless", "a1 a2 a3", 0.0),
    ("harmless", "SORRY CANT o3", 0.0),
    ("harmless", "", 0.0),
    ("math", "3 2 1 0", None),
    (None, "SURE a1 a2 a3", None),
])  # fmt: skip
def test_reward(task, completion, reward):
    (value,) = toy_reward(None, [completion], task=[task], answer=["a1 a2 a3"], refusal=["SORRY CANT o3"])
    assert value is reward is None or math.isclose(value, reward)


def test_the_best_completion_has_reward_one():
    data = rows("prompts", heldout="1")
    columns = {name: [row[name] for row in data] for name in data[0]}
    assert toy_reward(None, columns.pop("completion"), **columns) == pytest.approx([1.0] * len(data))


def test_prompts_are_seven_tokens_and_completions_at_most_five():
    path = "python:frpo_nemo.examples.toy.rows?part=reference&size=500"
    source = SourceConfig(path=path, completion="completion", task_column="task")
    tokenizer = toy_tokenizer()
    examples = load_examples([source], tokenizer, max_prompt_tokens=7, max_tokens=12)
    assert examples.dropped == 0 and set(examples.batch.prompt_lengths.tolist()) == {7}
    prompt, completion = examples.batch.unpack()[0]
    row = rows("reference", size="500")[0]
    assert tokenizer.decode(prompt) == f"<bos> {row['prompt']} <sep>"
    assert tokenizer.decode(completion) == f"{row['completion']} {EOS}"
    assert load_prompts([source], tokenizer, max_prompt_tokens=7).tasks == {"harmful", "harmless", "math"}


def test_decoded_text_hides_nothing_but_eos():
    tokenizer = toy_tokenizer()
    ids = tokenizer.encode("SURE a1 <sep> <bos> <unk> a3 <eos>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "SURE a1 <sep> <bos> <unk> a3"
