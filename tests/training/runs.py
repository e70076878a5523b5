"""Recipes as processes of their own, started as a user starts them, to be killed and started again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from frpo_nemo.examples.new_model import new_model
from frpo_nemo.examples.toy import toy_tokenizer

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
LIMIT = 900  # seconds that a job may take: many times what it needs, because a busy machine is slow


def random_model(path: Path, family: str = "llama", ffn_hidden_size: int = 128) -> str:
    """Return a random model that knows the world's words."""
    sizes = dict(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_hidden_size=ffn_hidden_size)
    new_model(path, tokenizer=toy_tokenizer(), family=family, max_position_embeddings=64, tie=False, seed=0, **sizes)
    return str(path)


class Job:
    """One start of a recipe: plain python for one rank, torchrun for more. Output goes to run_dir.log (appended)."""

    def __init__(
        self,
        recipe: str,
        overrides: list[str],
        run_dir: Path,
        *,
        ranks: int = 1,
        die_in_save_of: int = 0,
        resume: str | None = None,
        environment: dict[str, str] | None = None,
        umask: int = -1,
    ):
        """die_in_save_of: a step; every rank kills itself when it has written a part of that step's checkpoint. resume:
        a line for a shell, typed in another directory, instead of the recipe's command; the overrides are added."""
        self.run_dir, self.log = run_dir, run_dir.with_suffix(".log")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        script = [str(RECIPES / recipe)]
        if die_in_save_of:
            script = [str(HERE / "dying_save.py"), str(die_in_save_of), *script]
        self.started, self._before = time.time(), len(self.log.read_text()) if self.log.exists() else 0
        with self.log.open("a") as log:
            command = [sys.executable, *launcher, *script, *overrides, f"run_dir={run_dir}"]
            if resume:
                command = ["bash", "-c", f"{resume} {shlex.join(overrides)}"]
            options = dict(env=os.environ | (environment or {}), umask=umask, cwd="/" if resume else None)
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **options)

    @property
    def output(self) -> str:
        return self.log.read_text()[self._before :]

    def wait(self, limit: float = LIMIT) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit} s:\n{self.output[-3000:]}") from None

    def succeed(self) -> Job:
        """Wait for the end, which must be a good one."""
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.output[-5000:]}"
        return self

    def wait_for_step(self, step: int) -> None:
        """Until this start, not an earlier one, has recorded `step` or a later one: the next is on its way then."""
        self.wait_until(lambda: any(r["step"] >= step and r["time"] > self.started for r in steps(self.run_dir)))

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            code = self.process.poll()
            assert code is None, f"ended too early with exit code {code}:\n{self.output[-5000:]}"
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"waited for {LIMIT} s:\n{self.output[-5000:]}")
            time.sleep(0.01)

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes of a job under torchrun."""
        return {int(p.environ()["RANK"]): p for p in psutil.Process(self.process.pid).children()}

    def listens_on(self) -> set[str]:
        """Return the addresses on which the recipe's processes listen, except the launcher's."""
        family = psutil.Process(self.process.pid)
        recipe = [p for p in (family, *family.children(recursive=True)) if "torch.distributed.run" not in p.cmdline()]
        return {c.laddr.ip for p in recipe for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}

    def kill(self) -> None:
        """kill -9 of everything, the launcher first: nobody is left to notice."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=30)
        assert self.process.wait(30) == -signal.SIGKILL


def steps(run_dir: Path) -> list[dict]:
    """Return what metrics.jsonl says of training steps, in its order; also while it is being written."""
    return [row for row in _rows(run_dir) if _kind(row) == "step"]


def validations(run_dir: Path) -> list[dict]:
    return [row for row in _rows(run_dir) if _kind(row) == "validation"]


def probes(run_dir: Path) -> list[dict]:
    return [row for row in _rows(run_dir) if _kind(row) == "probe"]


def without_times(row: dict) -> dict:
    """Return what a step computed, which a repetition must give again bit for bit."""
    return {k: v for k, v in row.items() if k not in ("time", "tokens_per_second") and not k.startswith("seconds/")}


def exported(run_dir: Path) -> dict:
    """Return name -> tensor of run_dir/hf."""
    return {name: t for file in sorted((run_dir / "hf").glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor.view(torch.int32), found[name].view(torch.int32)), name


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


def _rows(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def _kind(row: dict) -> str:
    measured = {name.partition("/")[0] for name in row}
    return next((kind for kind in ("validation", "probe") if kind in measured), "step")
