"""Which rank of which world a process is, by the variables of its launcher. (srun itself is not run here.)"""

import datetime
import subprocess
import sys

import pytest
import torch

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.processes import world
from frpo_nemo.processes.launcher import started_world

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """No launcher's variables; what a test leaves in the environment goes with it."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_plain_python_is_a_world_of_one(environment):
    assert world.read_world() == (0, 1)


def test_srun_gives_rank_world_and_the_first_host_as_rendezvous(environment):
    slurm = dict(STEP_NUM_TASKS="16", PROCID="11", LOCALID="3", STEP_NODELIST="node[003-004]", JOB_ID="123456")
    for name, value in slurm.items():
        environment.setenv(f"SLURM_{name}", value)
    environment.setenv("PATH", "")  # no scontrol: the node list is read here
    assert started_world() == (3, 16)
    assert world.read_world() == (11, 16)
    import os

    assert [os.environ[name] for name in LAUNCHER_VARIABLES] == ["11", "3", "16", "node003", "23456"]


def test_a_process_of_a_batch_script_is_a_world_of_one(environment):
    """Slurm's variables there are those of the whole job, of which srun has started nothing."""
    slurm = dict(NTASKS="4", NPROCS="4", NTASKS_PER_NODE="2", PROCID="0", LOCALID="0", NODELIST="node[1-2]", JOB_ID="7")
    for name, value in slurm.items():
        environment.setenv(f"SLURM_{name}", value)
    assert started_world() == (0, 1)
    assert world.read_world() == (0, 1)


def timeouts_of_groups() -> set[datetime.timedelta]:
    from megatron.core import parallel_state as ps
    from worlds import use_layout

    use_layout(ModelConfig(path=""))
    groups = ps.get_data_parallel_group(), ps.get_tensor_model_parallel_group(), ps.get_pipeline_model_parallel_group()
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_megatrons_groups_wait_as_long_as_the_world_does(workers):
    """Megatron's default of 30 minutes would end a long phase that the watchdog allows."""
    assert workers.run(1, timeouts_of_groups) == [{world.GROUP_TIMEOUT}]


GATHER = """
import glob
import torch
import torch.distributed as dist
from frpo_nemo.config.options import ModelConfig
from frpo_nemo.megatron.groups import start_model_parallel
from frpo_nemo.processes.world import start_world

def loops():
    return sum(open(f"{task}/comm").read().startswith("pt_gloo_runloop") for task in glob.glob("/proc/self/task/*"))

start_world()
start_model_parallel(ModelConfig(path=""), seed=1)
before = loops()
for _ in range(20):
    works = [dist.all_gather_into_tensor(torch.zeros(1 << 20), torch.zeros(1 << 20), async_op=True) for _ in range(4)]
    [work.wait() for work in works]
print(before, loops(), torch.get_num_threads())
"""


def test_gathers_start_no_team_of_openmp_threads(environment):
    """Which would make the process's threads more than its cores, and every parallel operation slow from then on."""
    for name in LAUNCHER_VARIABLES:
        environment.delenv(name, raising=False)
    environment.setenv("OMP_NUM_THREADS", "2")
    done = subprocess.run([sys.executable, "-c", GATHER], capture_output=True, text=True, check=True)
    before, after, threads = map(int, done.stdout.split())
    assert (after, threads) == (before, 2) and before > 2
