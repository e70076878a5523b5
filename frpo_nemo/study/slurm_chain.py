"""A study as a chain of Slurm jobs: one for each part that has not finished, after the one that it needs, and a report.

Slurm reports what is in the queue. A part has finished when its directory has slurm_finished, which slurm/lib.sh writes.
OUT/jobs.jsonl records what was submitted, with which settings. Jobs write no rows: the report does, when all have ended.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.study.parts import TRAINING_RECIPES, Part, ServerConfig
from frpo_nemo.study.recipe import ROOT
from frpo_nemo.study.run import LAST_LINES, ForgettingStudy, check_same_settings

REPORT = "report"
REPORT_SCRIPT = "slurm/forgetting.sh"
ATTEMPTS, PAUSE = 6, 3.0  # how often Slurm is asked, and seconds between attempts
_SIZES = ("(?:--nodes|-N)", "--ntasks-per-node")  # options of sbatch


@dataclass(frozen=True)
class Job:
    """What sbatch receives for one job."""

    name: str  # a part's directory below the study's; servers/NAME; report
    script: str
    arguments: list[str]
    options: list[str]  # of sbatch
    log: Path
    recorded: list[str]  # arguments that make two jobs with one name the same: without secrets
    needs: list[str] = field(default_factory=list)  # names of jobs that must have succeeded, if they are in the queue
    follows: list[str] = field(default_factory=list)  # ... that must have ended, successfully or not
    uses: list[str] = field(default_factory=list)  # ... that must have started
    ends: list[str] = field(default_factory=list)  # ... that it cancels at its end


class SlurmChain:
    """The jobs of a study. arguments: the command line that named the study, for the report's job."""

    def __init__(self, study: ForgettingStudy, arguments: Sequence[str]):
        self.study, self.arguments = study, list(arguments)
        self._file = study.out / "jobs.jsonl"
        self._submitted: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in _entries(self._file)}
        for job in (*map(self._job, self._parts()), *map(self._server, study.config.servers)):
            if not (ROOT / job.script).is_file():
                raise ConfigError(f"{job.name}: script={job.script} does not exist; job scripts are in slurm/.")

    def check(self) -> None:
        """Raise ConfigError for what check.py can find wrong before a job starts. The login node must see the data."""
        from frpo_nemo.study.check import check_parts  # seconds of imports, which the report doesn't need

        parts = self._parts()
        check_parts(parts, self.study.out, started=lambda part: _sizes(self._job(part)), finished=self._is_done)

    def submit(self, dry_run: bool = False) -> list[dict[str, Any]]:
        """Submit what has neither finished nor is in the queue: all of it, or nothing if Slurm refuses a job. Returns the
        new lines of jobs.jsonl. dry_run: print the commands instead. Raises ConfigError, or RuntimeError with Slurm's
        message."""
        queue, free = self._queue() if not dry_run or self._submitted else ({}, set())
        jobs = self.missing(queue, free)
        if dry_run:
            numbers = queue | {job.name: f"<{job.name}>" for job in jobs}
            for job in jobs:
                print(shlex.join(redact.arguments(_command(job, numbers))))
            return []
        for script, options in {(job.script, tuple(job.options)) for job in jobs}:
            _slurm("sbatch", "--test-only", *options, script)
        if jobs and REPORT in queue:
            self._cancel_report(queue.pop(REPORT))
        return self._submit(jobs, queue)

    def collect(self) -> list[Part]:
        """Record what ended; return the parts that have not finished: failed, or never started because another failed.
        Call it when no job of the study is left. Raises ConfigError if a part ran with other settings than it has now."""
        for part in self._parts():
            if self.study.finished(part):
                continue
            if self._has_finished(part):
                self._check_same_settings(part)
                self.study.record(part)
            elif part.log.exists():
                self.study.record(part, error=_last_words(part))
        return [part for part in self._parts() if not self.study.finished(part)]

    def missing(self, queue: dict[str, str], free: Collection[str] = ()) -> list[Job]:
        """Return what is neither finished nor in the queue ({name: number}), in an order in which it can be submitted.
        Removes from the queue the jobs that wait for a failed one. free: jobs of the queue that run, or wait for no other:
        what they need has succeeded, though another machine's file system may not show it yet."""
        parts = [part for part in self._parts() if not self.study.finished(part)]
        for part in parts:
            if self._name(part) in queue or self._has_finished(part):
                self._check_same_settings(part)
        ended = {self._name(part) for part in parts if self._has_finished(part)}
        for part in parts:
            needed = part.after if self._name(part) in free else None
            while needed:
                ended.add(self._name(needed))
                needed = needed.after
        pending = [self._job(part) for part in parts if self._name(part) not in ended]
        unfinished = {job.name for job in pending}
        for job in pending:
            if any(name in unfinished and name not in queue for name in job.needs):
                queue.pop(job.name, None)  # Slurm is about to cancel it
        jobs = [job for job in pending if job.name not in queue]
        used = {name for job in pending for name in job.uses}
        servers = [server for server in map(self._server, self.study.config.servers) if server.name in used]
        for server in servers:
            if server.name in queue and self._submitted[server.name]["arguments"] != server.recorded:
                raise ConfigError(
                    f"{server.name} is in the queue with other settings, as job {queue[server.name]}; cancel it first."
                )
        jobs = [*(server for server in servers if server.name not in queue), *jobs]
        reported = REPORT in queue or (not parts and self._report_is_new())
        if reported and not jobs:
            return []
        running = [name for name in (*queue, *(job.name for job in jobs)) if name.startswith("servers/")]
        return [*jobs, self._report(follows=[job.name for job in pending], ends=running)]

    def _submit(self, jobs: list[Job], queue: dict[str, str]) -> list[dict[str, Any]]:
        numbers = dict(queue)
        entries: list[dict[str, Any]] = []
        for job in jobs:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            try:
                numbers[job.name] = _slurm(*_command(job, numbers)).strip().partition(";")[0]  # ;cluster may follow
            except RuntimeError:
                if entries:
                    _slurm("scancel", *(entry["job"] for entry in entries))
                raise
            after = [numbers[name] for name in (*job.needs, *job.follows, *job.uses) if name in numbers]
            entry = dict(name=job.name, job=numbers[job.name], after=after, script=job.script, arguments=job.recorded)
            entries.append(entry | {"time": time.strftime("%Y-%m-%d %H:%M:%S%z")})
            with self._file.open("a") as file:
                file.write(json.dumps(entries[-1]) + "\n")
        return entries

    def _queue(self) -> tuple[dict[str, str], set[str]]:
        """Return ({name: number} of this study's pending or running jobs, names of those that run or wait for no other).
        Slurm may reuse numbers, so the name decides too."""
        lines = _slurm("squeue", "--me", "--noheader", "--format=%A %E %j").splitlines()  # %E: what it still waits for
        queued = {(number, name): needs for number, needs, name in (line.strip().split(" ", 2) for line in lines)}
        mine = {name: job["job"] for name, job in self._submitted.items() if (job["job"], name) in queued}
        return mine, {name for name, number in mine.items() if queued[number, name] == "(null)"}

    def _cancel_report(self, number: str) -> None:
        """Cancel the waiting report: another will wait for the new jobs as well."""
        _slurm("scancel", "--state=PENDING", number)
        if REPORT in self._queue()[0]:
            raise ConfigError(f"Job {number} is writing the report; start again when it has ended.")

    def _parts(self) -> list[Part]:
        return list(self.study.parts(self.study.config.seeds))

    def _has_finished(self, part: Part) -> bool:
        """Return whether a job of this chain succeeded; it may not be recorded yet."""
        return self._name(part) in self._submitted and (part.directory / "slurm_finished").exists()

    def _is_done(self, part: Part) -> bool:
        return self.study.finished(part) or self._has_finished(part)

    def _report_is_new(self) -> bool:
        """Return whether the report was written after the last row; the job that adds the last rows may have died before."""
        page, rows = self.study.out / "report.html", self.study.out / "results.jsonl"
        return page.exists() and page.stat().st_mtime_ns >= rows.stat().st_mtime_ns

    def _check_same_settings(self, part: Part) -> None:
        check_same_settings(part, self._submitted[self._name(part)]["arguments"])

    def _name(self, part: Part) -> str:
        return str(part.directory.relative_to(self.study.out))

    def _job(self, part: Part) -> Job:
        config = part.config
        if part.recipe in TRAINING_RECIPES:
            named = [] if config.config else ["--config-name", part.recipe]  # else the script would choose its own
            script, arguments = f"slurm/{part.recipe}_7b.sh", [*named, *part.arguments]
        else:
            script, arguments = "slurm/recipe.sh", [str(part.directory), part.recipe, *part.arguments]
        return Job(
            name=self._name(part),
            script=config.script or script,
            arguments=arguments,
            options=[*self.study.config.sbatch, *config.sbatch],
            log=part.log,
            recorded=part.recorded,
            needs=[self._name(part.after)] if part.after else [],
            uses=[
                f"servers/{name}"
                for name in self.study.config.servers
                if any(str(self._url_file(name)) in argument for argument in part.arguments)
            ],
        )

    def _server(self, name: str) -> Job:
        config: ServerConfig = self.study.config.servers[name]
        arguments = [str(self._url_file(name)), config.model, *config.options]
        return Job(
            name=f"servers/{name}",
            script=config.script,
            arguments=arguments,
            options=[*self.study.config.sbatch, *config.sbatch],
            log=self._url_file(name).with_suffix(".log"),
            recorded=redact.arguments(arguments),
        )

    def _report(self, follows: list[str], ends: list[str]) -> Job:
        log, recorded = self.study.out / f"{REPORT}.log", redact.arguments(self.arguments)
        return Job(
            REPORT, REPORT_SCRIPT, self.arguments, self.study.config.sbatch, log, recorded, follows=follows, ends=ends
        )

    def _url_file(self, server: str) -> Path:
        return self.study.out / "servers" / f"{server}.url"


def _entries(file: Path) -> list[dict[str, Any]]:
    """Return the lines of jobs.jsonl. Raises ConfigError for a cut-off line: without it a job could be submitted twice."""
    lines = file.read_text().splitlines() if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ConfigError(
            f"{file} has a line that is cut off or damaged ({error}); remove that line, and cancel its job if it is in the "
            "queue (squeue --me)."
        ) from error


def _sizes(job: Job) -> tuple[list[str], int | None]:
    """Return (the overrides that slurm/lib.sh adds, the number of processes), from the job script and its options. A script
    without --nodes or --ntasks-per-node isn't one of ours and gives neither."""
    asked = [
        line.removeprefix("#SBATCH ") for line in (ROOT / job.script).read_text().splitlines() if line[:8] == "#SBATCH "
    ]
    found = [re.findall(rf"(?:^|\s){name}[= ]?(\d+)(?=\s|$)", " ".join([*asked, *job.options])) for name in _SIZES]
    if not all(found):
        return [], None
    nodes, ranks = (int(numbers[-1]) for numbers in found)  # the last of several options counts
    return [f"trainer.num_nodes={nodes}", f"trainer.devices={ranks}"], nodes * ranks


def _command(job: Job, numbers: dict[str, str]) -> list[str]:
    """Return the sbatch command of the job. numbers: {name: number} of the jobs in the queue, the only ones to wait for."""
    kinds = {"afterok": job.needs, "afterany": job.follows, "after": job.uses}
    found = {kind: [numbers[name] for name in names if name in numbers] for kind, names in kinds.items()}
    dependency = ",".join(":".join([kind, *ids]) for kind, ids in found.items() if ids)
    waiting = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    log = str(job.log).replace("%", "%%")  # sbatch replaces %j and its like
    own = [f"--job-name={job.name}", f"--output={log}", *waiting, *job.options]
    ends = [f"--end={','.join(numbers[name] for name in job.ends)}"] if job.ends else []
    return ["sbatch", "--parsable", *own, job.script, *ends, *job.arguments]


def _last_words(part: Part) -> str:
    """Return the last output of the part's processes (srun puts a number before their lines), or else of the job."""
    lines = part.log.read_text().splitlines()
    return "\n".join(([line for line in lines if re.match(r"\d+: ", line)] or lines)[-LAST_LINES:])


def _slurm(*command: str) -> str:
    """Return the output of a Slurm command. A failing squeue is tried again for a while: the controller may be busy."""
    attempts = ATTEMPTS if command[0] == "squeue" else 1
    for attempt in range(attempts):
        time.sleep(PAUSE * bool(attempt))
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{command[0]} is not installed here; start this on a login node of a Slurm cluster."
            ) from error
        if done.returncode == 0:
            return done.stdout
    raise RuntimeError(f"{shlex.join(redact.arguments(command))}: {done.stderr.strip() or done.stdout.strip()}")
