"""Interpret a row: its prompt as chat messages, its completion as text.

`source.prompt` and `source.completion` each name a column or are a template of several; if both name the same
column, it holds conversations. prompts.py and sft.py make token ids.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.conversations import are_messages, as_conversation, thoughts
from frpo_nemo.data.templates import fill, is_template, with_line_ends
from frpo_nemo.errors import ConfigError


def prompt_messages(row: dict[str, Any], source: SourceConfig) -> list[dict[str, Any]]:
    """Return the chat messages before the answer: a string is one user message, a conversation ends before its last
    assistant turn; the source's system prompt comes first. Raises ConfigError on anything else."""
    prompt = _conversation(row, source.prompt, source)
    if source.prompt == source.completion:
        prompt = prompt[: _last_answer(prompt, source)]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not are_messages(messages):
        raise ConfigError(
            f"data source '{source.path}', column '{source.prompt}': a prompt is a string or a list of "
            f"{{role, content}} messages, not {str(prompt)[:80]!r}"
        )
    if messages[-1]["role"] == "assistant" and source.prompt != source.completion:
        raise ConfigError(
            f"data source '{source.path}', column '{source.prompt}': a prompt ends in the assistant's answer, "
            f"{str(messages[-1]['content'])[:80]!r}; set completion={source.prompt} to separate the answer, or end "
            "prompts before it"
        )
    if source.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ConfigError(
            f"data source '{source.path}' has prompts with a system message of their own: remove system_prompt"
        )
    return [{"role": "system", "content": with_line_ends(source.system_prompt)}, *messages]


def completion_message(row: dict[str, Any], source: SourceConfig) -> dict[str, Any]:
    """Return the assistant's message that answers `prompt_messages`. Raises ConfigError if there is none."""
    value = _conversation(row, source.completion, source)
    if source.prompt == source.completion:
        return value[_last_answer(value, source)]
    if are_messages(value) and len(value) == 1 and value[0]["role"] == "assistant":
        return value[0]
    if not isinstance(value, str | None):
        raise ConfigError(
            f"data source '{source.path}', column '{source.completion}': a completion is a string, "
            f"not {str(value)[:80]!r} (or a list of one message, the assistant's)"
        )
    return {"role": "assistant", "content": value}


def completion_text(row: dict[str, Any], source: SourceConfig) -> str:
    """Return the answer to `prompt_messages` as text, with its thoughts before it if it has any."""
    message = completion_message(row, source)
    thought, content = thoughts(message), message["content"] or ""
    return f"<think>\n{thought}\n</think>\n\n{content}" if thought else content


def _value(row: dict[str, Any], name: str, source: SourceConfig) -> Any:
    """Return a column as it is, or a template filled in: text, without the white space that empty columns leave at its ends."""
    if not is_template(name):
        return row[name]
    return fill(name, lambda column: _text(row[column], column, source)).strip()


def _text(value: Any, column: str, source: SourceConfig) -> str:
    if value is None or value != value:  # NaN, which pandas writes for a missing value
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ConfigError(
            f"data source '{source.path}', column '{column}': a template takes text or numbers, not {str(value)[:80]!r}"
        )
    return str(value)


def _conversation(row: dict[str, Any], name: str, source: SourceConfig) -> Any:
    return as_conversation(_value(row, name, source), f"data source '{source.path}', column '{name}'")


def _last_answer(conversation: Any, source: SourceConfig) -> int:
    """Return the place of the last assistant turn, which must not be the first message."""
    if are_messages(conversation):
        turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        if turns and turns[-1] > 0:
            return turns[-1]
    raise ConfigError(
        f"data source '{source.path}', column '{source.prompt}': prompt and completion in one column are a list of "
        f"{{role, content}} messages with an assistant's after the first, not {str(conversation)[:80]!r}"
    )
