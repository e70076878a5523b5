"""The reward-against-KL landscape (figure 2 of arXiv 2602.08813): how much reward later fine-tuning takes on its way
away from the policy. The curves, which are numbers, and their picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from frpo_nemo.evaluation.figures import Picture, band_text, legend, panels, save, style_of, styled
from frpo_nemo.evaluation.study import KL_NAMES, Row, Study, reward_label

GRID = 101  # KL values at which the seeds are averaged


@dataclass(frozen=True)
class Curve:
    """Reward against KL for one arm.

    by_seed: {seed: (kl, reward)}, each probe of the run, by growing KL; ends: {seed: (kl, reward)} at the last probe.
    kl, mean, std [GRID]: over the KL that every seed reaches; std (sample, over the seeds) is None for one seed, and
    kl, mean are empty if the seeds have no KL in common.
    """

    by_seed: dict[int, tuple[np.ndarray, np.ndarray]]
    ends: dict[int, tuple[float, float]]
    kl: np.ndarray
    mean: np.ndarray
    std: np.ndarray | None


def reward_curve(runs: dict[int, Row], kl_name: str, reward: str) -> Curve | None:
    """{seed: finetune row} -> the arm's curve; None if no run has two probes with both values.

    Fine-tuning moves away from the policy, but a measured KL may fall between two probes: the probes of a seed are put
    in order of their KL (the mean reward where KL is equal) and joined by straight lines. The mean and the spread over
    seeds are taken at equal KL, from the largest of the seeds' first KLs to the smallest of their last.
    """
    probes = {seed: _probes(row, kl_name, reward) for seed, row in runs.items()}
    probes = {seed: points for seed, points in probes.items() if len(points) > 1}
    if not probes:
        return None
    by_seed = {seed: _by_growing_kl(points) for seed, points in probes.items()}
    ends = {seed: tuple(points[-1]) for seed, points in probes.items()}
    low = max(kl[0] for kl, _ in by_seed.values())
    high = min(kl[-1] for kl, _ in by_seed.values())
    if high <= low:
        return Curve(by_seed, ends, np.empty(0), np.empty(0), None)
    grid = np.linspace(low, high, GRID)
    rewards = np.stack([np.interp(grid, kl, values) for kl, values in by_seed.values()])
    std = rewards.std(axis=0, ddof=1) if len(rewards) > 1 else None
    return Curve(by_seed, ends, grid, rewards.mean(axis=0), std)


def draw_landscape(study: Study, task: str, path: Path) -> Picture | None:
    """The landscape of one downstream task: a panel for each reward, a curve for each arm. None without a KL."""
    rewards = study.reward_names()
    titles = [f"reward: {reward_label(reward)}" for reward in rewards]
    return draw_arms(study, task, [(reward, study.arms) for reward in rewards], titles, path)


@styled
def draw_arms(
    study: Study,
    task: str,
    contents: list[tuple[str, list[str]]],
    titles: list[str],
    path: Path,
    *,
    columns: int = 2,
    share: bool = False,
) -> Picture | None:
    """Panels with the curves of some arms each: [(reward, arms)]. None if there is nothing to draw."""
    kl_name = study.kl_name("finetune", task)
    if kl_name is None or not contents:
        return None
    figure, axes = panels(len(contents), columns, share=share)
    drawn: dict[str, None] = {}
    for axis, title, (reward, arms) in zip(axes, titles, contents, strict=True):
        for arm in arms:
            curve = reward_curve(study.runs(arm, "finetune", task), kl_name, reward)
            if curve is not None:
                _draw_curve(axis, curve, style_of(study, arm))
                drawn[arm] = None
        axis.set_title(title)
        axis.set_xlabel("KL of fine-tuning (nats per response)")
    if not drawn:
        return None
    figure.supylabel("reward on held-out prompts", fontsize=11)
    arms = [arm for arm in study.arms if arm in drawn]
    legend(figure, study, arms)
    return save(figure, path, _caption(study, task, kl_name, contents, arms))


def _draw_curve(axis, curve: Curve, style: dict) -> None:
    colour, dashes = style["color"], style["linestyle"]
    if len(curve.by_seed) > 1:
        for kl, reward in curve.by_seed.values():
            axis.plot(kl, reward, color=colour, alpha=0.22, linewidth=0.7, zorder=1)
    if curve.std is not None:
        axis.fill_between(curve.kl, curve.mean - curve.std, curve.mean + curve.std, color=colour, alpha=0.11, lw=0)
    axis.plot(curve.kl, curve.mean, color=colour, linestyle=dashes, linewidth=2.4, zorder=3)
    for kl, reward in curve.ends.values():
        axis.plot(kl, reward, marker=style["marker"], color=colour, markersize=4, alpha=0.8, linestyle="none", zorder=4)


def _caption(study: Study, task: str, kl_name: str, contents, drawn: list[str]) -> str:
    shown = ", ".join(reward_label(reward) for reward in dict.fromkeys(reward for reward, _ in contents))
    absent = [arm for arm in dict.fromkeys(arm for _, arms in contents for arm in arms) if arm not in drawn]
    band = band_text(len(study.runs(arm, "finetune", task)) for arm in drawn)
    return (
        f"Reward kept against distance travelled while fine-tuning on {task}. Horizontal: KL from the policy before this "
        f"fine-tuning ({kl_name}: {KL_NAMES[kl_name]}). Vertical: mean reward on held-out prompts of stage one ({shown}). "
        "Thin lines: one seed each, its probes in order of their KL; dots: where a seed ended. Seeds reach different KL "
        "at the same step, so each seed's line is interpolated and the thick line is the mean at equal KL, drawn only "
        f"where all seeds of the arm have been. {band}"
        + (f" Not drawn, for no finished run has both values: {', '.join(absent)}." if absent else "")
    )


def _probes(row: Row, kl_name: str, reward: str) -> np.ndarray:
    """[probes, 2] in the order of the steps, where both values are finite."""
    pairs = [(point.get(kl_name), point.get(reward)) for point in row["points"]]
    values = np.array([pair for pair in pairs if None not in pair], dtype=float).reshape(-1, 2)
    return values[np.isfinite(values).all(axis=1)]


def _by_growing_kl(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kl, index = np.unique(points[:, 0], return_inverse=True)
    return kl, np.bincount(index, points[:, 1]) / np.bincount(index)
