"""What all figures of a report share: the look of an arm, panels, the legend, captions about bands, saving."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from frpo_nemo.evaluation.plots import COLOURS, STYLE
from frpo_nemo.evaluation.study import Study

MARKERS = "osD^vP"
DOTS_PER_INCH = 140
VACANT = "vacant"  # label of the place of a panel that is not there
SIZES = {1: (7.0, 4.6), 2: (5.5, 4.0), 3: (4.4, 3.4)}  # columns: width and height of a panel in inches


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


def styled(draw: Callable) -> Callable:
    """Decorator of functions that draw: matplotlib is imported, and has the report's style, only within."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def style_of(study: Study, arm: str) -> dict[str, str]:
    """Colour, line style and marker of an arm, the same in all figures of a study. Baselines are dashed; from the
    eighth arm on, colours come again with another marker."""
    index = study.arms.index(arm)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": "--" if study.is_baseline(arm) else "-",
        "marker": MARKERS[index // len(COLOURS) % len(MARKERS)],
    }


def panels(count: int, columns: int, *, share: bool = False):
    """(figure, [axis, ...]) of `count` panels, at most `columns` (1 to 3) in a row; share: equal scales."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    width, height = SIZES[columns]
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flatten().tolist()
    for axis in axes[count:]:
        axis.set_axis_off()
        axis.set_label(VACANT)
    return figure, axes[:count]


def legend(figure, study: Study, arms: Iterable[str]) -> None:
    """In the place of a panel that the last row has room for; else below all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=2.4, markersize=5, label=arm, **style_of(study, arm)) for arm in arms]
    place = next((axis for axis in figure.axes if axis.get_label() == VACANT), None)
    if place:
        place.legend(handles=handles, loc="center", handlelength=3, labelspacing=0.8)
        return
    rows = -(-len(handles) // (5 if figure.get_figwidth() > 8 else 3))
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // rows), handlelength=3)


def save(figure, path: Path, caption: str) -> Picture:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return Picture(path, caption)


def band_text(seeds: Iterable[int]) -> str:
    """How bands were computed; `seeds`: the number of seeds of each arm drawn."""
    counts = sorted(set(seeds))
    if counts == [1]:
        return "One seed for each arm: there is no band."
    some = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    single = " Arms with one seed have no band." if counts[0] == 1 else ""
    return f"Band: ±1 sample standard deviation over the seeds ({some}).{single}"
