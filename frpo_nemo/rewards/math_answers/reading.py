"""Parses an answer from its text: numbers, lists, points, intervals and so on (values.py). Nothing is evaluated here;
equal.py compares."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from frpo_nemo.rewards.math_answers.scalars import BASED, is_decimal, read_scalar
from frpo_nemo.rewards.math_answers.text import clean, without_outer_braces
from frpo_nemo.rewards.math_answers.values import (
    Interval,
    Matrix,
    Relation,
    Scalar,
    Several,
    Tuple,
    Union,
    Value,
    Words,
    as_interval,
    is_name,
    with_items,
)

_AND = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])")
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\lor|\\vee")
_SIGN = re.compile(r"\\(?:le|ge|ne|approx|in)(?![A-Za-z])|[<>=]")
_LABEL = re.compile(
    r"(?:\\text\s*\{[^{}\\]*(?:[:=]|\bis|\bare)\s*\}|(?:\\text\s*\{[^{}\\]*\}|[A-Za-z][A-Za-z ]*[A-Za-z])\s*[:=])\s*(?=.)"
)
_MATRIX = re.compile(r"\\begin\s*\{((?:[pbB]|small)?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\s*\{\1\}")
_TRANSPOSED = re.compile(r"(?<=\})\s*\^\s*\{?\s*(?:T|t|\\top|\\intercal)\s*\}?$")
_ABOUT = re.compile(
    r"(?:\\(?:therefore|sim|approx)(?![A-Za-z])|(?:\\text\s*\{\s*)?(?:approximately|about|around|roughly)\b\s*\}?)\s*"
)
_LESS = re.compile(r"\\R\s*(?:\\setminus|\\backslash|-)\s*")
_POINT_NAME = re.compile(r"[A-Za-z]?\s*\(\s*\\?[A-Za-z]\w*\s*(?:,\s*\\?[A-Za-z]\w*\s*)+\)")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_DENIED = re.compile(r"(?<![A-Za-z\\])not(?![A-Za-z])|\?|\\(?:neg|lnot)(?![A-Za-z])")
_INFINITE = Scalar(r"-\infty"), Scalar(r"\infty")
LONGEST = 1000  # characters of an answer: the longest of MATH-500 has 60
_OPEN, _CLOSE = "([{", ")]}"


@lru_cache(maxsize=4096)
def read(text: str) -> Value | None:
    """Return the value of `text`, which is an answer and nothing else; None where it can't be read as one answer."""
    text = clean(text) if len(text) <= LONGEST else ""
    return _read(text) if text else None


def words_of(text: str) -> str:
    """Return the words of an answer in small letters, without the marks and brackets around them."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", clean(text))
    return " ".join(re.sub(r"[(){}.,;:!*\"'_$\\-]+", " ", text).lower().split())


def _read(text: str) -> Value | None:
    text = without_outer_braces(text.strip().rstrip(",;:").strip())
    if _DENIED.search(text) and re.search(r"\d|[=<>]|\\in\b", text):
        return None
    about = _ABOUT.match(text)
    text = text[about.end() :] if about else text
    label = _LABEL.match(text)
    if label and not _SIGN.search(text[label.end() :]):
        text = text[label.end() :].strip()
    for reader in (_matrix, _reals, _listed, _united, _related, _bracketed, _several_signs, read_scalar, _words):
        value = reader(text)
        if value is not None:
            return value
    return None


def _matrix(text: str) -> Value | None:
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1].strip()  # around an array
    transposed = _TRANSPOSED.search(text)
    text = text[: transposed.start()] if transposed else text
    match = _MATRIX.search(text)
    if not match or match.end() < len(text) or re.search(r"[=<>,(]", text[: match.start()]):
        return None
    factor = re.sub(r"\\(?:cdot|times)\s*$", "", text[: match.start()].strip())
    rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
    factored = "{}({})" if factor in ("", "-") else "({})({})"
    cells = tuple(
        tuple(read_scalar(factored.format(factor, cell) if factor else clean(cell)) for cell in row.split("&"))
        for row in rows
    )
    if any(cell is None for row in cells for cell in row) or len({len(row) for row in cells}) != 1:
        return None
    return Matrix(tuple(zip(*cells, strict=True)) if transposed else cells)


def _listed(text: str) -> Value | None:
    parts = list(_split(text, _AND, commas=True))
    parts = [part for part in parts if part.strip()]
    if len(parts) < 2:
        return None
    if is_decimal(text.lstrip("+- ")):  # 1,234
        return None
    items = [_read(part) for part in parts]
    if None in items:
        return None
    if all(isinstance(item, (Interval, Union)) for item in items) and _SIGN.search(parts[0]):
        return (None if _OR.search(text) else _overlap(items)) or _union(items)
    flat = tuple(i for item in items for i in with_items(item))
    words = {isinstance(i, Words) for i in flat}
    return None if words == {True, False} else Several(flat)


def _overlap(items: list) -> Interval | None:
    """Return the intersection of two rays, as in x >= -2 and x <= 7."""
    rays = [i for i in items if isinstance(i, Interval)]
    right = [i for i in rays if i.right.text == r"\infty"]
    left = [i for i in rays if i.left.text == r"-\infty"]
    if len(items) != 2 or len(right) != 1 or len(left) != 1:
        return None
    start, end = right[0].left, left[0].right
    if None not in (start.number, end.number) and start.number >= end.number:
        return None
    return Interval(start, end, (right[0].closed[0], left[0].closed[1]))


def _reals(text: str) -> Value | None:
    """Read all real numbers, or all except a few or an interval: R \\setminus {2}, R \\setminus [2, 3]."""
    if text == r"\R":
        return Interval(*_INFINITE, (False, False))
    match = _LESS.match(text)
    if not match:
        return None
    out = _read(text[match.end() :])
    if isinstance(out, Interval):
        ends = out.left, out.right
        closed = out.closed
    elif isinstance(out, Several) and len(out.items) == 1 and isinstance(out.items[0], Scalar):
        ends, closed = out.items * 2, (True, True)
    else:
        return None
    below = Interval(_INFINITE[0], ends[0], (False, not closed[0]))
    return Union((below, Interval(ends[1], _INFINITE[1], (not closed[1], False))))


def _united(text: str) -> Value | None:
    parts = list(_split(text, re.compile(r"\\cup(?![A-Za-z])")))
    if len(parts) < 2:
        return None
    intervals = [as_interval(_read(part)) for part in parts]
    return None if any(i is None for i in intervals) else _union(intervals)


def _union(intervals: list) -> Union:
    return Union(tuple(i for part in intervals for i in (part.intervals if isinstance(part, Union) else (part,))))


def _related(text: str) -> Value | None:
    """Read equations and inequalities. Of a chain of equalities the last side counts: 48 + 24 = 72."""
    signs = [m for m in _SIGN.finditer(text) if _depth(text, m.start()) == 0]
    if not signs:
        return None
    kinds = [m[0] for m in signs]
    sides = _sides(text, signs)
    if kinds[-1] == "\\approx":
        return _read(text[: signs[-1].start()]) if sides[0] else _read(sides[-1])
    if "\\in" in kinds:
        return _read(sides[-1])
    if set(kinds) == {"="}:
        return _equation(sides)
    if "=" in kinds:
        return None
    formulas = [read_scalar(side) for side in sides]
    if any(f is None for f in formulas):
        return None
    return _inequality(formulas, kinds)


def _equation(sides: list[str]) -> Value | None:
    right = _read(sides[-1])
    if not sides[0] or right is None:
        return right
    left = read_scalar(sides[0])
    if left is None or not isinstance(right, Scalar):
        return right
    if left.number is not None and len(sides) == 2 and right.number is None and is_name(sides[1]):
        return Relation(right, "=", left)  # 5 = x
    if not re.search(r"(?<![A-Za-z\\])[A-Za-z]", sides[0]) and not is_name(sides[0]):
        return right  # 48 + 24 = 72
    return Relation(left, "=", right)


def _inequality(formulas: list[Scalar], kinds: list[str]) -> Value | None:
    """Read x > 3, 3 < x and a <= x < b as intervals, other inequalities as they are."""
    names = [is_name(f.text) for f in formulas]
    if len(formulas) == 3 and names[1]:
        first, second = (kind in (r"\le", r"\ge") for kind in kinds)
        if set(kinds) <= {"<", r"\le"}:
            return Interval(formulas[0], formulas[2], (first, second))
        if set(kinds) <= {">", r"\ge"}:
            return Interval(formulas[2], formulas[0], (second, first))
    if len(formulas) != 2:
        return None
    (left, right), sign = formulas, kinds[0]
    if names[1] and not names[0]:
        left, right, sign = right, left, _TURNED[sign]
    if re.fullmatch(r"\|\s*[A-Za-z]\s*\|", left.text) and sign != r"\ne":
        return _absolute(right, sign)
    if not is_name(left.text):
        smaller = sign in ("<", r"\le")
        return Relation(right, _TURNED[sign], left) if smaller else Relation(left, sign, right)
    if sign == r"\ne":
        return Union((Interval(_INFINITE[0], right, (False, False)), Interval(right, _INFINITE[1], (False, False))))
    if sign in (">", r"\ge"):
        return Interval(right, _INFINITE[1], (sign == r"\ge", False))
    return Interval(_INFINITE[0], right, (False, sign == r"\le"))


def _absolute(bound: Scalar, sign: str) -> Value | None:
    """Read |x| < 3 and |x| > 3 as regions."""
    negative = read_scalar(f"-({bound.text})" if re.search("[-+]", bound.text) else f"-{bound.text}")
    if sign in ("<", r"\le"):
        return Interval(negative, bound, (sign == r"\le",) * 2)
    closed = sign == r"\ge"
    return Union((Interval(_INFINITE[0], negative, (False, closed)), Interval(bound, _INFINITE[1], (closed, False))))


def _bracketed(text: str) -> Value | None:
    """Read {a, b}, (a, b), [a, b) and so on, where the brackets enclose all of the text and hold more than one item."""
    braces = re.fullmatch(r"\\\{(.*)\\\}", text)
    if braces:
        condition = re.search(r"(?<!\|)\||\\mid|:", braces[1])
        if condition:
            return _read(braces[1][condition.end() :])
        items = tuple(_read(part) for part in _split_inside(braces[1]))
        return None if None in items else Several(tuple(i for item in items for i in with_items(item)))
    if not text or text[0] not in "([" or text[-1] not in ")]" or _depth(text, len(text) - 1) != 1:
        return None
    if any(_depth(text, i) == 0 for i in range(1, len(text))):
        return None
    parts = _split_inside(text[1:-1])
    if len(parts) == 1:
        return _read(text[1:-1]) if text[0] + text[-1] == "()" and not BASED.fullmatch(text) else None
    coordinates: tuple[Any, ...] = tuple(_read(part) for part in parts)
    if any(item is None for item in coordinates):
        return None
    if text[0] + text[-1] == "()":
        return Tuple(coordinates)
    return Interval(*coordinates, (text[0] == "[", text[-1] == "]")) if len(coordinates) == 2 else None


def _split_inside(text: str) -> list[str]:
    """Return the items between brackets. (12,102) has two: a comma marks thousands only among others that have a space."""
    spaced = re.search(r",\s", text) is not None
    return list(_split(text if spaced else text.replace(",", ", "), None, commas=True))


def _several_signs(text: str) -> Value | None:
    """Read a \\pm b as the list of both."""
    if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        return None
    upper = re.sub(r"\\mp(?![A-Za-z])", "-", re.sub(r"\\pm(?![A-Za-z])", "+", text))
    lower = re.sub(r"\\mp(?![A-Za-z])", "+", re.sub(r"\\pm(?![A-Za-z])", "-", text))
    items = _read(upper), _read(lower)
    return None if None in items else Several(items)


def _words(text: str) -> Words | None:
    if re.search(r"\d", text) and not re.fullmatch(r"\\text\s*\{[^{}]*\}", text):
        return None
    words = words_of(text)
    return Words(words) if words and re.search("[a-z]", words) else None


def _split(text: str, separator: re.Pattern | None, *, commas: bool = False) -> Iterator[str]:
    """Yield the parts of `text` between separators outside of all brackets; a comma between digits, as in 1,234, is none."""
    ends = [(m.start(), m.end()) for m in separator.finditer(text)] if separator else []
    if commas:
        ends += [(m.start(), m.end()) for m in re.finditer(r"[,;](?!\d{3}(?!\d))|(?<!\d)[,;]|(?<=\d{4})[,;]", text)]
    start = 0
    for begin, end in sorted(e for e in ends if _depth(text, e[0]) == 0):
        yield text[start:begin]
        start = max(start, end)
    yield text[start:]


def _sides(text: str, signs: list[re.Match]) -> list[str]:
    edges = [0, *(edge for m in signs for edge in (m.start(), m.end())), len(text)]
    return [without_outer_braces(text[a:b].strip()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _depth(text: str, position: int) -> int:
    """Count the brackets that are open at `position`; \\{ counts as one."""
    before = text[:position]
    return sum(before.count(c) for c in _OPEN) - sum(before.count(c) for c in _CLOSE)
