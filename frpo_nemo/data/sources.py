"""Load rows from files, a Hugging Face data set, or a Python function. A row is a plain dict.

A `source` is a `SourceConfig` (config/options.py). Of its rows, `start` and `limit` choose a
range, `at_least` and `where` keep some of that range, `holdout` divides those in two, and `sample` draws some. files.py
finds files and readers.py reads them; columns.py interprets rows, and prompts.py and sft.py make token ids of them.
"""

from __future__ import annotations

import itertools
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.conversations import TOOLS
from frpo_nemo.data.files import FORMATS, Files, find_files, listed, split_names
from frpo_nemo.data.functions import function_rows, is_function
from frpo_nemo.data.readers import read_file
from frpo_nemo.data.rows import Part, PlainRows, Rows, TableRows
from frpo_nemo.data.templates import columns_of, is_template, with_line_ends
from frpo_nemo.errors import ConfigError

_kept: dict[tuple, Part] | None = None  # (file, its inode, when it changed, its size, how many rows were wanted) -> its rows


def check_source(source: SourceConfig) -> list[str]:
    """Return the names of the columns of `source`, of which `read_to_check` reads the rows."""
    return read_to_check(source).columns


def read_to_check(source: SourceConfig) -> Rows:
    """Return the rows of `source` before a model loads: those of a run, read in the same way. Of a stream from the hub this
    is the first row only, because the rest is not downloaded for a check.

    Raises ConfigError: no such file or data set, unreadable, empty, a named column is missing, contradictory
    fields, nothing left after `start`, `at_least`, `where` or `holdout`, fewer rows than `sample`.
    """
    if not is_hub_stream(source):
        return load_rows(source)
    rows, _ = _read(source, 0, 1)
    if not rows:
        raise ConfigError(f"data source '{source.path}' has no rows")
    _check_columns(source, rows.columns)
    return rows


def load_rows(source: SourceConfig, *, whole: bool = True) -> Rows:
    """Return the rows of `source` from `start` on, at most `limit`; of these, those that satisfy `at_least` and `where`; of
    these, one side of the `holdout`; of these, `sample`, in their order. Unless `whole`, for rewards, they have only the
    columns that `source` names, and `tools`. Raises ConfigError like `check_source`."""
    rows, size = _read(source, source.start, source.limit)
    if size == 0:
        raise ConfigError(f"data source '{source.path}' has no rows")
    if not rows:
        raise ConfigError(
            f"data source '{source.path}' has {size} rows: none is left with start={source.start}, limit={source.limit}"
        )
    _check_columns(source, rows.columns)
    rows = rows if whole else rows.only([TOOLS, *(column for _, _, column in _columns_named(source))])
    rows = _good_enough(rows, source) if source.at_least else rows
    rows = _equal(rows, source) if source.where else rows
    rows = _one_side(rows, source) if source.holdout else rows
    return rows if source.sample is None else _sampled(rows, source)


def is_hub_stream(source: SourceConfig) -> bool:
    """Return whether the rows of `source` are downloaded one by one. Raises ConfigError like `find_files`."""
    path = str(source.path)
    if not source.streaming or is_function(path) or Path(path).expanduser().exists():
        return False
    return find_files(path, source.split) is None


def _read(source: SourceConfig, start: int, limit: int | None) -> tuple[Rows, int | str]:
    """Return (the rows from `start` on, at most `limit`; how many there are in all). A stream ends with the last row that
    was asked for, so the number of rows after it is unknown."""
    path, stop = str(source.path), None if limit is None else start + limit
    datasets.disable_progress_bars()  # one bar per rank and file is useless
    with _failures_as_sentences(path):
        if is_function(path):
            rows = _of_split({"train": [PlainRows(function_rows(path))]}, source)
        elif saved := _saved(Path(path).expanduser()):
            rows = _of_split(saved, source)
        elif files := find_files(path, source.split):
            rows = _from_files(files, source, stop if source.streaming else None)
        else:
            name, _, configuration = path.partition(":")
            name = str(Path(name).expanduser())  # a directory that only `datasets` can read; a hub name stays as it is
            found = datasets.load_dataset(name, configuration or None, split=source.split, streaming=source.streaming)
            if source.streaming:  # take() reads a block too many
                return Rows([PlainRows(list(itertools.islice(found.skip(start), limit)))]), "too few"
            rows = Rows([_table(found)])
    return rows.select(range(len(rows))[start:stop]), "too few" if source.streaming else len(rows)


def _saved(place: Path) -> dict[str, list[Part]] | None:
    """Return the splits of a directory that `datasets` wrote with save_to_disk; None: it is something else."""
    if not any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    found = datasets.load_from_disk(str(place))
    if isinstance(found, datasets.DatasetDict):
        return {name: [_table(one)] for name, one in found.items()}
    return dict.fromkeys(("train", str(found.split or "train")), [_table(found)])


def _table(found: datasets.Dataset) -> TableRows:
    return TableRows(found.with_format("arrow")[:])


def _from_files(files: Files, source: SourceConfig, stop: int | None) -> Rows:
    """Return the rows of the split's files; with `stop`, read no file after those that have that many rows."""
    if stop is not None and "[" in source.split:
        raise ConfigError(
            f"data source '{source.path}': split={source.split} takes a part, which streaming cannot; use start and limit"
        )
    names = _checked_splits(source, files.splits)
    parts: dict[str, list[Part]] = {name: [] for name in names}
    counts, left = [], stop
    for name, file in [(split, file) for split in names for file in files.splits[split]]:
        if left == 0:
            break
        parts[name].append(_read_file(file, files, source, left))
        size = len(parts[name][-1])
        counts.append(f"{files.name(file)} {size:,}")
        left = None if left is None else max(0, left - size)
    rows = _of_split(parts, source)
    of_files = f" of {len(counts)} files ({listed(counts)})" if len(counts) > 1 else ""
    rows.origin = of_files + files.left_out(names)
    return rows


def keep_files() -> None:
    """Keep the rows of each file that is read from now on, until `forget_files`, so that the checks before a run and the run
    itself read it once."""
    global _kept
    _kept = {} if _kept is None else _kept


def forget_files() -> None:
    """Free what `keep_files` kept, and keep nothing from now on."""
    global _kept
    _kept = None


def _read_file(file: Path, files: Files, source: SourceConfig, stop: int | None) -> Part:
    try:
        if _kept is None:
            return read_file(file, stop)
        content = file.stat()
        key = (file, content.st_ino, content.st_ctime_ns, content.st_size, stop)
        if key not in _kept:
            _kept[key] = read_file(file, stop)
        return _kept[key]
    except (OSError, ValueError, RuntimeError) as problem:
        which = "" if file == Path(source.path).expanduser() else f"{files.name(file)}: "
        raise ConfigError(f"data source '{source.path}' cannot be read: {which}{problem}") from problem


def _checked_splits(source: SourceConfig, there: Iterable[str]) -> list[str]:
    """Return the splits that `source.split` names, which must be `there`."""
    names = split_names(source.split)
    for name in names:
        if name not in there:
            raise ConfigError(
                f"data source '{source.path}' has no split '{name}' (split={source.split}); it has "
                f"{', '.join(sorted(there))}: a file belongs to the split in its name, else to train"
            )
    return names


def _of_split(parts: Mapping[str, list[Part]], source: SourceConfig) -> Rows:
    """Return the rows of the splits `parts` that `source.split` asks for, as `datasets` reads it."""
    if source.split in parts:
        return Rows(parts[source.split])
    sizes = {name: sum(map(len, parts[name])) for name in _checked_splits(source, parts)}
    chosen, indices, before = [], array("q"), 0
    for piece in datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes):
        size = sizes[piece.splitname]
        indices.extend(range(before + (piece.from_ or 0), before + (size if piece.to is None else piece.to)))
        chosen += parts[piece.splitname]
        before += size
    return Rows(chosen, indices)


@contextmanager
def _failures_as_sentences(path: str) -> Iterator[None]:
    """Turn failures into ConfigError. Wraps opening and reading, because a stream fails only when it is asked for rows."""
    try:
        yield
    except ConfigError:
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as problem:
        raise ConfigError(
            f"data source '{path}' cannot be read: {problem.__cause__ or problem}. A source is a file ({FORMATS}), a "
            "directory of them, a pattern (DIR/*.jsonl), the name of a data set on the hub ('owner/name' or "
            "'owner/name:configuration', with `split`), or "
            "'python:package.module.function'"
        ) from problem


def _good_enough(rows: Rows, source: SourceConfig) -> Rows:
    least_of = source.at_least.items()
    kept = rows.where(lambda row: all(_number(row[c], c, source) >= least for c, least in least_of), source.at_least)
    if not kept:
        asked = " and ".join(f"{column} of at least {least:g}" for column, least in source.at_least.items())
        raise ConfigError(
            f"data source '{source.path}': none of the {len(rows)} rows read has {asked}; the highest "
            + " and ".join(f"{c} is {max(_number(row[c], c, source) for row in rows):g}" for c in source.at_least)
        )
    return kept


def _equal(rows: Rows, source: SourceConfig) -> Rows:
    kept = rows.where(
        lambda row: all(str(row[column]) == str(value) for column, value in source.where.items()), source.where
    )
    if not kept:
        there = {c: " or ".join(sorted({str(row[c])[:40] for row in rows})[:10]) for c in source.where}
        raise ConfigError(
            f"data source '{source.path}': none of the {len(rows)} rows read has {_shown(source.where)}; they have "
            f"{_shown(there)}"
        )
    return kept


def _sampled(rows: Rows, source: SourceConfig) -> Rows:
    """Draw `source.sample` rows, the same in every process: they depend only on the number of rows and the seed."""
    if not 1 <= source.sample <= len(rows):
        raise ConfigError(
            f"data source '{source.path}': sample={source.sample} must be between 1 and {len(rows)}, the number of rows "
            "that it is drawn from"
        )
    drawn = random.Random(source.sample_seed).sample(range(len(rows)), source.sample)
    return rows.select(sorted(drawn))


def _number(value: Any, column: str, source: SourceConfig) -> float:
    """Return a column's number, which data sets also write as text. A missing one satisfies no `at_least`."""
    if value is None:
        return -math.inf
    try:
        return float(value)
    except (TypeError, ValueError) as problem:
        raise ConfigError(
            f"data source '{source.path}': at_least.{column} compares numbers, but the column has {str(value)[:80]!r}"
        ) from problem


def _one_side(rows: Rows, source: SourceConfig) -> Rows:
    """Return the rows that are held out, or the others, in their order. The rows are shuffled by the seed and sorted by their
    value of `holdout_by`, and every (1 / holdout)-th of them is held out: so each value gives its share of its rows, to
    within one."""
    places = np.random.default_rng(source.holdout_seed).permutation(len(rows)).tolist()
    if source.holdout_by is not None:
        values = [str(row[source.holdout_by]) for row in rows.only([source.holdout_by])]
        places.sort(key=values.__getitem__)
    passed = [math.floor(source.holdout * count + 0.5) for count in range(len(rows) + 1)]
    held_out = {i for number, i in enumerate(places) if passed[number + 1] > passed[number]}
    kept = rows.select(i for i in range(len(rows)) if (i in held_out) == source.held_out)
    if not kept:
        raise ConfigError(
            f"data source '{source.path}': holdout={source.holdout:g} of {len(rows)} rows leaves none with held_out="
            f"{str(source.held_out).lower()}"
        )
    return kept


def _check_columns(source: SourceConfig, columns: list[str]) -> None:
    if source.task is not None and source.task_column is not None:
        raise ConfigError(
            f"data source '{source.path}' has both task={source.task} and task_column={source.task_column}: give one"
        )
    for field, name, column in _columns_named(source):
        if column not in columns:
            in_template = field in ("prompt", "completion") and is_template(name)
            braces = "; braces around anything else are written twice, {{ }}" if in_template else ""
            raise ConfigError(
                f"data source '{source.path}' has no column '{column}' ({field}={' '.join(name.split())}); "
                f"its columns: {', '.join(columns)}{braces}"
            )


def _columns_named(source: SourceConfig) -> list[tuple[str, str, str]]:
    """Return (field, its value, a column that it reads) of the fields that read columns, by name or in a template."""
    named = {field: getattr(source, field) for field in ("prompt", "completion", "task_column", "holdout_by")}
    texts = {field: getattr(source, field) for field in ("prompt", "completion", "system_prompt", "completion_until")}
    try:
        for text in filter(None, texts.values()):
            with_line_ends(text)
        read = [
            (field, name, column) for field, name in named.items() if name is not None for column in columns_of(name)
        ]
    except ConfigError as error:
        raise ConfigError(f"data source '{source.path}': {error}") from error
    read += [("at_least", f"{{{column}: {least:g}}}", column) for column, least in (source.at_least or {}).items()]
    return read + [("where", _shown(source.where), column) for column in source.where or {}]


def _shown(mapping: dict[str, str]) -> str:
    return "{" + ", ".join(f"{column}: {value}" for column, value in mapping.items()) + "}"
