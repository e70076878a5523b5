"""Finds the one place of a text where its final answer stands, from the text alone: grade.py decides whether the answer is
right."""

from __future__ import annotations

import numbers
import re
from dataclasses import dataclass
from decimal import Decimal

_BOX = re.compile(r"\\boxed\s*\{")
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_CALCULATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's notes of calculations: <<48+24=72>>72
_DISPLAYED = re.compile(r"\\\[.*?\\\]|\$\$.*?\$\$", re.DOTALL)
_END = 5000  # characters at a completion's end that are searched for its last statement
_THREE_WORDS = re.compile(r"[a-z]{2,} [a-z]{2,} [a-z]{2,}", re.I)
_LONGEST = 1000  # characters at a statement's end that are examined
# Between two boxes of one answer: "$\boxed{2}$ and $\boxed{3}$".
_JOINT = re.compile(
    r"(?:[\s$,;]|\b[a-z]\s*=|\\[()\[\],;!]|\\q?quad|\\text\s*\{\s*(?:,?\s*(?:and|or))\s*\}|\b(?:and|or)\b)*"
)
_STATED = re.compile(r"\b(?:answer|result|solution)s?\b[*_]*\s*(?:(?:is|are|equals|to be)\b\s*:?|[:=])[*_]*\s*", re.I)
_CORRECTED = re.compile(r"\b(?:wait|wrong|mistake|incorrect|correction|actually|instead|oops)\b", re.I)
# Before a number that isn't the answer: not 72, at least 72.
_NEGATED = re.compile(
    r"(?:(?:\b(?:not|never|cannot|no longer)|n't)\s+(?:[a-z]+\s+)?|\b(?:more|less|fewer|greater|larger|smaller|other) than\s+"
    r"|\b(?:at least|at most|nearly|almost|over|under|above|below|up to)\s+)\W*$",
    re.I,
)
_WITHOUT_OTHERS = re.compile(r"(?<=\S)(?:,\s*(?:and\s+)?|\s+and\s+)not\b|(?<=\S)\s+(?:rather than|instead of)\b", re.I)
_SENTENCE_END = re.compile(r"(?<=[.!?])[*_]*\s+(?=[A-Z(*]|\$(?!\$)|\\(?![\])]))")
# Around a number that isn't the whole answer: 72 or 73, 72 and a half.
_PART_OF_MORE = (
    re.compile(r"\d\S*\s+(?:or|to|through|versus|vs)\W*$", re.I),
    re.compile(
        r"\W*\b(?:(?:or|to|over|plus|minus|times)\s+\W*\d|and\s+(?:a|an|one|two|three)\s+(?:half|third|quarter|\w+ths?)\b"
        r"|remainder\b|point\s+\w)",
        re.I,
    ),
)
_ITEM = re.compile(
    r"\$\$.+?\$\$|(?<!\\)\$[^$\s][^$]*?\$(?!\d)|\\\(.+?\\\)|\\\[.+?\\\]"
    r"|(?<!\S)\S*\d\S*(?:[ \t]+(?:\d+/\d+|thousand|million|billion|trillion|hundred|dozen|percent)\b)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class FinalAnswer:
    """texts: the readings of that place, the widest first: the whole statement, then the formula or number that it ends
    in. place: box, hashes or statement."""

    texts: tuple[str, ...]
    place: str


def gold_text(value, column: str) -> str:
    """Return the gold answer of a row as text. Raises ValueError where it is missing or a structure."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool) and value == value:
        return str(value)
    if value is None or isinstance(value, str | float | Decimal):
        raise ValueError(f"column '{column}' holds no gold answer: {value!r}")
    raise ValueError(f"gold answer {str(value)[:80]!r} of column '{column}' is neither text nor a number")


def final_answer(text: str, *, hashes: bool) -> FinalAnswer | None:
    """Return the last complete box; else what follows the last `####`, if `hashes`, as where the gold answer has one, or if
    the text ends in it; else what the last statement says. None where a box is begun and not closed, or nothing is said."""
    if _BOX.search(text):
        contents = _last_boxes(text)
        return FinalAnswer((" \\text{ or } ".join(contents),), "box") if contents else None
    _, sign, tail = text.rpartition("####")
    if sign and (hashes or "\n" not in tail.strip()):
        first = tail.strip().split("\n")[0]
        found, place = (first,) if _is_bare(first) else _statement(tail), "hashes"
    else:
        found, place = _statement(text), "statement"
    return FinalAnswer(found, place) if found else None


def after_hashes(text: str) -> str:
    """Return the line after the last `####`, GSM8K's sign of the final answer; all of a text without one."""
    _, sign, answer = text.rpartition("####")
    return answer.strip().split("\n")[0] if sign else text


def complete_boxes(text: str) -> list[tuple[int, int, str]]:
    """Return (start, end, content) of every \\boxed{...} whose braces close, in the order in which they begin."""
    boxes, open_braces = [], []
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0].endswith("{") and len(token[0]) != 2:
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin[0] != "{":
                boxes.append((begin.start(), token.end(), text[begin.end() : token.start()]))
    return sorted(boxes)


def closing_brace(text: str, start: int) -> int | None:
    """Return the index of the brace that closes the one at `start`, as TeX reads them."""
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return None


def _last_boxes(text: str) -> list[str]:
    """Return the content of the last complete box, after those of the boxes that a comma, `and` or `or` joins to it."""
    boxes = complete_boxes(text)
    contents: list[str] = []
    for i in range(len(boxes) - 1, -1, -1):
        start, end, content = boxes[i]
        if contents and not _joins(text[end : boxes[i + 1][0]]):
            break
        if content not in contents:
            contents.insert(0, content)
    return contents


def _joins(between: str) -> bool:
    return bool(_JOINT.fullmatch(between)) and re.search(r"and|or|(?<!\\)[,;]", between) is not None


def _is_bare(line: str) -> bool:
    """Return whether a line begins with its answer rather than, like a heading, with a word."""
    return not re.match(r"[\s*_]*[A-Za-z]{2,}", line)


def _statement(text: str) -> tuple[str, ...]:
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    text = (tagged[-1] if tagged else text.rpartition("</think>")[2])[-_END:]
    text = _DISPLAYED.sub(lambda display: " ".join(display[0].split()), _CALCULATION.sub("", text))
    lines = [line.strip() for line in text.split("\n") if line.strip(" \t\r*_`#-")]
    marked = [i for i, line in enumerate(lines) if _STATED.search(line)]
    if marked and not any(_CORRECTED.search(line) for line in lines[marked[-1] + 1 :]):
        return _ending(lines[marked[-1]], lines[marked[-1] + 1 :])
    return _ending(lines[-1], []) if lines else ()


def _ending(line: str, following: list[str]) -> tuple[str, ...]:
    """Return what `line` says, which is in the following line when it ends in `The answer is:`."""
    sentence = [s for s in _SENTENCE_END.split(line) if s.strip()][-1]
    marks = list(_STATED.finditer(line))
    if marks:
        sentence = _SENTENCE_END.split(line[marks[-1].end() :])
        rest = " ".join(sentence[1:])
        sentence = rest if _CORRECTED.search(rest) and _ITEM.search(rest) else sentence[0]
        if not sentence.strip(" *_`") and following:
            return _ending(following[0], [])
    return _readings(_WITHOUT_OTHERS.split(sentence)[0][-_LONGEST:], stated=bool(marks))


def _readings(sentence: str, *, stated: bool) -> tuple[str, ...]:
    """Return the whole sentence and the formula or number that it ends in; for prose, only the latter. stated: whether the
    sentence is what follows `the answer is`."""
    if sentence.rstrip().endswith("?"):
        return ()
    items = list(_ITEM.finditer(sentence))
    if not items:
        marked = re.findall(r"\*\*(.+?)\*\*", sentence)
        return (sentence, *marked[-1:]) if sentence.strip() else ()
    sentence = sentence.rstrip("! ")
    if stated and not _CORRECTED.search(sentence) and not sentence[: items[0].start()].strip(" *_`:"):
        items = items[:1]  # the answer is 72, which is 3 times 24
    before, item, after = sentence[: items[-1].start()], items[-1][0].rstrip("!?"), sentence[items[-1].end() :]
    if _NEGATED.search(before):
        return ()
    if _PART_OF_MORE[0].search(before) or _PART_OF_MORE[1].match(after):
        return (sentence,)
    formula_alone = item[0] in "$\\" and not after.strip(" .,;:*_`") and not re.search(r"[\d$\\=]", before)
    prose = not stated and (not _is_bare(sentence) or _THREE_WORDS.search(before) is not None)
    return (item,) if formula_alone or prose else (sentence, item)
