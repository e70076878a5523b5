"""Split a reasoning model's response into thoughts and answer; rewards and judges read only the answer."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parted:
    """Responses without their thoughts. answers: text. tokens: of the thoughts, with the tag that ends them. unfinished:
    whether the response consists of thoughts that did not end, so that its answer is empty."""

    answers: list[str]
    tokens: list[int]
    unfinished: list[bool]


def part(responses: Sequence[list[int]], texts: Sequence[str], begun: Sequence[bool], end: str, tokenizer) -> Parted:
    """Part responses (token ids and their texts) where the last `end`, such as </think>, stops. Thoughts that begin again
    after it have not ended. Without it a response is an answer, unless thoughts had begun: in the prompt (`begun`), or with
    the response, by the tag that belongs to `end`. Where `end` has no such tag, a response without it is unfinished."""
    begin, answers, tokens, unfinished = opening(end), [], [], []
    for ids, text, in_prompt in zip(responses, texts, begun, strict=True):
        before, found, answer = text.rpartition(end)
        again = bool(begin) and begin in answer
        open_ = again if found else in_prompt or text.lstrip().startswith(begin)
        answers.append("" if open_ else answer.lstrip() if found else text)
        thought = len(before) + len(end) if found else 0
        tokens.append(len(ids) if open_ else _tokens_up_to(thought, ids, tokenizer))
        unfinished.append(open_)
    return Parted(answers, tokens, unfinished)


def opening(end: str) -> str:
    """Return the tag that begins what `end` ends, <think> for </think>; "" for an end without a slash."""
    return end.strip().replace("/", "", 1) if "/" in end else ""


def begun_in_prompt(prompt: list[int], end: str, tokenizer) -> bool:
    """Return whether the template has opened the thoughts at the end of a prompt."""
    tail = tokenizer.decode(prompt[-16:], skip_special_tokens=False)
    begin = opening(end)
    return bool(begin) and tail.rstrip().endswith(begin)


def _tokens_up_to(place: int, ids: list[int], tokenizer) -> int:
    """Return how many tokens it takes to write the first `place` characters of a response."""

    def length(count: int) -> int:
        return len(tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return bisect.bisect_left(range(len(ids) + 1), place, key=length)
