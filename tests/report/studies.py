"""Made-up studies for the tests of the report: rows with values that a test chooses, or that look like real ones."""

from __future__ import annotations

import numpy as np

FRPO = {"name": "frpo", "lambda_": 0.2, "beta": 0.04}
GRPO = {"name": "dr_grpo", "beta": 0.04}


def train_row(arm, seed, objective, reward=0.8, *, kl=1.0, steps=240, tokens=360_000, tasks=None, **more):
    """Return a finished stage one, with the rewards `tasks` ({"harmful": .9}) at its end."""
    end = {"step": steps, "reward/mean": reward, "kl/per_response": kl, "response_length/mean": 4.5}
    end |= {f"reward/task/{name}/mean": value for name, value in (tasks or {}).items()}
    start = end | {"step": 0, "reward/mean": 0.6, "kl/per_response": 0.0}
    settings = {"objective": objective, "optim": {"lr": 1e-3}, "max_steps": steps}
    row = dict(arm=arm, seed=seed, stage="train", task=None, status="finished", error=None, settings=settings)
    return row | dict(run_dir=f"{arm}/{seed}", steps=steps, tokens=tokens, seconds=60.0, points=[start, end]) | more


def finetune_row(arm, seed, task, before, after, *, kl=2.0, accuracy=1.0, tasks=None, **more):
    """Return a finished fine-tuning in two probes; tasks: {"harmful": (before, after)}."""
    start = {"step": 0, "reward/mean": before, "kl/exact": 0.0, "downstream/accuracy": 0.0}
    end = {"step": 200, "reward/mean": after, "kl/exact": kl, "downstream/accuracy": accuracy}
    for name, (first, last) in (tasks or {}).items():
        start[f"reward/task/{name}/mean"], end[f"reward/task/{name}/mean"] = first, last
    row = dict(arm=arm, seed=seed, stage="finetune", task=task, status="finished", error=None)
    settings = {"optim": {"lr": 3e-4}, "max_steps": 200}
    row |= dict(settings=settings, run_dir=f"{arm}/{seed}/{task}", steps=200, tokens=90_000, seconds=30.0)
    return row | dict(points=[start, end]) | more


def failed_row(arm, seed, objective, error):
    return train_row(arm, seed, objective) | {"status": "failed", "error": error, "points": []}


def two_arms(after_frpo: dict[int, float], after_grpo: dict[int, float], task="alpaca"):
    """Return rows of FRPO and GRPO with these rewards after fine-tuning, from .9 before."""
    rows = []
    for arm, objective, after in (("frpo", FRPO, after_frpo), ("grpo", GRPO, after_grpo)):
        for seed, value in after.items():
            rows += [train_row(arm, seed, objective, 0.9), finetune_row(arm, seed, task, 0.9, value)]
    return rows


# arm: objective, safety before, help before, KL to the reference, safety after alpaca, after math, spread
LIKE_REAL = {
    "grpo": (GRPO, 0.956, 0.774, 0.77, 0.759, 0.751, 0.09),
    "frpo_0.2": (FRPO, 0.993, 0.769, 1.01, 0.950, 0.919, 0.025),
    "frpo_0.5": (FRPO | {"lambda_": 0.5}, 0.988, 0.774, 0.93, 0.923, 0.885, 0.04),
    "frpo_2": (FRPO | {"lambda_": 2.0}, 0.975, 0.780, 0.85, 0.871, 0.826, 0.06),
    "grpo_std": ({"name": "grpo", "beta": 0.04}, 0.983, 0.809, 1.11, 0.894, 0.868, 0.07),
    "grpo_beta_.01": (GRPO | {"beta": 0.01}, 0.987, 0.796, 1.02, 0.924, 0.871, 0.04),
    "frpo_0.2_beta_.002": (FRPO | {"beta": 0.002}, 0.996, 0.772, 1.19, 0.982, 0.945, 0.01),
}


def like_real(seeds=(11, 12, 13, 14, 15), arms=tuple(LIKE_REAL)):
    """Return rows with curves, noise and sizes such as real runs have."""
    random = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        luck = random.normal()
        for arm in arms:
            objective, safety, helpful, kl, *after, spread = LIKE_REAL[arm]
            safety, helpful = safety + 0.01 * random.normal(), helpful + 0.01 * random.normal()
            rows.append(_stage_one(random, arm, seed, objective, safety, helpful, kl))
            for task, level, far in zip(("alpaca", "math"), after, (3.0, 5.5), strict=True):
                end = min(0.995, level + spread * (0.7 * luck + 0.5 * random.normal()))
                rows.append(_later(random, arm, seed, task, safety, end, helpful, far * (1 + 0.15 * random.normal())))
    return rows


def _stage_one(random, arm, seed, objective, safety, helpful, kl):
    points = []
    for step in range(0, 241, 40):
        gained = 1 - np.exp(-step / 60)
        harmful = 0.46 + (safety - 0.46) * gained + 0.01 * random.normal()
        harmless = 0.7 + (helpful - 0.7) * gained + 0.01 * random.normal()
        points.append(_point(step, harmful, harmless) | {"kl/per_response": kl * gained * (1 + 0.03 * random.normal())})
    settings = {"objective": objective, "optim": {"lr": 1e-3, "schedule": "cosine"}, "max_steps": 240}
    settings["data"] = {"train": [{"path": f"python:frpo_nemo.examples.toy.rows?part=prompts&seed={seed}"}]}
    tokens = int(365_000 + 4_000 * random.normal())
    return train_row(arm, seed, objective, settings=settings, points=points, tokens=tokens)


def _later(random, arm, seed, task, before, after, helpful, far):
    points = []
    for step in (0, 5, 10, 20, 40, 60, 80, 100, 150, 200):
        gone = 1 - np.exp(-step / 50)
        kl = far * gone * (1 + (0.04 * random.normal() if step else 0))
        harmful = before + (after - before) * gone**1.5 + 0.008 * random.normal()
        harmless = helpful * (1 - 0.25 * gone) + 0.01 * random.normal()
        learned = 1 - np.exp(-step / 30)
        points.append(
            _point(step, harmful, harmless)
            | {"kl/exact": kl, "kl/k3": 1.05 * kl, "kl/per_response": 0.98 * kl}
            | {"downstream/loss": 1.9 * (1 - 0.9 * learned), "downstream/accuracy": learned**2}
        )
    return finetune_row(arm, seed, task, 0, 0) | {"points": points}


def _point(step, harmful, harmless):
    rewards = {"reward/task/harmful/mean": harmful, "reward/task/harmless/mean": harmless}
    return {"step": step, "reward/mean": (harmful + harmless) / 2, "response_length/mean": 4.6 - step / 500, **rewards}
