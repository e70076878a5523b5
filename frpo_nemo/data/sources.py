"""Where rows come from: a local file, a Hugging Face data set, or the embedded world. A row is a plain dict.

A `source` is anything with the fields of `SourceConfig` (training/config.py). Of its rows, `start` and `limit` choose a
range, `at_least` and `where` keep some of that range, `holdout` parts those in two, and `sample` draws some. What rows say
is the business of columns.py, what becomes of them (token ids) that of prompts.py and sft.py.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from frpo_nemo.data import world
from frpo_nemo.data.columns import columns_of
from frpo_nemo.errors import ConfigError

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def check_source(source) -> list[str]:
    """The names of the columns of `source`, so that configurations can be checked before a model loads. Of a stream,
    and of a file of which all rows from the first are taken, it reads no more than the beginning.

    Raises ConfigError: no such file or data set, unreadable, empty, a named column is missing, contradictory
    fields, nothing left after `start`, `at_least`, `where` or `holdout`, fewer rows than `sample`.
    """
    rows, _ = _read(source, 0, 1, streaming=source.streaming or _is_file(source.path))
    if not rows:
        raise ConfigError(f"data source '{source.path}' has no rows")
    _check_columns(source, list(rows[0]))
    chosen = source.start or source.at_least or source.where or source.holdout or source.sample is not None
    if chosen and not source.streaming:
        load_rows(source)
    return list(rows[0])


def load_rows(source) -> list[dict[str, Any]]:
    """The rows of `source` from `start` on, at most `limit`; of these the ones that have `at_least` what it asks and are
    as `where` says; of these one side of the `holdout`; of these `sample`, in their order. Raises ConfigError like
    `check_source`."""
    rows, size = _read(source, source.start, source.limit, source.streaming)
    if not rows:
        raise ConfigError(
            f"data source '{source.path}' has {size} rows: none is left with start={source.start}, limit={source.limit}"
        )
    _check_columns(source, list(rows[0]))
    rows = _good_enough(rows, source) if source.at_least else rows
    rows = _equal(rows, source) if source.where else rows
    rows = _one_side(rows, source) if source.holdout else rows
    return rows if source.sample is None else _sampled(rows, source)


def _read(source, start: int, limit: int | None, streaming: bool) -> tuple[list[dict[str, Any]], int | str]:
    """(the rows from `start` on, at most `limit`; how many there are in all). A stream ends with the last row that was
    asked for, and does not know how many would follow."""
    path = str(source.path)
    stop = None if limit is None else start + limit
    if path.startswith("world:"):
        rows = world.rows(path)
        return rows[start:stop], len(rows)
    datasets.disable_progress_bars()  # one bar per rank and file says nothing
    if _is_file(path):
        _check_file(Path(path).expanduser())
    with _failures_as_sentences(path):
        found = _open(path, source.split, streaming)
        if streaming:
            return list(itertools.islice(found.skip(start), limit)), "too few"  # take() reads a block too many
        chosen = range(len(found))[start:stop]
        return found.select(chosen).to_list() if chosen else [], len(found)


def _open(path: str, split: str, streaming: bool):
    if _is_file(path):
        kind, file = FILE_TYPES[Path(path).suffix], str(Path(path).expanduser())
        return datasets.load_dataset(kind, data_files=file, split="train", streaming=streaming)
    name, _, configuration = path.partition(":")
    name = str(Path(name).expanduser())  # a directory; a hub name stays as it is
    return datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)


@contextmanager
def _failures_as_sentences(path: str) -> Iterator[None]:
    """Around opening and reading, because a stream fails only when it is asked for rows."""
    try:
        yield
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as problem:
        raise ConfigError(
            f"data source '{path}' cannot be read: {problem.__cause__ or problem}. A source is a file "
            f"({', '.join(FILE_TYPES)}), a directory of them, the name of a data set on the hub ('owner/name' or "
            "'owner/name:configuration', with `split`), or 'world:...'"
        ) from problem


def _good_enough(rows: list[dict[str, Any]], source) -> list[dict[str, Any]]:
    kept = [row for row in rows if all(_number(row[c], c, source) >= least for c, least in source.at_least.items())]
    if not kept:
        asked = " and ".join(f"{column} of at least {least:g}" for column, least in source.at_least.items())
        raise ConfigError(
            f"data source '{source.path}': none of the {len(rows)} rows read has {asked}; the highest "
            + " and ".join(f"{c} is {max(_number(row[c], c, source) for row in rows):g}" for c in source.at_least)
        )
    return kept


def _equal(rows: list[dict[str, Any]], source) -> list[dict[str, Any]]:
    kept = [row for row in rows if all(str(row[column]) == str(value) for column, value in source.where.items())]
    if not kept:
        there = {c: " or ".join(sorted({str(row[c])[:40] for row in rows})[:10]) for c in source.where}
        raise ConfigError(
            f"data source '{source.path}': none of the {len(rows)} rows read has {_shown(source.where)}; they have "
            f"{_shown(there)}"
        )
    return kept


def _sampled(rows: list[dict[str, Any]], source) -> list[dict[str, Any]]:
    """The same rows in every process: they depend on their number and the seed alone."""
    if not 1 <= source.sample <= len(rows):
        raise ConfigError(
            f"data source '{source.path}': sample={source.sample} must be between 1 and {len(rows)}, the number of rows "
            "that it is drawn from"
        )
    drawn = random.Random(source.sample_seed).sample(range(len(rows)), source.sample)
    return [rows[i] for i in sorted(drawn)]


def _number(value: Any, column: str, source) -> float:
    """Sets write numbers as text, too. Where there is none, nothing is reached."""
    if value is None:
        return -math.inf
    try:
        return float(value)
    except (TypeError, ValueError) as problem:
        raise ConfigError(
            f"data source '{source.path}': at_least.{column} compares numbers, but the column has {str(value)[:80]!r}"
        ) from problem


def _one_side(rows: list[dict[str, Any]], source) -> list[dict[str, Any]]:
    """The rows that are held out, or the others, in their order. The rows are laid in a row, shuffled by the seed and those
    with the same value of `holdout_by` together, and of this row every (1 / holdout)-th is held out: so each value gives
    its share of its rows, to within one."""
    places = np.random.default_rng(source.holdout_seed).permutation(len(rows)).tolist()
    if source.holdout_by is not None:
        places.sort(key=lambda i: str(rows[i][source.holdout_by]))
    passed = [math.floor(source.holdout * count + 0.5) for count in range(len(rows) + 1)]
    held_out = {i for number, i in enumerate(places) if passed[number + 1] > passed[number]}
    kept = [row for i, row in enumerate(rows) if (i in held_out) == source.held_out]
    if not kept:
        raise ConfigError(
            f"data source '{source.path}': holdout={source.holdout:g} of {len(rows)} rows leaves none with held_out="
            f"{str(source.held_out).lower()}"
        )
    return kept


def _is_file(path: str) -> bool:
    return Path(path).suffix in FILE_TYPES


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
    named = [(field, getattr(source, field)) for field in ("prompt", "completion", "task_column", "holdout_by")]
    read = [(field, name, column) for field, name in named if name is not None for column in columns_of(name)]
    read += [("at_least", f"{{{column}: {least:g}}}", column) for column, least in (source.at_least or {}).items()]
    read += [("where", _shown(source.where), column) for column in source.where or {}]
    for field, name, column in read:
        if column not in columns:
            raise ConfigError(
                f"data source '{source.path}' has no column '{column}' ({field}={' '.join(name.split())}); "
                f"its columns: {', '.join(columns)}"
            )


def _shown(mapping: dict[str, str]) -> str:
    return "{" + ", ".join(f"{column}: {value}" for column, value in mapping.items()) + "}"
