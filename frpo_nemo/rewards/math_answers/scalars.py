"""Reads one number or formula of an answer, with its unit, percent sign or base, from its text. Formulas stay text."""

from __future__ import annotations

import re
from fractions import Fraction

from frpo_nemo.rewards.math_answers.text import without_outer_braces
from frpo_nemo.rewards.math_answers.values import Scalar

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_UNITS = {  # name: its spellings, without the s of the plural
    "inch": 'inch inche in "',
    "foot": "foot feet ft",
    "yard": "yard yd",
    "mile": "mile mi",
    "mm": "millimeter millimetre mm",
    "cm": "centimeter centimetre cm",
    "m": "meter metre m",
    "km": "kilometer kilometre km",
    "mg": "milligram mg",
    "g": "gram g",
    "kg": "kilogram kg",
    "ounce": "ounce oz",
    "pound": "pound lb",
    "ml": "milliliter millilitre ml",
    "liter": "liter litre l",
    "second": "second sec s",
    "minute": "minute min",
    "hour": "hour hr h",
    "degree": "degree deg",
    "radian": "radian rad",
    "dollar": "dollar usd buck",
    "cent": "cent",
    "mile/hour": "mph",
    "": "unit",
}
_UNIT_OF = {spelling: name for name, spellings in _UNITS.items() for spelling in spellings.split()} | {"": ""}
_UNIT_OF_NONE = re.compile(
    r"\b(?:and|or|to|not|no|but|plus|minus|times|over|more|less|fewer|greater|than|half|third|quarter|remainder|factorial"
    r"|each other|is|are|was|if|when|where|through|until|between|at|zero|one|two|three|four|five|six|seven|eight|nine|ten"
    r"|k|mod|modulo|base)\b"
)
_MARKED_UNIT = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?$")
_PLAIN_UNIT = re.compile(r"(?:\s+|(?<=[\d})]))(/?(?<!\\)[A-Za-z\"][A-Za-z '/.-]*)(?:\^\s*\{?\s*(\d)\s*\}?)?$")
_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_DECIMAL = re.compile(
    rf"({_INTEGER}|)(?:\.(\d*))?(?:\s*(?:\\times|\\cdot|x)\s*10\s*\^\s*(?:\{{\s*)?([+-]?\s*\d+)\s*\}}?|[eE]([+-]?\d+))?"
)
_FRACTION = re.compile(rf"(?:({_INTEGER})\s*)?\\frac\{{\s*(-?\s*(?:{_INTEGER}))\s*\}}\{{\s*(-?\s*(?:{_INTEGER}))\s*\}}")
_RECURRING = re.compile(r"(\d*)\.(\d*)\s*\\(?:overline|bar)\s*\{?\s*(\d+)\s*\}?")
_SLASHED = re.compile(rf"(?:({_INTEGER})\s+)?({_INTEGER})\s*/\s*({_INTEGER})")
BASED = re.compile(
    r"\(?\s*([0-9A-Fa-f]*\d[0-9A-Fa-f]*)\s*\)?\s*(?:_|\(?\s*(?:in\s+)?(?=base))[\s{(]*(?:base[\s-]*)?(\w+)[\s})]*"
)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ\s*")
_PROSE = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}\s+[A-Za-z0-9]|\.\.|\\[lc]?dots")
_LONG_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{4,}")


def read_scalar(text: str) -> Scalar | None:
    """Return the one number or formula that a text consists of; None where it isn't one."""
    text = without_outer_braces(text.strip())
    based = BASED.fullmatch(re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text))
    if based and (base := _base(based[2])):
        return Scalar(based[1].upper(), base=base)
    text, unit, percent, scale = _without_unit(text)
    if text is None or not _is_formula(text):
        return None
    number, places = number_of(text)
    if scale != 1:
        return None if number is None else Scalar(str(number * scale), number * scale)
    return Scalar(text, number, places, percent, unit)


def _base(text: str) -> str:
    return text if text.isdigit() else _BASES.get(text.lower(), "")


def _is_formula(text: str) -> bool:
    if not text or r"\text" in text or _LONG_WORD.search(text) or re.search(r"[?:;&#!]\s*$(?<!\d!)|[?:;&#]", text):
        return False
    if re.search(r"(?<![_^\d])\d+\s+\d", text) and number_of(text)[0] is None:
        return False
    if _PROSE.search(text):
        return False
    return re.search(r"[0-9A-Za-z]", text) is not None and re.search(r"\s(?:or|and|not|to|is)\s|^not?\s", text) is None


def _without_unit(text: str) -> tuple[str | None, str, bool, int]:
    """Split off (formula, unit, percent, scale). The formula is None where the rest isn't a unit, as in `72 and a half`."""
    percent, unit, scale = False, "", 1
    text = re.sub(r"(?<=[\d})])\s*\((?:in\s+)?([A-Za-z ]{3,})\)$", r" \\text{\1}", text)  # 72 (clips)
    currency = re.match(r"([+-]?)\s*(?:\\\$|(?:US\s*\\\$|USD)(?=[\s\d]))\s*", text)
    if currency:
        text, unit = currency[1] + text[currency.end() :], "dollar"
    text = re.sub(r"(?<=\d)\s*\\\$$", "", text)
    sign = re.search(r"\s*\\?%$|\s*(?:\\text\s*\{\s*(?:percent|%|\\%)\s*\}|(?<![A-Za-z])(?:percent|pct))$", text)
    if sign:
        return text[: sign.start()].strip(), unit, True, 1
    if re.search(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-z])", text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    degrees = re.search(r"\s*\^\\circ\s*(?:\\text\s*\{\s*)?[CF]?\s*\}?$", text)
    if degrees:
        return text[: degrees.start()].strip(), "degree", False, 1
    match = _MARKED_UNIT.search(text) or _PLAIN_UNIT.search(text)
    if match and match.start() > 0 and _may_be_unit(text, match):
        words, power = match[1].lower().strip(), match[2] or ""
        first, *others = words.split() or [""]
        text = text[: match.start()].strip()
        if first in SCALES:
            scale, words = SCALES[first], " ".join(others)
        if _UNIT_OF_NONE.search(words) or re.search(r"\d", words):
            return None, "", False, 1
        unit = unit_name(words, power) or unit
    return text, unit, percent, scale


def _may_be_unit(text: str, match: re.Match) -> bool:
    """Return whether it is words marked as text, a long word, or a short unit that stands apart, unlike 2ab's letters."""
    if match.re is _MARKED_UNIT:
        return True
    longest = max(re.findall("[A-Za-z]+", match[1]) or [""], key=len)
    apart = match[0][0].isspace() and text[match.start() - 1] in "0123456789})"
    known = all(len(w) > 1 and w.removesuffix("s") in _UNIT_OF for w in match[1].lower().strip("/").split("/"))
    return len(longest) >= 4 or known or apart and (longest.lower().removesuffix("s") in _UNIT_OF or len(longest) == 3)


def unit_name(words: str, power: str) -> str:
    """Return one name for the spellings of a unit: square inches, inches^2, sq. in."""
    words = re.sub(r"[.\\]", "", words).strip()
    squared = re.match(r"(?:square|sq|cubic|cu)\s+", words)
    if squared:
        words, power = words[squared.end() :], "2" if words.startswith("sq") else "3"
    words = re.sub(r"\s+per\s+|\s*/\s*", "/", words)
    parts = [_UNIT_OF.get(w, _UNIT_OF.get(w.removesuffix("s"), w.removesuffix("s"))) for w in words.split("/")]
    name = "/".join(parts)
    return f"{name}^{power}" if name and power else name


def number_of(text: str) -> tuple[Fraction | None, int | None]:
    """Return the value of a text that is one number, and how many decimals are written."""
    text = re.sub(r"^([+-]?\s*\d{1,3})((?: \d{3})+)(?![\d/])", lambda m: m[1] + m[2].replace(" ", ""), text)
    sign, text = (-1, text[1:].strip()) if text.startswith("-") else (1, text.removeprefix("+").strip())
    match = _DECIMAL.fullmatch(text)
    if match and (match[1] or match[2]):
        exponent = int((match[3] or match[4] or "0").replace(" ", ""))
        if abs(exponent) > 400:
            return None, None
        decimals = match[2] or ""
        value = Fraction(int((match[1].replace(",", "") or "0") + decimals), 10 ** len(decimals))
        return sign * value * Fraction(10) ** exponent, None if match[2] is None else max(len(decimals) - exponent, 0)
    match = _RECURRING.fullmatch(text)
    if match:
        whole, fixed, period = match[1] or "0", match[2], match[3]
        rest = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
        return sign * (Fraction(int(whole + fixed), 10 ** len(fixed)) + rest), None
    match = _FRACTION.fullmatch(text) or _SLASHED.fullmatch(text)
    if not match:
        return None, None
    whole, top, bottom = (int((g or "0").replace(",", "").replace(" ", "")) for g in match.groups())
    return (sign * (whole + Fraction(top, bottom)), None) if bottom else (None, None)


def is_decimal(text: str) -> bool:
    """Return whether a text is one number in digits, as 1,234 is."""
    return _DECIMAL.fullmatch(text) is not None
