"""Where rows come from: a local file, a Hugging Face data set, or the embedded world. A row is a plain dict.

A `source` is anything with the fields of `SourceConfig` (training/config.py): path, split, prompt,
completion, task, task_column, system_prompt, limit, start. What rows become (token ids) is the business of
prompts.py and sft.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

from frpo_nemo.data import world
from frpo_nemo.errors import ConfigError

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def check_source(source) -> list[str]:
    """The names of the columns of `source`. Reads no more than the beginning of a file (a hub data set is
    fetched, because the run will need it anyway), so that configurations can be checked before a model loads.

    Raises ConfigError: no such file or data set, unreadable, empty, a named column is missing, contradictory
    fields.
    """
    row = next(iter(_open(source, streaming=True)), None)
    if row is None:
        raise ConfigError(f"data source '{source.path}' has no rows")
    _check_columns(source, list(row))
    return list(row)


def load_rows(source) -> list[dict[str, Any]]:
    """The rows of `source` from `start` on, at most `limit`. Raises ConfigError like `check_source`."""
    rows = _open(source, streaming=False)
    stop = len(rows) if source.limit is None else min(len(rows), source.start + source.limit)
    if source.start >= stop:
        raise ConfigError(
            f"data source '{source.path}' has {len(rows)} rows: none is left with start={source.start}, "
            f"limit={source.limit}"
        )
    rows = rows[source.start : stop] if isinstance(rows, list) else rows.select(range(source.start, stop)).to_list()
    _check_columns(source, list(rows[0]))
    return rows


def _open(source, streaming: bool) -> Iterable[dict[str, Any]]:
    path = str(source.path)
    if path.startswith("world:"):
        return world.rows(path)
    datasets.disable_progress_bars()  # one bar per rank and file says nothing
    is_file = Path(path).suffix in FILE_TYPES
    if is_file:
        _check_file(Path(path).expanduser())
    try:
        return _open_file(Path(path).expanduser(), streaming) if is_file else _open_hub(path, source.split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as problem:
        raise ConfigError(
            f"data source '{path}' cannot be read: {problem.__cause__ or problem}. A source is a file "
            f"({', '.join(FILE_TYPES)}), the name of a data set on the hub ('owner/name' or "
            "'owner/name:configuration', with `split`), or 'world:...'"
        ) from problem


def _open_file(path: Path, streaming: bool):
    kind = FILE_TYPES[path.suffix]
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
    # A stream reads, and fails, only when asked for a row: ask here, where failures become sentences.
    return list(rows.take(1)) if streaming else rows


def _open_hub(path: str, split: str):
    name, _, configuration = path.partition(":")
    return datasets.load_dataset(name, configuration or None, split=split)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"data file '{path}' does not exist (working directory: {Path.cwd()})")
    if path.stat().st_size == 0:
        raise ConfigError(f"data file '{path}' has no rows: it is empty")


def _check_columns(source, columns: list[str]) -> None:
    if source.task is not None and source.task_column is not None:
        raise ConfigError(
            f"data source '{source.path}' has both task={source.task} and task_column={source.task_column}: give one"
        )
    for field in ("prompt", "completion", "task_column"):
        column = getattr(source, field)
        if column is not None and column not in columns:
            raise ConfigError(
                f"data source '{source.path}' has no column '{column}' ({field}={column}); "
                f"its columns: {', '.join(columns)}"
            )
