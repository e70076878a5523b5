"""Turn plain composed YAML into a typed configuration, an instance of a dataclass of options.py.

An error in YAML (an unknown key, a type, a missing value) is reported in one sentence with the full path, also inside
lists, where OmegaConf's own messages have none.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from typing import Any, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from frpo_nemo.config.option import MISSING, bad_value, check_values, dataclass_in, options_of, own_options, shown
from frpo_nemo.config.overrides import expand_homes
from frpo_nemo.errors import ConfigError


def load(schema: type, cfg: DictConfig | dict) -> Any:
    """Return `cfg` as an instance of the dataclass `schema`: defaults filled in, interpolations and ~ resolved. Raises
    ConfigError for an unknown key (naming the nearest), a wrong type, a missing mandatory value, a bad interpolation, or a
    value that its option does not allow."""
    cfg = OmegaConf.create(cfg)
    _check_keys_and_types(OmegaConf.to_container(cfg), schema, schema)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), cfg)
        _check_missing(merged, schema)
        typed = expand_homes(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        text = one_line(error.msg or str(error))
        if found := re.match(r"Interpolation key '(.*)' not found", text):
            name = found[1]
            text = f"${{{name}}} stands for the option {name}, which does not exist"
            if "." not in name:
                text += f"; in a template write a column as {{{name}}}, and a dollar sign before it as \\${{{name}}}"
        raise ConfigError(f"{error.full_key}: {text}.") from error
    check_values(typed)
    return typed


def one_line(text: str) -> str:
    """Return an OmegaConf message on one line, without its last lines, which show internals."""
    return " ".join(text.split("\n    full_key")[0].split()).rstrip(".")


def _check_missing(merged: DictConfig, schema: type) -> None:
    missing = sorted(OmegaConf.missing_keys(merged))
    if not missing:
        return
    hints = []
    for key in missing:
        plain = re.sub(r"\[(\d+)\]", r".\1", key)  # data.train[0].path
        known = (each.rule.example for each in options_of(schema) if fnmatch.fnmatchcase(plain, each.key))
        example = next(known, None)  # none in a free mapping, such as args
        hints.append(f"{key} (for example {key}={example})" if example else key)
    raise ConfigError(f"No value for {', '.join(hints)}.")


def _check_keys_and_types(values: Any, schema: type, root: type, path: str = "") -> None:
    """Raise ConfigError for the first key in nested `values` that the dataclass `schema` lacks, or whose value has the
    wrong type. `path` is where `values` lies in `root`."""
    known = {each.key: each for each in own_options(schema)}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}={shown(values)} must be a mapping with keys among {', '.join(known)}.")
    blank = OmegaConf.structured(schema)
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"Unknown key {full}={shown(value)}; {_nearest(str(key), full, list(known), root)}.")
        if isinstance(value, str) and (value == MISSING or "${" in value):
            continue  # missing or interpolated: known after the merge
        hint = known[key].hint
        if inner := dataclass_in(hint):
            for item_path, item in _items(hint, value, full):
                _check_keys_and_types(item, inner, root, item_path)
            continue
        try:
            blank[key] = value
        except ValidationError as error:
            raise bad_value(full, shown(value), known[key]) from error


def _items(hint: Any, value: Any, path: str) -> list[tuple[str, Any]]:
    """Return (path, value) of each dataclass that a field of type `hint` holds: itself, in a list or in a dict."""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{path}={shown(value)} must be a list, such as [{{path: prompts.jsonl}}].")
        return [(f"{path}.{i}", item) for i, item in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={shown(value)} must be a mapping from names to options.")
        return [(f"{path}.{name}", item) for name, item in value.items()]
    return [(path, value)]


def _nearest(key: str, full: str, siblings: list[str], root: type) -> str:
    """Return a clause on the key that was meant: of the same name elsewhere, or of a similar name here."""
    elsewhere = [each.key for each in options_of(root) if _leaf(each.key) == key]
    here = [full[: -len(key)] + name for name in difflib.get_close_matches(key, siblings, n=1)]
    found = elsewhere or here
    return f"the nearest valid key is {found[0]}" if found else f"valid keys here are {', '.join(siblings)}"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
