"""Checks that need a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def printed_by(script: str, *arguments: str, **environment: str) -> list[dict]:
    """Return the JSON lines that a script of this directory prints."""
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
