"""What an answer may be: a number or formula, words, a list, a point, an interval, a matrix, a relation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Scalar:
    """A number or formula. number: its exact value if it is written as one number. places: decimals written, None without
    a decimal point. base: 8 in 52_8, as text."""

    text: str
    number: Fraction | None = None
    places: int | None = None
    percent: bool = False
    unit: str = ""
    base: str = ""


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Several:
    """A list or a set: the order doesn't count."""

    items: tuple
    names: tuple = ()  # the names x and y dropped from x = 1, y = 2


@dataclass(frozen=True)
class Tuple:
    """(a, b, ...): a point, and with two items perhaps an open interval."""

    items: tuple


@dataclass(frozen=True)
class Interval:
    left: Scalar
    right: Scalar
    closed: tuple[bool, bool]


@dataclass(frozen=True)
class Union:
    intervals: tuple


@dataclass(frozen=True)
class Matrix:
    rows: tuple


@dataclass(frozen=True)
class Relation:
    """left sign right, as formulas. assigns: whether it gives a name to a formula, as y = 2x does."""

    left: Scalar
    sign: str
    right: Scalar

    @property
    def assigns(self) -> bool:
        return self.sign == "=" and is_name(self.left.text)


Value = Scalar | Words | Several | Tuple | Interval | Union | Matrix | Relation


def is_name(text: str) -> bool:
    """Return whether a left side is only a name: x, x_1, f(x), \\theta, P(A)."""
    return (
        re.fullmatch(
            r"\\?[A-Za-z]+'?(?:_\w|_\{\w+\})?(?:\s*\(\s*\w+(?:\s*,\s*\w+)*\s*\))?|\\text\s*\{[^{}]*\}|[A-Za-z ]+", text
        )
        is not None
    )


def as_interval(value: Value | None) -> Interval | Union | None:
    """Return (a, b) as the open interval that it may be; intervals and unions as they are."""
    if isinstance(value, Tuple) and len(value.items) == 2 and all(isinstance(i, Scalar) for i in value.items):
        return Interval(*value.items, (False, False))
    return value if isinstance(value, (Interval, Union)) else None


def with_items(value: Value) -> tuple:
    """Return the items of a list, or the value alone."""
    return value.items if isinstance(value, Several) else (value,)


def without_name(value: Value) -> Value:
    """Return y = 2x as 2x, in lists too."""
    if isinstance(value, Relation) and value.assigns:
        return value.right
    if not isinstance(value, Several):
        return value
    named = all(isinstance(i, Relation) and i.assigns for i in value.items)
    return Several(tuple(map(without_name, value.items)), tuple(i.left.text for i in value.items) if named else ())
