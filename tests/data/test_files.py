"""Which files of a directory are read: all of a split, by their names, in the check as in the run."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.files import find_files
from frpo_nemo.data.sources import check_source, load_rows, read_to_check
from frpo_nemo.errors import ConfigError
from frpo_nemo.training.checks.data import check_source_list, describe_data


def write(root: Path, *names: str, rows: int = 1) -> Path:
    """Write files whose rows name them."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = [{"prompt": f"{name} {i}"} for i in range(rows)]
        if ".parquet" in name:
            pq.write_table(pa.Table.from_pylist(content), file)
        elif ".csv" in name:
            file.write_text("prompt\n" + "".join(row["prompt"] + "\n" for row in content))
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return root


def read(path, **fields) -> list[str]:
    return [row["prompt"].rpartition(" ")[0] for row in load_rows(SourceConfig(path=str(path), **fields))]


@pytest.mark.parametrize("files, split, expected", [
    (["train.jsonl", "more.jsonl"], "train", ["more.jsonl", "train.jsonl"]),
    (["a.jsonl", "b.parquet", "c.csv"], "train", ["a.jsonl", "b.parquet", "c.csv"]),
    (["math.jsonl", "math_eval.jsonl"], "train", ["math.jsonl"]),
    (["math.jsonl", "math_eval.jsonl"], "test", ["math_eval.jsonl"]),
    (["train.jsonl", "val2.jsonl", "dev.jsonl", "test-1.jsonl"], "validation", ["dev.jsonl", "val2.jsonl"]),
    (["a.jsonl", "a.jsonl.bak", "b.jsonl.old", "c.jsonl.part", "d.jsonl~", ".e.jsonl"], "train", ["a.jsonl"]),
    (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
     "train", ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
    (["train_sft-00000-of-00001.jsonl", "train_prefs-00000-of-00001.jsonl"], "train_sft",
     ["train_sft-00000-of-00001.jsonl"]),
    (["train_sft-00000-of-00001-a3ecf92756993583.jsonl", "train_gen-00000-of-00001-a6c9fb894be3e50b.jsonl"], "train_gen",
     ["train_gen-00000-of-00001-a6c9fb894be3e50b.jsonl"]),
    (["part-00000-of-00001.jsonl", "latest.jsonl"], "train", ["latest.jsonl", "part-00000-of-00001.jsonl"]),
    (["train.jsonl", "test.jsonl"], "train+test", ["train.jsonl", "test.jsonl"]),
    (["a.jsonl", "dataset_infos.json", "saved/state.json", "README.md"], "train", ["a.jsonl"]),
])  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_gives_every_data_file_of_the_split(files, split, expected, streaming, tmp_path):
    found = read(write(tmp_path, *files), split=split, streaming=streaming, limit=100)
    assert found == expected


def test_what_is_read_and_what_is_left_out_is_said_with_counts(tmp_path):
    write(tmp_path, "a.jsonl", "b.csv", rows=2)
    write(tmp_path, "eval.jsonl", "a.jsonl.bak")
    assert read_to_check(SourceConfig(path=str(tmp_path))).describe() == (
        "4 rows of 2 files (a.jsonl 2, b.csv 2); left out: eval.jsonl (split test), a.jsonl.bak (no data)"
    )
    assert read_to_check(SourceConfig(path=str(tmp_path / "a.jsonl"))).describe() == "2 rows"
    some = SourceConfig(path=str(tmp_path / "*.jsonl"), start=1, limit=2, where={"prompt": "a.jsonl 1"})
    assert read_to_check(some).describe() == "3 rows of 2 files (a.jsonl 2, eval.jsonl 1); 1 chosen"
    write(tmp_path, *(f"shards/{i:02}.jsonl" for i in range(20)))
    assert "shards/05.jsonl 1 and 14 more); left out" in read_to_check(SourceConfig(path=str(tmp_path))).describe()


def test_a_file_that_was_read_is_not_said_to_be_left_out(tmp_path):
    write(tmp_path, "test.jsonl")
    for split in ("train", "test"):
        assert read_to_check(SourceConfig(path=str(tmp_path / "test.jsonl"), split=split)).describe() == "1 rows"


@pytest.mark.parametrize("link, target", [("b.jsonl", "a.jsonl"), ("again", "."), ("latest", "v2")])
def test_a_link_does_not_make_rows_count_twice(link, target, tmp_path):
    write(tmp_path, "a.jsonl", "v2/c.jsonl")
    (tmp_path / link).symlink_to(target)
    for path in (tmp_path, tmp_path / "**/*.jsonl"):
        with pytest.raises(ConfigError, match=r"(a|c).jsonl' and .* \(split train\) are one file \(a link\); give"):
            load_rows(SourceConfig(path=str(path)))
    (tmp_path / link).unlink()
    (tmp_path / "other").symlink_to(write(tmp_path.with_name(f"{tmp_path.name}-other"), "d.jsonl"))
    assert len(load_rows(SourceConfig(path=str(tmp_path)))) == 3


def test_a_check_keeps_what_it_read_for_the_start_to_say(tmp_path):
    write(tmp_path, "train.jsonl", "test.jsonl", rows=3)
    source = SourceConfig(path=str(tmp_path), limit=2)
    assert check_source_list([("data.train.7", source)]) == []
    assert f"data.train.7 ({tmp_path}): 3 rows; left out: test.jsonl (split test); 2 chosen" in describe_data()


def test_files_of_a_directory_may_have_other_columns_and_types(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": 5}\n')
    (tmp_path / "b.csv").write_text("prompt,answer,level\nb,2024-05-01,08\n")
    assert load_rows(SourceConfig(path=str(tmp_path))) == [
        {"prompt": "a", "answer": 5, "level": None},
        {"prompt": "b", "answer": "2024-05-01", "level": "08"},
    ]


@pytest.mark.parametrize("pattern, expected", [
    ("*.jsonl", ["a.jsonl", "eval.jsonl"]),
    ("**/*.jsonl", ["a.jsonl", "eval.jsonl", "sub/c.jsonl"]),
    ("[ab].*", ["a.jsonl", "b.csv"]),
])  # fmt: skip
def test_a_pattern_chooses_by_itself(pattern, expected, tmp_path):
    write(tmp_path, "a.jsonl", "b.csv", "eval.jsonl", "sub/c.jsonl")
    assert read(tmp_path / pattern) == expected


@pytest.mark.parametrize("split, expected", [
    ("train", range(10)), ("train[:3]", range(3)), ("train[-2:]", [8, 9]), ("train[20%:50%]", [2, 3, 4]),
    ("train[8:]+train[:2]", [8, 9, 0, 1]),
])  # fmt: skip
@pytest.mark.parametrize("name", ["rows.jsonl", ""])
def test_a_part_of_a_split_is_taken_of_files_as_of_the_hub(split, expected, name, tmp_path):
    write(tmp_path, "rows.jsonl", rows=10)
    rows = load_rows(SourceConfig(path=str(tmp_path / name), split=split))
    assert [int(row["prompt"].split()[1]) for row in rows] == list(expected)
    later = load_rows(SourceConfig(path=str(tmp_path / name), split=split, start=1, limit=1))
    assert [int(row["prompt"].split()[1]) for row in later] == list(expected)[1:2]


def test_a_part_of_the_embedded_world_is_taken_as_of_files():
    path = "python:frpo_nemo.examples.toy.rows?part=math"
    whole = load_rows(SourceConfig(path=path))
    assert load_rows(SourceConfig(path=path, split="train[:3]+train[-1:]")) == [*whole[:3], whole[-1]]
    with pytest.raises(ConfigError, match="no split 'test' .split=test.; it has train"):
        load_rows(SourceConfig(path=path, split="test"))


def test_the_name_of_a_file_may_say_its_split_and_a_file_has_no_other(tmp_path):
    write(tmp_path, "test.jsonl", "train_prefs-00000-of-00001.parquet")
    assert read(tmp_path / "test.jsonl") == read(tmp_path / "test.jsonl", split="test") == ["test.jsonl"]
    assert len(read(tmp_path / "train_prefs-00000-of-00001.parquet", split="train_prefs")) == 1
    write(tmp_path, "rows.jsonl", rows=3)
    assert len(read(tmp_path / "rows.jsonl", split="train_prefs[:2]")) == 2


@pytest.mark.parametrize("files, path, fields, sentence", [
    (["test.jsonl"], "test.jsonl", {"split": "validation"}, "no split 'validation' (split=validation); it has test, train"),
    (["a.jsonl"], "", {"split": "test[:3]"}, "no split 'test' (split=test[:3]); it has train: a file belongs to the split in"),
    (["a.jsonl"], "a.jsonl", {"split": "train[:x]"}, "Unrecognized instruction format: train[:x]"),
    (["a.jsonl"], "a.jsonl", {"split": "train[:3]", "streaming": True, "limit": 1}, "use start and limit"),
    (["eval.jsonl"], "", {}, "no split 'train' (split=train); it has test"),
    (["train_test.jsonl"], "", {}, "'train_test.jsonl' names the splits test and train; rename it, or give files"),
    (["a.jsonl", "a.jsonl.gz"], "", {}, "'a.jsonl' and 'a.jsonl.gz' (split train) seem to hold the same rows in two formats"),
    (["a.jsonl", "a.csv"], "*", {}, "'a.csv' and 'a.jsonl' (split train) seem to hold the same rows in two formats"),
    (["a.txt", "b.jsonl.bak"], "", {}, "has no data file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, also .gz and .zst"),
    (["a.jsonl"], "b*.jsonl", {}, "b*.jsonl' has no data file"),
    (["a.jsonl"], ":main", {}, "has no configuration 'main': no README.md there names one"),
    (["a.jsonl"], "b.JSONL.gz", {}, "b.JSONL.gz' does not exist (working directory: "),
])  # fmt: skip
def test_what_is_not_certain_is_a_sentence(files, path, fields, sentence, tmp_path):
    write(tmp_path, *files)
    for function in (check_source, load_rows):
        with pytest.raises(ConfigError) as error:
            function(SourceConfig(path=str(tmp_path) + (path if path.startswith(":") else f"/{path}"), **fields))
        assert sentence in str(error.value) and "\n" not in str(error.value)


CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/train*}
  - {split: test, path: main/test*}
- config_name: other
  data_files: other/*
---
"""


def test_the_card_of_a_data_set_that_was_copied_from_the_hub_says_which_files(tmp_path):
    write(tmp_path, "main/train.jsonl", "main/test.jsonl", "other/rows.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    assert read(tmp_path) == read(f"{tmp_path}:main") == ["main/train.jsonl"]
    assert read(tmp_path, split="test") == ["main/test.jsonl"]
    assert read(f"{tmp_path}:other") == ["other/rows.jsonl"]
    with pytest.raises(ConfigError, match="'neither' not found. Available: .'main', 'other'"):
        read(f"{tmp_path}:neither")


def test_a_directory_of_save_to_disk_is_read(tmp_path):
    sets = {
        name: datasets.Dataset.from_list([{"prompt": f"{name} 0", "day": "2024-05-01"}]) for name in ("train", "test")
    }
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "both")
    sets["test"].save_to_disk(tmp_path / "one")
    assert read(tmp_path / "both") == read(tmp_path / "both", split="train[:1]") == ["train"]
    assert read(tmp_path / "both", split="test") == read(tmp_path / "one") == ["test"]
    assert load_rows(SourceConfig(path=str(tmp_path / "one")))[0]["day"] == "2024-05-01"
    with pytest.raises(ConfigError, match="no split 'dev' .split=dev.; it has test, train"):
        read(tmp_path / "both", split="dev")


def test_names_of_the_hub_are_left_to_datasets():
    for name in ("openai/gsm8k", "openai/gsm8k:main", "tatsu-lab/alpaca.v2"):
        assert find_files(name) is None
