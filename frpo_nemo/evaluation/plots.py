"""Pictures of runs, from their metrics.jsonl alone. No process of the training needs to be there."""

from __future__ import annotations

import json
import math
from pathlib import Path

# Okabe and Ito's palette, which colour-blind readers can tell apart; yellow left out, it is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "legend.frameon": False,
}


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """metrics.jsonl -> {metric: (steps, values)}, by growing step; null becomes NaN.

    The last value counts where a step was logged twice. A last line that is not whole yet is left out; any
    other line that is not JSON raises ValueError.
    """
    points: dict[str, dict[int, float]] = {}
    for line in Path(path).read_text().split("\n")[:-1]:
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            points.setdefault(name, {})[step] = math.nan if value is None else value
    return {name: (sorted(by_step), [by_step[s] for s in sorted(by_step)]) for name, by_step in points.items()}


def learning_curve(metrics_files: dict[str, str | Path], out_png: str | Path, *, title: str | None = None) -> Path:
    """Draw {label: path of metrics.jsonl}: reward against step on the left (line with dots: held-out prompts,
    pale line: training prompts), KL to the reference on the right; entropy there if no run logged a KL,
    nothing if neither.

    Raises ValueError when no run has a reward.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = {label: read_metrics(path) for label, path in metrics_files.items()}
    if not any(name in run for run in runs.values() for name in ("reward/mean", "validation/reward/mean")):
        raise ValueError(f"no reward/mean in {', '.join(map(str, metrics_files.values()))}: nothing to draw")
    second = next((name for name in ("kl/reference", "entropy") if any(name in run for run in runs.values())), None)
    with rc_context(STYLE):
        panels = 2 if second else 1
        figure = Figure(figsize=(4.6 * panels, 3.5), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_rewards(axes[0], runs)
        if second:
            _draw(axes[1], runs, second)
            axes[1].set_ylabel(
                {"kl/reference": "KL to reference (nats per token)", "entropy": "entropy (nats)"}[second]
            )
        for axis in axes:
            axis.set_xlabel("step")
            axis.margins(x=0.02)
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold")
        Path(out_png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png, dpi=160)
    return Path(out_png)


def _draw_rewards(axis, runs) -> None:
    _draw(axis, runs, "reward/mean", alpha=0.35, linewidth=1.2)
    _draw(axis, runs, "validation/reward/mean", marker="o", markersize=4)
    axis.set_ylabel("mean reward")
    handles = [
        axis.plot([], [], color=colour, linewidth=2, label=label)[0]
        for label, colour in zip(runs, _colours(runs), strict=True)
    ]
    grey = {"color": "#555555", "linewidth": 1.5}
    if any("validation/reward/mean" in run for run in runs.values()):
        handles.append(axis.plot([], [], marker="o", markersize=4, label="held-out prompts", **grey)[0])
    if any("reward/mean" in run for run in runs.values()):
        handles.append(axis.plot([], [], alpha=0.45, label="training prompts", **grey)[0])
    axis.legend(handles=handles, fontsize=9, loc="best")


def _draw(axis, runs, metric: str, **style) -> None:
    for run, colour in zip(runs.values(), _colours(runs), strict=True):
        if metric in run:
            axis.plot(*run[metric], **{"color": colour, "linewidth": 2, "solid_capstyle": "round"} | style)


def _colours(runs) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]
