"""The same answer in other spellings: rewritings of a gold answer's text, and of its formula with sympy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig


def spellings(gold: str) -> Iterator[tuple[str, str]]:
    """Return (kind, text) of equal answers."""
    yield "full stop in the box", f"{gold}."
    yield "dollars in the box", f"${gold}$"
    yield "display style", f"\\displaystyle {gold}"
    yield "spaces", f"\\, {gold} \\;"
    yield "larger brackets", _sized(gold)
    yield "fractions", gold.replace("\\frac", "\\dfrac")
    yield "fractions", re.sub(r"\\dfrac|\\frac(?=\{)", r"\\tfrac", gold)
    yield (
        "no spaces",
        re.sub(r"(?<![A-Za-z]) | (?![A-Za-z])", "", gold) if "\\text" not in gold and "mbox" not in gold else gold,
    )
    yield "Unicode", _unicode(gold)
    for family in (_numbers, _plain_formulas, _formulas, _lists, _regions, _vectors, _word_answers, _units, _bases):
        yield from family(gold)


def _sized(gold: str) -> str:
    return (
        gold
        if "\\left" in gold or "\\text" in gold
        else re.sub(r"(\\\{|[(\[])", r"\\left\1", re.sub(r"(\\\}|[)\]])", r"\\right\1", gold))
    )


def _unicode(gold: str) -> str:
    for command, character in [
        ("\\pi", "π"),
        ("\\cup", "∪"),
        ("\\infty", "∞"),
        ("^\\circ", "°"),
        ("\\pm", "±"),
        ("\\in ", "∈ "),
    ]:
        gold = gold.replace(command, character)
    return gold.replace("-", "−") if re.fullmatch(r"-[\d.]+", gold) else gold


def value_of(gold: str) -> Fraction | None:
    """Return the number that a gold answer is, without a unit."""
    text = gold.replace("\\!", "").replace(" ", "").replace("\\$", "").replace("dfrac", "frac")
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    if re.fullmatch(r"-?\d*\.?\d+", text):
        return Fraction(text)
    match = re.fullmatch(r"(-?)(\d*)\\frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))", text)
    if not match:
        return None
    part = Fraction(int(match[3] or match[4]), int(match[5] or match[6]))
    return (-1 if match[1] else 1) * (int(match[2] or 0) + part)


def _numbers(gold: str) -> Iterator[tuple[str, str]]:
    value = value_of(gold)
    if value is None:
        return
    sign, size = ("-" if value < 0 else ""), abs(value)
    if "\\frac" not in gold and "/" not in gold:
        yield "bold in the box", f"\\mathbf{{{gold}}}"
        yield "words around", f"\\text{{Answer: }} {gold}"
        yield "as text", f"\\text{{{gold}}}" if "\\" not in gold else gold
    yield "bold in the box", f"\\boldsymbol{{{gold}}}"
    yield "name in front", f"x = {gold}"
    yield "name in front", f"\\text{{Total}} = {gold}"
    yield "name in front", f"f(2) = {gold}"
    if "$" not in gold:
        yield "unit after", f"{gold} \\text{{ apples}}"
        yield "unit after", f"{gold}\\ \\mathrm{{cm}}^2"
        yield "unit after", f"{gold} apples"
        yield "dollar sign", f"\\${gold}" if value >= 0 else gold
        yield "degrees", f"{gold}^\\circ"
        yield "bare percent", f"{gold}\\%"
    if value.denominator == 1:
        n = size.numerator
        yield "decimals of zero", f"{sign}{n}.0"
        yield "decimals of zero", f"{sign}{n}.00"
        yield "unreduced fraction", f"{sign}\\frac{{{2 * n}}}{{2}}"
        yield "sum", f"{n} - {2 * n}" if sign else f"{n + 3} - 3"
        yield "equation of numbers", f"{2 * n} - {n} = {n}" if not sign else gold
        if n >= 1000:
            for mark in (",", "{,}", "\\,", "\\!", ",\\!", "\\;", "\\ "):
                yield "thousands", sign + f"{n:,}".replace(",", mark)
            yield "thousands", f"{sign}{n}"
            power = len(str(n)) - 1
            digits = str(n).rstrip("0")
            mantissa = digits[0] + ("." + digits[1:] if len(digits) > 1 else "")
            yield "power of ten", f"{sign}{mantissa} \\times 10^{{{power}}}"
            yield "power of ten", f"{sign}{mantissa}e{power}"
    else:
        top, bottom = size.numerator, size.denominator
        yield "fraction with a slash", f"{sign}{top}/{bottom}"
        yield "fraction with a slash", f"{sign}\\frac{{{top}}}{{{bottom}}}"
        yield "unreduced fraction", f"{sign}\\frac{{{3 * top}}}{{{3 * bottom}}}"
        yield "sign in the numerator", f"\\frac{{{sign}{top}}}{{{bottom}}}"
        yield "division", f"{sign}{top} \\div {bottom}"
        if top > bottom:
            yield "mixed number", f"{sign}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}"
            yield "mixed number", f"{sign}{top // bottom} \\tfrac{{{top % bottom}}}{{{bottom}}}"
            yield "mixed number", f"{sign}{top // bottom} {top % bottom}/{bottom}"
        decimals = decimal_of(size)
        if decimals:
            yield "decimals", sign + decimals
            yield "decimals", sign + decimals.removeprefix("0")
            yield "decimals of zero", f"{sign}{decimals}0"
            percent = decimal_of(100 * size)
            yield "percent", f"{sign}{percent}\\%"
            yield "percent", f"{sign}{percent}%"
            yield "percent", f"{sign}{percent} \\text{{ percent}}"
        else:
            yield "rounded to six decimals", f"{sign}{float(size):.6f}"
            yield "rounded to two decimals", f"{sign}{float(size):.2f}"


def decimal_of(value: Fraction) -> str | None:
    """Return the decimals of a number, if they end."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return None
    digits = next(n for n in range(64) if (value * 10**n).denominator == 1)
    text = str((value * 10**digits).numerator).rjust(digits + 1, "0")
    return text if not digits else f"{text[:-digits]}.{text[-digits:]}"


def _is_formula(gold: str) -> bool:
    return (
        value_of(gold) is None and re.search(r"text|mbox|begin|,|\\cup|\\in\b|\\pm|=|_|\(-?\d|circ|[$%]", gold) is None
    )


def formula_of(gold: str) -> sympy.Expr | None:
    """Return the formula that a gold answer is, as sympy has it, with the imaginary unit."""
    if not _is_formula(gold):
        return None
    text = re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", gold).replace("\\dfrac", "\\frac")
    parsed = latex2sympy(text, conversion_config=ConversionConfig(lowercase_symbols=False))
    return parsed.subs(sympy.Symbol("i"), sympy.I).doit()


def _plain_formulas(gold: str) -> Iterator[tuple[str, str]]:
    if not _is_formula(gold):
        return
    plain = re.sub(r"\\sqrt\{(\w+)\}", r"sqrt(\1)", re.sub(r"\\sqrt(\d)", r"sqrt(\1)", gold)).replace("\\pi", "pi")
    if "\\" not in plain:
        yield "plain notation", plain
        yield "plain notation", re.sub(r"(?<=[0-9)])\s*(?=[a-zA-Z])", "*", plain)
    yield "bold in the box", f"\\mathbf{{{gold}}}"
    yield "name in front", f"y = {gold}" if "y" not in gold else gold
    yield (
        "roots as powers",
        re.sub(r"\\sqrt(?:\{(\d+)\}|(\d))", r" \\cdot \1\2^{1/2}", gold)
        if re.match(r"\d", gold) and "frac" not in gold
        else gold,
    )
    yield (
        "roots as powers",
        re.sub(r"\\sqrt\{(\d+)\}", r"{\1}^{\\frac{1}{2}}", gold) if re.match(r"\\sqrt", gold) else gold,
    )
    yield "braces", f"{{{gold}}}"
    yield "times signs", re.sub(r"(?<=\d)\s*(?=[a-zA-Z]|\\sqrt|\\pi)", r" \\cdot ", gold)
    yield "times signs", re.sub(r"(?<=\d)\s*(?=[a-zA-Z]|\\sqrt|\\pi)", r" \\times ", gold)
    yield "tie of spaces", re.sub(r"(?<=\d)\s*(?=[a-zA-Z]|\\sqrt|\\pi)", r"\\,", gold)


def _formulas(gold: str) -> Iterator[tuple[str, str]]:
    formula = formula_of(gold)
    if formula is None:
        return
    yield "terms in another order", _reordered(formula)
    yield "expanded", sympy.latex(sympy.expand(formula))
    yield "factored", sympy.latex(sympy.factor(formula))
    yield "over two", f"\\frac{{{sympy.latex(2 * formula)}}}{{2}}"
    yield "rationalised", sympy.latex(sympy.radsimp(formula))
    yield "one more and one less", f"{sympy.latex(formula)} + 1 - 1"
    if not formula.free_symbols and formula.is_real:
        yield "rounded to six decimals", f"{float(formula):.8f}"
        yield "rounded to two decimals", f"{float(formula):.2f}" if abs(formula) < 1000 else gold


def _reordered(formula: sympy.Expr) -> str:
    terms = list(reversed([sympy.latex(t) for t in sympy.Add.make_args(formula)]))
    return "".join(t if i == 0 or t.startswith("-") else "+" + t for i, t in enumerate(terms))


def items_of(gold: str, *, opening: str = "", closing: str = "") -> list[str]:
    """Return the items of a list, or of one in brackets."""
    if not (gold.startswith(opening) and gold.endswith(closing)):
        return []
    inner = gold[len(opening) : len(gold) - len(closing)]
    if value_of(gold) is not None or re.search(r"text|cup|,\\!|\(|\[|\\\{", inner) or "," not in inner:
        return []
    return [item.strip() for item in inner.split(",")]


def tidy(gold: str) -> str:
    return gold.replace("\\left", "").replace("\\right", "").strip()


def _lists(gold: str) -> Iterator[tuple[str, str]]:
    items = items_of(gold) or items_of(gold, opening="\\{", closing="\\}")
    if "\\pm" in gold and not items:
        items = [gold]
    if not items:
        return
    signs = [i.replace("\\pm", s) for i in items for s in "+-" if "\\pm" in i or s == "+"]
    yield "list in another order", ", ".join(reversed(items))
    yield "list in braces", f"\\{{{', '.join(items)}\\}}"
    yield "list without braces", ", ".join(items)
    yield "both signs written", ", ".join(signs)
    yield "list with and", f"{', '.join(signs[:-1])} \\text{{ and }} {signs[-1]}"
    yield "list with or", " \\text{ or } ".join(signs)
    yield "list with and", f"{', '.join(signs[:-1])} and {signs[-1]}"
    yield "list of names", ", ".join(f"x = {i}" for i in signs)
    yield "list of names", " \\text{ or } ".join(f"x = {i}" for i in signs)
    yield "list with a name", f"x = {', '.join(signs)}"
    yield "set with a name", f"x \\in \\{{{', '.join(signs)}\\}}"


def interval_of(gold: str) -> tuple[str, str, str, str] | None:
    """Return (bracket, left, right, bracket) of an interval; a pair in parentheses may be a point and isn't taken for one."""
    text = tidy(gold).removeprefix("x \\in").strip()
    match = re.fullmatch(r"([(\[])\s*([^,()\[\]]+),\s*([^,()\[\]]+?)\s*([)\]])", text)
    if match and ("[" in text or "]" in text or "infty" in text or "x" in gold):
        return match[1], match[2].strip(), match[3], match[4]
    return None


def _inequality(parts: tuple[str, str, str, str], name: str = "x") -> str:
    first, left, right, last = parts
    below, above = ("\\le" if first == "[" else "<"), ("\\le" if last == "]" else "<")
    if "infty" in left:
        return f"{name} {above} {right}"
    if "infty" in right:
        return f"{left} {below} {name}"
    return f"{left} {below} {name} {above} {right}"


def _regions(gold: str) -> Iterator[tuple[str, str]]:
    pieces = [p.strip() for p in tidy(gold).split("\\cup")]
    if len(pieces) > 1:
        pairs = [p[1:-1].split(",") for p in pieces]
        rays = [_inequality((p[0], a.strip(), b.strip(), p[-1])) for p, (a, b) in zip(pieces, pairs, strict=True)]
        yield "union in another order", " \\cup ".join(reversed(pieces))
        yield "inequalities", " \\text{ or } ".join(rays)
        yield "inequalities", " or ".join(rays)
        yield "membership", f"x \\in {gold}"
        return
    parts = interval_of(gold)
    if parts is None:
        return
    first, left, right, last = parts
    yield "inequality", _inequality(parts)
    yield "inequality", _inequality(parts, "t").replace("\\le", "\\leq")
    yield "set of an inequality", f"\\{{x \\mid {_inequality(parts)}\\}}"
    yield "membership", f"x \\in {first}{left}, {right}{last}"
    yield "interval alone", f"{first}{left},{right}{last}"
    yield "sign of infinity", f"{first}{left},{right}{last}".replace(",\\infty", ", +\\infty")


def _vectors(gold: str) -> Iterator[tuple[str, str]]:
    text = tidy(gold)
    items = items_of(text, opening="(", closing=")") if interval_of(gold) is None else []
    if items:
        yield "spaces in a point", "( " + " , ".join(items) + " )"
        yield "no spaces in a point", "(" + ",".join(items) + ")"
        yield "name in front", f"({', '.join('xyzw'[: len(items)])}) = ({', '.join(items)})"
        yield "item unreduced", f"(\\frac{{2 \\cdot ({items[0]})}}{{2}}, {', '.join(items[1:])})"
    if "pmatrix" in gold:
        yield "brackets of a matrix", gold.replace("pmatrix", "bmatrix")
        yield "lines of a matrix", gold.replace("\\\\", "\\\\\n")
        yield "fractions in a matrix", re.sub(r"(\d+)/(\d+)", r"\\frac{\1}{\2}", gold)
        yield "fractions in a matrix", re.sub(r"(-?)(\d+)/(\d+)", r"\\dfrac{\1\2}{\3}", gold)
        if "&" not in gold:
            rows = [row.strip() for row in re.sub(r"\\(?:begin|end)\{pmatrix\}", "", gold).split("\\\\")]
            yield "a point for a column vector", f"({', '.join(rows)})"


def _word_answers(gold: str) -> Iterator[tuple[str, str]]:
    match = re.fullmatch(r"\\text\{(.*)\}", gold)
    if not match:
        return
    word = match[1]
    yield "plain word", word
    yield "bold word", f"\\textbf{{{word}}}"
    yield "upright word", f"\\mathrm{{{word}}}"
    yield "word in Markdown", f"**{word}**"
    yield "other case", word.upper()
    yield "other case", f"\\text{{{word.lower()}}}"
    yield "full stop after a word", f"\\text{{{word}.}}"
    if word.startswith("("):
        yield "letter alone", word.strip("()")
        yield "letter alone", f"\\text{{{word.strip('()')}}}"
        yield "the letter and its choice", f"\\text{{{word} }} 17"


def unit_of(gold: str) -> tuple[str, str] | None:
    """Return (number or formula, unit) of a gold answer that has one."""
    match = re.fullmatch(r"(.+?)\s*(?:\\(?:text|mbox)\{\s*([a-z]+)\s*\}(?:\^(\d))?|\^\\circ())", gold)
    if not match:
        return None
    return match[1], ("degrees" if match[2] is None else match[2]) + (f"^{match[3]}" if match[3] else "")


def _units(gold: str) -> Iterator[tuple[str, str]]:
    if gold.startswith("\\$"):
        amount = gold.removeprefix("\\$")
        yield "no currency", amount
        yield "currency in words", f"{amount} \\text{{ dollars}}"
        yield "the other unit, converted", f"{float(100 * value_of(gold)):.0f} \\text{{ cents}}"
    found = unit_of(gold)
    if not found:
        return
    amount, unit = found
    yield "no unit", amount
    name, _, power = unit.partition("^")
    yield "unit as text", f"{amount} \\text{{ {name}}}" + (f"^{power}" if power else "")
    yield "unit upright", f"{amount}\\,\\mathrm{{{name}}}" + (f"^{{{power}}}" if power else "")
    if power:
        long = {"cm": "centimeters"}.get(name, name)
        yield "square in words", f"{amount} \\text{{ square {long}}}"
    if unit == "degrees":
        yield "degrees", f"{amount}^{{\\circ}}"
        yield "degrees", f"{amount}°"
        yield "degrees", f"{amount} degrees"
        if amount.isdigit():
            yield "angle in radians", f"\\frac{{{amount}\\pi}}{{180}}"


def _bases(gold: str) -> Iterator[tuple[str, str]]:
    match = re.fullmatch(r"(\d+)_\{?(\d)\}?", gold)
    if not match:
        return
    digits, base = match[1], int(match[2])
    word = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][base]
    yield "base in braces", f"{digits}_{{{base}}}"
    yield "base without braces", f"{digits}_{base}"
    yield "base in words", f"{digits}_{{\\text{{{word}}}}}"
    yield "base in words", f"{digits} \\text{{ base }} {base}"
    yield "digits in parentheses", f"({digits})_{{{base}}}"
    yield "the base left out", digits
    yield "the value in base ten", str(int(digits, base))
