"""The built-in rewards that need only text. Each is `(prompts, completions, *, arguments, **columns) -> list`;
`column` names the data column that holds the right answer. `math` is in math_answers/."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from frpo_nemo.rewards.math_answers.final_answer import after_hashes, complete_boxes, gold_text


def exact_answer(prompts, completions: list[str], *, column: str = "answer", **columns) -> list[float]:
    """Score 1 where the final answer equals the gold one, as text or, where the data has a number, as a number; else 0.
    On both sides the final answer is the content of the last complete \\boxed{}, else what follows the last `####`, else
    the whole text; $, thousands separators, repeated spaces and a final full stop don't count. Raises ValueError where
    the gold answer is missing or isn't text or a number."""
    return [float(_is_exact(_plain(c), gold, column)) for c, gold in zip(completions, columns[column], strict=True)]


def format_match(prompts, completions: list[str], *, pattern: str, **columns) -> list[float]:
    """Score 1 where the whole completion matches the regular expression (. matches newlines too), else 0."""
    regex = re.compile(pattern, re.DOTALL)
    return [float(regex.fullmatch(c) is not None) for c in completions]


def regex_search(prompts, completions: list[str], *, pattern: str, **columns) -> list[float]:
    """Score 1 where the regular expression matches somewhere in the completion, else 0."""
    regex = re.compile(pattern)
    return [float(regex.search(c) is not None) for c in completions]


def one_boxed(prompts, completions: list[str], **columns) -> list[float]:
    """Score 1 where the completion has exactly one \\boxed whose braces close around something, else 0. Nested and escaped
    braces are read as TeX reads them; \\boxed 5 without braces isn't an answer, but it counts as a \\boxed."""
    return [
        float(c.count("\\boxed") == 1 and any(content.strip() for *_, content in complete_boxes(c)))
        for c in completions
    ]


def length_penalty(
    prompts,
    completions: list[str],
    *,
    max: int | None = None,
    soft: int = 0,
    target: int | None = None,
    unit: str = "tokens",
    **columns,
) -> list[float]:
    """Return a penalty in [-1, 0]. With `max`, it is 0 up to that length and falls to -1 within `soft` more. With
    `target`, it is the distance from that length as a share of it. unit: tokens (column response_tokens, which training
    provides), characters or words."""
    if (max is None) == (target is None):
        raise ValueError(f"length needs exactly one of max and target (max={max}, target={target})")
    if target is not None and target < 1:
        raise ValueError(f"target={target} must be at least 1")
    if unit not in ("tokens", "characters", "words"):
        raise ValueError(f"unit={unit} must be tokens, characters or words")
    if unit == "tokens":
        lengths = columns["response_tokens"]
    else:
        lengths = [len(c) if unit == "characters" else len(c.split()) for c in completions]
    if target is not None:
        return [-min(1.0, abs(n - target) / target) for n in lengths]
    return [0.0 if n <= max else -1.0 if n >= max + soft else -(n - max) / soft for n in lengths]


def _is_exact(answer: str, gold, column: str) -> bool:
    """Compare as numbers where the data has one: 72 may be 72.0 there, because a column with a gap is read as floats."""
    text = gold_text(gold, column)
    if isinstance(gold, str):
        return answer == _plain(text)
    try:
        return Decimal(answer) == Decimal(text)
    except InvalidOperation:
        return False


def _plain(text: str) -> str:
    boxes = complete_boxes(text)
    answer = boxes[-1][2] if boxes else after_hashes(text)
    answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.replace("$", ""))
    return " ".join(answer.split()).removesuffix(".")
