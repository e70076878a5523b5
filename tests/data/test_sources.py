"""Which rows a run reads: a range of a file, directory or stream, and of that range the ones that are good enough."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.sources import check_source, load_rows
from frpo_nemo.errors import ConfigError

# OpenCodeInstruct's way: a score of unit tests, written as text.
ROWS = [{"input": f"Task {i}.", "output": f"f{i}()", "score": "1" if i % 4 == 0 else "0.5"} for i in range(40)]
COLUMNS = {"prompt": "input", "completion": "output"}
HARMBENCH = Path(__file__).parents[3] / "shared" / "data" / "harmbench" / "behaviors_text_test.csv"


@pytest.fixture
def directory(tmp_path):
    """Return a directory with the rows in four files of ten."""
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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_sample_is_of_the_rows_that_are_left_in_their_order_and_depends_on_its_seed_alone(directory, streaming):
    def drawn(**fields):
        some = dict(start=2, limit=30, at_least={"score": 0.5}, where={"score": "0.5"}, streaming=streaming)
        return [ROWS.index(row) for row in load_rows(source(directory, **some | fields))]

    left = drawn()
    assert left == [i for i in range(2, 32) if i % 4]
    first, again, other = drawn(sample=8), drawn(sample=8), drawn(sample=8, sample_seed=2)
    assert first == again == sorted(first) and len(set(first)) == 8 and set(first) < set(left)
    assert other != first and set(other) < set(left)
    assert drawn(sample=len(left)) == left


def test_a_hundred_standard_behaviours_of_harmbench_are_the_same_hundred_everywhere():
    """Those left out are frozen here: other rows would be another benchmark. Reads its file in ../shared/data, which the
    product does not need."""
    if not HARMBENCH.exists():
        pytest.skip(f"{HARMBENCH} is not there")
    chosen = dict(prompt="Behavior", where={"FunctionalCategory": "standard"})
    rows = load_rows(SourceConfig(path=str(HARMBENCH), sample=100, **chosen))
    assert len({row["BehaviorID"] for row in rows}) == 100
    assert {row["FunctionalCategory"] for row in rows} == {"standard"}
    standard = [row["BehaviorID"] for row in load_rows(SourceConfig(path=str(HARMBENCH), **chosen))]
    assert len(standard) == 159
    left_out = sorted({*range(159)} - {standard.index(row["BehaviorID"]) for row in rows})
    assert left_out[:8] == [1, 8, 9, 10, 14, 17, 18, 19]


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
        ({"where": {"quality": "1"}}, "no column 'quality' (where={quality: 1}); its columns: input, output, score"),
        ({"where": {"score": "2"}}, "none of the 40 rows read has {score: 2}; they have {score: 0.5 or 1}"),
        ({"where": {"score": "1"}, "sample": 11}, "sample=11 must be between 1 and 10, the number of rows"),
        ({"sample": 0}, "sample=0 must be between 1 and 40"),
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
