"""Curves over training steps: of stage one, and of later fine-tuning. The averages, which are numbers, and pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from frpo_nemo.evaluation.endpoints import downstream_names
from frpo_nemo.evaluation.figures import Picture, band_text, legend, panels, save, style_of, styled
from frpo_nemo.evaluation.study import Row, Study, reward_label, series

LABELS = {
    "downstream/loss": "held-out loss (nats per token)",
    "downstream/accuracy": "held-out accuracy",
    "downstream/token_accuracy": "held-out token accuracy",
    "downstream/reward": "held-out reward",
    "response_length/mean": "response length (tokens)",
}


def mean_by_step(runs: dict[int, Row], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """(steps, mean, sample std over the seeds or None for one) at the steps where every run that has the metric at all
    has a finite value; None if there is no such step."""
    found = [dict(zip(*series(row, name), strict=True)) for row in runs.values()]
    found = [values for values in found if values]
    steps = sorted(set.intersection(*(set(values) for values in found))) if found else []
    if not steps:
        return None
    values = np.array([[run[step] for step in steps] for run in found])
    return np.array(steps), values.mean(axis=0), values.std(axis=0, ddof=1) if len(found) > 1 else None


def draw_stage_one(study: Study, path: Path) -> Picture | None:
    """Reward and KL to the reference by step of stage one. None if no run of it is there."""
    kl = study.kl_name("train")
    contents = {name: f"reward ({reward_label(name)})" for name in study.reward_names()}
    if kl:
        contents[kl] = "KL to the reference (nats per response)"
    caption = "Stage one: reward on held-out prompts"
    caption += f", and {kl} from the reference policy, by training step." if kl else ", by training step."
    return _draw(study, "train", None, contents, caption, path)


def draw_finetuning(study: Study, task: str, path: Path) -> Picture | None:
    """What was learned and what was kept, by step of fine-tuning on `task`. None if no run finished."""
    contents = {name: f"{task}: {LABELS[name]}" for name in downstream_names(study, task)}
    contents |= {name: f"stage-one reward ({reward_label(name)})" for name in study.reward_names()}
    contents["response_length/mean"] = "stage-one prompts: response length (tokens)"
    caption = (
        f"Fine-tuning on {task}: the task's own held-out metrics, then reward and length of responses to held-out "
        "prompts of stage one, by fine-tuning step."
    )
    return _draw(study, "finetune", task, contents, caption, path)


@styled
def _draw(study: Study, stage: str, task: str | None, contents: dict[str, str], caption: str, path: Path):
    runs = {arm: study.runs(arm, stage, task) for arm in study.arms}
    curves = {name: {arm: curve for arm in study.arms if (curve := mean_by_step(runs[arm], name))} for name in contents}
    curves = {name: by_arm for name, by_arm in curves.items() if by_arm}
    if not curves:
        return None
    figure, axes = panels(len(curves), 2 if len(curves) in (2, 4) else 3)
    for axis, (name, by_arm) in zip(axes, curves.items(), strict=True):
        for arm, (steps, mean, std) in by_arm.items():
            style = style_of(study, arm)
            if std is not None:
                axis.fill_between(steps, mean - std, mean + std, color=style["color"], alpha=0.12, lw=0)
            axis.plot(steps, mean, linewidth=2, markersize=3.5, **style)
        axis.set_title(contents[name])
        axis.set_xlabel("step")
    arms = [arm for arm in study.arms if any(arm in by_arm for by_arm in curves.values())]
    legend(figure, study, arms)
    band = band_text(len(runs[arm]) for arm in arms)
    return save(figure, path, f"{caption} Lines: mean over the seeds, at the steps that all have. {band}")
