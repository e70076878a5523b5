"""Averages of curves over seeds: at equal KL, and at equal steps."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread
from report.studies import FRPO, GRPO, finetune_row, like_real, train_row

from frpo_nemo.report.curves import by_step, landscape
from frpo_nemo.report.frame import Results
from frpo_nemo.report.plots import draw_finetuning, draw_landscape, draw_stage_one, look


def probes(seed, *points):
    """Return a finetune row with (kl, reward) by step."""
    rows = [{"step": step, "kl/exact": kl, "reward/mean": reward} for step, (kl, reward) in enumerate(points)]
    return finetune_row("a", seed, "math", 0, 0) | {"points": rows}


def curve_of(*rows):
    return landscape(Results(rows), "a", "math", "reward/mean")


def test_seeds_are_averaged_at_equal_kl_and_not_at_equal_steps():
    # both rewards are lines in the KL: 1 - kl / 4 and 1 - kl / 2, with probes at other KLs
    curve = curve_of(probes(1, (0, 1.0), (1, 0.75), (4, 0.0)), probes(2, (0, 1.0), (0.5, 0.75), (2, 0.0)))
    kl = curve.rewards.index.to_numpy()
    assert (kl[0], kl[-1]) == (0.0, 2.0)
    np.testing.assert_allclose(curve.rewards.mean(axis=1), 1 - 0.375 * kl, atol=1e-12)
    np.testing.assert_allclose(curve.rewards.std(axis=1), 0.25 * kl / np.sqrt(2), atol=1e-12)
    assert curve.ends == {1: (4.0, 0.0), 2: (2.0, 0.0)}


def test_the_mean_ends_where_the_first_seed_ends():
    curve = curve_of(probes(1, (0, 1.0), (5, 0.5)), probes(2, (0.5, 1.0), (1, 0.8), (3, 0.4)))
    assert (curve.rewards.index[0], curve.rewards.index[-1]) == (0.5, 3.0)


def test_probes_are_ordered_by_kl_and_equal_kls_are_averaged():
    curve = curve_of(probes(1, (0, 1.0), (2, 0.6), (1, 0.8), (2, 0.4)))
    assert curve.by_seed[1].to_dict() == pytest.approx({0: 1.0, 1: 0.8, 2: 0.5})
    assert curve.ends[1] == (2.0, 0.4)  # the last probe by step


def test_probes_without_a_value_are_left_out():
    curve = curve_of(probes(1, (0, 1.0), (None, 0.9), (1, None), (2, 0.5)))
    assert curve.rewards[1].iloc[-1] == 0.5 and len(curve.by_seed[1]) == 2
    assert curve_of(probes(1, (0, 1.0))) is None


def test_seeds_without_a_common_kl_have_no_mean():
    curve = curve_of(probes(1, (0, 1.0), (1, 0.5)), probes(2, (2, 1.0), (3, 0.5)))
    assert curve.rewards.empty and set(curve.by_seed) == {1, 2}


def test_curves_by_step_are_averaged_at_the_steps_that_all_seeds_have():
    first, second, other = (finetune_row("a", seed, "math", 0, 0) for seed in (1, 2, 3))
    first["points"] = [{"step": 0, "x": 1.0}, {"step": 5, "x": 2.0}, {"step": 10, "x": 3.0}]
    second["points"] = [{"step": 0, "x": 3.0}, {"step": 5, "x": None}, {"step": 10, "x": 6.0}]
    other["points"] = [{"step": 0, "y": 1.0}]
    curve = by_step(Results([first, second, other]), "a", "x", "finetune", "math")
    assert curve.to_dict("index") == {0: {1: 1.0, 2: 3.0}, 10: {1: 3.0, 2: 6.0}}
    assert by_step(Results([other]), "a", "x", "finetune", "math").empty


def test_pictures_are_drawn_and_their_captions_say_what_and_how(tmp_path):
    results = Results(like_real(seeds=(1, 2), arms=("grpo", "frpo_0.2")))
    landscape = draw_landscape(results, "alpaca", tmp_path / "new" / "l.png")
    assert "(kl/exact: the exact KL" in landscape.caption and "alpaca" in landscape.caption
    assert "interpolated and the thick line is the mean at equal KL" in landscape.caption
    assert "±1 sample standard deviation over the seeds (2 seeds)" in landscape.caption
    for picture in (
        landscape,
        draw_stage_one(results, tmp_path / "s.png"),
        draw_finetuning(results, "math", tmp_path / "f.png"),
    ):
        height, width, _ = imread(picture.path).shape
        assert width > 1400 and 0.3 < height / width < 1.2


def test_an_arm_without_a_finished_run_is_named_in_the_caption(tmp_path):
    rows = like_real(seeds=(1,), arms=("grpo", "frpo_0.2"))
    for row in rows:
        if row["arm"] == "grpo" and row["task"] == "math":
            row.update(status="failed", error="boom")
    caption = draw_landscape(Results(rows), "math", tmp_path / "l.png").caption
    assert caption.endswith(
        "One seed for each arm: there is no band. Not drawn, for no finished run has both values: grpo."
    )


def test_without_a_kl_there_is_no_landscape(tmp_path):
    row = finetune_row("a", 1, "math", 0.9, 0.8)
    for point in row["points"]:
        del point["kl/exact"]
    assert draw_landscape(Results([row]), "math", tmp_path / "l.png") is None
    assert not (tmp_path / "l.png").exists()


def test_every_arm_has_a_look_of_its_own_and_baselines_are_dashed():
    rows = [train_row(f"arm{i}", 1, GRPO if i == 3 else FRPO) for i in range(20)]
    results = Results(rows)
    styles = [tuple(look(results, arm).values()) for arm in results.arms]
    assert len(set(styles)) == 20
    assert [style[1] for style in styles].count("--") == 1 and styles[3][1] == "--"
