"""Output of the processes that examine Transformer Engine's layers and the installed signatures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def printed_by(script: str) -> list[dict]:
    """Return the JSON lines of a script of this directory, in a process that sees no GPU."""
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(HERE / script)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="session")
def te_facts():
    """Return a function that gives the facts with these values."""
    everything = printed_by("te_process.py")

    def chosen(**values) -> list[dict]:
        found = [facts for facts in everything if values.items() <= facts.items()]
        assert found, values
        errors = [facts["error"] for facts in found if "error" in facts]
        assert not errors, errors
        return found

    return chosen


@pytest.fixture(scope="session")
def signatures() -> list[dict]:
    return printed_by("signatures.py")
