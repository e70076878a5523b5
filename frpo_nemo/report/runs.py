"""Finds which arm, task and seed each run directory is, for runs that no study made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from frpo_nemo.errors import ConfigError
from frpo_nemo.study.results import ResultRow, read_config, read_records, row_of_run


def rows_of_runs(run_dirs: list[Path]) -> list[ResultRow]:
    """Return the rows of run directories, relative to the working directory as the paths in their configurations are.

    A run with probes is a fine-tuning. Its arm is the run of stage one that it began from (model.path), which is added
    if it was not given, or model.path itself. Its task has the directory's name, or the data's path if runs on the
    same data have several names. Arms have the names of their directories; if an objective ran with several seeds,
    their names are the objective's settings. Raises ConfigError for a directory that isn't a run, or one that has
    neither probes nor validation rewards.
    """
    directories = list(dict.fromkeys(Path(os.path.relpath(path)) for path in run_dirs))
    stages = {path: _stage(path) for path in directories}
    origins = {path: _origin(path) for path in directories if stages[path] == "finetune"}
    trained = [path for path in directories if stages[path] == "train"]
    trained += [path for path in dict.fromkeys(origins.values()) if path and path not in trained]
    names, tasks = _arm_names(trained), _task_names(list(origins))
    rows = [row_of_run(path, arm=names[path], seed=_seed(path), stage="train") for path in trained]
    for path, origin in origins.items():
        arm, seed = (names[origin], _seed(origin)) if origin else (read_config(path)["model"]["path"], _seed(path))
        rows.append(row_of_run(path, arm=arm, seed=seed, stage="finetune", task=tasks[path]))
    return rows


def _stage(run_dir: Path) -> str:
    config, names = read_config(run_dir), {name for record in read_records(run_dir) for name in record}
    if any(name.startswith("probe/") for name in names):
        return "finetune"
    if "objective" in config and any(name.startswith("validation/reward/") for name in names):
        return "train"
    raise ConfigError(
        f"{run_dir} has no probe/ metrics (a fine-tuning with probe.interval) and no validation/reward/ metrics "
        "(a run of recipes/frpo.py with trainer.val_interval): there is nothing to report."
    )


def _origin(run_dir: Path) -> Path | None:
    """Return the run of stage one whose export this run began from; None if it is not on this machine."""
    start = Path(os.path.relpath(Path(read_config(run_dir)["model"]["path"]).parent))
    known = (start / "config.yaml").is_file() and (start / "metrics.jsonl").is_file()
    return start if known and "objective" in read_config(start) else None


def _seed(run_dir: Path) -> int:
    return read_config(run_dir)["trainer"]["seed"]


def _arm_names(run_dirs: list[Path]) -> dict[Path, str]:
    labels = {path: _objective_label(read_config(path)["objective"]) for path in run_dirs}
    runs = {(labels[path], _seed(path)) for path in run_dirs}
    if len(set(labels.values())) < len(runs) == len(run_dirs):  # an objective ran with several seeds
        return labels
    names = {path: path.name for path in run_dirs}
    return names if len(set(names.values())) == len(names) else {path: str(path) for path in run_dirs}


def _task_names(run_dirs: list[Path]) -> dict[Path, str]:
    data = {path: " + ".join(source["path"] for source in read_config(path)["data"]["train"]) for path in run_dirs}
    names: dict[str, set[str]] = {}
    for path in run_dirs:
        names.setdefault(data[path], set()).add(path.name)
    return {path: path.name if len(names[data[path]]) == 1 else data[path] for path in run_dirs}


def _objective_label(objective: dict[str, Any]) -> str:
    fields = {key.rstrip("_"): value for key, value in objective.items() if key not in ("name", "_target_")}
    name = objective.get("name") or objective["_target_"].rpartition(".")[2]
    return " ".join([name, *(f"{key}={value}" for key, value in fields.items())])
