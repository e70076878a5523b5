"""Load supervised examples: a prompt as a sampler gets it, then the completion as the chat template writes it in the whole
conversation, up to the token that ends the turn (or EOS, if the template writes none)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.data.chat import Chat
from frpo_nemo.data.columns import completion_message, completion_text, prompt_messages
from frpo_nemo.data.conversations import tools_of
from frpo_nemo.data.prompts import fingerprint
from frpo_nemo.data.sources import load_rows
from frpo_nemo.data.templates import with_line_ends
from frpo_nemo.errors import ConfigError


@dataclass(frozen=True)
class SFTSet:
    """All examples as one ragged batch (`batch.select(indices)` is a step's). `dropped`: how many rows were left out
    because they are too long or have no answer."""

    batch: SequenceBatch
    dropped: int

    def __len__(self) -> int:
        return self.batch.num_sequences

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.batch.unpack())


def load_examples(sources: Sequence[SourceConfig], tokenizer, *, max_prompt_tokens: int, max_tokens: int) -> SFTSet:
    """Read all `sources`. Examples with more than `max_prompt_tokens` of prompt or `max_tokens` in all are dropped, and
    so are those whose completion is empty: they would teach the model to answer nothing.

    Raises ConfigError: all that `check_source` and Chat report, no completion column, a completion
    that isn't a string, `completion_until` where no completion has it, a source of which nothing is left.
    """
    chat = Chat.of(tokenizer)
    chat.check()
    prompts, completions, dropped = [], [], 0
    for source in sources:
        rows, examples, tools = _read_examples(source)
        pairs = chat.examples(examples, f"data source '{source.path}'", tools)
        kept = [(p, c) for p, c in pairs if len(p) <= max_prompt_tokens and len(p) + len(c) <= max_tokens]
        if not kept:
            raise ConfigError(
                f"data source '{source.path}': all {len(pairs)} examples are longer than "
                f"max_prompt_tokens={max_prompt_tokens} or max_tokens={max_tokens}; "
                f"the shortest has {min(len(p) + len(c) for p, c in pairs)} tokens"
            )
        dropped += rows - len(kept)
        prompts += [p for p, _ in kept]
        completions += [c for _, c in kept]
    return SFTSet(SequenceBatch.from_lists(prompts, completions), dropped)


def _read_examples(source: SourceConfig) -> tuple[int, list[tuple[list[dict], dict]], list[list[dict] | None]]:
    """Return (number of rows, chat messages and the assistant's message of those with an answer, the tools of these)."""
    if source.completion is None:
        raise ConfigError(f"data source '{source.path}' names no completion column: supervised training needs one")
    rows = load_rows(source, whole=False)
    end = source.completion_until and with_line_ends(source.completion_until)
    if end and not any(end in completion_text(row, source) for row in rows):
        raise ConfigError(f"data source '{source.path}': none of {len(rows)} completions has completion_until={end!r}")
    answers = [_until(completion_message(row, source), end) for row in rows]
    pairs = [(row, answer) for row, answer in zip(rows, answers, strict=True) if _says_something(answer)]
    examples = [(prompt_messages(row, source), answer) for row, answer in pairs]
    if not examples:
        raise ConfigError(f"data source '{source.path}': all {len(rows)} completions are empty")
    return len(rows), examples, [tools_of(row) for row, _ in pairs]


def _until(answer: dict, end: str | None) -> dict:
    """Return an answer up to the text `end`. GSM8K's worked answers, for example, end in a line `#### number`."""
    text = answer["content"]
    return {**answer, "content": text.partition(end)[0].rstrip()} if end and end in (text or "") else answer


def _says_something(answer: dict) -> bool:
    return bool((answer["content"] or "").strip() or answer.get("tool_calls"))
