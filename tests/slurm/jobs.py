"""A Slurm cluster on this machine and jobs on it, started as a user starts them (cluster.sh says how it is made)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 1200  # seconds of waiting: many times what is needed, because a busy machine is slow
ATTEMPTS = 8  # of a Slurm command that may be repeated, with pauses that grow by a second


class Cluster:
    """`nodes` nodes with names node1, node2 ...; state below `directory`."""

    def __init__(self, directory: Path, nodes: int):
        self.directory, self.nodes = directory, nodes

    def cluster(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        settings = dict(SLURMKIT_DIR=str(self.directory), SLURMKIT_CPUS="8", SLURMKIT_GPUS="8", SLURMKIT_NICE="0")
        command = ["bash", str(HERE / "cluster.sh"), *arguments]
        return subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, check=check)

    def up(self) -> None:
        done = self.cluster("up", str(self.nodes), check=False)
        if done.returncode:
            raise RuntimeError(f"the cluster does not start:\n{done.stderr}")

    def down(self) -> None:
        self.cluster("down", "--purge")

    def slurm(self, *command: str) -> str:
        """Return the output of a Slurm command on the login node."""
        for attempt in range(1 if command[0] == "sbatch" else ATTEMPTS):  # the controller may be busy
            time.sleep(attempt)
            done = self.cluster("exec", *command, check=False)
            if done.returncode == 0 and (done.stdout.strip() or command[:2] != ("scontrol", "show")):
                return done.stdout
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr or done.stdout}")

    def submit(self, script: str, *overrides: str, log: Path, nodes=2, ranks=2, options=(), **environment) -> SlurmJob:
        """`nodes` x `ranks` processes without GPUs. environment: what the job finds set."""
        exports = ",".join(["ALL", *(f"{key}={value}" for key, value in environment.items())])
        sizes = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", "--gpus-per-node=0", f"--output={log}"]
        command = ["sbatch", "--parsable", *sizes, f"--export={exports}", *options, script, *overrides]
        return SlurmJob(self, self.slurm(*command).strip(), log)


class SlurmJob:
    def __init__(self, cluster: Cluster, number: str, log: Path):
        self.cluster, self.number, self.log = cluster, number, log

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def show(self) -> dict[str, str]:
        """Return what `scontrol show job` knows."""
        line = self.cluster.slurm("scontrol", "-o", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", line))

    def wait(self, limit: int = LIMIT) -> tuple[str, int]:
        """Return (state, restarts) when it has ended."""
        done = self.cluster.cluster("wait", self.number, str(limit), check=False)
        if done.returncode == 124:
            raise AssertionError(f"job {self.number} still there after {limit} s: {done.stderr}\n{self.output[-5000:]}")
        _, state, _, restarts = done.stdout.split()
        return state, int(restarts)

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def succeed(self, limit: int = LIMIT) -> int:
        """Wait for the end, which must be a good one: the number of restarts."""
        state, restarts = self.wait(limit)
        assert state == "COMPLETED", f"{state}:\n{self.output[-5000:]}"
        return restarts

    def wait_until(self, condition, limit: float = LIMIT) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            if self.show()["JobState"] in ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"):
                raise AssertionError(f"the job ended too early:\n{self.output[-5000:]}")
            if time.monotonic() > deadline:
                raise AssertionError(f"waited for {limit} s:\n{self.output[-5000:]}")
            time.sleep(0.2)

    def signal(self) -> None:
        """Do what --signal=B:USR1@300 does, without waiting for Slurm's next check of the time limits."""
        self.cluster.slurm("scancel", "--batch", "--signal=USR1", self.number)

    def cancel(self) -> None:
        self.cluster.slurm("scancel", self.number)


class Faults:
    """Faults that will happen inside a job's processes, once each (faults/sitecustomize.py)."""

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True)

    @property
    def environment(self) -> dict[str, str]:
        return {"FRPO_FAULTS": str(self.directory), "PYTHONPATH": str(HERE / "faults")}

    def add(self, name: str, *, step: int, where: str, action: str = "kill", rank: int = 1, delay: float = 0.0) -> None:
        plan = {"rank": rank, "step": step, "where": where, "action": action, "delay": delay}
        (self.directory / f"{name}.json").write_text(json.dumps(plan))

    def happened(self, name: str) -> bool:
        return (self.directory / f"{name}.happened").exists()

    def release(self, name: str) -> None:
        """Let the function of a fault of action "mark" go on."""
        (self.directory / f"{name}.released").touch()
