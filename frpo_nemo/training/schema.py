"""Plain composed YAML and a dataclass of config.py -> a typed configuration.

What YAML may get wrong (unknown keys, types, missing values) is said in one sentence with the full path, also inside
lists, where OmegaConf's own messages have none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from frpo_nemo.errors import ConfigError

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def load(schema: type, cfg: DictConfig | dict) -> Any:
    """`cfg` as an instance of the dataclass `schema`: defaults filled in, interpolations resolved. Raises ConfigError
    for an unknown key (naming the nearest), a wrong type, a missing mandatory value or a bad interpolation."""
    cfg = OmegaConf.create(cfg)
    _check_keys_and_types(OmegaConf.to_container(cfg), schema, schema)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), cfg)
        _check_missing(merged, schema)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {one_line(error.msg or str(error))}.") from error


def documented_keys(schema: type, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, field) of every option. The options of a list's entries and of a dict's items have no index or name in
    their key: data.train.path."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        yield path + item.name, item
        inner = _dataclass_in(hints[item.name])
        if inner:
            yield from documented_keys(inner, f"{path}{item.name}.")


def one_line(text: str) -> str:
    """OmegaConf's messages go on with lines of internals."""
    return " ".join(text.split("\n    full_key")[0].split()).rstrip(".")


def _check_missing(merged: DictConfig, schema: type) -> None:
    missing = sorted(OmegaConf.missing_keys(merged))
    if not missing:
        return
    examples = {key: item.metadata["example"] for key, item in documented_keys(schema) if item.metadata}
    hints = []
    for key in missing:
        plain = re.sub(r"\[\d+\]", "", key)  # data.train[0].path
        example = examples.get(plain) or next((e for k, e in examples.items() if _leaf(k) == _leaf(plain)), None)
        hints.append(f"{key} (for example {key}={example})" if example else key)  # none in what is free, as args
    raise ConfigError(f"No value for {', '.join(hints)}.")


def _check_keys_and_types(values: Any, schema: type, root: type, path: str = "") -> None:
    """Raise ConfigError for the first key in nested `values` that the dataclass `schema` lacks, or whose value has the
    wrong type. `path` is where `values` lies in `root`."""
    hints = get_type_hints(schema)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}={_shown(values)} must be a mapping with keys among {', '.join(hints)}.")
    blank = OmegaConf.structured(schema)
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"Unknown key {full}={_shown(value)}; {_nearest(str(key), full, list(hints), root)}.")
        if isinstance(value, str) and (value == "???" or "${" in value):
            continue  # missing or interpolated: known after the merge
        if _dataclass_in(hints[key]):
            for item_path, item in _items(hints[key], value, full):
                _check_keys_and_types(item, _dataclass_in(hints[key]), root, item_path)
            continue
        try:
            blank[key] = value
        except ValidationError as error:
            raise ConfigError(f"{full}={_shown(value)} must be {_describe(hints[key])}.") from error


def _items(hint: Any, value: Any, path: str) -> list[tuple[str, Any]]:
    """(path, value) of each dataclass that a field of type `hint` holds: itself, in a list or in a dict."""
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{path}={_shown(value)} must be a list, such as [{{path: prompts.jsonl}}].")
        return [(f"{path}.{i}", item) for i, item in enumerate(value)]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}={_shown(value)} must be a mapping from names to options.")
        return [(f"{path}.{name}", item) for name, item in value.items()]
    return [(path, value)]


def _dataclass_in(hint: Any) -> type | None:
    return next((t for t in (hint, *get_args(hint)) if is_dataclass(t)), None)


def _nearest(key: str, full: str, siblings: list[str], root: type) -> str:
    """The key that was meant: of the same name elsewhere, or of a similar name here."""
    elsewhere = [name for name, _ in documented_keys(root) if _leaf(name) == key]
    here = [full[: -len(key)] + name for name in difflib.get_close_matches(key, siblings, n=1)]
    found = elsewhere or here
    return f"the nearest valid key is {found[0]}" if found else f"valid here are {', '.join(siblings)}"


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return f"{_describe(get_args(hint)[0])} or null"
    return _TYPE_NAMES.get(hint, {list: "a list", dict: "a mapping"}.get(get_origin(hint), "a value"))


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
