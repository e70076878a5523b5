"""Read rows from a Python function: the source `python:package.module.function?name=value&...`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from frpo_nemo.errors import ConfigError

SCHEME = "python:"


def is_function(path: str) -> bool:
    return path.startswith(SCHEME)


def function_rows(path: str) -> list[dict[str, Any]]:
    """Return the rows that the function of `path` returns. Its arguments are given by name, as text. Every process calls it,
    so it must return the same rows each time. Raises ConfigError, also when the function raises."""
    url = urlsplit(path)
    module, _, name = url.path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
        arguments = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query)))
        inspect.signature(function).bind(**arguments)
        rows = list(function(**arguments))
    except ConfigError as problem:
        raise ConfigError(f"data source '{path}': {problem}") from problem
    except Exception as problem:
        raise ConfigError(
            f"data source '{path}': {type(problem).__name__}: {problem}. Write "
            "python:package.module.function?name=value&name=value"
        ) from problem
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"data source '{path}' must return a list of dicts, one per row")
    return rows
