"""Bring chat messages of data sets to one form: a list of {role, content, ...} with text as content.

Data sets keep conversations as lists, as JSON text, in ShareGPT's form, with content in parts, and in Parquet with every key
of every message, null where a message lacks it. A form that has no single reading raises ConfigError.
"""

from __future__ import annotations

import json
import re
from typing import Any

from frpo_nemo.errors import ConfigError

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of an assistant's thoughts before its content
TOOLS = "tools"  # column with the tools that a conversation may call, as in OpenAI's and TRL's data sets
_TEXT_PARTS = ("text", "input_text", "output_text")
_SHAREGPT = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant", "tool")}
_PYTHON = re.compile(r"\s*\[\s*\{\s*'(?:role|content|from|value)'\s*:")  # str() of messages, in CSV


def are_messages(value: Any) -> bool:
    """Return whether `value` is a list of messages. One that calls tools needs no content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and "role" in m and ("content" in m or m.get("tool_calls")) for m in value)
    )


def as_conversation(value: Any, where: str) -> Any:
    """Return messages, or their JSON text, in the one form; anything else unchanged. Raises ConfigError for content that
    isn't text, and for messages as Python prints them. where: source and column, for error messages."""
    if isinstance(value, str):
        value = _parsed(value, where)
    if _is_sharegpt(value):
        value = [_from_sharegpt(m, f"{where}, message {i}") for i, m in enumerate(value)]
    return [_message(m, f"{where}, message {i}") for i, m in enumerate(value)] if are_messages(value) else value


def thoughts(message: dict[str, Any]) -> str:
    """Return the thoughts of an assistant's message, "" if it has none."""
    return next((message[key] for key in THOUGHTS if message.get(key)), "")


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the definitions of tools that a row has in its column `tools`, as objects or as JSON text. None: none, or the
    column has something else."""
    value = row.get(TOOLS)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return _without_nulls(value) if isinstance(value, list) and value and all(map(_is_tool, value)) else None


def _is_tool(value: Any) -> bool:
    found = value.get("function", value) if isinstance(value, dict) else None
    return isinstance(found, dict) and "name" in found and ("parameters" in found or "description" in found)


def _parsed(text: str, where: str) -> Any:
    """Return the messages that `text` holds as JSON; else the text."""
    if _PYTHON.match(text):
        raise ConfigError(
            f"{where} has messages as Python prints them, {text[:40]!r}; write them as JSON, with json.dumps"
        )
    if not text.lstrip().startswith("["):
        return text
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError:
        return text
    return parsed if are_messages(parsed) or _is_sharegpt(parsed) else text


def _is_sharegpt(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in value)
    )


def _from_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    if message["from"] not in _SHAREGPT:
        raise ConfigError(f"{where} is from {message['from']!r}; known names are {', '.join(_SHAREGPT)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT[message["from"]], "content": message["value"], **others}


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message without the keys that have no value. `content` stays null in a tool call, because templates ask for
    that."""
    clean = {key: _without_nulls(value) for key, value in message.items() if value not in (None, [])}
    content = _text(message.get("content"), where)
    if content is None and not clean.get("tool_calls"):
        raise ConfigError(f"{where} (role {message['role']!r}) has no content: give it text, or leave the row out")
    return {"role": message["role"], "content": content, **{k: v for k, v in clean.items() if k not in _OWN}}


_OWN = ("role", "content")


def _text(content: Any, where: str) -> str | None:
    """Return content as text; it is text, or a list of parts of text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(f"{where} has a content that isn't text: {str(content)[:80]!r}")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and (part.get("type") or "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, str):
        return part
    raise ConfigError(f"{where} has a part that isn't text, and only text is supported: {str(part)[:80]!r}")


def _without_nulls(value: Any) -> Any:
    """Return a value without null keys: a data set in Parquet has all keys of all rows, null where a row lacks one."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
