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
from frpo_nemo.data.prompts import check_tokenizer, encode_prompts, fingerprint, to_messages
from frpo_nemo.data.sources import load_rows
from frpo_nemo.errors import ConfigError


@dataclass(frozen=True)
class SFTSet:
    """All examples as one ragged batch (`batch.select(indices)` is a step's), and how many were too long."""

    batch: SequenceBatch
    dropped: int

    def __len__(self) -> int:
        return self.batch.num_sequences

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.batch.unpack())


def load_examples(sources: Sequence[Any], tokenizer, *, max_prompt_tokens: int, max_tokens: int) -> SFTSet:
    """Read all `sources`; examples with more than `max_prompt_tokens` of prompt or `max_tokens` in all are
    dropped.

    Raises ConfigError: whatever `check_source` and `check_tokenizer` find, no completion column, a completion
    that is no string, a source of which nothing is left.
    """
    check_tokenizer(tokenizer)
    prompts, completions, dropped = [], [], 0
    for source in sources:
        pairs = _encode(source, tokenizer)
        kept = [(p, c) for p, c in pairs if len(p) <= max_prompt_tokens and len(p) + len(c) <= max_tokens]
        if not kept:
            raise ConfigError(
                f"data source '{source.path}': all {len(pairs)} examples are longer than "
                f"max_prompt_tokens={max_prompt_tokens} or max_tokens={max_tokens}; "
                f"the shortest has {min(len(p) + len(c) for p, c in pairs)} tokens"
            )
        dropped += len(pairs) - len(kept)
        prompts += [p for p, _ in kept]
        completions += [c for _, c in kept]
    return SFTSet(SequenceBatch.from_lists(prompts, completions), dropped)


def _encode(source, tokenizer) -> list[tuple[list[int], list[int]]]:
    if source.completion is None:
        raise ConfigError(f"data source '{source.path}' names no completion column: supervised training needs one")
    rows = load_rows(source)
    prompt_ids = encode_prompts([to_messages(row[source.prompt], source) for row in rows], tokenizer, source)
    texts = [_completion_text(row[source.completion], source) for row in rows]
    completion_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        (prompt, _ended(answer, tokenizer.eos_token_id))
        for prompt, answer in zip(prompt_ids, completion_ids, strict=True)
    ]


def _completion_text(value: Any, source) -> str:
    if not isinstance(value, str):
        raise ConfigError(
            f"data source '{source.path}', column '{source.completion}': a completion is a string, "
            f"not {str(value)[:80]!r}"
        )
    return value


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids[-1:] == [eos] else [*ids, eos]
