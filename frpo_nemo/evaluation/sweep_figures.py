"""Pictures of sweeps: frontiers, and the landscape at each lambda. The numbers are in sweeps.py and landscape.py."""

from __future__ import annotations

from pathlib import Path

from frpo_nemo.evaluation.figures import Picture, panels, save, styled
from frpo_nemo.evaluation.landscape import draw_arms
from frpo_nemo.evaluation.plots import COLOURS
from frpo_nemo.evaluation.statistics import Summary
from frpo_nemo.evaluation.study import Study, reward_label
from frpo_nemo.evaluation.sweeps import FrontierPoint, Sweep, baselines_of, frontier, frontier_point, kept_rewards

SYMBOLS = {"lambda_": "λ", "beta": "β"}
DASHES = ("-", "--", ":", "-.")
Panel = tuple[str, str | None]  # (reward kept: vertical, other reward before: horizontal, None for the KL)


@styled
def draw_frontier(study: Study, sweeps: list[Sweep], task: str, path: Path) -> Picture | None:
    """What sweeps of one field trade: the reward of each stage-one task after fine-tuning, against KL to the reference
    and against the other tasks' rewards before. None if fewer than two arms of every sweep finished."""
    lines = {sweep: frontier(study, sweep, task) for sweep in sweeps}
    lines = {sweep: points for sweep, points in lines.items() if len(points) > 1}
    swept = tuple(point.arm for points in lines.values() for point in points)
    singles = [frontier_point(study, arm, task) for arm in baselines_of(study, swept)] if lines else []
    contents = [panel for panel in _panels(study) if any(_at(p, panel) for points in lines.values() for p in points)]
    if not contents:
        return None
    figure, axes = panels(len(contents), 2)
    for axis, panel in zip(axes, contents, strict=True):
        for number, (sweep, points) in enumerate(lines.items()):
            known = [point for point in points if _at(point, panel)]
            colour = COLOURS[number % len(COLOURS)]
            _draw_line(axis, known, panel, colour, linestyle=DASHES[number % len(DASHES)], label=sweep.label)
            for point in known:
                _draw_point(axis, point, panel, color=colour, marker="o", markersize=6)
                _label(axis, f"{SYMBOLS[sweep.field]} = {point.value:g}", point, panel, colour, above=number % 2 == 0)
        for point in singles:
            if _at(point, panel):
                _draw_point(axis, point, panel, color="#222222", marker="X", markersize=8, label=point.arm)
        _name_axes(axis, panel, task)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return save(figure, path, _caption(sweeps[0], task, study.kl_name("train"), bool(singles)))


def draw_landscape_by_value(study: Study, sweep: Sweep, task: str, reward: str, path: Path) -> Picture | None:
    """A small landscape of one reward for each value of the sweep, against the same baselines."""
    baselines = baselines_of(study, sweep.arms)
    contents = [(reward, [arm, *baselines]) for arm in sweep.arms]
    titles = [f"{sweep.objective}, {_symbol(sweep)} {value:g}: {reward_label(reward)}" for value in sweep.values]
    return draw_arms(study, task, contents, titles, path, columns=3, share=True)


def _panels(study: Study) -> list[Panel]:
    kept = kept_rewards(study)
    return [(reward, other) for reward in kept for other in (None, *(name for name in kept if name != reward))]


def _at(point: FrontierPoint, panel: Panel) -> tuple[Summary, Summary] | None:
    """(horizontal, vertical) of a point; None if one was not measured."""
    kept, other = panel
    x, y = point.kl if other is None else point.before.get(other), point.after.get(kept)
    return (x, y) if x and y else None


def _draw_line(axis, points: list[FrontierPoint], panel: Panel, colour: str, **style) -> None:
    values = [_at(point, panel) for point in points]
    means = [x.mean for x, _ in values], [y.mean for _, y in values]
    axis.plot(*means, color=colour, linewidth=1.5, zorder=1, **style)


def _draw_point(axis, point: FrontierPoint, panel: Panel, **style) -> None:
    x, y = _at(point, panel)
    bars = dict(xerr=x.std or 0.0, yerr=y.std or 0.0, linestyle="none", elinewidth=0.9)
    axis.errorbar(x.mean, y.mean, **bars, **style)


def _label(axis, text: str, point: FrontierPoint, panel: Panel, colour: str, *, above: bool) -> None:
    x, y = _at(point, panel)
    shift = (7, 7) if above else (7, -14)
    axis.annotate(text, (x.mean, y.mean), xytext=shift, textcoords="offset points", fontsize=9, color=colour)


def _name_axes(axis, panel: Panel, task: str) -> None:
    kept, other = panel
    before = f"reward before fine-tuning: {reward_label(other)}" if other else "KL to the reference (nats per response)"
    axis.set_xlabel(before)
    axis.set_ylabel(f"reward after {task}: {reward_label(kept)}")
    axis.margins(0.12)


def _caption(sweep: Sweep, task: str, kl_name: str | None, singles: bool) -> str:
    text = (
        f"Frontiers of {_symbol(sweep)}: reward on held-out prompts of stage one after fine-tuning on {task}, against "
        f"the KL to the reference at the end of stage one ({kl_name or 'not measured'}) and against the other task's "
        f"reward before fine-tuning. One line for each objective, joined in the order of {_symbol(sweep)}. "
        "Points: mean over the seeds; bars: ±1 sample standard deviation (none with one seed)."
    )
    return text + (" Crosses: baseline arms at the same beta, or all where none has it." if singles else "")


def _symbol(sweep: Sweep) -> str:
    return sweep.field.rstrip("_")
