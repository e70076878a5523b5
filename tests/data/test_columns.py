"""What a row says: prompt and completion from columns, templates or conversations."""

from decimal import Decimal

import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.columns import completion_text, prompt_messages
from frpo_nemo.errors import ConfigError

ALPACA = {"prompt": "{instruction}\n\n{input}", "completion": "output"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def source(**fields):
    return SourceConfig(path="rows.jsonl", **fields)


@pytest.mark.parametrize("empty", ["", None, " \n"])
def test_a_template_joins_columns_and_an_empty_one_leaves_no_trace(empty):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert prompt_messages(row, source(**ALPACA)) == [user("Add.\n\n1 and 2")]
    assert prompt_messages(row | {"input": empty}, source(**ALPACA)) == [user("Add.")]
    assert completion_text(row, source(**ALPACA)) == "3"


@pytest.mark.parametrize("empty", ["", None, " \n"])
def test_a_part_in_double_brackets_vanishes_with_an_empty_column(empty):
    """The authors' prompts of Alpaca: headings, and the second only where there is an input."""
    row = {"instruction": "Add.", "input": "1 and 2"}
    alpaca = source(prompt="### Instruction:\n{instruction}[[\n\n### Input:\n{input}]]")
    assert prompt_messages(row, alpaca) == [user("### Instruction:\nAdd.\n\n### Input:\n1 and 2")]
    assert prompt_messages(row | {"input": empty}, alpaca) == [user("### Instruction:\nAdd.")]


def test_a_template_takes_values_as_they_are_and_evaluates_nothing():
    row = {"n": 3, "two words": "{n} {n.__class__} $n %s"}
    template = "{n}: {two words}, in \\boxed{} {}"
    assert prompt_messages(row, source(prompt=template)) == [user("3: {n} {n.__class__} $n %s, in \\boxed{} {}")]
    assert completion_text(row, source(completion="n = {n}")) == "n = 3"
    values = {"n": 2**70, "x": Decimal("1.50"), "gap": float("nan")}
    assert prompt_messages(values, source(prompt="{n}; {x}; {gap}")) == [user("1180591620717411303424; 1.50;")]
    with pytest.raises(ConfigError, match="column 'n': a template takes text or numbers, not 'True'"):
        prompt_messages({"n": True}, source(prompt="{n}?"))
    with pytest.raises(ConfigError, match="column 'n': a template takes text or numbers, not .\\['3'\\]"):
        prompt_messages({"n": ["3"]}, source(prompt="{n}?"))


def test_the_last_assistant_turn_of_a_conversation_is_the_completion():
    turns = [user("hi"), assistant("hello"), user("1+1?"), assistant("2")]
    chat = source(prompt="messages", completion="messages")
    for messages in (turns, [*turns, user("thanks")]):
        assert prompt_messages({"messages": messages}, chat) == turns[:3]
        assert completion_text({"messages": messages}, chat) == "2"
    briefly = source(prompt="messages", completion="messages", system_prompt="Be brief.")
    assert prompt_messages({"messages": turns}, briefly) == [{"role": "system", "content": "Be brief."}, *turns[:3]]


@pytest.mark.parametrize("value", ["text", [], [user("hi")], [assistant("hello")], [{"from": "human", "value": "hi"}]])
def test_what_is_no_conversation_with_an_answer_is_a_sentence(value):
    chat = source(prompt="messages", completion="messages")
    for read in (prompt_messages, completion_text):
        with pytest.raises(ConfigError, match="'messages': prompt and completion in one column are a list of {role"):
            read({"messages": value}, chat)
