"""A forgetting study: for each seed, train each arm, fine-tune each result on each later task, measure the models, and keep
the measurements.

Every part (parts.py) is a recipe in its own processes, the same command that a user would type, with its output next to
its directory. results.jsonl has a row for each that ended. When the study is started again, a finished part is not
repeated, and a failed or interrupted one continues from its checkpoints.
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
from dataclasses import replace
from typing import Any

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.study.parts import SCHEMAS, TRAINING_RECIPES, Part, StudyConfig, StudyParts, named
from frpo_nemo.study.recipe import RECIPES
from frpo_nemo.study.results import ResultRow, read_results, row_of_evaluation, row_of_run

LAST_LINES = 15  # lines of a failed part's output, kept in its row


class ForgettingStudy:
    """The parts of a study, and the record of those that ended."""

    def __init__(self, config: StudyConfig, check: Callable[[str, list[str]], None], config_dir: str | None = None):
        """check(recipe, arguments): raises ConfigError for a command whose configuration is wrong. Nothing runs before the
        commands of all arms and tasks are checked; commands that differ only in paths and seeds are checked once.
        config_dir: where configurations of parts may be besides configs/."""
        self._plan = StudyParts(config, config_dir)
        self.out = self._plan.out
        self.config = replace(config, seeds=config.seeds[: config.num_seeds])
        self._lock = threading.Lock()
        for part in self.parts(self.config.seeds[:1]):
            if part.recipe in SCHEMAS and (part.stage in ("prepare", "train") or part.arm == next(iter(config.arms))):
                with named(part):
                    check(part.recipe, part.arguments)
        path = self.out / "results.jsonl"
        rows = read_results(path) if path.exists() else []
        self._rows = {_key(row): row for row in rows}
        for part in self.parts(self.config.seeds):
            if part.stage != "prepare" and self.finished(part):
                check_same_settings(part, self._rows[part.key]["arguments"])

    def parts(self, seeds: Iterable[int]) -> Iterator[Part]:
        """Yield the parts, each after the one that it needs."""
        return self._plan.all(seeds)

    def check(self) -> None:
        """Raise ConfigError for what check.py can find wrong before `run` starts the parts here."""
        from frpo_nemo.study.check import check_parts  # seconds of imports, which the report doesn't need

        processes = None if self.config.launcher else self.config.processes
        parts = self.parts(self.config.seeds)
        check_parts(parts, self.out, started=lambda part: ([], processes), finished=self.finished)

    def finished(self, part: Part) -> bool:
        """Return whether the part's end is recorded as finished."""
        if part.stage == "prepare":
            done = part.directory.with_suffix(".done")
            return done.exists() and json.loads(done.read_text()) == part.recorded
        return part.key in self._rows and self._rows[part.key]["status"] == "finished"

    def record(self, part: Part, error: str | None = None) -> None:
        """Record that a part ended, successfully or not. A failed preparation leaves no record, only its output."""
        if part.stage == "prepare":
            if error is None:
                part.directory.with_suffix(".done").write_text(json.dumps(part.recorded))
            return
        try:
            row = _row(part, error)
        except ConfigError as problem:  # it ended and left nothing to report
            row = _row(part, str(problem))
        row |= {"arguments": part.recorded}
        with self._lock:
            self._rows[part.key] = row
            with (self.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> list[ResultRow]:
        """Return the rows of this study's parts that ended, including failed ones. results.jsonl may have more, for seeds,
        arms and tasks that the configuration named before."""
        return [self._rows[part.key] for part in self.parts(self.config.seeds) if part.key in self._rows]

    def run(self) -> list[ResultRow]:
        """Run everything that has not finished yet, on this machine; returns `rows`."""
        if self.config.servers:
            raise ConfigError(
                "only slurm/forgetting.sh starts servers; here, start them first (python slurm/serve.py 127.0.0.1 "
                f"{self.out}/servers/NAME.url MODEL) and add ~servers to this command."
            )
        with ThreadPoolExecutor(self.config.jobs) as pool:
            ready = dict(zip(self.config.seeds, pool.map(self._prepare, self.config.seeds), strict=True))
            chains = [(seed, arm) for seed in self.config.seeds if ready[seed] for arm in self.config.arms]
            list(pool.map(lambda chain: self._run_chain(*chain), chains))
        unprepared = [seed for seed in self.config.seeds if not ready[seed]]
        if unprepared:
            raise RuntimeError(f"The preparation of seeds {unprepared} failed; its output is in {self.out}.")
        return self.rows()

    def _prepare(self, seed: int) -> bool:
        for part in self._plan.preparation(seed):
            if self.finished(part):
                continue
            error = self._start(part)
            if error:
                self._say(f"{part.title}: FAILED\n{error}")
                return False
            self.record(part)
        return True

    def _run_chain(self, seed: int, arm: str) -> None:
        lost: list[Part] = []  # failed, or after one that failed: there is no model to fine-tune or to measure
        for part in self._plan.chain(seed, arm):
            if self.finished(part):
                continue
            error = None
            if part.after not in lost:
                error = self._start(part)
                self.record(part, error)
            if error or part.after in lost:
                lost.append(part)

    def _start(self, part: Part) -> str | None:
        """Run the part's command to its end; return the last lines of its output if it failed."""
        part.log.parent.mkdir(parents=True, exist_ok=True)
        command, started = self._command(part), time.monotonic()
        with part.log.open("a") as file:
            print(f"$ {shlex.join(redact.arguments(command))}", file=file, flush=True)
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=self._environment()).returncode
        if code == 0:
            self._say(f"{part.title}: {time.monotonic() - started:.0f} s")
            return None
        self._say(f"{part.title}: FAILED with exit code {code}, see {part.log}")
        return "\n".join([f"exit code {code}", *part.log.read_text().splitlines()[-LAST_LINES:]])

    def _command(self, part: Part) -> list[str]:
        script = [str(RECIPES / f"{part.recipe}.py"), *part.arguments]
        if part.recipe not in TRAINING_RECIPES:
            return [sys.executable, *script]
        if self.config.launcher:
            return [*shlex.split(self.config.launcher), sys.executable, *script]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.config.processes}"]
        return [sys.executable, *(torchrun if self.config.processes > 1 else []), *script]

    def _environment(self) -> dict[str, str]:
        """Set the threads of each rank so that the jobs do not slow each other down; the user's own settings stay."""
        threads = max(1, (os.cpu_count() or 1) // (self.config.jobs * self.config.processes))
        return {"OMP_NUM_THREADS": str(threads), **os.environ}

    def _say(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)


def check_same_settings(part: Part, before: list[str]) -> None:
    """Raise ConfigError if the part ran, or runs, with other arguments than it has now."""
    if before != part.recorded:
        then, now = set(before) - set(part.recorded), set(part.recorded) - set(before)
        raise ConfigError(
            f"{part.directory.parent} has {part.title} with other settings: {' '.join(sorted(then)) or 'none'} then, "
            f"{' '.join(sorted(now)) or 'none'} now; rename the arm or task, or choose another out."
        )


def _row(part: Part, error: str | None) -> ResultRow:
    of: dict[str, Any] = dict(arm=part.arm, seed=part.seed, task=part.task, error=error)
    if part.evaluation:
        return row_of_evaluation(part.directory, evaluation=part.evaluation, **of)
    return row_of_run(part.directory, stage=part.stage, **of)


def _key(row: ResultRow) -> tuple:
    return row["arm"], row["seed"], row["task"], row.get("evaluation")
