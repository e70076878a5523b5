"""Starts a group's processes, one per rank, and collects what they measured.

Their failures don't reach this process: a rank that dies, hangs or raises costs only the check that it was in. The
checks after that one run in new processes, in what is left of the group's time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from acceptance.registry import Check, Group

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5  # seconds for other ranks to report after one has failed


@dataclass
class Measured:
    """The result of one check: the values of each rank, or the error."""

    values: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


def run_group(group: Group, checks: list[Check], *, cpu: bool, work: Path, out: Path) -> dict[str, Measured]:
    """Run the checks; return the result of each, by name. All ranks write to out/GROUP.log."""
    deadline, left = time.monotonic() + group.seconds, [check.name for check in checks]
    found: dict[str, Measured] = {}
    log = out / f"{group.name}.log"
    log.unlink(missing_ok=True)
    while left:
        seconds = deadline - time.monotonic()
        if seconds < 1:
            text = f"not run: {list(found)[-1]} used up the {group.seconds} s of the group {group.name}"
            return found | {name: Measured(error=text) for name in left}
        ended = _run_once(group, left, seconds, cpu=cpu, work=work, log=log)
        found |= _collect(group, left, ended, log)
        left = [name for name in left if name not in found]
    return found


@dataclass(frozen=True)
class _Ended:
    """How one start ended. exit_codes: of the ranks, None for one that had not ended. records: by check, the last that each
    rank wrote."""

    exit_codes: list[int | None]
    records: list[dict[str, dict]]


def _run_once(group: Group, checks: list[str], seconds: float, *, cpu: bool, work: Path, log: Path) -> _Ended:
    results = [log.with_name(f"{group.name}.rank{rank}.jsonl") for rank in range(group.ranks)]
    for file in results:
        file.unlink(missing_ok=True)
    environment, port = _environment(cpu), str(_free_port() if group.ranks > 1 else 0)
    processes = []
    try:
        for rank, file in enumerate(results):
            command = [sys.executable, "-m", "acceptance.worker", group.name, "--checks", *checks]
            command += ["--work", str(work), "--results", str(file), "--seconds", str(max(seconds - 2, 1))]
            if group.world:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(group.ranks)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with log.open("a") as output:
                options: dict[str, Any] = dict(stdout=output, stderr=output, cwd=ROOT, start_new_session=True)
                processes.append(subprocess.Popen(command + ["--cpu"] * cpu, env=environment, **options))
        codes = _wait(processes, time.monotonic() + seconds)
    finally:
        for process in processes:
            _end(process)
    return _Ended(codes, [_read(file) for file in results])


def _wait(processes: list[subprocess.Popen], deadline: float) -> list[int | None]:
    """Return the exit codes when all have ended, or GRACE after the first failure, or at the deadline."""
    failed = False
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or time.monotonic() > deadline:
            return codes
        if any(codes) and not failed:
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.05)


def _end(process: subprocess.Popen) -> None:
    """Kill the process with its children: a check may have started some."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: Path) -> dict[str, dict]:
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {record["check"]: record for record in map(json.loads, lines)}


def _collect(group: Group, checks: list[str], ended: _Ended, log: Path) -> dict[str, Measured]:
    """Return the results of the checks that finished, and of the one in which the processes ended, if one did not."""
    found = {}
    for name in checks:
        records = [ranks.get(name, {}) for ranks in ended.records]
        seconds = max(record.get("seconds", 0.0) for record in records)
        if all("values" in record for record in records):
            found[name] = Measured([record["values"] for record in records], seconds=seconds)
            continue
        errors = [f"rank {rank}: {r['error']}" for rank, r in enumerate(records) if "error" in r]
        found[name] = Measured(error=f"{errors[0] if errors else _how(group, ended)} ({log})", seconds=seconds)
        return found
    if any(code != 0 for code in ended.exit_codes):
        last = found[checks[-1]]
        last.error = f"after its last check, the group {group.name}: {_how(group, ended)} ({log})"
    return found


def _how(group: Group, ended: _Ended) -> str:
    dead = [(rank, code) for rank, code in enumerate(ended.exit_codes) if code]
    if dead:
        return "rank {} ended with exit code {}".format(*dead[0])
    waiting = [rank for rank, code in enumerate(ended.exit_codes) if code is None]
    return f"ranks {waiting} had not ended after the {group.seconds} s of the group {group.name}"


def _environment(cpu: bool) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cpu:
        return environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | environment  # as the recipes set it


def _free_port() -> int:
    """Choose one below the range that the system gives to connections: none of them can take it before rank 0 listens."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):  # nobody listens there
                return port
