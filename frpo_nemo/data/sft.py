"""Supervised examples: a prompt as the chat template renders it, then the completion, then EOS.

The two are tokenized apart and joined as ids, which is exactly what a sampler sees: it continues prompt ids
that were fixed before the first answer token. Tokenizing the joined text instead could merge tokens across
the border.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.data.columns import completion_text, prompt_messages
from frpo_nemo.data.prompts import check_tokenizer, encode_prompts, fingerprint
from frpo_nemo.data.sources import load_rows
from frpo_nemo.errors import ConfigError


@dataclass(frozen=True)
class SFTSet:
    """All examples as one ragged batch (`batch.select(indices)` is a step's). `dropped`: how many rows were left out,
    as too long or without an answer."""

    batch: SequenceBatch
    dropped: int

    def __len__(self) -> int:
        return self.batch.num_sequences

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.batch.unpack())


def load_examples(sources: Sequence[Any], tokenizer, *, max_prompt_tokens: int, max_tokens: int) -> SFTSet:
    """Read all `sources`; examples with more than `max_prompt_tokens` of prompt or `max_tokens` in all are dropped, and
    so are those whose completion is empty: they would teach to say nothing.

    Raises ConfigError: whatever `check_source` and `check_tokenizer` find, no completion column, a completion
    that is no string, `completion_until` where no completion has it, a source of which nothing is left.
    """
    check_tokenizer(tokenizer)
    prompts, completions, dropped = [], [], 0
    for source in sources:
        rows, examples = _read_examples(source)
        pairs = _encode(examples, tokenizer, source)
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


def _read_examples(source) -> tuple[int, list[tuple[list[dict[str, str]], str]]]:
    """(number of rows, those with an answer as chat messages and completion)."""
    if source.completion is None:
        raise ConfigError(f"data source '{source.path}' names no completion column: supervised training needs one")
    rows = load_rows(source)
    whole = [completion_text(row, source) for row in rows]
    texts = [_until(text, source.completion_until) for text in whole]
    if source.completion_until and not any(source.completion_until in text for text in whole):
        raise ConfigError(
            f"data source '{source.path}': none of {len(rows)} completions has "
            f"completion_until={source.completion_until!r}"
        )
    examples = [(prompt_messages(row, source), text) for row, text in zip(rows, texts, strict=True) if text.strip()]
    if not examples:
        raise ConfigError(f"data source '{source.path}': all {len(rows)} completions are empty")
    return len(rows), examples


def _encode(examples, tokenizer, source) -> list[tuple[list[int], list[int]]]:
    prompt_ids = encode_prompts([messages for messages, _ in examples], tokenizer, source)
    completion_ids = tokenizer([text for _, text in examples], add_special_tokens=False)["input_ids"]
    return [
        (prompt, _ended(answer, tokenizer.eos_token_id))
        for prompt, answer in zip(prompt_ids, completion_ids, strict=True)
    ]


def _until(text: str, end: str | None) -> str:
    """GSM8K's worked answers, for one, end in a line `#### number`, which may be unwanted."""
    return text.partition(end)[0].rstrip() if end and end in text else text


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]
