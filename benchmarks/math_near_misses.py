"""Answers that nearly match a gold answer, and are wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

import sympy

from benchmarks.math_spellings import decimal_of, formula_of, interval_of, items_of, tidy, unit_of, value_of


def near_misses(gold: str) -> Iterator[tuple[str, str]]:
    """Return (kind, text) of answers that differ."""
    for family in (_other_numbers, _other_formulas, _other_structures, _other_words):
        yield from family(gold)


def _other_numbers(gold: str) -> Iterator[tuple[str, str]]:
    value = value_of(gold)
    if value is None:
        return

    def written(v: Fraction) -> str:
        if v.denominator == 1:
            return str(v.numerator)
        return decimal_of(v) or f"{'-' * (v < 0)}\\frac{{{abs(v.numerator)}}}{{{v.denominator}}}"

    yield "one more", written(value + 1)
    yield "one less", written(value - 1)
    yield "other sign", written(-value) if value else "1"
    yield "ten times", written(10 * value) if value else "10"
    yield "a tenth", written(value / 10) if value else "0.1"
    yield "a little more", written(value + Fraction(1, 1000))
    yield "percent of another size", f"{written(10 * value)}\\%" if value else "1\\%"
    if value not in (0, 1):
        yield "squared", f"({gold})^2" if value != 0 else "1"
        yield "inverted", written(1 / value) if value not in (1, -1) else "2"
        yield "with a letter", f"{gold}x"
        yield "with pi", f"{gold}\\pi"
        yield "with a root", f"\\sqrt{{{gold}}}"
        yield "scale", f"{gold} \\text{{ million}}"
        yield "scale", f"{gold} thousand"
    if value > 2 and value.denominator == 1:
        yield "factorial", f"{gold}!"
        digits = str(value.numerator)
        yield (
            "digits swapped",
            digits[:-2] + digits[-1] + digits[-2] if digits[-2:] != digits[-2:][::-1] else digits + "7",
        )
        yield "digit left out", digits[:-1] or "0"
        yield "digit too many", digits + digits[-1]
        yield "another base", f"{digits}_{{9}}" if value > 8 else f"{digits}_{{3}}" if value == 0 else digits + "9"
    if value.denominator != 1:
        top, bottom = value.numerator, value.denominator
        yield "numerator one more", f"\\frac{{{top + 1}}}{{{bottom}}}"
        yield "denominator one more", f"\\frac{{{top}}}{{{bottom + 1}}}"
    yield "range", f"{gold} \\text{{ to }} 1000001"
    yield "two values", f"{gold}, 1000001"
    yield "and a half", f"{gold} and a half"
    yield "not", f"\\text{{not }} {gold}"
    yield "inequality for a number", f"x > {gold}"


def _other_formulas(gold: str) -> Iterator[tuple[str, str]]:
    formula = formula_of(gold)
    if formula is None:
        return
    latex = sympy.latex
    yield "formula and one", f"{latex(formula)} + 1"
    yield "minus the formula", latex(-formula)
    yield "twice the formula", latex(2 * formula)
    yield "formula squared", latex(formula**2)
    terms = sympy.Add.make_args(formula)
    if len(terms) > 1:
        yield "term left out", latex(formula - terms[0])
        yield "sign of a term", latex(formula - 2 * terms[-1])
    for symbol in sorted(formula.free_symbols, key=str)[:1]:
        yield "other letter", latex(formula.subs(symbol, sympy.Symbol("u")))
        yield "other power", latex(formula.subs(symbol, symbol**2))
    if formula.has(sympy.I):
        yield "conjugate", latex(sympy.conjugate(formula))
    if "\\pi" in gold:
        yield "pi left out", gold.replace("\\pi", "").strip() or "1"
    if "\\sqrt" in gold:
        yield "root left out", gold.replace("\\sqrt", "")
        yield (
            "other radicand",
            re.sub(r"\\sqrt(?:\{(\d+)\}|(\d))", lambda m: f"\\sqrt{{{int(m[1] or m[2]) + 1}}}", gold, count=1),
        )


def _other_structures(gold: str) -> Iterator[tuple[str, str]]:
    text = tidy(gold)
    points = items_of(text, opening="(", closing=")")
    if points and interval_of(gold) is None and "cup" not in text:
        if points != points[::-1]:
            yield "coordinates swapped", f"({', '.join(reversed(points))})"
        yield "point as a set", f"\\{{{', '.join(points)}\\}}"
        yield "point as an interval", f"[{', '.join(points)}]" if len(points) == 2 else f"({points[0]})"
        yield "coordinate changed", f"({', '.join([*points[:-1], points[-1] + ' + 1'])})"
        yield "coordinate too many", f"({', '.join([*points, '0'])})"
        yield "coordinate left out", f"({', '.join(points[:-1])})"
    parts = interval_of(gold)
    if parts:
        first, left, right, last = parts
        yield "other end closed", f"{'(' if first == '[' else '['}{left}, {right}{last}"
        yield "other end closed", f"{first}{left}, {right}{')' if last == ']' else ']'}"
        end = left if "infty" not in left else right
        yield "one end changed", f"{first}{left}, {right}{last}".replace(end, f"{end} + 1")
        yield "inequality the other way", f"x < {left}" if "infty" not in left else f"x > {right}"
        yield "end alone", end
    if "\\cup" in gold:
        pieces = [p.strip() for p in text.split("\\cup")]
        yield "part of a union", pieces[0]
        yield "intersection", " \\cap ".join(pieces)
        yield "union closed", f"{pieces[0]} \\cup [{pieces[1][1:]}"
    items = items_of(gold) or items_of(gold, opening="\\{", closing="\\}")
    if items:
        yield "item left out", ", ".join(items[:-1])
        yield "item too many", ", ".join([*items, "1000001"])
        yield "item changed", ", ".join([*items[:-1], f"{items[-1]} + 1"])
        yield "a point for a list", f"({', '.join(items)})"
    if "\\pm" in gold and not items:
        yield "one sign alone", gold.replace("\\pm", "+")
        yield "item changed", f"{gold} + 1"
    if "pmatrix" in gold:
        numbers = re.findall(r"-?\d+", re.sub(r"begin|end", "", gold))
        yield "entry changed", gold.replace(numbers[-1], str(int(numbers[-1]) + 1), 1)
        yield "sign of an entry", re.sub(r"(\{pmatrix\}\s*)(-?)", lambda m: m[1] + ("" if m[2] else "-"), gold, count=1)
        if "&" not in gold:
            yield "transposed", gold.replace("\\\\", "&")
        yield "row left out", re.sub(r"\\\\(?!.*\\\\).*(?=\\end)", "", gold)
    if "=" in gold:
        left, _, right = gold.partition("=")
        yield "right side changed", f"{gold} + 1"
        yield "left side changed", f"{left}+ 1 = {right}"
        yield "other name", gold.replace(left.strip()[-1], "w") if right.strip() != "0" else gold.replace("x", "w")
        yield "inequality for an equation", gold.replace("=", "<")


def _other_words(gold: str) -> Iterator[tuple[str, str]]:
    match = re.fullmatch(r"\\text\{(.*)\}", gold)
    if match:
        word = match[1]
        letter = word.strip("()")
        yield "another word", f"\\text{{({chr(ord(letter[0]) + 1)})}}" if word.startswith("(") else "\\text{other}"
        yield "word denied", f"\\text{{not {word}}}"
        yield "two words", f"\\text{{{word} or other}}" if not word.startswith("(") else "\\text{(A) or (B)}"
        yield "another word", f"\\text{{{letter}x}}"
    found = unit_of(gold)
    if found:
        amount, unit = found
        yield "amount changed", f"1{amount}" if amount.isdigit() else f"{amount} + 1"
        yield "another unit", f"{amount} \\text{{ {'dollars' if unit != 'dollars' else 'hours'}}}"
        if "^" in unit:
            yield "power of the unit", f"{amount} \\text{{ {unit.split('^')[0]}}}"
    digits = re.fullmatch(r"(\d+)_\{?(\d)\}?", gold)
    if digits:
        yield "another base", f"{digits[1]}_{{{int(digits[2]) + 1}}}"
        yield "other digits in the base", f"{digits[1]}0_{digits[2]}"
        yield "other digits", f"{digits[1]}1"
