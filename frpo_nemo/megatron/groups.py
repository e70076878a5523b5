"""Create Megatron's parallel groups, and offer the collectives over them that other modules use."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.megatron.cpu import runs_on_megatron_device
from frpo_nemo.processes.world import GROUP_TIMEOUT, gather_objects


@runs_on_megatron_device
def start_model_parallel(model: ModelConfig, seed: int) -> None:
    """Create Megatron's groups for `model`: ranks are ordered TP fastest, then CP, DP, PP."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # megatron-core's default would split experts like dense layers
        distributed_timeout_minutes=int(GROUP_TIMEOUT.total_seconds() // 60),
    )
    tensor_parallel.random.model_parallel_cuda_manual_seed(seed)
    if not torch.cuda.is_available() and max(gather_objects(torch.get_num_threads())) > 1:
        _keep_gloo_from_openmp()


def _keep_gloo_from_openmp() -> None:
    """Let each gloo thread copy alone. Otherwise its first large gather starts a team of OpenMP threads. The process then has
    more of them than cores, and libgomp lets all of them sleep at every barrier: small operations take 8 times as long
    (findings/gloo_gathers_slow_all_of_openmp.sh). A thread takes the number of threads that is set at its first parallel
    operation, and keeps it. Collective over each group."""
    threads = torch.get_num_threads()
    torch._C.set_num_threads(1)  # vLLM replaces torch's function of this name by one that does nothing
    for group in list(dist.distributed_c10d._world.pg_map):
        ranks = dist.get_world_size(group)
        own = torch.zeros((1 << 21) // ranks)  # milliseconds, in which the other of a group's two threads takes the next
        everything = [torch.zeros(own.numel() * ranks) for _ in range(6)]
        for work in [dist.all_gather_into_tensor(gathered, own, group=group, async_op=True) for gathered in everything]:
            work.wait()
    torch._C.set_num_threads(threads)


def stop_model_parallel() -> None:
    """Undo start_model_parallel, so that another layout can follow in the same processes (tests do). megatron-core
    forgets its groups but leaves them alive, with the threads of each gloo group, which wake 100 times a second."""
    parallel_state.destroy_model_parallel()
    gc.collect()  # unused models hold groups, and are in reference cycles
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def data_parallel() -> tuple[int, int]:
    """Return (rank, size) among the replicas of the model."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def sum_over_replicas_and_stages(values: Tensor) -> Tensor:
    """Sum over data-parallel replicas and pipeline stages, in place. If only one rank has a nonzero
    value at each place, this is an exact gather that every rank receives."""
    for group in (parallel_state.get_data_parallel_group(), parallel_state.get_pipeline_model_parallel_group()):
        if dist.get_world_size(group) > 1:
            dist.all_reduce(values, group=group)
    return values


def from_last_stage(value):
    """Return the last pipeline stage's picklable `value`, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    box = [value]
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(box, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return box[0]


class SumOverGroup(torch.autograd.Function):
    """Sum over the group in the forward pass. Backward is the identity: every rank computes the same loss from the sum."""

    @staticmethod
    def forward(ctx, values, group):
        dist.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx, grad):
        return grad, None
