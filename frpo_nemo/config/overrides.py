"""Prepare overrides of the command line for Hydra, and expand paths with `~`. A text from the shell is taken literally,
whereas Hydra's own grammar reads `=`, `(` or `,` in it as syntax.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from frpo_nemo.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Last parts of the keys whose value is a path, or begins with one. A model may also be a hub name.
PATHS = {"run_dir", "path", "out", "input", "base", "resume", "source", "model", "target", "url"}
PATHS |= {"include_path", "antlr_path"}
TEMPLATES = {"prompt", "completion", "system_prompt"}  # `{question}` isn't a mapping there
TEXTS = PATHS | TEMPLATES | {"wandb_project", "wandb_name"}  # never a number, a list or a choice


def for_hydra(overrides: Sequence[str], config_dir: str | None) -> tuple[str, list[str]]:
    """Return (the directory that Hydra searches first, overrides as Hydra needs them).

    Value overrides get Hydra's `++` (set, whether or not a YAML file has the key), because the defaults are not in
    the YAML. Choices of a group (parallel=tp2) and overrides with a prefix stay as they are. Raises ConfigError.
    """
    if config_dir is None:
        return str(CONFIGS), [_set_or_choose(override, [CONFIGS]) for override in overrides]
    first = Path(expand_home("--config-dir", config_dir)).resolve()
    if not first.is_dir():
        raise ConfigError(f"The configuration directory {config_dir} does not exist (working directory: {Path.cwd()}).")
    ours = f"hydra.searchpath=['file://{CONFIGS}']"
    return str(first), [*(_set_or_choose(override, [first, CONFIGS]) for override in overrides), ours]


def expand_homes(values: Any, path: str = "") -> Any:
    """Expand ~ at the beginning of paths in nested dataclasses, mappings and lists, in place. Raises ConfigError when there
    is no such user."""
    items = values if isinstance(values, dict) else vars(values) if is_dataclass(values) else None
    if isinstance(values, list):
        items = dict(enumerate(values))
    for name, item in (items or {}).items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(item, str) and name in PATHS:
            item = expand_home(key, item)
            if is_dataclass(values):
                setattr(values, name, item)
            else:
                values[name] = item
        elif name != "where":  # its names are columns
            expand_homes(item, key)
    return values


def expand_home(key: str, value: str) -> str:
    """Return `value` with ~ or ~user at its beginning replaced by the home directory."""
    if not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        raise ConfigError(
            f"{key}={value} begins with the home directory of a user that this machine does not have; write the path in "
            f"full, or ./{value} for a name that begins with ~."
        ) from error


def _set_or_choose(override: str, directories: list[Path]) -> str:
    key, equals, value = override.partition("=")
    if not equals and not key.startswith("~"):
        raise ConfigError(f"The override {override!r} has no value; write {_with_value(override)}.")
    if not key.strip("+~"):
        raise ConfigError(f"The override {override!r} has no name; write NAME{override.lstrip('+~')}.")
    if key.lstrip("+") == "experiment":
        raise ConfigError(
            f"{override}: an experiment is a whole configuration; write --config-name experiment/{value}."
        )
    groups = [directory / key.lstrip("+") for directory in directories if (directory / key.lstrip("+")).is_dir()]
    if groups:
        _check_choice(key.lstrip("+"), value, groups)
    if groups or set(key) & set("/@") or key.startswith(("~", "hydra")):
        return override
    return f"{'' if key.startswith('+') else '++'}{key}={_as_text_if_needed(key, value)}"


def _with_value(override: str) -> str:
    """Return the nearest override that has a value, for texts such as `optim.lr: 1`, `optim.lr 1`, `objective/frpo`."""
    found = re.fullmatch(r"([+\w.]+)(?::\s*|\s+|/)(.+)", override)
    return f"{found[1]}={found[2]}" if found else f"{override}=VALUE"


def _check_choice(key: str, value: str, groups: list[Path]) -> None:
    """Raise ConfigError unless a group gets names of files; Hydra prints tracebacks for null, numbers and lists of others."""
    try:
        read = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return  # Hydra reports which character it cannot read
    if read.is_sweep_override():
        return
    chosen = read.value()
    names = chosen if isinstance(chosen, list) else [chosen]
    if chosen == {} or not (isinstance(chosen, dict) or all(isinstance(name, str) for name in names)):
        files = sorted({file.stem for group in groups for file in group.glob("*.yaml")})
        raise ConfigError(
            f"{key}={value}: {key} takes the name of a file in configs/{key} ({', '.join(files)}); to do without one, write "
            f"'~{key}'."
        )


def _as_text_if_needed(key: str, value: str) -> str:
    """Quote a value that Hydra cannot read, as text. Also quote the value of an option in TEXTS that Hydra would read as
    something else (a,b as a choice, 1e-6 as a number)."""
    last = key.rpartition(".")[2].lstrip("+")
    quoted = QuotedString(value, Quote.single).with_quotes()
    try:
        read = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        begun = ("'", '"') if last in TEMPLATES else ("'", '"', "[", "{")
        return value if value.startswith(begun) else quoted  # begun in Hydra's syntax: an error in it is reported
    if last not in TEXTS or value in ("", "null"):
        return value
    return quoted if read.is_sweep_override() or not isinstance(read.value(), str) else value
