"""The built-in `math` reward. It is a separate module so that workers import sympy before their time limit starts.

final_answer.py finds the answer in the text, reading.py parses it, equal.py compares it with the gold answer."""

from __future__ import annotations

import math
import re

from frpo_nemo.rewards.math_answers.equal import equal
from frpo_nemo.rewards.math_answers.final_answer import FinalAnswer, complete_boxes, final_answer, gold_text
from frpo_nemo.rewards.math_answers.reading import read, words_of
from frpo_nemo.rewards.math_answers.text import clean
from frpo_nemo.rewards.math_answers.values import Value, Words

# Marks of another choice, not of what a choice stands for.
_OTHER_CHOICE = re.compile(r"^[^\w\\$]|\b(?:and|or|but|not|wrong)\b|\([A-Z]\)|\?|,\s", re.I)

_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
# A number as one writes it: with a short name before it, currency, sign; percent, degrees or a unit after it.
_WRITTEN = re.compile(
    r"(?:[A-Za-z]{1,2}\s*=\s*)?(?:\\\$)?\s*[-+]?\s*(?:\\\$)?\s*"
    rf"(?:(?:\d+\s*)?\\frac\{{(?P<top>-?\d+)\}}\{{(?P<bottom>\d+)\}}|(?:\d+\s+)?(?P<up>\d+)\s*/\s*(?P<down>\d+)"
    rf"|{_DECIMAL}(?:\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\{{-?\d+\}}|\d))?)"
    r"\s*(?:\\?%|\^\\circ|\\text\{[^{}]*\})?"
)


def math_answer(
    prompts, completions: list[str], *, column: str = "answer", strict: bool = False, **columns
) -> list[float]:
    """Score 1 where the completion's final answer equals the gold one as mathematics, else 0.

    The final answer is read from one place: the last complete \\boxed{} if there is a box, else the line after the last
    `####` where the gold answer has one, else the last statement. Gold answers may be GSM8K's (`... #### 72`), text that
    holds a box, or the answer alone, in LaTeX or plain; one that can't be read as mathematics or words is compared letter by
    letter.

    strict: the answer is the content of the last complete box alone, and where the gold answer is a number as one writes it
    (27, 0.5, \\frac{1}{2}), it must be one, too: neither a sum, a power or a root, nor a fraction that isn't in lowest
    terms. It is what the paper's grader does, and gives nothing for an answer that was left to the grader to work out.

    Always runs in worker processes: evaluating a formula can take forever. Raises ValueError on a gold answer that
    is missing or a structure.
    """
    scores = []
    for completion, gold in zip(completions, columns[column], strict=True):
        text = gold_text(gold, column)
        expected, value = _gold(text, column)
        answer = _last_box(completion) if strict else final_answer(completion, hashes="####" in text)
        right = answer is not None and _is_right(expected, value, answer)
        scores.append(float(right and (not strict or _is_written_like(expected, answer.texts[0]))))
    return scores


def _last_box(completion: str) -> FinalAnswer | None:
    boxes = complete_boxes(completion)
    return FinalAnswer((boxes[-1][2],), "box") if boxes else None


def _is_written_like(gold: str, answer: str) -> bool:
    """Return whether `answer` is a number as one writes it, if `gold` is one; of whole numbers no fraction."""
    if not _WRITTEN.fullmatch(clean(gold)):
        return True
    if not (found := _WRITTEN.fullmatch(clean(answer))):
        return False
    terms = [int(number) for number in (found["top"] or found["up"], found["bottom"] or found["down"]) if number]
    return not terms or (math.gcd(*terms) == 1 and terms[1] != 1)


def _gold(text: str, column: str) -> tuple[str, Value | None]:
    """Return a gold answer's text and its value, which is None where it can't be read."""
    where = (
        final_answer(text, hashes=True) if "\\boxed" in text or "####" in text else FinalAnswer((text,), "statement")
    )
    for candidate in where.texts if where else ():
        value = read(candidate)
        if value is not None:
            return candidate, value
    if where is None or not clean(where.texts[0]):
        raise ValueError(f"gold answer {text[:80]!r} of column '{column}' holds no mathematics")
    return where.texts[0], None


def _is_right(expected: str, gold: Value | None, answer: FinalAnswer) -> bool:
    if gold is None:
        return any(_letters(text) == _letters(expected) for text in answer.texts)
    if isinstance(gold, Words):
        return any(_same_words(gold.text, text) for text in answer.texts)
    for text in answer.texts:
        value = read(text)
        if _is_the_word(expected.strip(), text, value):
            return True
        if value is not None and not isinstance(value, Words):
            return equal(gold, value, bare_percent=answer.place != "hashes")
    return False


def _is_the_word(gold: str, answer: str, value: Value | None) -> bool:
    """Return whether a gold answer of letters alone (B, yes), which reads as a product of variables, is the answer's word."""
    letters = re.fullmatch(r"\(?([A-Za-z]+)\)?", gold)
    if letters is None or isinstance(value, Words):
        return letters is not None and _same_words(letters[1].lower(), answer)
    word, said = letters[1], clean(answer).strip().strip(".$")
    same = len(word) > 1 and word.lower() == said.lower()
    return same and (len(word) > 2 or word.isupper() == said.isupper())  # AB is not ab


def _letters(text: str) -> str:
    return re.sub(r"\s|\\text|[{}]", "", clean(text)).lower()


def _same_words(gold: str, answer: str) -> bool:
    """Compare the words alone; a choice such as (C) may be followed by what it stands for."""
    said = re.sub(r"^(?:(?:the|option|choice|answer|it|is|a|an)\s+)+(?=\w)", "", words_of(answer))
    if said == gold or len(gold) > 1:
        return said == gold
    chosen = re.match(rf"[^\w?]*(?:text\w*\s*\{{\s*)?\(?{gold}\s*[).:]\s*(?:\}}|\\[ ,;:]|~|\s)*", answer, re.I)
    return chosen is not None and not _OTHER_CHOICE.search(answer[chosen.end() :])
