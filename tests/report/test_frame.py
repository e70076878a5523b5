"""Rows of results.jsonl as frames: which run and which value counts."""

from __future__ import annotations

import pytest
from report.studies import FRPO, GRPO, failed_row, finetune_row, train_row

from frpo_nemo.errors import ConfigError
from frpo_nemo.report.frame import Results


def test_a_later_row_of_the_same_run_replaces_the_earlier_one():
    results = Results([failed_row("a", 1, FRPO, "boom"), train_row("a", 1, FRPO, 0.7)])
    assert results.failed == [] and results.at_end("reward/mean", "train").loc[1, "a"] == 0.7


def test_values_are_frames_of_seeds_by_arms_in_the_order_in_which_arms_came():
    rows = [train_row("b", 2, FRPO, 0.7), train_row("a", 1, GRPO, 0.6), failed_row("c", 1, FRPO, "boom")]
    found = Results(rows).at_end("reward/mean", "train")
    assert list(found.columns) == ["b", "a", "c"] and list(found.index) == [1, 2]
    assert found.stack().dropna().to_dict() == {(1, "a"): 0.6, (2, "b"): 0.7}


def test_values_that_are_missing_or_not_finite_are_not_numbers():
    row = finetune_row("a", 1, "math", 0.8, 0.6)
    nan, infinite = float("nan"), float("inf")
    row["points"] = [{"step": 0, "x": 1.0, "z": infinite}, {"step": 1, "x": None}, {"step": 2, "y": nan}]
    results = Results([row])
    start, end = (
        {name: at(name, "finetune", "math").notna().loc[1, "a"] for name in ("x", "y", "z", "w")}
        for at in (results.at_start, results.at_end)
    )
    assert start == {"x": True, "y": False, "z": False, "w": False}
    assert end == dict.fromkeys("xyzw", False)


def test_the_reward_before_fine_tuning_is_that_of_stage_one_or_of_step_0():
    rows = [
        train_row("a", 1, FRPO, 0.7),
        finetune_row("a", 1, "math", 0.6, 0.5),
        finetune_row("a", 2, "math", 0.4, 0.3),
    ]
    assert Results(rows).reward_before("reward/mean")["a"].to_dict() == {1: 0.7, 2: 0.4}


def test_the_best_kl_that_most_runs_have_is_used_for_all():
    rows = [finetune_row("a", seed, "math", 0.9, 0.8) for seed in (1, 2)]
    for row in rows:
        for point in row["points"]:
            point["kl/k3"] = point["kl/exact"]
    assert Results(rows).kl_name("finetune", "math") == "kl/exact"
    for point in rows[0]["points"]:
        del point["kl/exact"]
    assert Results(rows).kl_name("finetune", "math") == "kl/k3"
    assert Results(rows).kl_name("train") is None


def test_no_rows_are_refused():
    with pytest.raises(ConfigError, match="no results"):
        Results([])


def test_effective_beta_is_grpos_with_the_same_balance_of_rewards_and_kl():
    """The betas of the paper's safety training: GRPO's .1 is 114 to 571 times FRPO's."""

    def row(arm, objective, **rollout):
        row = train_row(arm, 1, objective)
        return row | {"settings": row["settings"] | {"rollout": rollout}}

    frpo = {"name": "frpo"}
    rows = [
        row("grpo", {"name": "dr_grpo", "beta": 0.1}, group_size=8),
        row("frpo_5", frpo | {"lambda_": 5, "beta": 0.0002}, group_size=8),
        row("frpo_0.5", frpo | {"lambda_": 0.5, "beta": 0.002}, group_size=8),
        row("grpo_std", {"name": "grpo", "beta": 0.1}, group_size=8),
        row("radius", frpo | {"kl_radius": 0.1, "beta": 0.1}, group_size=8),
        row("own", {"_target_": "nowhere.Objective", "beta": 0.1}, group_size=8),
        row("unknown", frpo | {"lambda_": 5, "beta": 0.0002}),
    ]
    results = Results(rows)
    found = [results.effective_beta(arm) for arm in results.arms]
    assert found[:3] == pytest.approx([0.1, 0.000175, 0.000875]) and found[3:] == [None] * 4
