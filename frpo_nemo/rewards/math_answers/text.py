"""Brings LaTeX, Markdown and plain notation of an answer to one LaTeX spelling with the same meaning.

What stays: numbers, operators, brackets, commands, and \\text{...} around words. What goes: fonts, spacing, sizes,
delimiters of formulas, thousands separators, and a full stop at the end."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from frpo_nemo.rewards.math_answers.final_answer import closing_brace

_CHARACTERS = {
    **dict.fromkeys("−–—﹣－", "-"),
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/"},
    **{"π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ", "√": r"\sqrt "},
    **{
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "°": r"^\circ ",
        "θ": r"\theta ",
        "∅": r"\emptyset ",
    },
    **{"⟨": "(", "⟩": ")", "′": "'", "’": "'", "¢": r"\text{ cents}", "€": r"\text{ euros}", "£": r"\text{ pounds}"},
    **{"\u00a0": " ", "\u202f": r"\,", "\u2009": r"\,", "\u200b": "", "✓": "", "✅": ""},
}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FONTS = re.compile(
    r"\\(?:mathbf|mathit|mathsf|mathtt|mathcal|mathbb|boldsymbol|pmb|bm|bold|displaystyle|textstyle|scriptstyle|limits"
    r"|Large|large|LARGE|huge|Huge|normalsize|bf|rm|it|ensuremath|boxed|fbox|color\s*\{\w+\}|textcolor\s*\{\w+\}"
    r"|(?:big|Big|bigg|Bigg)[lrm]?|left|right|middle|phantom\s*\{\}|strut|nolinebreak)(?![A-Za-z])"
)
_WORDS = re.compile(
    r"\\(?:textbf|textit|textrm|textsf|texttt|textnormal|mbox|hbox|mathrm|operatorname\*?|emph|underline)\s*\{"
)
_REALS = re.compile(r"\\mathbb\s*(?:\{\s*R\s*\}|R)|\\mathbf\s*\{\s*R\s*\}|ℝ")
_CONSTANTS = re.compile(r"\\mathrm\s*\{\s*([ie])\s*\}")  # set upright
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!|\\!,|\s*,\s*\\!)\s*(?=\d{3}(?!\d))")
_SPACES = re.compile(
    r"(?<!\\)\\(?:[,;:!> \n]|q?quad(?![A-Za-z])|enspace(?![A-Za-z])|thinspace(?![A-Za-z])|space(?![A-Za-z]))|~|&nbsp;"
)
_SYNONYMS: list[tuple[re.Pattern[str], Any]] = [  # (pattern, its replacement: text or a function)
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:nice|s|x)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[lr]angle(?![A-Za-z])"), lambda m: "(" if m[0] == r"\langle" else ")"),
    (re.compile(r"\\text\s*\{\s*(\\\$|\\?%|\^\\circ\s*)\s*\}"), r" \1 "),
    (re.compile(r"\\text\s*\{([^{}^\d]*)\^\s*\{?(\d)\}?\s*\}"), r"\\text{\1}^\2"),
    (re.compile(r"\\log\s*_\s*(?:e|\{\s*e\s*\})"), r"\\ln "),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\sqrt\s*(\[[^\[\]]*\])\s*([0-9A-Za-z])"), r"\\sqrt\1{\2}"),
    (re.compile(r"\\d?binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\neq(?![A-Za-z])|!="), r"\\ne "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\[lr]vert(?![A-Za-z])"), "|"),
    (re.compile(r"\\equiv(?![A-Za-z])"), "="),
    (
        re.compile(
            r"\s*\(?(?:\\p?mod|\\bmod|(?<![A-Za-z])mod)\s*(?:\{[^{}]*\}|\d+)\)?\s*$|\\checkmark(?![A-Za-z])|\\blacksquare|\\square|\{\}"
        ),
        "",
    ),
    (re.compile(r"\\(?:degree|degrees)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)"), r"^\\circ "),
    (re.compile(r"\\(?:ast|star)(?![A-Za-z])|(?<!\*)\*(?!\*)"), r"\\cdot "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:implies|Rightarrow|rightarrow|to)(?![A-Za-z])"), "="),
]
_FUNCTIONS = re.compile(
    r"(?<![A-Za-z\\])(arc(?:sin|cos|tan)|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|infty)(?![A-Za-z])"
)
_INFINITY = re.compile(r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])")


def clean(text: str) -> str:
    """Return `text` in the one spelling."""
    text = _from_unicode(re.sub(r"(?<!\\)\\$", "", text.strip()))
    text = _without_markup(text)
    text = _THOUSANDS.sub("", text)
    text = _SPACES.sub(" ", text)
    text = _without_needless_text(_WORDS.sub(r"\\text{", _CONSTANTS.sub(r" \1 ", _REALS.sub(r"\\R ", text))))
    text = _FONTS.sub(" ", re.sub(r"\\(?:left|right)\s*\.", " ", text))
    for pattern, spelling in _SYNONYMS:
        text = pattern.sub(spelling, text)
    text = _plain_notation(text)
    text = _braced_arguments(text)
    text = re.sub(r"\s+", " ", text).strip()
    text = text if text.endswith("..") else text.rstrip(".,;: ")  # dots at the end mean that more follows
    return without_outer_braces(text.strip())


def without_outer_braces(text: str) -> str:
    """Return `text` without braces that enclose all of it and group nothing."""
    while text.startswith("{") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def _from_unicode(text: str) -> str:
    for character, spelling in _CHARACTERS.items():
        text = text.replace(character, spelling)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("(?<=[0-9])(?=[¼½¾⅓⅔⅕-⅞])", " ", text)  # 1½ is a mixed number
    return unicodedata.normalize("NFKC", text).replace("⁄", "/")


def _without_markup(text: str) -> str:
    """Remove delimiters of formulas and Markdown's emphasis; a `$` without a partner is the currency."""
    text = re.sub(r"\\\\\[[\d.]+\w\w\]", r"\\\\ ", text)  # \\[4pt], an end of a row
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    if len(re.findall(r"(?<!\\)\$", text.replace("$$", ""))) % 2:
        text = re.sub(r"(?<!\\)\$", r"\\$", text)
    text = re.sub(r"(?<!\\)\$", " ", text)
    text = re.sub(r"(?<![\w*])(\*{1,3})(?![\s*])(.+?)(?<![\s*])\1(?![\w*])", r"\2", text)
    text = re.sub(r"^\s*[*_`]+|[*_`]+([.,;:]?)\s*$", r"\1", text.strip())
    return re.sub(r"^[\"“”]+|(?:[\"“”]|\'\')+$", "", text.replace("`", "").strip())


def _without_needless_text(text: str) -> str:
    """Replace \\text{...} around formulas and numbers, or around nothing, by its content."""
    for match in reversed(list(re.finditer(r"\\text\s*\{", text))):
        end = closing_brace(text, match.end() - 1)
        content = "" if end is None else text[match.end() : end]
        amount = re.sub(r"\^\{?\d\}?", "", content)  # not cm^2
        formula = re.search(r"[-+=*]", content) and not re.search(r"[A-Za-z]{2,}", content)
        if end is not None and (re.search(r"\\|\d", amount) or formula or not content.strip()):
            text = f"{text[: match.start()]} {content} {text[end + 1 :]}"
    return text


def _plain_notation(text: str) -> str:
    """Write sqrt(5), cbrt(2), pi and the like in LaTeX; names inside \\text{...} are words and stay."""
    pieces = re.split(r"(\\text\s*\{[^{}]*\})", text)
    for i in range(0, len(pieces), 2):
        piece = re.sub(r"(?<![A-Za-z\\])(?=sqrt(?![A-Za-z]))", r"\\", pieces[i])
        piece = _INFINITY.sub(r"\\infty ", _FUNCTIONS.sub(r"\\\1 ", piece))
        piece = re.sub(r"(?<![A-Za-z\\])U(?=\s*[(\[])(?<=[)\]] U)", r"\\cup ", piece)
        pieces[i] = _root_of_parentheses(piece)
    return "".join(pieces)


def _root_of_parentheses(text: str) -> str:
    """Make \\sqrt(5 + x) the root of everything in the parentheses."""
    for match in reversed(list(re.finditer(r"\\sqrt\s*\(", text))):
        depth = 0
        for end in range(match.end() - 1, len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                text = f"{text[: match.start()]}\\sqrt{{{text[match.end() : end]}}}{text[end + 1 :]}"
                break
    return text


def _braced_arguments(text: str) -> str:
    """Add braces to \\frac65, \\frac 59, \\frac9{19} and \\sqrt5."""
    text = re.sub(r"\\sqrt\s*(?=\d)(\d+)", r"\\sqrt{\1}", text) if re.search(r"\\sqrt\s+\d{2}", text) else text
    text = re.sub(r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*(\\[A-Za-z]+)", r"\\sqrt{\1}", text)
    for match in reversed(list(re.finditer(r"\\frac\s*", text))):
        top, rest = _argument(text[match.end() :])
        bottom, rest = _argument(rest)
        if top and bottom:
            text = f"{text[: match.start()]}\\frac{{{top}}}{{{bottom}}}{rest}"
    return re.sub(r"([_^])\s*\{\s*([0-9A-Za-z])\s*\}", r"\1\2", text)


def _argument(text: str) -> tuple[str, str]:
    """Split one argument of a command from `text`: a group without its braces, a command, or one character."""
    text = text.lstrip()
    if text.startswith("{"):
        end = closing_brace(text, 0)
        return ("", text) if end is None else (text[1:end].strip(), text[end + 1 :])
    match = re.match(r"\\[A-Za-z]+|[0-9A-Za-z]", text)
    return (match[0], text[match.end() :]) if match else ("", text)
