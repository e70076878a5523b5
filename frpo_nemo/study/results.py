"""Rows of a study, one for each run: of stage one ("train"), of a later fine-tuning ("finetune"), or of a model's evaluation
("evaluate").

Reads and checks results.jsonl, and makes a row from a run's directory (config.yaml, metrics.jsonl, environment.jsonl). The
run itself need not be running. study.py interprets rows together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from frpo_nemo.errors import ConfigError
from frpo_nemo.records import read_jsonl
from frpo_nemo.training.start_record import starts

ResultRow = dict[str, Any]
SECTIONS = ("objective", "optim", "data", "rollout", "reward")  # sections of config.yaml in which two arms can differ
_REQUIRED = ("arm", "seed", "stage", "task", "status", "settings", "points")


def read_results(path: str | Path) -> list[ResultRow]:
    """Return the checked rows of a results.jsonl. A last line without its end is still being written and is left out.

    Raises ConfigError for a missing file and for an invalid line, naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: give a results.jsonl, or a directory that has one.")
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}.") from error
        rows.append(check_row(row, f"{path}, line {number}"))
    return rows


def check_row(row: Any, where: str = "row") -> ResultRow:
    """Return `row` itself if it is valid; raise ConfigError, whose message begins with `where`, if not."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where} must be an object with {', '.join(_REQUIRED)}.")
    missing = [key for key in _REQUIRED if key not in row]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    if row["stage"] not in ("train", "finetune", "evaluate"):
        raise ConfigError(f"{where}: stage={row['stage']!r} must be train, finetune or evaluate.")
    if row["status"] not in ("finished", "failed"):
        raise ConfigError(f"{where}: status={row['status']!r} must be finished or failed.")
    if row["stage"] == "evaluate":
        if not {"evaluation", "scores"} <= set(row):
            raise ConfigError(f"{where} is of an evaluation and lacks evaluation or scores.")
        return row
    if (row["task"] is None) != (row["stage"] == "train"):
        raise ConfigError(f"{where}: task={row['task']!r}; a finetune row names its task, a train row has null.")
    steps = [point.get("step") for point in row["points"]]
    if None in steps or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ConfigError(f"{where}: the steps of its points must increase, but are {steps}.")
    if row["status"] == "finished" and not steps:
        raise ConfigError(f"{where}: a finished run needs points.")
    return row


def row_of_evaluation(
    directory: str | Path, *, arm: str, seed: int, task: str | None, evaluation: str, error: str | None = None
) -> ResultRow:
    """Return the row of what recipes/evaluate.py measured in `directory`, of the model after `task` (None: after stage one).
    The evaluation has failed if there is an `error` or no results."""
    path = Path(directory) / "results.json"
    if error is None and not path.is_file():
        error = f"{path} was not written"
    return {
        "arm": arm,
        "seed": seed,
        "stage": "evaluate",
        "task": task,
        "evaluation": evaluation,
        "status": "finished" if error is None else "failed",
        "error": error,
        "run_dir": str(directory),
        "settings": {},
        "points": [],
        "scores": json.loads(path.read_text()) if path.is_file() else {},
    }


def row_of_run(
    run_dir: str | Path, *, arm: str, seed: int, stage: str, task: str | None = None, error: str | None = None
) -> ResultRow:
    """Return the row of a run: stage "train" (its points are validations) or "finetune" of a `task` (its points are probes,
    with the run's own validation as downstream/NAME).

    The run has finished if it logged its last step; otherwise it failed, with `error` or where it stopped. With an
    `error`, files that the run did not get to write may be missing. tokens and seconds are those of the steps.
    Raises ConfigError if run_dir isn't a run, or is a finished one without points to report.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir) if error is None or (run_dir / "config.yaml").exists() else {}
    records = read_records(run_dir) if error is None or (run_dir / "metrics.jsonl").exists() else []
    points = _points(records, stage)
    steps = max((record["step"] for record in records if "loss" in record), default=0)
    max_steps = config.get("trainer", {}).get("max_steps")
    if error is None and steps != max_steps:
        error = f"stopped after step {steps} of {max_steps}"
    if error is None and not points:
        option = "trainer.val_interval" if stage == "train" else "probe.interval"
        raise ConfigError(f"{run_dir} has nothing to report: it ran without {option}.")
    row = {
        "arm": arm,
        "seed": seed,
        "stage": stage,
        "task": task,
        "status": "finished" if error is None else "failed",
        "error": error,
        "run_dir": str(run_dir),
        "settings": _settings(config, stage),
        "steps": steps,
        "tokens": round(sum((r.get("tokens_per_second") or 0) * (r.get("seconds/step") or 0) for r in records)),
        "seconds": round(sum(r.get("seconds/step") or 0 for r in records), 3),
        "environment": _environment(run_dir),
        "points": points,
    }
    return check_row(row, str(run_dir))


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return config.yaml of a run."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run's directory: it has no config.yaml.")
    return OmegaConf.to_container(OmegaConf.load(path))


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl, in the order of logging."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no metrics.jsonl: the run has not made a step.")
    return read_jsonl(path)


def _points(records: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Return one point for each step that was measured. In stage one a validation is the point; in fine-tuning the probe is
    the point, and the validation goes below downstream/."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        values = {}
        for name, value in record.items():
            kind, _, rest = name.partition("/")
            if kind == "probe" and stage == "finetune" or kind == "validation" and stage == "train":
                values[rest] = value
            elif kind == "validation":
                values["downstream/" + ("reward" if rest == "reward/mean" else rest)] = value
        if values:
            by_step.setdefault(record["step"], {"step": record["step"]}).update(values)
    return [by_step[step] for step in sorted(by_step)]


def _settings(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """Return what may differ between arms. The model's path isn't a setting: later fine-tuning begins with each arm's own."""
    settings = {name: config[name] for name in SECTIONS if name in config}
    trainer = config.get("trainer", {})
    settings |= {name: trainer[name] for name in ("max_steps", "updates_per_rollout") if name in trainer}
    if stage == "train" and "model" in config:
        settings["model"] = {"path": config["model"]["path"]}
    return settings


def _environment(run_dir: Path) -> dict[str, Any]:
    """Return the record of the run's last start."""
    found: dict[str, Any] = next(reversed(starts(run_dir)), {})
    return {name: found[name] for name in ("commit", "packages", "world_size") if name in found}
