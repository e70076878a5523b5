"""Read the rank and world size that a launcher passes to a process. Imports nothing of ours, and nothing heavy."""

from __future__ import annotations

import os


def srun_task() -> tuple[int, int, int] | None:
    """Return (rank, rank on this node, world size) if srun started several processes; else None. A batch script has
    SLURM_PROCID and SLURM_NTASKS as well, for the tasks that it may start, but isn't a step of the job."""
    env = os.environ
    if "SLURM_PROCID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return None
    return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"])


def started_world() -> tuple[int, int]:
    """Return (rank on this node, world size) from torchrun or srun, or (0, 1)."""
    if "RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    task = srun_task()
    return task[1:] if task else (0, 1)
