"""One file gives training and validation: a share of its rows is held out by a seed, and each side takes its own."""

import json
from collections import Counter

import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.sources import check_source, load_rows
from frpo_nemo.errors import ConfigError

KINDS = ["refusal"] * 100 + ["rainbow"] * 39 + ["aegis"] * 20 + ["rare"]
ROWS = [{"prompt": f"Prompt {i}.", "kind": kind, "level": 1 + i % 5} for i, kind in enumerate(KINDS)]

FROZEN = [26, 53, 60, 79, 108, 116, 151, 155]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def both_sides(path, **fields) -> tuple[list[int], list[int]]:
    """Return places in ROWS of the rows to train on, and of those held out."""
    sides = (load_rows(SourceConfig(path=str(path), held_out=held_out, **fields)) for held_out in (False, True))
    return tuple([ROWS.index(row) for row in side] for side in sides)


@pytest.mark.parametrize("by", [None, "kind"])
@pytest.mark.parametrize("share", [0.025, 0.1, 0.5, 0.9])
def test_the_sides_are_disjoint_and_complete_and_keep_the_order_of_the_file(share, by, file):
    rest, held_out = both_sides(file, holdout=share, holdout_by=by)
    assert sorted(rest + held_out) == list(range(160))
    assert rest == sorted(rest) and held_out == sorted(held_out)
    assert len(held_out) == round(share * 160)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.025, 0.1, 0.33])
def test_every_value_gives_its_share_of_rows_to_within_one(share, seed, file):
    _, held_out = both_sides(file, holdout=share, holdout_by="kind", holdout_seed=seed)
    found = Counter(KINDS[i] for i in held_out)
    for kind, size in Counter(KINDS).items():
        assert abs(found[kind] - share * size) < 1


def test_which_rows_are_held_out_depends_on_the_seed_alone(file):
    """They are frozen here: another process, machine or version must not train on what was held out."""
    assert both_sides(file, holdout=0.05)[1] == FROZEN
    assert both_sides(file, holdout=0.05, streaming=True, limit=160)[1] == FROZEN
    assert both_sides(file, holdout=0.05, holdout_seed=2)[1] != FROZEN


def test_rows_are_held_out_of_those_that_are_left(file):
    rest, held_out = both_sides(file, start=20, limit=100, at_least={"level": 4}, holdout=0.25, holdout_by="kind")
    assert sorted(rest + held_out) == [i for i in range(20, 120) if ROWS[i]["level"] >= 4]
    assert len(held_out) == 10


@pytest.mark.parametrize("read", [check_source, load_rows])
@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(holdout=0.001, held_out=True), "holdout=0.001 of 160 rows leaves none with held_out=true"),
        (dict(holdout=0.999), "holdout=0.999 of 160 rows leaves none with held_out=false"),
        (dict(holdout=0.1, holdout_by="type"), "has no column 'type' (holdout_by=type); its columns: prompt, kind"),
    ],
)
def test_an_empty_side_and_a_missing_column_are_one_sentence(read, fields, sentence, file):
    with pytest.raises(ConfigError) as error:
        read(SourceConfig(path=str(file), **fields))
    assert sentence in str(error.value)
