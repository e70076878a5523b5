"""A forgetting study: train each arm, fine-tune each result on each later task, for each seed, and keep what was seen.

Every part is a recipe in processes of its own, the same command that a user would type, with its output beside its run
directory. results.jsonl has a row for each that ended; a finished part is not repeated, a failed or interrupted one
continues from its checkpoints when the study is started again.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.results import Row, read_results, row_of_run

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TRAINING_RECIPES = ("frpo", "sft")
LAST_LINES = 15  # of a failed run's output, kept in its row


@dataclass
class PartConfig:
    """A recipe with its configuration. In texts {seed}, {out} (of the study) and {dir} (of the seed) are filled in."""

    recipe: str = "frpo"
    config: str | None = None
    overrides: list[str] = field(default_factory=list)


@dataclass
class StudyConfig:
    """configs/forgetting.yaml explains the fields."""

    out: str = field(default="???", metadata={"example": "runs/forgetting"})
    seeds: list[int] = field(default_factory=lambda: [1])
    num_seeds: int | None = None
    prepare: list[PartConfig] = field(default_factory=list)
    model: str = field(default="???", metadata={"example": "Qwen/Qwen2.5-7B-Instruct"})
    train: PartConfig = field(default_factory=PartConfig)
    arms: dict[str, list[str]] = field(default_factory=dict)
    tasks: dict[str, PartConfig] = field(default_factory=dict)
    processes: int = 1
    jobs: int = 1
    launcher: str | None = None


@dataclass(frozen=True)
class Part:
    """One run of the study: what it is, its command, and the directory that it writes."""

    seed: int
    arm: str | None  # None: preparation of the seed
    task: str | None  # None: stage one
    recipe: str
    arguments: list[str]
    directory: Path

    @property
    def stage(self) -> str:
        return "prepare" if self.arm is None else "train" if self.task is None else "finetune"

    @property
    def title(self) -> str:
        return " ".join(str(word) for word in (f"seed {self.seed}", self.arm, self.task or self.stage) if word)

    @property
    def recorded(self) -> list[str]:
        """The arguments as they are written down and compared: without secrets."""
        return redact.arguments(self.arguments)

    @property
    def row_fields(self) -> dict[str, Any]:
        return dict(arm=self.arm, seed=self.seed, stage=self.stage, task=self.task)


class ForgettingStudy:
    """The parts of a study, and the record of those that ended."""

    def __init__(self, config: StudyConfig, check: Callable[[str, list[str]], None]):
        """check(recipe, arguments): raises ConfigError for a command whose configuration is wrong. Nothing is run
        before all commands of all arms and tasks were checked."""
        _check(config)
        config = replace(config, seeds=config.seeds[: config.num_seeds])
        self.config, self.out = config, Path(config.out)
        self._lock = threading.Lock()
        for part in self.parts(config.seeds[:1]):
            if part.recipe in TRAINING_RECIPES:
                check(part.recipe, part.arguments)
        path = self.out / "results.jsonl"
        rows = read_results(path) if path.exists() else []
        self._rows = {_key(row["arm"], row["seed"], row["task"]): row for row in rows}
        self._check_same_settings()

    def parts(self, seeds: Iterable[int]) -> Iterator[Part]:
        """In an order in which they can run."""
        for seed in seeds:
            yield from self.preparation(seed)
            for arm in self.config.arms:
                yield from self.chain(seed, arm)

    def preparation(self, seed: int) -> list[Part]:
        return [
            Part(seed, None, None, p.recipe, self._arguments(p, seed), self._seed_dir(seed) / f"prepare_{number}")
            for number, p in enumerate(self.config.prepare)
        ]

    def chain(self, seed: int, arm: str) -> list[Part]:
        """Stage one of an arm, then every task."""
        own, directory = self.config.arms[arm], self._seed_dir(seed) / arm
        model, trained = self._fill(self.config.model, seed), directory / "train"
        parts = [self._run(self.config.train, seed, arm, None, trained, model, own)]
        for task, part in self.config.tasks.items():
            parts.append(self._run(part, seed, arm, task, directory / task, str(trained / "hf"), []))
        return parts

    def run(self) -> list[Row]:
        """Everything that has not finished yet; returns the rows of this study's parts that ended, failed ones included.
        results.jsonl may have more: of seeds, arms and tasks that the configuration named before."""
        with ThreadPoolExecutor(self.config.jobs) as pool:
            ready = dict(zip(self.config.seeds, pool.map(self._prepare, self.config.seeds), strict=True))
            chains = [(seed, arm) for seed in self.config.seeds if ready[seed] for arm in self.config.arms]
            list(pool.map(lambda chain: self._run_chain(*chain), chains))
        unprepared = [seed for seed in self.config.seeds if not ready[seed]]
        if unprepared:
            raise RuntimeError(f"The preparation of seeds {unprepared} failed; their output is in {self.out}.")
        keys = [_key(part.arm, part.seed, part.task) for part in self.parts(self.config.seeds)]
        return [self._rows[key] for key in keys if key in self._rows]

    def _prepare(self, seed: int) -> bool:
        for part in self.preparation(seed):
            done = part.directory.with_suffix(".done")
            if done.exists() and json.loads(done.read_text()) == part.recorded:
                continue
            error = self._start(part)
            if error:
                self._say(f"{part.title}: FAILED\n{error}")
                return False
            done.write_text(json.dumps(part.recorded))
        return True

    def _run_chain(self, seed: int, arm: str) -> None:
        for part in self.chain(seed, arm):
            row = self._rows.get(_key(arm, seed, part.task))
            if row and row["status"] == "finished":
                continue
            error = self._start(part)
            row = row_of_run(part.directory, error=error, **part.row_fields) | {"arguments": part.recorded}
            self._record(row)
            if error and part.task is None:
                return  # there is nothing to fine-tune

    def _start(self, part: Part) -> str | None:
        """Run the part's command to its end; the last lines of its output if it failed."""
        log = part.directory.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command, started = self._command(part), time.monotonic()
        with log.open("a") as file:
            print(f"$ {shlex.join(redact.arguments(command))}", file=file, flush=True)
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=self._environment()).returncode
        if code == 0:
            self._say(f"{part.title}: {time.monotonic() - started:.0f} s")
            return None
        self._say(f"{part.title}: FAILED with exit code {code}, see {log}")
        return "\n".join([f"exit code {code}", *log.read_text().splitlines()[-LAST_LINES:]])

    def _command(self, part: Part) -> list[str]:
        script = [str(RECIPES / f"{part.recipe}.py"), *part.arguments]
        if part.recipe not in TRAINING_RECIPES:
            return [sys.executable, *script]
        if self.config.launcher:
            return [*shlex.split(self.config.launcher), sys.executable, *script]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.config.processes}"]
        return [sys.executable, *(torchrun if self.config.processes > 1 else []), *script]

    def _environment(self) -> dict[str, str]:
        """Threads for each rank, so that the jobs do not get in each other's way; what the user set stays."""
        threads = max(1, (os.cpu_count() or 1) // (self.config.jobs * self.config.processes))
        return {"OMP_NUM_THREADS": str(threads), **os.environ}

    def _run(self, part: PartConfig, seed: int, arm: str, task: str | None, directory: Path, model: str, more) -> Part:
        own = [f"run_dir={directory}", f"model.path={model}", f"trainer.seed={seed}"]
        arguments = [*self._arguments(part, seed), *[self._fill(text, seed) for text in more], *own]
        return Part(seed, arm, task, part.recipe, arguments, directory)

    def _arguments(self, part: PartConfig, seed: int) -> list[str]:
        named = ["--config-name", part.config] if part.config else []
        return named + [self._fill(text, seed) for text in part.overrides]

    def _fill(self, text: str, seed: int) -> str:
        for name, value in (("seed", seed), ("dir", self._seed_dir(seed)), ("out", self.out)):
            text = text.replace(f"{{{name}}}", str(value))
        return text

    def _seed_dir(self, seed: int) -> Path:
        return self.out / f"seed_{seed}"

    def _record(self, row: Row) -> None:
        with self._lock:
            self._rows[_key(row["arm"], row["seed"], row["task"])] = row
            with (self.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _say(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)

    def _check_same_settings(self) -> None:
        for part in self.parts(self.config.seeds):
            row = self._rows.get(_key(part.arm, part.seed, part.task))
            if row and row["status"] == "finished" and row["arguments"] != part.recorded:
                before, now = set(row["arguments"]) - set(part.recorded), set(part.recorded) - set(row["arguments"])
                raise ConfigError(
                    f"{self.out} has {part.title} with other settings: {' '.join(sorted(before)) or 'none'} then, "
                    f"{' '.join(sorted(now)) or 'none'} now; name the arm or task anew, or take another out."
                )


def _check(config: StudyConfig) -> None:
    for name, value in (("seeds", config.seeds), ("arms", config.arms), ("tasks", config.tasks)):
        if not value:
            raise ConfigError(f"{name} is empty; a study needs at least one.")
    if len(set(config.seeds)) < len(config.seeds):
        raise ConfigError(f"seeds={config.seeds} names a seed twice.")
    for name in ("processes", "jobs"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 1.")
    if config.num_seeds is not None and not 1 <= config.num_seeds <= len(config.seeds):
        raise ConfigError(f"num_seeds={config.num_seeds} must be from 1 to {len(config.seeds)}, the number of seeds.")
    if "train" in config.tasks or any("/" in name for name in (*config.arms, *config.tasks)):
        raise ConfigError("arms and tasks name directories: no '/', and no task called train (that is stage one).")
    for name, part in {"train": config.train, **{f"tasks.{k}": v for k, v in config.tasks.items()}}.items():
        if part.recipe not in TRAINING_RECIPES:
            raise ConfigError(f"{name}.recipe={part.recipe} must be one of {', '.join(TRAINING_RECIPES)}.")
    for part in config.prepare:
        if not (RECIPES / f"{part.recipe}.py").is_file():
            raise ConfigError(f"prepare: there is no recipe {part.recipe}; recipes/ has it without .py.")


def _key(arm: str | None, seed: int, task: str | None) -> tuple:
    return arm, seed, task
