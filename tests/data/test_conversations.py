"""Conversations as data sets hold them: JSON text, parts, null keys, thoughts, and answers at the end of prompts."""

from __future__ import annotations

import json

import datasets
import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.columns import completion_message, completion_text, prompt_messages
from frpo_nemo.data.sources import load_rows
from frpo_nemo.errors import ConfigError

HI, HELLO, WHY = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Why?"},
)
RL = SourceConfig(path="rows.jsonl", prompt="chat")
SFT = SourceConfig(path="rows.jsonl", prompt="chat", completion="chat")


@pytest.mark.parametrize("space", ["", "\n "])
def test_json_text_of_messages_is_a_conversation(space):
    assert prompt_messages({"chat": space + json.dumps([HI, HELLO, WHY])}, RL) == [HI, HELLO, WHY]
    row = {"chat": json.dumps([HI, HELLO])}
    assert prompt_messages(row, SFT) == [HI] and completion_text(row, SFT) == "Hello!"


@pytest.mark.parametrize(
    "text", ["[1, 2, 3]", "[not JSON", '[{"role": "x"}]', '{"role": "user", "content": "x"}', "[]"]
)
def test_other_text_with_brackets_stays_a_question(text):
    assert prompt_messages({"chat": text}, RL) == [{"role": "user", "content": text}]


@pytest.mark.parametrize("form", [list, json.dumps])
def test_sharegpts_form_is_a_conversation(form):
    said = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello!"), ("human", "Why?")]
    chat = form([{"from": who, "value": text, "weight": None} for who, text in said])
    whole = [{"role": "system", "content": "Be brief."}, HI, HELLO, WHY]
    assert prompt_messages({"chat": chat}, RL) == whole
    assert prompt_messages({"chat": chat}, SFT) == whole[:2] and completion_message({"chat": chat}, SFT) == HELLO
    with pytest.raises(
        ConfigError, match="message 1 is from 'bing'; known names are human, gpt, system, user, assistant, tool"
    ):
        prompt_messages({"chat": form([{"from": "human", "value": "Hi"}, {"from": "bing", "value": "Ho"}])}, RL)


@pytest.mark.parametrize("text", [str([HI, HELLO]), "[{'content': 'Hi', 'role': 'user'}\n {'content': 'Ho'}]"])
def test_messages_as_python_prints_them_are_a_sentence(text):
    with pytest.raises(ConfigError, match="column 'chat' has messages as Python prints them, .* write them as JSON"):
        prompt_messages({"chat": text}, RL)


def test_parts_of_text_are_joined_and_others_are_a_sentence():
    parts = [{"type": "text", "text": "What is ", "image": None}, {"type": None, "text": "this?"}, " Say."]
    assert prompt_messages({"chat": [{"role": "user", "content": parts}]}, RL)[0]["content"] == "What is this? Say."
    image = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(ConfigError, match="column 'chat', message 0 has a part that isn't text, and only text is supp"):
        prompt_messages({"chat": image}, RL)
    with pytest.raises(ConfigError, match="message 0 has a content that isn't text: '5'"):
        prompt_messages({"chat": [{"role": "user", "content": 5}]}, RL)


def test_null_content_is_a_sentence_except_beside_a_call_of_tools():
    with pytest.raises(ConfigError, match=r"message 1 \(role 'assistant'\) has no content"):
        prompt_messages({"chat": [HI, {"role": "assistant", "content": None}, WHY]}, RL)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "content": "6"}
    for content in ({}, {"content": None}):
        messages = prompt_messages({"chat": [HI, call | content, result]}, RL)
        assert messages == [HI, call | {"content": None}, result]
    assert completion_message({"chat": [HI, call]}, SFT)["tool_calls"] == call["tool_calls"]


def test_keys_that_parquet_adds_to_every_message_are_left_out(tmp_path):
    call = {"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "halve", "arguments": {"b": 2}}}
    chat = [HI, {"role": "assistant", "content": None, "tool_calls": [call, other]}, {"role": "tool", "content": "3"}]
    datasets.Dataset.from_list([{"chat": chat}]).to_parquet(tmp_path / "rows.parquet")
    (row,) = load_rows(SourceConfig(path=str(tmp_path / "rows.parquet"), prompt="chat"))
    assert "tool_calls" in row["chat"][0], "Parquet adds the key"
    assert prompt_messages(row, RL) == chat


def test_a_prompt_that_ends_in_the_answer_is_a_sentence():
    with pytest.raises(ConfigError, match="a prompt ends in the assistant's answer, 'Hello!'; set completion=chat to"):
        prompt_messages({"chat": [HI, HELLO]}, RL)
    assert prompt_messages({"chat": [HI, HELLO]}, SFT) == [HI]


def test_thoughts_stay_with_the_answer():
    row = {"chat": [HI, HELLO | {"reasoning_content": "A greeting."}]}
    assert completion_message(row, SFT)["reasoning_content"] == "A greeting."
    assert completion_text(row, SFT) == "<think>\nA greeting.\n</think>\n\nHello!"


def test_a_completion_may_be_a_list_of_one_message():
    source = SourceConfig(path="rows.jsonl", prompt="prompt", completion="completion")
    row = {"prompt": [HI], "completion": [HELLO]}
    assert prompt_messages(row, source) == [HI] and completion_text(row, source) == "Hello!"
    with pytest.raises(ConfigError, match="a completion is a string, not .* a list of one message, the assistant's"):
        completion_message({"prompt": [HI], "completion": [WHY]}, source)
