"""Load prompts for reinforcement learning (rows -> chat messages -> token ids), and choose the prompts of each step.

Nothing here keeps a position: the step's number alone determines its prompts, so a resumed run continues with the right
ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.chat import Chat
from frpo_nemo.data.columns import prompt_messages
from frpo_nemo.data.conversations import tools_of
from frpo_nemo.data.sources import load_rows
from frpo_nemo.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    """One prompt: chat messages, their token ids up to where the answer begins, and what rewards may need."""

    prompt_ids: list[int]
    messages: list[dict[str, str]]
    task: str | None
    columns: dict[str, Any]  # the row's other columns, unchanged


@dataclass(frozen=True)
class PromptSet:
    """All prompts of a run. `dropped`: how many were left out because they are longer than max_prompt_tokens."""

    examples: list[Prompt]
    dropped: int

    def __len__(self) -> int:
        return len(self.examples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of all examples in order: equal on all ranks, and equal when a run resumes."""
        return fingerprint((e.prompt_ids, e.task, e.columns) for e in self.examples)

    @functools.cached_property
    def tasks(self) -> set[str | None]:
        return {e.task for e in self.examples}

    def columns(self, indices: Sequence[int], repeat: int = 1) -> dict[str, list]:
        """Return the raw columns of the examples at `indices`, each `repeat` times (responses of one prompt are
        neighbours). A column that an example's source does not have is None there."""
        rows = [self.examples[i].columns for i in indices for _ in range(repeat)]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}


def load_prompts(sources: Sequence[SourceConfig], tokenizer, *, max_prompt_tokens: int) -> PromptSet:
    """Read all `sources`, render their prompts with the chat template of `tokenizer` (or of a Chat), generation prompt
    added, and tokenize. Raises ConfigError: all that `check_source` and Chat report, and a source of which nothing is left.
    """
    chat = Chat.of(tokenizer)
    chat.check()
    examples, dropped = [], 0
    for source in sources:
        rows = load_rows(source)
        messages = [prompt_messages(row, source) for row in rows]
        prompt_ids = chat.prompt_ids(messages, f"data source '{source.path}'", map(tools_of, rows))
        kept = [
            Prompt(ids, m, row_task(row, source), {k: v for k, v in row.items() if k != source.prompt})
            for ids, m, row in zip(prompt_ids, messages, rows, strict=True)
            if len(ids) <= max_prompt_tokens
        ]
        if not kept:
            shortest = min(map(len, prompt_ids))
            raise ConfigError(
                f"data source '{source.path}': all {len(rows)} prompts are longer than "
                f"max_prompt_tokens={max_prompt_tokens}; the shortest has {shortest}"
            )
        dropped += len(rows) - len(kept)
        examples += kept
    return PromptSet(examples, dropped)


def row_task(row: dict[str, Any], source: SourceConfig) -> str | None:
    """Return the task of a row: the source's own, or the value of its task column."""
    task = source.task if source.task_column is None else row[source.task_column]
    return None if task is None else str(task)


def fingerprint(rows) -> str:
    """Return the sha256 of rows of plain values, in order; 16 hex digits."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PromptSampler:
    """Choose the examples of each step. Epochs, each in its own order, are laid end to end and cut into steps: nothing
    repeats within an epoch, and a step may hold the end of one epoch and the beginning of the next."""

    num_examples: int
    prompts_per_step: int
    seed: int
    shuffle: bool = True

    def indices(self, step: int) -> list[int]:
        """Return the examples of step 0, 1, ...; a pure function of the step."""
        first = step * self.prompts_per_step
        positions = range(first, first + self.prompts_per_step)
        return [self._order(p // self.num_examples)[p % self.num_examples] for p in positions]

    def _order(self, epoch: int) -> Sequence[int]:
        return _permutation(self.num_examples, self.seed, epoch) if self.shuffle else range(self.num_examples)


@functools.lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(size).tolist()
