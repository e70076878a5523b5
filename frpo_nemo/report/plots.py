"""The pictures of a report, and learning curves of single runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from frpo_nemo.records import read_jsonl
from frpo_nemo.report.curves import Landscape, by_step, landscape
from frpo_nemo.report.frame import KL_NAMES, Results, reward_label
from frpo_nemo.report.sweeps import Sweep, baselines_of, kept_rewards, outcomes

# Okabe and Ito's palette, which colour-blind readers can tell apart; yellow left out, it is faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vP"
DASHES = ("-", "--", ":", "-.")
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
DOTS_PER_INCH = 140
SIZES = {1: (7.0, 4.6), 2: (5.5, 4.0), 3: (4.4, 3.4)}  # columns: width and height of a panel in inches
VACANT = "vacant"  # label of a place in the grid without a panel
SYMBOLS = {"lambda_": "λ", "beta": "β"}
LABELS = {
    "downstream/loss": "held-out loss (nats per token)",
    "downstream/accuracy": "held-out accuracy",
    "downstream/token_accuracy": "held-out token accuracy",
    "downstream/reward": "held-out reward",
}
_ERRORBAR = {"linewidth": 1.5, "elinewidth": 0.9, "marker": "o", "markersize": 6}
_CROSS = {"marker": "X", "markersize": 8}


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


def read_metrics(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return metrics.jsonl as {metric: (steps, values)}, by growing step; null becomes NaN.

    The last value counts where a step was logged twice. An incomplete last line is left out; any
    other line that is not JSON raises ValueError.
    """
    points: dict[str, dict[int, float]] = {}
    for record in read_jsonl(path):
        step = record.pop("step")
        for name, value in record.items():
            points.setdefault(name, {})[step] = math.nan if value is None else value
    return {name: (sorted(by_step), [by_step[s] for s in sorted(by_step)]) for name, by_step in points.items()}


@rc_context(STYLE)
def learning_curve(metrics_files: dict[str, str | Path], out_png: str | Path, *, title: str | None = None) -> Path:
    """Draw {label: path of metrics.jsonl}: reward against step on the left (line with dots: held-out prompts,
    pale line: training prompts), KL to the reference on the right; entropy there if no run logged a KL,
    nothing if neither.

    Raises ValueError when no run has a reward.
    """
    runs = {label: read_metrics(path) for label, path in metrics_files.items()}
    measured = {name for run in runs.values() for name in run}
    if not measured & {"reward/mean", "validation/reward/mean"}:
        raise ValueError(f"no reward/mean in {', '.join(map(str, metrics_files.values()))}: nothing to draw")
    seconds = {"kl/reference": "KL to reference (nats per token)", "entropy": "entropy (nats)"}
    second = next((name for name in seconds if name in measured), None)
    count = 2 if second else 1
    figure = Figure(figsize=(4.6 * count, 3.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    _draw_runs(axes[0], runs, "reward/mean", alpha=0.35, linewidth=1.2)
    _draw_runs(axes[0], runs, "validation/reward/mean", marker="o", markersize=4)
    axes[0].set_ylabel("mean reward")
    handles = [Line2D([], [], color=_colour(i), linewidth=2, label=label) for i, label in enumerate(runs)]
    kinds = {"validation/reward/mean": ("held-out prompts", {"marker": "o", "markersize": 4})}
    kinds["reward/mean"] = ("training prompts", {"alpha": 0.45})
    grey = {"color": "#555555", "linewidth": 1.5}
    handles += [Line2D([], [], label=text, **look, **grey) for name, (text, look) in kinds.items() if name in measured]
    axes[0].legend(handles=handles, fontsize=9, loc="best")
    if second:
        _draw_runs(axes[1], runs, second)
        axes[1].set_ylabel(seconds[second])
    for axis in axes:
        axis.set_xlabel("step")
        axis.margins(x=0.02)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=160)
    return Path(out_png)


def draw_landscape(results: Results, task: str, path: Path) -> Picture | None:
    """Draw the landscape of one downstream task: a panel for each reward, a curve for each arm. None without a KL."""
    contents = [(f"reward: {reward_label(reward)}", reward, results.arms) for reward in results.rewards]
    return _draw_landscapes(results, task, contents, path, columns=2)


def draw_landscape_by_value(results: Results, sweep: Sweep, task: str, reward: str, path: Path) -> Picture | None:
    """Draw a small landscape of one reward for each value of the sweep, against the same baselines."""
    baselines, field = baselines_of(results, sweep.arms), sweep.field.rstrip("_")
    contents = [
        (f"{sweep.objective}, {field} {value:g}: {reward_label(reward)}", reward, [arm, *baselines])
        for value, arm in zip(sweep.values, sweep.arms, strict=True)
    ]
    return _draw_landscapes(results, task, contents, path, columns=3, share=True)


def draw_stage_one(results: Results, path: Path) -> Picture | None:
    """Draw reward and KL to the reference by step of stage one. None if it has no run."""
    kl = results.kl_name("train")
    titles = {name: f"reward ({reward_label(name)})" for name in results.rewards}
    caption = "Stage one: reward on held-out prompts"
    if kl:
        titles[kl] = "KL to the reference (nats per response)"
        caption += f", and {kl} from the reference policy"
    return _draw_by_step(results, "train", "", titles, f"{caption}, by training step.", path)


def draw_finetuning(results: Results, task: str, path: Path) -> Picture | None:
    """Draw what was learned and what was kept, by step of fine-tuning on `task`. None if no run finished."""
    titles = {name: f"{task}: {LABELS[name]}" for name in results.downstream_names(task)}
    titles |= {name: f"stage-one reward ({reward_label(name)})" for name in results.rewards}
    titles["response_length/mean"] = "stage-one prompts: response length (tokens)"
    caption = (
        f"Fine-tuning on {task}: the task's own held-out metrics, then reward and length of responses to held-out "
        "prompts of stage one, by fine-tuning step."
    )
    return _draw_by_step(results, "finetune", task, titles, caption, path)


@rc_context(STYLE)
def draw_frontier(results: Results, sweeps: list[Sweep], task: str, path: Path) -> Picture | None:
    """Draw the trade-off in sweeps of one field: the reward of each stage-one task after fine-tuning, against KL to the
    reference and against the other tasks' rewards before. None if fewer than two arms of every sweep finished."""
    finished = set(results.finished("finetune", task)["arm"])
    sweeps = [sweep for sweep in sweeps if len(finished.intersection(sweep.arms)) > 1]
    swept = [arm for sweep in sweeps for arm in sweep.arms if arm in finished]
    found, kept = outcomes(results, task), kept_rewards(results)
    contents = [(reward, other) for reward in kept for other in (None, *kept) if other != reward]
    contents = [panel for panel in contents if len(_points(found, swept, *panel))]
    if not contents:
        return None
    baselines, symbol = baselines_of(results, swept), SYMBOLS[sweeps[0].field]
    figure, axes = _panels(len(contents), 2)
    for axis, panel in zip(axes, contents, strict=True):
        for number, sweep in enumerate(sweeps):
            points, colour = _points(found, [arm for arm in sweep.arms if arm in swept], *panel), _colour(number)
            dashes = DASHES[number % len(DASHES)]
            axis.errorbar(**points, color=colour, linestyle=dashes, label=sweep.label, **_ERRORBAR)
            shift = (7, 7 if number % 2 == 0 else -14)
            for arm, value in zip(sweep.arms, sweep.values, strict=True):
                if arm in points.index:
                    where = dict(xy=points.loc[arm, ["x", "y"]], xytext=shift, textcoords="offset points")
                    axis.annotate(f"{symbol} = {value:g}", **where, fontsize=9, color=colour)
        crosses = _points(found, baselines, *panel)
        for arm in crosses.index:
            axis.errorbar(**crosses.loc[[arm]], color="#222222", linestyle="none", label=arm, **_ERRORBAR | _CROSS)
        _name_axes(axis, *panel, task)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _save(figure, path, _frontier_caption(results, sweeps[0].field.rstrip("_"), task, bool(baselines)))


def look(results: Results, arm: str) -> dict[str, str]:
    """Return colour, line style and marker of an arm, the same in all pictures of a study. Baselines are dashed; from the
    eighth arm on, colours repeat with another marker."""
    index = results.arms.index(arm)
    return {
        "color": _colour(index),
        "linestyle": "--" if results.is_baseline(arm) else "-",
        "marker": MARKERS[index // len(COLOURS) % len(MARKERS)],
    }


def _draw_runs(axis: Axes, runs: dict[str, dict], metric: str, **style) -> None:
    for number, run in enumerate(runs.values()):
        if metric in run:
            axis.plot(*run[metric], **{"color": _colour(number), "linewidth": 2, "solid_capstyle": "round"} | style)


@rc_context(STYLE)
def _draw_landscapes(
    results: Results,
    task: str,
    contents: list[tuple[str, str, list[str]]],
    path: Path,
    *,
    columns: int,
    share: bool = False,
) -> Picture | None:
    """Draw a panel for each (title, reward, arms). None if there is nothing to draw."""
    if not contents:
        return None
    figure, axes = _panels(len(contents), columns, share=share)
    drawn = set()
    for axis, (title, reward, arms) in zip(axes, contents, strict=True):
        for arm in arms:
            found = landscape(results, arm, task, reward)
            if found:
                _draw_landscape(axis, found, look(results, arm))
                drawn.add(arm)
        axis.set_title(title)
        axis.set_xlabel("KL of fine-tuning (nats per response)")
    if not drawn:
        return None
    figure.supylabel("reward on held-out prompts", fontsize=11)
    _legend(figure, results, [arm for arm in results.arms if arm in drawn])
    return _save(figure, path, _landscape_caption(results, task, contents, drawn))


def _draw_landscape(axis: Axes, found: Landscape, style: dict[str, str]) -> None:
    colour = style["color"]
    if len(found.by_seed) > 1:
        for line in found.by_seed.values():
            axis.plot(line, color=colour, alpha=0.22, linewidth=0.7, zorder=1)
    _draw_band(axis, found.rewards, colour, alpha=0.11)
    mean = found.rewards.mean(axis=1)
    axis.plot(mean, color=colour, linestyle=style["linestyle"], linewidth=2.4, zorder=3)
    for end in found.ends.values():
        axis.plot(*end, marker=style["marker"], color=colour, markersize=4, alpha=0.8, linestyle="none", zorder=4)


@rc_context(STYLE)
def _draw_by_step(
    results: Results, stage: str, task: str, titles: dict[str, str], caption: str, path: Path
) -> Picture | None:
    """Draw a panel for each metric that was measured ({metric: title}): its mean over the seeds by training step, a line
    for each arm. None if no run finished."""
    curves = {
        metric: {arm: curve for arm in results.arms if len(curve := by_step(results, arm, metric, stage, task))}
        for metric in titles
    }
    curves = {metric: by_arm for metric, by_arm in curves.items() if by_arm}
    if not curves:
        return None
    figure, axes = _panels(len(curves), 2 if len(curves) in (2, 4) else 3)
    for axis, (metric, by_arm) in zip(axes, curves.items(), strict=True):
        for arm, curve in by_arm.items():
            style = look(results, arm)
            _draw_band(axis, curve, style["color"], alpha=0.12)
            axis.plot(curve.index, curve.mean(axis=1), linewidth=2, markersize=3.5, **style)
        axis.set_title(titles[metric])
        axis.set_xlabel("step")
    arms = [arm for arm in results.arms if any(arm in by_arm for by_arm in curves.values())]
    _legend(figure, results, arms)
    band = _band_text(results, arms, stage, task)
    return _save(figure, path, f"{caption} Lines: mean over the seeds, at the steps that all have. {band}")


def _draw_band(axis: Axes, by_seed: pd.DataFrame, colour: str, *, alpha: float) -> None:
    """Draw the mean ±1 standard deviation of by_seed [x, seeds], where there are two seeds."""
    if by_seed.shape[1] > 1:
        mean, std = by_seed.mean(axis=1), by_seed.std(axis=1)
        axis.fill_between(by_seed.index, mean - std, mean + std, color=colour, alpha=alpha, lw=0)


def _points(found: pd.DataFrame, arms: Sequence[str], reward: str, other: str | None) -> pd.DataFrame:
    """Draw the [arms] of a frontier's panel, means over seeds with their spread: the reward after fine-tuning (y) against
    another one before it, or (None) against the KL (x). Arms without both are left out."""
    found, x, y = found.loc[list(arms)], f"before {other}" if other else "kl", f"after {reward}"
    points = {"x": found[x, "mean"], "y": found[y, "mean"], "xerr": found[x, "std"], "yerr": found[y, "std"]}
    return pd.DataFrame(points).dropna(subset=["x", "y"]).fillna(0.0)


def _name_axes(axis: Axes, reward: str, other: str | None, task: str) -> None:
    before = f"reward before fine-tuning: {reward_label(other)}" if other else "KL to the reference (nats per response)"
    axis.set_xlabel(before)
    axis.set_ylabel(f"reward after {task}: {reward_label(reward)}")
    axis.margins(0.12)


def _panels(count: int, columns: int, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Return (figure, [axis, ...]) of `count` panels, at most `columns` (1 to 3) in a row; share: equal scales."""
    columns = min(count, columns)
    rows = -(-count // columns)
    width, height = SIZES[columns]
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flatten().tolist()
    for axis in axes[count:]:
        axis.set_axis_off()
        axis.set_label(VACANT)
    return figure, axes[:count]


def _legend(figure: Figure, results: Results, arms: Iterable[str]) -> None:
    """Place the legend where the last row has room for a panel; else below all panels."""
    handles = [Line2D([], [], linewidth=2.4, markersize=5, label=arm, **look(results, arm)) for arm in arms]
    place = next((axis for axis in figure.axes if axis.get_label() == VACANT), None)
    if place:
        place.legend(handles=handles, loc="center", handlelength=3, labelspacing=0.8)
        return
    rows = -(-len(handles) // (5 if figure.get_figwidth() > 8 else 3))
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), handlelength=3)


def _save(figure: Figure, path: Path, caption: str) -> Picture:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return Picture(path, caption)


def _landscape_caption(results: Results, task: str, contents: list[tuple[str, str, list[str]]], drawn: set[str]) -> str:
    kl = results.kl_name("finetune", task)
    shown = ", ".join(dict.fromkeys(reward_label(reward) for _, reward, _ in contents))
    absent = [arm for arm in dict.fromkeys(arm for _, _, arms in contents for arm in arms) if arm not in drawn]
    return (
        f"Reward kept against distance travelled while fine-tuning on {task}. Horizontal: KL from the policy before this "
        f"fine-tuning ({kl}: {KL_NAMES[kl]}). Vertical: mean reward on held-out prompts of stage one ({shown}). "
        "Thin lines: one seed each, its probes in order of their KL; dots: where a seed ended. Seeds reach different KL "
        "at the same step, so each seed's line is interpolated and the thick line is the mean at equal KL, drawn only "
        f"where all seeds of the arm have been. {_band_text(results, drawn, 'finetune', task)}"
        + (f" Not drawn, for no finished run has both values: {', '.join(absent)}." if absent else "")
    )


def _frontier_caption(results: Results, field: str, task: str, baselines: bool) -> str:
    text = (
        f"Frontiers of {field}: reward on held-out prompts of stage one after fine-tuning on {task}, against "
        f"the KL to the reference at the end of stage one ({results.kl_name('train') or 'not measured'}) and against the "
        f"other task's reward before fine-tuning. One line for each objective, joined in the order of {field}. "
        "Points: mean over the seeds; bars: ±1 sample standard deviation (none with one seed)."
    )
    return text + (" Crosses: baseline arms at the same beta, or all where none has it." if baselines else "")


def _band_text(results: Results, arms: Iterable[str], stage: str, task: str) -> str:
    """Explain how the bands of these arms were computed."""
    counts = results.finished(stage, task).groupby("arm").size()[list(arms)]
    fewest, most = counts.min(), counts.max()
    if most == 1:
        return "One seed for each arm: there is no band."
    some = f"{fewest} seeds" if fewest == most else f"{fewest} to {most} seeds"
    single = " Arms with one seed have no band." if fewest == 1 else ""
    return f"Band: ±1 sample standard deviation over the seeds ({some}).{single}"


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
