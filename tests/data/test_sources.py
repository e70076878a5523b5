"""Which rows a run reads: a range of a file, directory or stream, and of that range the ones that are good enough."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frpo_nemo.data.sources import check_source, load_rows
from frpo_nemo.errors import ConfigError
from frpo_nemo.training.config import SourceConfig

# OpenCodeInstruct's way: a score of unit tests, written as text.
ROWS = [{"input": f"Task {i}.", "output": f"f{i}()", "score": "1" if i % 4 == 0 else "0.5"} for i in range(40)]
COLUMNS = {"prompt": "input", "completion": "output"}


@pytest.fixture
def directory(tmp_path):
    """The rows in four files of ten."""
    for shard in range(4):
        rows = pa.Table.from_pylist(ROWS[shard * 10 : shard * 10 + 10])
        pq.write_table(rows, tmp_path / f"train-{shard:05d}-of-00004.parquet", row_group_size=5)
    return tmp_path


def source(path, **fields):
    return SourceConfig(path=str(path), **COLUMNS | fields)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("start, limit", [(0, 3), (8, 4), (18, 13), (30, 100)])
def test_a_stream_gives_the_rows_that_the_whole_set_has_in_that_range(directory, start, limit, streaming):
    assert load_rows(source(directory, start=start, limit=limit, streaming=streaming)) == ROWS[start : start + limit]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_may_be_streamed(kind, tmp_path, directory):
    path = tmp_path / f"rows.{kind}"
    write = {
        "jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
        "json": lambda: path.write_text(json.dumps(ROWS)),
        "csv": lambda: path.write_text("input,output\n" + "".join(f"{r['input']},{r['output']}\n" for r in ROWS)),
        "parquet": lambda: pq.write_table(pa.Table.from_pylist(ROWS), path),
    }
    write[kind]()
    rows = load_rows(source(path, start=5, limit=2, streaming=True))
    assert [(row["input"], row["output"]) for row in rows] == [("Task 5.", "f5()"), ("Task 6.", "f6()")]


def test_a_stream_reads_no_file_after_the_last_row_it_needs(directory):
    (directory / "train-00002-of-00004.parquet").write_text("not parquet")
    assert load_rows(source(directory, start=5, limit=15, streaming=True)) == ROWS[5:20]
    assert check_source(source(directory, limit=20, streaming=True)) == ["input", "output", "score"]
    for too_far in (source(directory, limit=21, streaming=True), source(directory, limit=20)):
        with pytest.raises(ConfigError, match="cannot be read: .*[Pp]arquet"):
            load_rows(too_far)


@pytest.mark.parametrize("streaming", [False, True])
def test_at_least_keeps_some_of_the_rows_that_start_and_limit_choose(directory, streaming):
    rows = load_rows(source(directory, at_least={"score": 1}, start=2, limit=12, streaming=streaming))
    assert rows == [ROWS[4], ROWS[8], ROWS[12]]


def test_rows_need_all_of_at_least_and_a_row_without_a_value_is_not_kept(tmp_path):
    rows = [{"prompt": str(i), "a": a, "b": b} for i, (a, b) in enumerate([(1, 5), (2, 3.5), (None, 9), (3, 4)])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = load_rows(SourceConfig(path=str(tmp_path / "rows.jsonl"), at_least={"a": 1, "b": 4}))
    assert [row["prompt"] for row in kept] == ["0", "3"]


@pytest.mark.parametrize("read", [check_source, load_rows])
@pytest.mark.parametrize(
    "fields, sentence",
    [
        (
            {"at_least": {"quality": 1}},
            "no column 'quality' (at_least={quality: 1}); its columns: input, output, score",
        ),
        (
            {"at_least": {"score": 1.5}, "limit": 20},
            "none of the 20 rows read has score of at least 1.5; the highest score is 1",
        ),
        ({"at_least": {"output": 1}}, "at_least.output compares numbers, but the column has 'f0()'"),
        ({"start": 40}, "has 40 rows: none is left with start=40, limit=None"),
        ({"prompt": "{input}\n{context}"}, "no column 'context' (prompt={input} {context}); its columns: input"),
        ({"completion": "answer"}, "no column 'answer' (completion=answer); its columns: input, output, score"),
    ],
)
def test_what_leaves_nothing_is_a_sentence_with_counts(read, fields, sentence, directory):
    with pytest.raises(ConfigError) as error:
        read(source(directory, **fields))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_stream_that_ends_before_start_is_a_sentence(directory):
    with pytest.raises(ConfigError, match="has too few rows: none is left with start=40, limit=5"):
        load_rows(source(directory, start=40, limit=5, streaming=True))
