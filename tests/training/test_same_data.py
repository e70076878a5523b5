"""A run continues with the data that it began with, or reports why it cannot."""

from pathlib import Path

import pytest

from frpo_nemo.errors import ConfigError
from frpo_nemo.training.checks.resume import check_same_data

NOW = {"data": {"train": "a", "validation": "b"}, "moment": "2026-11-29T12:00:00"}
BEFORE = {"data": NOW["data"]}


@pytest.mark.parametrize("state", [NOW, BEFORE])
def test_the_same_data_is_no_matter_and_neither_is_a_set_that_is_gone(state):
    check_same_data(Path("step_1"), state, {"train": "a", "validation": "b"})
    check_same_data(Path("step_1"), state, {"train": "a"})


@pytest.mark.parametrize("state, hint", [
    (NOW, "give it the same, or take another run_dir"),
    (BEFORE, "give it the same (an older version guessed the types of data files, read directories in part"),
])  # fmt: skip
def test_other_data_is_a_sentence_that_says_what_an_older_version_read_otherwise(state, hint):
    with pytest.raises(ConfigError) as error:
        check_same_data(Path("step_1"), state, {"train": "c", "validation": "b"})
    assert str(error.value).startswith("step_1 was made with other train data than this run has; ")
    assert hint in str(error.value) and "\n" not in str(error.value)
