"""What srun is asked for with and without a container. No container runs here: the test cluster has no pyxis."""

from __future__ import annotations

import os
import subprocess

import pytest
from jobs import ROOT


@pytest.fixture
def srun_arguments(tmp_path):
    """`srun_arguments(**environment)`: the arguments that lib.sh gives to srun for `python recipes/frpo.py a=b`."""
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "PYTHONPATH=$PYTHONPATH"\n')
    fake.chmod(0o755)

    def call(**environment: str) -> list[str]:
        script = "source slurm/lib.sh; RUN_DIR=/shared/run frpo_srun --nodes=1 -- python recipes/frpo.py a=b"
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "", **environment}
        return subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    return call


def test_a_container_gets_checkout_run_directory_and_further_mounts_and_its_own_python(srun_arguments):
    arguments = srun_arguments(FRPO_CONTAINER="/images/frpo.sqsh", FRPO_MOUNTS="/data:/data")
    assert "--container-image=/images/frpo.sqsh" in arguments and f"--container-workdir={ROOT}" in arguments
    assert f"--container-mounts={ROOT}:{ROOT},/shared/run:/shared/run,/data:/data" in arguments
    assert arguments[-4:] == ["python", "recipes/frpo.py", "a=b", f"PYTHONPATH={ROOT}"]


def test_without_one_python_is_that_of_the_environment(srun_arguments):
    arguments = srun_arguments(FRPO_VENV="/shared/venv")
    assert arguments[-4:-1] == ["/shared/venv/bin/python", "recipes/frpo.py", "a=b"]
    assert not any(argument.startswith("--container") for argument in arguments)
