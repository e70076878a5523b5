r"""Fill templates: text with places for columns, such as "{instruction}\n\n{input}".

A part in double brackets with a column in it, such as "[[\n\n### Input:\n{input}]]", vanishes where that column is empty.
Braces themselves are written twice, {{ and }}, as in Python's format; {} needs no such care, because prompts ask for \boxed{}.
Nothing is evaluated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from frpo_nemo.errors import ConfigError

PLACE = re.compile(r"(?P<brace>\{\{|\}\})|\{\}|(?P<command>\\[A-Za-z]+)?\{(?P<column>[^{}\s][^{}]*)\}")
OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
# Hydra keeps a backslash and an n of a command line, where a line end is meant. Some LaTeX commands begin like that.
LINE_END = re.compile(r"(?<!\\)\\n(?P<word>[a-z]*)")
LATEX = re.compile(
    r"nabla|natural|ncong|nearrow|neg?|neq|newline|nexists|n[lg]eq|ngtr|ni|nless|nmid|nolimits|not|notin|nu|nwarrow"
)


def columns_of(name: str) -> list[str]:
    """Return the columns that a template reads; a text without places is a column's name. Raises ConfigError when a place
    looks like an argument of a LaTeX command."""
    return [place["column"] for place in _places(name)] or [name]


def is_template(name: str) -> bool:
    return bool(_places(name))


def fill(template: str, text_of: Callable[[str], str]) -> str:
    """Return the template with each column's place replaced by `text_of` the column, without the optional parts whose columns
    are all empty."""
    doubled = "{{" in template  # without it, }} is plain text: {"a": { "b": 1 }}

    def text(place: re.Match) -> str:
        if place["column"]:
            return text_of(place["column"])
        return place[0][0] if place["brace"] and doubled else place[0]

    def part(found: re.Match) -> str:
        named = [place["column"] for place in PLACE.finditer(found[1]) if place["column"]]
        if not named:
            return found[0]
        return found[1] if any(text_of(column).strip() for column in named) else ""

    return PLACE.sub(text, OPTIONAL.sub(part, with_line_ends(template)))


@functools.cache
def with_line_ends(text: str) -> str:
    r"""Return `text` with line ends where it has a backslash and an n, as Hydra leaves them on a command line. Raises
    ConfigError where a word follows that may belong to it, as in \nothing."""

    def line_end(found: re.Match) -> str:
        if LATEX.fullmatch(found[0][1:]):
            return found[0]
        if found["word"]:
            raise ConfigError(
                f"{text!r} has {found[0]}, which may be a line end and a word or a command of LaTeX: write a space or a "
                "capital after \\n, or the line end itself ($'...' in a shell, \"...\" in YAML)"
            )
        return "\n"

    return LINE_END.sub(line_end, text)


@functools.cache
def _places(template: str) -> list[re.Match]:
    places = [place for place in PLACE.finditer(with_line_ends(template)) if place["column"]]
    for place in places:
        if place["command"]:
            column, command = place["column"], place["command"]
            raise ConfigError(
                f"{template!r} has {place[0]}, which may be LaTeX or the column '{column}': write {command}{{{{{column}}}}} "
                f"for LaTeX, or {command}{{{{{{{column}}}}}}} for the column in LaTeX's braces"
            )
    return places
