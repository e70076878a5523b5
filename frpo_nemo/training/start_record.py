"""Record each start of a run: run_dir/environment.jsonl has one line for each, with the command that resumes the run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import psutil
from omegaconf import OmegaConf

from frpo_nemo import redact, stack
from frpo_nemo.processes.launcher import srun_task
from frpo_nemo.records import write_whole

FILE = "environment.jsonl"
PACKAGES = (*stack.PACKAGES, "nemo-toolkit")
_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("frpo_nemo", "recipes", "configs")


def add_start(
    run_dir: Path,
    *,
    model: str,
    world_size: int,
    data: dict[str, str],
    moment: str,
    resume: str,
    resumed_from: Path | None,
    files: dict[str, str] | None = None,
) -> None:
    """Add this start to the record. model: its directory, even if model.path is a hub name. data: name -> fingerprint of
    each data set. moment: time on the chat templates' clock. resume: checkpoint.resume. files: option -> digest of the
    files that it names."""
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "host": socket.gethostname(),
        "directory": str(Path.cwd()),
        "command": shlex.join(redact.arguments([sys.executable, *sys.orig_argv[1:]])),
        "resume": resume_command(resume),
        "resumed_from": resumed_from and str(resumed_from),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "world_size": world_size,
        "model": model,
        "data": data,
        "moment": moment,
        "files": files or {},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": _uncommitted(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := stack.version(name))},
    }
    path = run_dir / FILE
    cut = path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n")  # by a full disk, or a kill
    with path.open("a") as file:
        file.write("\n" * bool(cut) + json.dumps(start) + "\n")


def write_config(run_dir: Path, values: dict) -> None:
    """Write `values` to run_dir's config.yaml, all or nothing: a run that lost its configuration could not be continued."""
    write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(values))


def resume_command(resume: str = "auto") -> str:
    """Return a line for a shell that continues this run from its newest checkpoint, from any directory; a comment at its end
    has what the line cannot express. FRPO_RESUME_COMMAND, set by the starting process, is used as it is. Secrets are
    hidden, except those given as ${oc.env:NAME}."""
    given = os.environ.get("FRPO_RESUME_COMMAND")
    if given:
        return redact.shell_line(given)
    command, comment = _own_command()
    overrides = ["checkpoint.resume=auto"] if resume == "never" else []
    line = shlex.join(redact.arguments([*command, *overrides]))
    return f"cd {shlex.quote(str(Path.cwd()))} && {line}{comment}"


def began(run_dir: Path) -> str | None:
    """Return when the first start of a run was recorded, in local time without a zone; None if there is no record."""
    first = next(iter(starts(run_dir)), None)
    if first is None:
        return None
    return datetime.strptime(first["time"], "%Y-%m-%d %H:%M:%S%z").replace(tzinfo=None).isoformat()


def starts(run_dir: Path) -> list[dict]:
    """Return the record of a run, in order; [] if there is none."""
    path = run_dir / FILE
    lines = path.read_text().splitlines() if path.is_file() else []
    return [start for line in lines if (start := _parsed(line)) is not None]


def _parsed(line: str) -> dict | None:
    """Return the record on a line; None if the line was cut."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _own_command() -> tuple[list[str], str]:
    """Return (the command that started the world, a comment on where to type it)."""
    env, own = os.environ, [sys.executable, *sys.orig_argv[1:]]
    if "TORCHELASTIC_RUN_ID" in env:
        agent, nodes = psutil.Process(os.getppid()).cmdline(), int(env["GROUP_WORLD_SIZE"])
        return [sys.executable, *agent[1:]], f"  # on each of the {nodes} nodes" if nodes > 1 else ""
    world_size = int(env.get("WORLD_SIZE", "1"))
    if world_size > 1 and srun_task():
        num_nodes = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1"))
        srun = ["srun", f"--nodes={num_nodes}", f"--ntasks={world_size}"]
        return [*srun, *own], "  # in an allocation like the first one"
    return own, f"  # for each of {world_size} ranks, with its RANK" if world_size > 1 else ""


def _uncommitted() -> list[str] | None:
    """Return the files of the program that differ from the commit; None outside of a checkout."""
    changed = _git("status", "--porcelain", "--", *_CODE)
    return None if changed is None else [line[3:] for line in changed.splitlines()]


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:  # as in many images
        return None
    result = subprocess.run(["git", "-C", _ROOT, *arguments], capture_output=True, text=True)
    return result.stdout.rstrip() if result.returncode == 0 else None
