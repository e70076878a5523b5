"""Check whether two sets of prompts overlap: a probe must not ask prompts on which the fine-tuning trains.

Prompts are compared as text, not as token ids: ids differ as soon as one source has a system prompt, other white space or
another template, and the check comes before a tokenizer loads.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.columns import prompt_messages
from frpo_nemo.data.sources import load_rows
from frpo_nemo.errors import ConfigError

Messages = list[dict[str, str]]


def overlapping_prompts(prompts: Iterable[Messages], others: Iterable[Messages]) -> list[Messages]:
    """Return those of `prompts` that `others` has too, in order: equal except for system messages, case, white space and
    Unicode's way of writing a character."""
    known = {_key(messages) for messages in others}
    return [messages for messages in prompts if _key(messages) in known]


def check_apart(probe: Sequence[Any], training: Sequence[Any]) -> None:
    """Raise ConfigError when a prompt of the sources `probe` is also in the sources `training`. Reads all their rows,
    whatever their length in tokens."""
    prompts = _prompts(probe)
    shared = overlapping_prompts(prompts, _prompts(training))
    if shared:
        raise ConfigError(
            f"probe.prompts: {len(shared)} of {len(prompts)} prompts are also in data.train, the first "
            f"{str(shared[0][-1]['content'])[:80]!r}; take other rows (start, limit) or another set."
        )


def _prompts(sources: Sequence[SourceConfig]) -> list[Messages]:
    return [prompt_messages(row, source) for source in sources for row in load_rows(source, whole=False)]


def _key(messages: Messages) -> tuple[str, ...]:
    return tuple(_normalised(str(m["content"])) for m in messages if m["role"] != "system")


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
