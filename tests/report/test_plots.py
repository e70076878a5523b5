"""The learning curve is drawn from metrics files alone."""

from __future__ import annotations

import json
import math

import pytest
from matplotlib.image import imread

from frpo_nemo.report.plots import learning_curve, read_metrics


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def a_run(path, gain, *metrics):
    records = []
    for step in range(41):
        reward = 1 - math.exp(-gain * step / 20)
        if step:
            wobble = 0.05 * math.sin(7 * step)
            values = {
                "reward/mean": reward + wobble,
                "kl/reference": 0.002 * step,
                "entropy": 2 - 0.02 * step,
            }
            records.append({"step": step, "time": 1.0, **{name: values[name] for name in metrics}})
        if step % 10 == 0:
            records.append({"step": step, "time": 1.0, "validation/reward/mean": reward})
    return write(path, records)


def test_read_metrics_sorts_keeps_the_last_and_reads_null(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"step": 2, "a": 1.0}, {"step": 1, "a": None}, {"step": 2, "a": 3.0, "b": 4.0}])
    with open(path, "a") as file:
        file.write('{"step": 3, "a"')
    read = read_metrics(path)
    assert read["a"][0] == [1, 2] and math.isnan(read["a"][1][0]) and read["a"][1][1] == 3.0
    assert read["b"] == ([2], [4.0])


def test_several_runs_fit_one_picture(tmp_path):
    names = ("reward/mean", "kl/reference", "entropy")
    runs = {
        "FRPO": a_run(tmp_path / "f.jsonl", 1.0, *names),
        "GRPO": a_run(tmp_path / "g.jsonl", 0.7, *names),
    }
    picture = imread(learning_curve(runs, tmp_path / "new" / "curve.png", title="GSM8K, 0.5M parameters"))
    height, width, _ = picture.shape
    assert 1200 <= width <= 1800 and 2 < width / height < 3


@pytest.mark.parametrize("names, panels", [(("reward/mean",), 1), (("reward/mean", "entropy"), 2), ((), 1)])
def test_one_run_without_kl_shows_what_there_is(tmp_path, names, panels):
    picture = imread(learning_curve({"run": a_run(tmp_path / "m.jsonl", 1.0, *names)}, tmp_path / "curve.png"))
    assert picture.shape[1] == 736 * panels


def test_a_run_without_reward_is_refused(tmp_path):
    path = write(tmp_path / "sft.jsonl", [{"step": 1, "loss/total": 1.0}])
    with pytest.raises(ValueError, match="no reward/mean in .*sft.jsonl"):
        learning_curve({"sft": path}, tmp_path / "curve.png")
