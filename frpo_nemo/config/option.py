"""Define one option of a configuration: a field of a dataclass with its default, its meaning and the values that it may have.

An option is described at its field and nowhere else. load.py and the objectives check values by it,
training/checks/resume.py reads from it what a resumed run may change, and reference.py makes --help and docs/options.md of
it. This file imports only the error, because objective/ is used without OmegaConf.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterator
from dataclasses import MISSING as NOT_GIVEN
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from operator import ge, gt, le, lt
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from frpo_nemo.errors import ConfigError

MISSING = "???"  # OmegaConf's mark for a value that the user must give
_NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


@dataclass(frozen=True)
class Rule:
    """Describe the option of a field, in addition to the field's type and default."""

    sentence: str = ""
    example: str | None = None  # a value for the message that none was given
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    also: float | None = None  # a value outside of the bounds that is allowed
    may_change: bool = False  # when a run resumes: where, how fast and how long it computes, what it reports


@dataclass(frozen=True)
class Option:
    """One field of a dataclass. key: its path; * stands for an entry's number in a list (from 0), or its name."""

    key: str
    hint: Any
    default: Any
    rule: Rule

    def allows(self, value: Any) -> bool:
        if value is None:
            return _is_optional(self.hint) or self.hint is Any
        if value == self.rule.also:
            return True
        kind, rule = _plain(self.hint), self.rule
        if kind in (int, float):
            numbers = (int,) if kind is int else (int, float)
            return isinstance(value, numbers) and not isinstance(value, bool) and _is_within(value, rule)
        if kind in (bool, str) and not isinstance(value, kind):
            return False
        return not rule.choices or value in rule.choices

    def wanted(self) -> str:
        """Return the values that it may have: "a whole number at least 1, or null"."""
        rule = self.rule
        others = [str(rule.also)] if rule.also is not None else []
        if rule.choices:
            return f"one of {', '.join([*['null'] * _is_optional(self.hint), *rule.choices])}"
        bounds = [("above", rule.above), ("at least", rule.at_least), ("below", rule.below), ("at most", rule.at_most)]
        kind = _plain(self.hint)
        noun = _NOUNS.get(kind, "options" if is_dataclass(kind) else "a value")
        text = f"{noun} {' and '.join(f'{word} {bound:g}' for word, bound in bounds if bound is not None)}".rstrip()
        others += ["null"] if _is_optional(self.hint) else []
        return f"{text}{',' if text != noun else ''} or {' or '.join(others)}" if others else text


def option(sentence: str, default: Any = MISSING, **rule: Any) -> Any:
    """Return a dataclass field. sentence: what the option means, for the user. default: a value, or a factory (list, dict,
    a dataclass); left out: the user must give a value. rule: fields of Rule."""
    metadata = {"rule": Rule(sentence, **rule)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(schema: type, path: str = "", described: set[type] | None = None) -> Iterator[Option]:
    """Yield every option of a dataclass, those of nested ones after the option that holds them. described: the dataclasses
    whose options are left out in further lists and mappings; grows."""
    for own in own_options(schema):
        each = replace(own, key=path + own.key)
        yield each
        inner = dataclass_in(each.hint)
        if inner is None:
            continue
        if inner is each.hint:
            yield from options_of(inner, f"{each.key}.", described)
        elif described is None or inner not in described:
            if described is not None:
                described.add(inner)
            yield from options_of(inner, f"{each.key}.*.", described)


def given_options(values: Any, path: str = "") -> Iterator[tuple[str, Any, Option]]:
    """Yield (key, value, option) of every field in an instance of a dataclass, and in the dataclasses that it holds."""
    schema: Any = type(values)
    for each in own_options(schema):
        value, key = getattr(values, each.key), path + each.key
        if not is_dataclass(value):
            yield key, value, each
        for inner_path, inner in _entries(value, key):
            if is_dataclass(inner):
                yield from given_options(inner, f"{inner_path}.")


def check_values(values: Any, path: str = "") -> None:
    """Raise ConfigError for the first field of `values`, an instance of a dataclass, whose value its option doesn't allow."""
    for key, value, each in given_options(values, path):
        if not each.allows(value):
            is_text = isinstance(value, str) and not each.rule.choices
            raise bad_value(key, repr(value) if is_text else shown(value), each)


def bad_value(key: str, value: str, each: Option) -> ConfigError:
    """Return the error about a value that `each` does not allow: the value, what it may be, and what the option means."""
    wanted = each.wanted().replace("a number", "a finite number" if value in ("inf", "-inf", "nan") else "a number")
    meaning = f" ({each.rule.sentence.rstrip('.')})" if each.rule.sentence else ""
    near = difflib.get_close_matches(value, each.rule.choices, n=1)
    return ConfigError(f"{key}={value} must be {wanted}{meaning}{f'; did you mean {near[0]}?' if near else '.'}")


def shown(value: Any) -> str:
    """Return `value` as it is written in YAML, a long one without its end."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def dataclass_in(hint: Any) -> Any:
    """Return the dataclass that a field of type `hint` holds: itself, in a list or in a mapping."""
    return next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)


@functools.cache
def own_options(schema: type) -> list[Option]:
    """Return the options of a dataclass without those of nested ones; their keys are the names of the fields."""
    hints = get_type_hints(schema)
    return [
        Option(each.name, hints[each.name], _default(each), each.metadata.get("rule", Rule()))
        for each in fields(schema)
    ]


def _default(each: Field) -> Any:
    if each.default_factory is not NOT_GIVEN:
        return each.default_factory()
    return MISSING if each.default is NOT_GIVEN else each.default


def _entries(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"{path}.{number}", entry) for number, entry in enumerate(value)]
    if isinstance(value, dict):
        return [(f"{path}.{name}", entry) for name, entry in value.items()]
    return [(path, value)]


def _is_within(value: float, rule: Rule) -> bool:
    bounds = ((gt, rule.above), (ge, rule.at_least), (lt, rule.below), (le, rule.at_most))
    return math.isfinite(value) and all(bound is None or holds(value, bound) for holds, bound in bounds)


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)


def _plain(hint: Any) -> Any:
    """Return the type without null, and without what a list or a mapping holds."""
    kind = get_args(hint)[0] if _is_optional(hint) else hint
    return get_origin(kind) or kind
