"""Worlds of real processes for tests: started once, used for many checks.

`Workers.run(world_size, check, **arguments)` calls `check(**arguments)` in every rank of a gloo world of that size and
returns the ranks' results. Importing torch and megatron-core takes seconds per process, so the processes stay; the
process group is made again when the size changes. Checks call `use_layout`, which keeps Megatron's groups from one check
to the next of the same layout: every gloo group costs threads.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import socket
import time
import traceback

TIMEOUT = 1200  # seconds for one check: what hangs, not what a busy machine makes slow


class Workers:
    """Processes that are started when first needed. A failed check ends them all: ranks may be stuck in a collective."""

    def __init__(self):
        self._processes: list = []
        self._pipes: list = []
        self._world = (0, 0)  # (size, port) of the world that exists

    def run(self, world_size: int, check, **arguments) -> list:
        """Results of all ranks, in order. Raises AssertionError with the first failing rank's traceback."""
        self._grow(world_size)
        if world_size != self._world[0]:
            self._world = (world_size, _free_port())
        for pipe in self._pipes[:world_size]:
            pipe.send((self._world, check, arguments))
        results, deadline = {}, time.monotonic() + TIMEOUT
        while len(results) < world_size:
            for rank, pipe in enumerate(self._pipes[:world_size]):
                if rank not in results and pipe.poll(0.01):
                    ok, value = pipe.recv()
                    if not ok:
                        self.close()
                        raise AssertionError(f"rank {rank} of {world_size} failed in {check.__name__}:\n{value}")
                    results[rank] = value
            if time.monotonic() > deadline:
                self.close()
                missing = sorted(set(range(world_size)) - set(results))
                raise AssertionError(f"ranks {missing} of {world_size} did not finish {check.__name__} in {TIMEOUT} s")
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes, self._world = [], [], (0, 0)

    def _grow(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < world_size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, len(self._processes)), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)


def use_layout(model) -> None:
    """Give this rank the Megatron groups of `model` (a ModelConfig)."""
    from megatron.core import parallel_state as ps

    from frpo_nemo.megatron.groups import start_model_parallel, stop_model_parallel

    wanted = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.expert_model_parallel_size,
    )
    if ps.model_parallel_is_initialized():
        sizes = (
            ps.get_tensor_model_parallel_world_size(),
            ps.get_pipeline_model_parallel_world_size(),
            ps.get_expert_model_parallel_world_size(),
        )
        if sizes == wanted:
            return
        stop_model_parallel()
    start_model_parallel(model, seed=1)


def _serve(pipe, rank: int) -> None:
    gc.disable()  # as a recipe starts
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from frpo_nemo.megatron.groups import stop_model_parallel
    from frpo_nemo.processes.world import start_world

    gc.freeze()
    gc.enable()
    current = None
    while True:
        world, check, arguments = pipe.recv()
        try:
            if world != current:
                if dist.is_initialized():
                    stop_model_parallel()
                    dist.destroy_process_group()
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world[0]))
                os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(world[1]))
                start_world()
                current = world
            pipe.send((True, check(**arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    """Below the range that the system gives to connections: none of them can take it before rank 0 listens."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):  # nobody listens there
                return port
