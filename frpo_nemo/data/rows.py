"""Keep rows compactly: as bytes of JSON or Arrow tables, which become dicts when a row is asked for.

A source's rows are `Rows`, a sequence over `parts`, one for each file. Every access makes a new dict, so nobody can change
the data that others see. files.py finds the files, and readers.py reads them.
"""

from __future__ import annotations

import bisect
import itertools
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec
import pyarrow as pa

from frpo_nemo.errors import ConfigError

Row = dict[str, Any]
BATCH = 1024  # rows of a table that exist as dicts at one time

_decoder = msgspec.json.Decoder()


def decode_json(text: bytes | memoryview) -> Any:
    """Return the value that `text` encodes. Raises ValueError or RecursionError."""
    try:
        return _decoder.decode(text)
    except msgspec.DecodeError:  # json also reads the NaN and Infinity of Python, and locates errors
        value = json.loads(str(text, "utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # raises on half of a surrogate pair, which isn't text
        return value


class Part(Protocol):
    """The rows of one file. `columns`: the names of all its columns, in the order in which they appear."""

    @property
    def columns(self) -> Iterable[str]: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], columns: Collection[str]) -> Iterator[Row]:
        """Yield the rows at `indices`, which ascend, with those of `columns` that they have, and maybe others."""


class PlainRows:
    """Rows that are dicts already."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.columns = dict.fromkeys(name for row in rows for name in row)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int], columns: Collection[str]) -> Iterator[Row]:
        return (self.rows[i] for i in indices)


class JsonRows:
    """JSON objects, each as the bytes that the file has. Each is decoded once when it is added, to check it."""

    def __init__(self) -> None:
        self.columns: dict[str, None] = {}
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def add(self, text: bytes) -> None:
        """Add one object. Raises ValueError when `text` is anything else."""
        row = decode_json(text)
        if not isinstance(row, dict):
            raise ValueError(f"a row is an object with columns, not {text.decode()[:80]!r}")
        if not row.keys() <= self.columns.keys():
            self.columns |= dict.fromkeys(row)
        self._bytes += text
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def read(self, indices: Sequence[int], columns: Collection[str]) -> Iterator[Row]:
        text = memoryview(self._bytes)
        return (decode_json(text[self._ends[i] : self._ends[i + 1]]) for i in indices)


class TableRows:
    """The rows of an Arrow table, with Arrow's types as Python's; a map is a dict."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.columns = table.column_names

    def __len__(self) -> int:
        return len(self._table)

    def read(self, indices: Sequence[int], columns: Collection[str]) -> Iterator[Row]:
        table = self._table.select([name for name in self.columns if name in columns] or self.columns[:1])
        for number, wanted in itertools.groupby(indices, lambda i: i // BATCH):
            first, block = number * BATCH, table.slice(number * BATCH, BATCH)
            block = _taken(block, [i - first for i in wanted])
            try:
                rows = block.to_pylist(maps_as_pydicts="lossy")
            except (ValueError, OverflowError, pa.ArrowException) as error:
                raise ConfigError(
                    f"a row between {first + 1} and {first + BATCH} of the columns {', '.join(table.column_names)} has a value "
                    f"that Python's types cannot hold: {error}"
                ) from error
            yield from rows


def _taken(table: pa.Table, places: list[int]) -> pa.Table:
    try:
        return table.take(places)
    except pa.ArrowNotImplementedError:  # for string_view, for example, which Polars and DuckDB write
        return pa.concat_tables([table.slice(place, 1) for place in places])


class Rows(Sequence[Row]):
    """Rows of all `parts`, or those at `indices`, which ascend. A column that a row does not have is None there.

    `origin`: a clause for messages on the files, if there are any: how many rows of each, and what was left out."""

    def __init__(
        self,
        parts: Sequence[Part],
        indices: Sequence[int] | None = None,
        columns: Collection[str] | None = None,
        origin: str = "",
    ) -> None:
        self._parts = parts
        self._starts = list(itertools.accumulate(map(len, parts), initial=0))
        self._indices = range(self._starts[-1]) if indices is None else indices
        self.columns = list(
            dict.fromkeys(name for part in parts for name in part.columns) if columns is None else columns
        )
        self.origin = origin

    def only(self, columns: Collection[str]) -> Rows:
        """Return the rows with those of `columns` that exist; the others are never made into Python objects."""
        return Rows(self._parts, self._indices, [name for name in self.columns if name in columns], self.origin)

    def select(self, places: Iterable[int]) -> Rows:
        """Return the rows at `places` of these, which ascend; a range stays one."""
        if isinstance(places, range):
            indices = self._indices[places.start : places.stop]
        else:
            indices = array("q", (self._indices[place] for place in places))
        return Rows(self._parts, indices, self.columns, self.origin)

    def where(self, holds: Callable[[Row], bool], columns: Collection[str]) -> Rows:
        """Return the rows for which `holds` is true; it is given only their `columns`."""
        return self.select(place for place, row in enumerate(self.only(columns)) if holds(row))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: Any) -> Any:
        """Return the row at a place, or the list of rows of a slice."""
        if isinstance(place, slice):
            return list(self)[place]
        return next(self._read([self._indices[place]]))

    def __iter__(self) -> Iterator[Row]:
        return self._read(self._indices)

    def __eq__(self, other: object) -> bool:
        """Compare as a list of dicts."""
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    def __repr__(self) -> str:
        return f"<{len(self)} rows: {', '.join(self.columns)}>"

    def describe(self) -> str:
        """Return a clause on what was read, and how many of these rows were chosen if not all."""
        read = self._starts[-1]
        chosen = f"; {len(self):,} chosen" if len(self) < read else ""
        return f"{read:,} rows{self.origin}{chosen}"

    def _read(self, indices: Sequence[int]) -> Iterator[Row]:
        for start, part in zip(self._starts, self._parts, strict=False):
            low, high = bisect.bisect_left(indices, start), bisect.bisect_left(indices, start + len(part))
            for row in part.read(_shifted(indices[low:high], -start), self.columns):
                yield {name: row.get(name) for name in self.columns}


def _shifted(indices: Sequence[int], by: int) -> Sequence[int]:
    if isinstance(indices, range):
        return range(indices.start + by, indices.stop + by)
    return array("q", (i + by for i in indices))
