"""Rows are what the file says: strings that look like something else come back as they are, in every format."""

import csv
import gzip
import json
import math
import os
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.prompts import fingerprint
from frpo_nemo.data.sources import check_source, load_rows
from frpo_nemo.errors import ConfigError

LOOKALIKES = [
    *(
        "2024-05-01",
        "1999-12-31T23:59:59",
        "12:30",
        "5 May 2024",
        "007",
        "1.50",
        "+1",
        "1e5",
        "0x10",
        "1_000",
        "-0",
        ".5",
    ),
    *(
        "123456789012345678901",
        "true",
        "False",
        "yes",
        "null",
        "None",
        "NA",
        "N/A",
        "nan",
        "NaN",
        "inf",
        "-",
        "#N/A",
        "",
        " ",
    ),
    *(
        '"',
        '""',
        '"a" b',
        "'",
        "\\",
        "\\n",
        "{",
        "[1]",
        '{"a": 1}',
        ",",
        "a,b",
        "\t",
        "a\tb",
        "a\nb",
        "\n",
        "\r\n",
        "a\rb",
    ),
    *("\u2028", "\x85", "\x00", "\x1a", "\ufeff", "é", "e\u0301", "数", "\U0001f600", "  spaces  ", "=1+1", "#", "\\N"),
]
VALUES = st.sampled_from(LOOKALIKES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.lists(
    st.builds(lambda prompt, answer: {"prompt": prompt, "answer": answer}, VALUES, VALUES | st.none()),
    min_size=1,
    max_size=8,
)


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=len(rows) % 2 == 0) + "\n" for row in rows).encode()


def delimited(rows, delimiter):
    """None is an empty field without quotes, which csv cannot write beside an empty text: quotes are written here."""
    quoted = ['"' + name + '"' for name in rows[0]]
    lines = [[("" if v is None else '"' + v.replace('"', '""') + '"') for v in row.values()] for row in rows]
    return "".join(delimiter.join(line) + "\n" for line in [quoted, *lines]).encode()


def parquet(rows):
    out = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist(rows, pa.schema({name: pa.string() for name in rows[0]})), out, row_group_size=3
    )
    return out.getvalue().to_pybytes()


WRITERS = {
    ".jsonl": json_lines,
    ".json": lambda rows: json.dumps(rows, indent=len(rows) % 3).encode(),
    ".csv": lambda rows: delimited(rows, ","),
    ".tsv": lambda rows: delimited(rows, "\t"),
    ".parquet": parquet,
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_strings_that_look_like_other_things_come_back_equal(suffix, packed, streaming, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / f"rows{suffix}{packed}"

    @settings(max_examples=60, deadline=None)
    @given(ROWS)
    def check(rows):
        path.write_bytes(PACKERS[packed](WRITERS[suffix](rows)))
        source = SourceConfig(path=str(path), streaming=streaming, limit=len(rows) if streaming else None)
        assert list(load_rows(source)) == rows

    check()


@pytest.mark.parametrize("delimiter, suffix", [(",", ".csv"), ("\t", ".tsv")])
def test_what_pythons_csv_module_writes_is_read_back_except_that_nothing_is_none(delimiter, suffix, tmp_path):
    rows = [{"prompt": value, "answer": "x"} for value in LOOKALIKES]
    with (tmp_path / f"rows{suffix}").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    found = load_rows(SourceConfig(path=str(tmp_path / f"rows{suffix}")))
    assert [row["prompt"] for row in found] == [value or None for value in LOOKALIKES]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(VALUES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), JSON_VALUES, min_size=1), min_size=1, max_size=6))
def test_json_keeps_types_row_by_row_and_a_column_that_a_row_lacks_is_none(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "mixed.jsonl"
    path.write_bytes(json_lines(rows))
    found = load_rows(SourceConfig(path=str(path), prompt=next(iter(rows[0]))))
    assert found.columns == list(dict.fromkeys(name for row in rows for name in row))
    assert list(found) == [dict.fromkeys(found.columns) | row for row in rows]
    assert json.dumps(list(found)) == json.dumps([dict.fromkeys(found.columns) | row for row in rows]), "1 is not True"


def rows_of(tmp_path, name, content, **fields):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_rows(SourceConfig(path=str(tmp_path / name), **fields))


@pytest.mark.parametrize("content", [
    '{"prompt": "a"}\n\n{"prompt": "b"}',
    '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n',
    '{\n  "prompt": "a"\n}\n{\n  "prompt": "b"\n}\n',
    '{"prompt": "a"} {"prompt": "b"}\n',
    '\n [{"prompt": "a"},\n {"prompt": "b"}]\n',
    '\ufeff[{"prompt": "a"}, {"prompt": "b"}]',
])  # fmt: skip
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "ROWS.JSONL", "rows.ndjson", "rows.v1.JSON"])
def test_objects_may_be_laid_out_in_every_way_that_json_writers_have(name, content, tmp_path):
    assert rows_of(tmp_path, name, content) == [{"prompt": "a"}, {"prompt": "b"}]


def test_the_types_of_late_rows_and_late_columns_are_read_as_the_first_ones(tmp_path):
    late = [{"prompt": "a", "answer": None}] * 3000 + [
        {"prompt": "b", "answer": "08"},
        {"prompt": "c", "new": [1, "1"]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(late))
    assert check_source(SourceConfig(path=str(path))) == ["prompt", "answer", "new"]
    found = load_rows(SourceConfig(path=str(path), start=3000))
    assert found == [{"prompt": "b", "answer": "08", "new": None}, {"prompt": "c", "answer": None, "new": [1, "1"]}]


@pytest.mark.parametrize(
    "header", ['prompt,"an\nswer"\n', '\n\r\nprompt,"an\nswer"\n', '\ufeff\n"prompt","an\nswer"\r\n']
)
@pytest.mark.parametrize("rows", ["a,1\nb,2\n", "\na,1\n\n\nb,2"])
def test_blank_lines_of_a_table_are_no_rows_also_before_its_header(header, rows, tmp_path):
    expected = [{"prompt": "a", "an\nswer": "1"}, {"prompt": "b", "an\nswer": "2"}]
    assert rows_of(tmp_path, "rows.csv", header + rows) == expected


def test_python_writes_nan_and_it_is_read(tmp_path):
    [row] = rows_of(tmp_path, "rows.jsonl", '{"prompt": "a", "score": NaN, "bound": -Infinity}\n')
    assert math.isnan(row["score"]) and row["bound"] == -math.inf


def test_each_access_makes_its_own_row(tmp_path):
    rows = rows_of(tmp_path, "rows.jsonl", '{"prompt": [{"role": "user", "content": "a"}]}\n' * 2)
    rows[0]["prompt"].append("changed")
    assert rows[0] == rows[-1] == list(rows)[0] and len(rows[0]["prompt"]) == 1


def test_a_file_replaced_under_the_same_time_and_size_is_read_again(tmp_path):
    for text in ("old rows", "new rows"):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
        os.utime(tmp_path / "rows.jsonl", (1.7e9, 1.7e9))
        assert load_rows(SourceConfig(path=str(tmp_path / "rows.jsonl"))) == [{"prompt": text}]


def test_parquet_keeps_its_types_and_a_map_is_a_dict(tmp_path):
    columns = {
        "prompt": pa.array(["a", "b"]),
        "score": pa.array([1, None], pa.int8()),
        "tags": pa.array([[("k", "1")], None], pa.map_(pa.string(), pa.string())),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert load_rows(SourceConfig(path=str(tmp_path / "rows.parquet"))) == [
        {"prompt": "a", "score": 1, "tags": {"k": "1"}, "kind": "x"},
        {"prompt": "b", "score": None, "tags": None, "kind": "y"},
    ]


def test_any_rows_are_taken_of_columns_for_which_arrow_has_no_take(tmp_path):
    """Polars and DuckDB write string_view."""
    rows = [{"prompt": str(i), "tags": [f"{i}?"]} for i in range(3000)]
    types = pa.schema({"prompt": pa.string_view(), "tags": pa.list_(pa.string())})
    pq.write_table(pa.Table.from_pylist(rows, types), tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field("prompt").type == pa.string_view()
    source = SourceConfig(path=str(tmp_path / "a.parquet"))
    assert load_rows(source) == rows
    source.start, source.where = 1, {"prompt": "2999"}
    assert load_rows(source) == rows[2999:]


@pytest.mark.parametrize("name, content, sentence", [
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": b}\n', "JSON parse error in line 2, column 12: Expecting value"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "JSON parse error in line 2, column 16: Expecting ',' delimiter"),
    ("a.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2: a row is an object with columns, not '[\"b\"]"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud800 "}\n', "line 2: 'utf-8' codec can't encode character '\\ud800'"),
    ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "line 2: 'utf-8' codec can't decode byte 0xe9"),
    ("a.jsonl", f'{{"prompt": "a"}}\n{{"prompt": {"[" * 9000}1{"]" * 9000}}}\n', "line 2: maximum recursion depth"),
    ("a.json", '[{"prompt": "a"}\n {"prompt": "b"}]', "JSON parse error: Expecting ',' delimiter: line 2 column 2"),
    ("a.json", '["a", "b"]', "a row is an object with columns, not '\"a\"'"),
    ("a.json", "[]", "has no rows"),
    ("a.jsonl", "\n \n", "has no rows"),
    ("a.csv", "prompt,answer\n", "has no rows"),
    ("a.csv", "prompt,answer\na,1\nb\n", "line 3 has 1 fields, but the header has 2"),
    ("a.csv", "prompt,answer\na,1,2\n", "line 2 has 3 fields, but the header has 2"),
    ("a.csv", 'prompt,answer\na,"1\nb,2\nc,3\n', "unexpected end of data"),
    ("a.tsv", 'prompt\tanswer\n"a" b\t1\n', "line 2: '\t' expected after '\"'"),
    ("a.csv", "prompt,prompt\na,1\n", "two columns have the name 'prompt'"),
    ("a.csv", b"prompt,answer\n\xe9,1\n", "can't decode byte 0xe9"),
    ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "Truncated compressed stream"),
    ("a.jsonl.zst", b"not zstd", "ZSTD decompress failed"),
    ("a.txt", "a\n", "has a name without a known format: .jsonl"),
    ("a.jsonl.bz2", "a\n", "has a name without a known format: .jsonl"),
])  # fmt: skip
@pytest.mark.parametrize("read", [check_source, load_rows])
def test_a_file_that_is_wrong_somewhere_is_a_sentence_in_the_check_as_in_the_run(
    read, name, content, sentence, tmp_path
):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read(SourceConfig(path=str(tmp_path / name)))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_json_lines_take_no_more_memory_than_twice_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i} " + "word " * 30, "answer": str(i)}) + "\n" for i in range(30_000))
    )
    source = SourceConfig(path=str(path))
    load_rows(source)
    tracemalloc.start()
    rows = load_rows(source)
    assert sum(len(row["answer"]) for row in rows) == sum(len(str(i)) for i in range(30_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size


def test_text_is_read_as_it_was_before_so_that_a_run_goes_on_with_the_fingerprint_of_its_data(tmp_path):
    """Checkpoints hold fingerprints of rows that `datasets` read."""
    rows = [{"prompt": f"Question {i}?", "answer": f"#### {i}", "level": i, "extra": None} for i in range(20)]
    (tmp_path / "rows.jsonl").write_bytes(json_lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for kind, name in (("json", "rows.jsonl"), ("parquet", "rows.parquet")):
        path = str(tmp_path / name)
        before = datasets.load_dataset(
            kind, data_files=path, split="train", cache_dir=str(tmp_path / "cache")
        ).to_list()
        assert fingerprint(load_rows(SourceConfig(path=path))) == fingerprint(before)


def test_columns_that_nothing_uses_are_never_made_into_objects(tmp_path):
    """Python has no year 33658. Rewards may ask for any column; supervised training names its own."""
    columns = {
        "prompt": ["a", "b"],
        "level": [1, 2],
        "at": pa.array([0, 10**12], pa.timestamp("s")),
        "answer": ["1", "2"],
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    chosen = {"at_least": {"level": 2}, "completion": "answer"}
    rows = load_rows(SourceConfig(path=str(tmp_path / "rows.parquet"), **chosen), whole=False)
    assert rows == [{"prompt": "b", "level": 2, "answer": "2"}]
    with pytest.raises(
        ConfigError, match="columns prompt, level, at, answer has a value that Python's types cannot hold"
    ):
        list(load_rows(SourceConfig(path=str(tmp_path / "rows.parquet"), **chosen)))
    (tmp_path / "more.jsonl").write_text('{"other": 1}\n{"prompt": "c"}\n')
    both = load_rows(SourceConfig(path=str(tmp_path)), whole=False)
    assert both == [{"prompt": None}, {"prompt": "c"}, {"prompt": "a"}, {"prompt": "b"}]
