"""What a row says: its prompt as chat messages, its completion as text.

`source.prompt` and `source.completion` each name a column or are a template of several; if both name the same
column, it holds conversations. Token ids are the business of prompts.py and sft.py.
"""

from __future__ import annotations

import re
from typing import Any

from frpo_nemo.errors import ConfigError

PLACE = re.compile(r"\{([^{}\s][^{}]*)\}")  # not an empty pair of braces: prompts ask for \boxed{}


def columns_of(name: str) -> list[str]:
    """The columns that a template reads; a text without places is a column's name."""
    return PLACE.findall(name) or [name]


def prompt_messages(row: dict[str, Any], source) -> list[dict[str, str]]:
    """The chat messages that the answer follows: a string is one user message, a conversation goes up to its last
    assistant turn; the source's system prompt goes before. Raises ConfigError on anything else."""
    prompt = _value(row, source.prompt, source)
    if source.prompt == source.completion:
        prompt = prompt[: _last_answer(prompt, source)]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not _are_messages(messages):
        raise ConfigError(
            f"data source '{source.path}', column '{source.prompt}': a prompt is a string or a list of "
            f"{{role, content}} messages, not {str(prompt)[:80]!r}"
        )
    if source.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ConfigError(
            f"data source '{source.path}' has prompts with a system message of their own: remove system_prompt"
        )
    return [{"role": "system", "content": source.system_prompt}, *messages]


def completion_text(row: dict[str, Any], source) -> str:
    """The answer to `prompt_messages`. Raises ConfigError if it is no string."""
    value = _value(row, source.completion, source)
    if source.prompt == source.completion:
        value = value[_last_answer(value, source)]["content"]
    if not isinstance(value, str):
        raise ConfigError(
            f"data source '{source.path}', column '{source.completion}': a completion is a string, "
            f"not {str(value)[:80]!r}"
        )
    return value


def _value(row: dict[str, Any], name: str, source) -> Any:
    """A column as it is, or a template filled in: text, without the space that empty columns leave at its ends."""
    if not PLACE.search(name):
        return row[name]
    return PLACE.sub(lambda place: _text(row[place[1]], place[1], source), name).strip()


def _text(value: Any, column: str, source) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ConfigError(
            f"data source '{source.path}', column '{column}': a template takes text or numbers, not {str(value)[:80]!r}"
        )
    return str(value)


def _last_answer(conversation: Any, source) -> int:
    """The place of the last assistant turn, which is not the first message."""
    if _are_messages(conversation):
        turns = [i for i, message in enumerate(conversation) if message["role"] == "assistant"]
        if turns and turns[-1] > 0:
            return turns[-1]
    raise ConfigError(
        f"data source '{source.path}', column '{source.prompt}': prompt and completion in one column are a list of "
        f"{{role, content}} messages with an assistant's after the first, not {str(conversation)[:80]!r}"
    )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and "role" in m and "content" in m for m in value)
    )
