"""Describe options to users: --help, and the tables of docs/options.md (docs/make_options.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from itertools import groupby
from textwrap import fill

import yaml

from frpo_nemo.config.option import MISSING, Option, options_of, shown
from frpo_nemo.config.overrides import CONFIGS

_WIDTH, _COLUMN = 132, 50  # width of a line of --help, and the column where sentences begin
_HEADER = """\
Options of recipes/{name}.py and their defaults. ??? must be set; * is a number (in a list, from 0) or a name (in a
mapping). Give them here (optim.lr=1e-6), or in a YAML file of your own (--config-dir DIR --config-name FILE).
"""


def help_text(schema: type, config_name: str) -> str:
    """Return the text of --help: the groups that `config_name` chooses from, and every option of `schema`."""
    lines = [_HEADER.format(name=config_name), *_choices(config_name)]
    for group in grouped(options_of(schema, described=set())):
        lines += ["", *(_help_line(each) for each in group)]
    return "\n".join(lines)


def table(options: Sequence[Option]) -> str:
    """Return a table in Markdown, one row for each option."""
    heads = ["option", "default", "values", "meaning"]
    rows = [
        [f"`{each.key}`", _default(each) and f"`{_default(each)}`", each.wanted(), each.rule.sentence]
        for each in options
    ]
    if any(each.rule.may_change for each in options):
        heads.append("resumed run")
        rows = [[*row, "may change" if each.rule.may_change else ""] for row, each in zip(rows, options, strict=True)]
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def grouped(options: Iterable[Option]) -> list[list[Option]]:
    """Group neighbours whose keys begin with the same name."""
    return [list(group) for _, group in groupby(options, lambda each: each.key.partition(".")[0])]


def _choices(config_name: str) -> Iterator[str]:
    """Yield a line for each group of files in configs/ from which `config_name` takes one."""
    defaults = yaml.safe_load((CONFIGS / f"{config_name}.yaml").read_text())["defaults"]
    for name in (key for entry in defaults if isinstance(entry, dict) for key in entry):
        files = ", ".join(sorted(file.stem for file in (CONFIGS / name).glob("*.yaml")))
        yield fill(f"{name}=FILE chooses from configs/{name}: {files}", _WIDTH, subsequent_indent="    ")


def _help_line(each: Option) -> str:
    name = each.key if is_dataclass(each.default) else f"{each.key}={shown(each.default)}"
    text = each.rule.sentence if is_dataclass(each.default) else f"{each.rule.sentence} ({each.wanted()})"
    return fill(text, _WIDTH, initial_indent=f"{name:{_COLUMN - 2}}  ", subsequent_indent=" " * _COLUMN)


def _default(each: Option) -> str:
    return "" if each.default == MISSING or is_dataclass(each.default) else shown(each.default)
