"""Runs recipes as separate commands, one after the other: `make demo` and `make smol` consist of these."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"


def run_recipe(name: str, arguments: list[str], *, title: str, processes: int = 1, threads: int = 1) -> None:
    """Print and run the recipe NAME.py; exit with its code if it fails. threads: per process."""
    script = str(from_here(RECIPES / f"{name}.py"))
    shown = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
    real = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", *shown[1:]]
    print(f"\n== {title}\n$ {shlex.join([*shown, script, *arguments])}", flush=True)
    code = subprocess.run([*real, script, *arguments], env=os.environ | environment(threads)).returncode
    if code:
        sys.exit(code)


def environment(threads: int = 1) -> dict[str, str]:
    """Return the environment of a recipe's process. The log level hides a note about NUMA."""
    return {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}


def from_here(path: Path) -> Path:
    """Return the path of a project file, shortened where the project is the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
