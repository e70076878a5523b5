"""The built-in rewards that need nothing but text. Each is `(prompts, completions, *, arguments, **columns)
-> list`; `column` names the data column that holds the right answer. `math` is in mathematics.py, `world` in
data/world.py."""

from __future__ import annotations

import re


def exact_answer(prompts, completions: list[str], *, column: str = "answer", **columns) -> list[float]:
    """1 where the final answer is the gold one letter by letter, else 0. The final answer, on both sides:
    what follows the last `####`, else the content of the last \\boxed{}, else all; without $, thousands
    separators, repeated spaces and a final full stop."""
    golds = columns[column]
    return [float(_plain(c) == _plain(str(gold))) for c, gold in zip(completions, golds, strict=True)]


def format_match(prompts, completions: list[str], *, pattern: str, **columns) -> list[float]:
    """1 where the whole completion matches the regular expression (. matches newlines too), else 0."""
    regex = re.compile(pattern, re.DOTALL)
    return [float(regex.fullmatch(c) is not None) for c in completions]


def regex_search(prompts, completions: list[str], *, pattern: str, **columns) -> list[float]:
    """1 where the regular expression matches somewhere in the completion, else 0."""
    regex = re.compile(pattern)
    return [float(regex.search(c) is not None) for c in completions]


def one_boxed(prompts, completions: list[str], **columns) -> list[float]:
    """1 where the completion has exactly one \\boxed and its braces close around something, else 0. Nested and escaped
    braces are read as TeX reads them; \\boxed 5 without braces is no answer, and every \\boxed counts as one."""
    return [float(c.count("\\boxed") == 1 and _last_box_has_content(c)) for c in completions]


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
    """A penalty in [-1, 0]. With `max`: 0 up to it, then falling to -1 within `soft` more. With `target`: the
    distance from it as a share of it. unit: tokens (column response_tokens, which training provides),
    characters or words."""
    if (max is None) == (target is None):
        raise ValueError(f"length needs one of max and target (max={max}, target={target})")
    if unit not in ("tokens", "characters", "words"):
        raise ValueError(f"unit={unit} is none of tokens, characters, words")
    if unit == "tokens":
        lengths = columns["response_tokens"]
    else:
        lengths = [len(c) if unit == "characters" else len(c.split()) for c in completions]
    if target is not None:
        return [-min(1.0, abs(n - target) / target) for n in lengths]
    return [0.0 if n <= max else -1.0 if n >= max + soft else -(n - max) / soft for n in lengths]


def after_hashes(text: str) -> str:
    """The line after the last `####`, GSM8K's sign of the final answer; all of a text without one."""
    _, sign, answer = text.rpartition("####")
    return answer.strip().split("\n")[0] if sign else text


def _plain(text: str) -> str:
    answer = after_hashes(text)
    answer = _last_boxed(answer) if "\\boxed{" in answer else answer
    answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.replace("$", ""))
    return " ".join(answer.split()).removesuffix(".")


def _last_boxed(text: str) -> str:
    """The content of the last \\boxed{...}, with its nested braces."""
    start = text.rindex("\\boxed{") + len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text[start:]


def _last_box_has_content(text: str) -> bool:
    """Whether braces follow the last \\boxed and close around something. Unlike `_last_boxed`, which takes what there is."""
    content = text.rpartition("\\boxed")[2].lstrip()
    depth = 0
    for token in re.finditer(r"\\.|[{}]", content, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return content[0] == "{" and content[1 : token.start()].strip() != ""
    return False
