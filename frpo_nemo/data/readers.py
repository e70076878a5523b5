"""Read files: JSON (one object per line, or an array), CSV, TSV, Parquet, and gz and zst of them.

No type is guessed: JSON and Parquet have their own, CSV and TSV have only text. `datasets` settles a column's type by its
first rows and parses what looks like a date or a number, so files aren't read with it.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from frpo_nemo.data.rows import JsonRows, Part, TableRows, decode_json

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK = 1 << 26  # bytes of CSV that are parsed at one time; a row has to fit
BATCH = 1 << 14  # rows of Parquet that are read at one time
BOM = "\ufeff".encode()

csv.field_size_limit(BLOCK)


def format_of(path: Path) -> tuple[str, str | None] | None:
    """Return the suffixes of a file's format and of its compression, by its name. None: not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    return (suffixes[-1], packed) if suffixes and suffixes[-1] in READERS else None


def read_file(path: Path, stop: int | None = None) -> Part:
    """Return the rows of a data file; if `stop` rows are enough, read no further. Raises ValueError, RuntimeError or
    OSError, which report where the file is wrong."""
    suffix, packed = format_of(path)
    return READERS[suffix](path, packed, stop)


def _open(path: Path, packed: str | None) -> BinaryIO:
    return io.BufferedReader(pa.input_stream(str(path), compression=COMPRESSIONS.get(packed)), 1 << 20)


def _read_json(path: Path, packed: str | None, stop: int | None) -> JsonRows:
    """Read one object per line; or, if the first line isn't an object, an array of objects or objects of several lines."""
    with _open(path, packed) as file:
        head = list(_up_to_text(file))
        first = head[-1].removeprefix(BOM) if head else b""
        if not _is_object(first):
            return _read_json_text((first + file.read()).decode())
        return _read_json_lines(itertools.chain(head[:-1], [first], file), stop)


def _up_to_text(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield blank lines and the first that isn't blank."""
    for line in lines:
        yield line
        if not line.isspace():
            return


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(decode_json(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_json_lines(lines: Iterable[bytes], stop: int | None) -> JsonRows:
    rows = JsonRows()
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            rows.add(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"JSON parse error in line {number}, column {error.pos + 1}: {error.msg}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if len(rows) == stop:
            break
    return rows


def _read_json_text(text: str) -> JsonRows:
    """Read an array of objects, or consecutive objects."""
    between = re.compile(r"[ \t\r\n]*")
    try:
        if text.lstrip().startswith("["):
            json.loads(text)  # raises where a comma is missing or extra
            text, between = text.strip()[1:-1], re.compile(r"[ \t\r\n,]*")
        rows, at, decoder = JsonRows(), between.match(text).end(), json.JSONDecoder()
        while at < len(text):
            _, end = decoder.raw_decode(text, at)
            rows.add(text[at:end].encode())
            at = between.match(text, end).end()
    except json.JSONDecodeError as error:
        raise ValueError(f"JSON parse error: {error}") from error
    return rows


def _read_text_table(path: Path, packed: str | None, stop: int | None, *, delimiter: str) -> TableRows:
    """Read CSV or TSV: every value is the text of the file, and a field with nothing in it, not even quotes, is None."""
    names = _check_text_table(path, packed, stop, delimiter)
    if not names:
        return TableRows(pa.table({}))
    read = arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK)
    parse = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    with _open(path, packed) as file, arrow_csv.open_csv(file, read, parse, convert) as batches:
        return TableRows(pa.Table.from_batches(_up_to(batches, stop), batches.schema))


def _check_text_table(path: Path, packed: str | None, stop: int | None, delimiter: str) -> list[str]:
    """Return the column names. Raises ValueError where Arrow would misread the file: quotes that do not close or do not
    enclose a whole field, two columns of one name."""
    with _open(path, packed) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(filter(None, lines), [])
            for row in itertools.islice(filter(None, lines), stop):
                if len(row) != len(names):
                    raise ValueError(f"line {lines.line_num} has {len(row)} fields, but the header has {len(names)}")
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}") from error
    _check_names(names)
    return names


def _check_names(names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two columns have the name '{twice[0]}'")


def _read_parquet(path: Path, packed: str | None, stop: int | None) -> TableRows:
    with _open(path, packed) as file:
        source = str(path) if packed is None else pa.BufferReader(file.read())
    with parquet.ParquetFile(source) as found:
        _check_names(found.schema_arrow.names)
        return TableRows(pa.Table.from_batches(_up_to(found.iter_batches(BATCH), stop), found.schema_arrow))


def _up_to(batches: Iterable[pa.RecordBatch], stop: int | None) -> list[pa.RecordBatch]:
    """Return batches until they have `stop` rows."""
    taken, rows = [], 0
    for batch in batches:
        taken.append(batch)
        rows += len(batch)
        if stop is not None and rows >= stop:
            break
    return taken


READERS: dict[str, Callable[[Path, str | None, int | None], Part]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": functools.partial(_read_text_table, delimiter=","),
    ".tsv": functools.partial(_read_text_table, delimiter="\t"),
    ".parquet": _read_parquet,
}
