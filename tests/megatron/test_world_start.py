"""Which rank of which world a process is, by the variables of its launcher. (srun itself is not run here.)"""

import pytest

from frpo_nemo.megatron import distributed

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """No launcher's variables; what a test leaves in the environment goes with it."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_plain_python_is_a_world_of_one(environment):
    assert distributed.read_world() == (0, 1)


def test_srun_gives_rank_world_and_the_first_host_as_rendezvous(environment):
    slurm = dict(NTASKS="16", PROCID="11", LOCALID="3", STEP_NODELIST="node[003-004]", JOB_ID="123456")
    for name, value in slurm.items():
        environment.setenv(f"SLURM_{name}", value)
    environment.setenv("PATH", "")  # no scontrol: the node list is read here
    assert distributed.read_world() == (11, 16)
    import os

    assert [os.environ[name] for name in LAUNCHER_VARIABLES] == ["11", "3", "16", "node003", "23456"]
