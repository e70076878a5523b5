"""Decides whether two answers mean the same. Numbers are compared exactly, formulas by their values at fixed points to 30
digits (latex2sympy parses them, sympy evaluates), everything else item by item."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from itertools import permutations

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig

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
    with_items,
    without_name,
)

DIGITS = 30
LONGEST = 400  # characters of a formula: the parser takes seconds for a thousand
_POINTS = ("0.37", "-0.84", "1.73")  # of the first variable; steps of 0.719 and 0.433 from one variable to the next
_ROUNDED = 6  # decimals, or significant digits, that stand for a number with more

_AGREEING = 20  # digits of two values of one formula
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_FACTORS = re.compile(
    r"(?<![_^]\d)(?<=[\d)])\s*(?=\(|\\(?:binom|gcd|lfloor|lceil|max|min)(?![a-z]))"
)  # latex2sympy reads 2(3) as a mixed number, 5
_CONVERSION = ConversionConfig(lowercase_symbols=False)


def equal(gold: Value, answer: Value, *, bare_percent: bool) -> bool:
    """Return whether `answer` means the same as `gold`. bare_percent: 10% may also be written 10."""
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relation(gold, answer)
    gold, answer = without_name(gold), without_name(answer)
    if isinstance(gold, Scalar) and isinstance(answer, Relation) and answer.sign == "=":
        answer = answer.right  # a + b = 42, where a + b was asked for
    if isinstance(gold, Tuple) and isinstance(answer, Several) and answer.names:
        answer = Tuple(answer.items) if list(answer.names) == sorted(set(answer.names)) else answer  # x = 1, y = 2
    if isinstance(gold, Scalar) and isinstance(answer, Scalar):
        return _same_scalar(gold, answer, bare_percent)
    if isinstance(gold, Several) or isinstance(answer, Several):
        return _same_items(with_items(gold), with_items(answer), bare_percent)
    if isinstance(gold, (Interval, Union)) or isinstance(answer, (Interval, Union)):
        return _same_region(gold, answer)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _same_rows(_as_matrix(gold), _as_matrix(answer))
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return len(gold.items) == len(answer.items) and all(
            equal(g, a, bare_percent=False) for g, a in zip(gold.items, answer.items, strict=True)
        )
    return isinstance(gold, Words) and gold == answer


def _same_items(golds: tuple, answers: tuple, bare_percent: bool) -> bool:
    if len(golds) != len(answers):
        golds, answers = _distinct(golds), _distinct(answers)
    if len(golds) != len(answers):
        return False
    left = list(answers)
    for gold in golds:
        match = next((a for a in left if equal(gold, a, bare_percent=bare_percent)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _distinct(items: tuple) -> tuple:
    kept: list = []
    for item in items:
        if not any(equal(k, item, bare_percent=False) for k in kept):
            kept.append(item)
    return tuple(kept)


def _same_region(gold: Value, answer: Value) -> bool:
    gold, answer = as_interval(gold), as_interval(answer)
    if gold is None or answer is None:
        return False
    parts = [v.intervals if isinstance(v, Union) else (v,) for v in (gold, answer)]
    return len(parts[0]) == len(parts[1]) and any(
        all(_same_interval(g, a) for g, a in zip(parts[0], order, strict=True)) for order in permutations(parts[1])
    )


def _same_interval(gold: Interval, answer: Interval) -> bool:
    return (
        gold.closed == answer.closed
        and equal(gold.left, answer.left, bare_percent=False)
        and equal(gold.right, answer.right, bare_percent=False)
    )


def _as_matrix(value: Value) -> Matrix | None:
    """Return a point as the column vector that it may also mean."""
    return (
        Matrix(tuple((i,) for i in value.items))
        if isinstance(value, Tuple)
        else value
        if isinstance(value, Matrix)
        else None
    )


def _same_rows(gold: Matrix | None, answer: Matrix | None) -> bool:
    if gold is None or answer is None or [len(r) for r in gold.rows] != [len(r) for r in answer.rows]:
        return False
    pairs = [(g, a) for gs, as_ in zip(gold.rows, answer.rows, strict=True) for g, a in zip(gs, as_, strict=True)]
    return all(equal(g, a, bare_percent=False) for g, a in pairs)


def _same_relation(gold: Relation, answer: Relation) -> bool:
    if gold.sign != answer.sign:
        return False
    if gold.assigns and answer.assigns:
        return _same_name(gold.left.text, answer.left.text) and _same_scalar(gold.right, answer.right, False)
    return _proportional((gold.left.text, gold.right.text), (answer.left.text, answer.right.text), gold.sign)


def _same_name(gold: str, answer: str) -> bool:
    """Compare names; y may also be f(x)."""
    return gold == answer or {gold == "y", answer == "y"} == {True, False} and "(x)" in gold + answer


def _same_scalar(gold: Scalar, answer: Scalar, bare_percent: bool) -> bool:
    if gold.base or answer.base:
        return _same_digits(gold, answer)
    if _differ(gold.unit, answer.unit):
        return False
    if gold.percent != answer.percent:
        share, other = (gold, answer) if gold.percent else (answer, gold)
        hundredth = Scalar(f"\\frac{{{share.text}}}{{100}}", None if share.number is None else share.number / 100)
        if _same_value(other, hundredth):
            return True
        if answer.percent and not bare_percent:
            return False
    return _same_value(gold, answer)


def _differ(gold: str, answer: str) -> bool:
    """Return whether both have a unit and the units differ. Cents and cents per ounce are the same."""
    if "/" in gold and "/" in answer:
        return gold != answer
    return bool(gold and answer) and gold.split("/")[0] != answer.split("/")[0]


def _same_digits(gold: Scalar, answer: Scalar) -> bool:
    """Compare answers with a base: 52_8 is 52_8, and 52 where base 8 was asked for; its value in base ten is another one."""
    if gold.base and answer.base or answer.base == "10":
        return (gold.base or "10", gold.text.lstrip("0")) == (answer.base, answer.text.lstrip("0"))
    return bool(gold.base) and gold.text == answer.text.replace(",", "").upper()


def _same_value(gold: Scalar, answer: Scalar) -> bool:
    if gold.number is not None and answer.number is not None:
        return gold.number == answer.number or _is_rounded(gold.number, answer) or _is_rounded(answer.number, gold)
    if gold.text.replace(" ", "") == answer.text.replace(" ", ""):
        return True
    if "\\infty" in gold.text + answer.text:
        return gold.text.replace(" ", "").lstrip("+") == answer.text.replace(" ", "").lstrip("+")
    for exact, written in ((gold, answer), (answer, gold)):
        if written.places is not None and exact.number is None:
            return _formula_is_rounded(exact.text, written)
    return _proportional((gold.text,), (answer.text,), "")


def _is_rounded(exact: Fraction, written: Scalar) -> bool:
    """Return whether `written` is `exact` rounded or cut to its decimals, if there are enough of them to decide."""
    if written.places is None or not written.number or exact.denominator == 1:
        return False
    unit = Fraction(1, 10**written.places)
    digits = len(str(abs(written.number) // unit))
    if digits < _ROUNDED and (written.places < _ROUNDED or digits < _ROUNDED - 2):
        return False
    off = abs(exact) - abs(written.number)
    return (exact < 0) == (written.number < 0) and -unit / 2 <= off < unit and (exact / unit).denominator != 1


def _formula_is_rounded(formula: str, written: Scalar) -> bool:
    value = _values((formula,), ())[0] if _parse(formula) is not None else None
    if value is None or not value.is_real:
        return False
    exact = Fraction(str(value))
    return abs(exact - written.number) <= Fraction(1, 10**_AGREEING) * abs(exact) or _is_rounded(exact, written)


def _proportional(gold: tuple[str, ...], answer: tuple[str, ...], sign: str) -> bool:
    """Return whether two formulas have the same values at every point. With a sign: whether the differences of the sides of
    two relations do, up to one factor."""
    parsed = [_parse(text) for text in gold + answer]
    if None in parsed:
        return False
    names = tuple(sorted({s.name for formula in parsed for s in formula.free_symbols} - {"i"}))
    pairs = [(g, a) for g, a in zip(_values(gold, names), _values(answer, names), strict=True) if None not in (g, a)]
    if len(pairs) < (2 if names else 1):
        return False
    factor = sympy.Integer(1)
    if sign:
        if not all(pairs[0]):
            return False
        factor = pairs[0][0] / pairs[0][1]
        if sign != "=" and not (factor.is_real and factor > 0):
            return False
    return all(_close(g, factor * a) for g, a in pairs)


def _close(a: sympy.Expr, b: sympy.Expr) -> bool:
    return bool(abs(a - b) <= max(abs(a), abs(b), sympy.Float("1e-12", DIGITS)) * sympy.Float(10, DIGITS) ** -_AGREEING)


def _values(sides: tuple[str, ...], names: tuple[str, ...]) -> list:
    """Return the value of a formula, or the difference of two, at each of the points; None where it isn't a number."""
    first, *second = (_values_of(side, names) for side in sides)
    if not second:
        return list(first)
    return [None if None in pair else pair[0] - pair[1] for pair in zip(first, second[0], strict=True)]


@lru_cache(maxsize=4096)
def _values_of(text: str, names: tuple[str, ...]) -> tuple:
    return tuple(_value_at(_parse(text), point) for point in _points(names))


def _points(names: tuple[str, ...]) -> list[dict[str, sympy.Float]]:
    return [
        {name: sympy.Float(start, DIGITS) + sympy.Rational(719 + 433 * j, 1000) * k for k, name in enumerate(names)}
        for j, start in enumerate(_POINTS if names else _POINTS[:1])
    ]


def _value_at(formula: sympy.Expr, point: dict[str, sympy.Float]) -> sympy.Expr | None:
    try:
        value = formula.subs({s: point.get(s.name, sympy.I if s.name == "i" else s) for s in formula.free_symbols})
        value = sympy.N(value, DIGITS)
        value = value if value.is_number and value.is_finite else sympy.N(value.doit(), DIGITS)
        return value if value.is_number and value.is_finite else None
    except Exception:  # noqa: BLE001 - a formula of a response; sympy raises many kinds
        return None


@lru_cache(maxsize=4096)
def _parse(text: str) -> sympy.Expr | None:
    if len(text) > LONGEST:
        return None
    try:
        normalized = normalize_latex(_FACTORS.sub(r"\\cdot ", text), _NORMALIZATION)
        parsed = latex2sympy(normalized, normalization_config=None, conversion_config=_CONVERSION)
    except Exception:  # noqa: BLE001 - a formula of a response; the parser raises many kinds
        return None
    return parsed if isinstance(parsed, sympy.Expr) else None
