"""Save the distributed Adam's state as tensors of the parameters' shapes, so that a checkpoint fits every layout.

The optimizer divides each flattened parameter over the data-parallel ranks. To save, one of them collects a parameter's
pieces, and each rank does so for its share of the parameters. To load, each reads the parameters of which it holds a piece.
So the state is written and read once, in parallel, and a rank never holds more than its share and one parameter.

The names on disk are those of megatron-core's `fully_reshardable` format. Its own code gathers all parameters of a
model shard on every replica (12 bytes each in host memory, and a third of that on the GPU), and in 0.16 its loader
does not know the step of torch's AdamW.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

KEYS = ("param", "exp_avg", "exp_avg_sq")  # the fp32 main weight, and Adam's moments


@torch.no_grad()
def to_save(optimizer, model_state: dict) -> dict:
    """Return parameter name -> key -> sharded fp32 tensor (on CPU) of the parameters that this rank must write. Collective.

    model_state: parameter name -> megatron-core's sharded tensor (or a factory of them) that holds the parameter.
    """
    allocate(optimizer)
    state = {}
    for part in _parts(optimizer):
        group, written = part.data_parallel_group, [0] * part.data_parallel_group.size()
        own = {id(parameter) for buffer in part.buffers for parameter in buffer.params}  # experts are a part of their own
        for name, template in model_state.items():
            if id(template.data) not in own:
                continue
            writer = written.index(min(written))  # the same on all ranks: they have the same parameters
            written[writer] += template.data.numel()
            whole = [_collect(part, template.data, key, writer) for key in KEYS]
            if writer == group.rank():
                state[name] = {key: _sharded(template, key, tensor) for key, tensor in zip(KEYS, whole, strict=True)}
    return state


@torch.no_grad()
def to_load(optimizer, model_state: dict) -> dict:
    """Return what `to_save` does, for the parameters of which this rank holds a piece, to be filled."""
    return {
        name: {key: _sharded(t, key, torch.empty(t.data.shape, dtype=torch.float32)) for key in KEYS}
        for part in _parts(optimizer)
        for name, t in model_state.items()
        if t.data in part.model_param_gbuf_map
    }


@torch.no_grad()
def restore(optimizer, parameters: dict, loaded: dict, step: int) -> None:
    """Copy this rank's pieces out of `loaded` (the filled result of `to_load`), and set Adam's step.

    parameters: name -> parameter of the model.
    """
    allocate(optimizer)
    for part in _parts(optimizer):
        for name, whole in loaded.items():
            if parameters[name] not in part.model_param_gbuf_map:
                continue
            where, pieces = _own_piece(part, parameters[name])
            for key in KEYS:
                pieces[key].copy_(whole[key].flatten()[where])
    set_adam_step(optimizer, step)


def allocate(optimizer) -> None:
    """Give an optimizer that has not stepped yet the state of step 0; one that has keeps its own."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    set_adam_step(optimizer, adam_step(optimizer))


def adam_step(optimizer) -> int:
    """Return the number of updates so far, on which Adam's bias correction depends."""
    for part in _parts(optimizer):
        # torch keeps it per parameter, the FusedAdam of Transformer Engine and Apex per group
        for holder in (*part.optimizer.state.values(), *part.optimizer.param_groups):
            if "step" in holder:
                return int(holder["step"])
    return 0


def set_adam_step(optimizer, step: int) -> None:
    for part in _parts(optimizer):
        if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(step))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = step


def _parts(optimizer) -> list:
    """Return megatron-core's DistributedOptimizers; none without an optimizer."""
    return getattr(optimizer, "chained_optimizers", [optimizer]) if optimizer is not None else []


def _own_piece(part, parameter: torch.nn.Parameter) -> tuple[slice, dict[str, Tensor]]:
    """Return (range of the flattened parameter, key -> this rank's tensor for that range)."""
    where = part._get_model_param_range_map(parameter)["param"]
    return slice(where.start, where.end), part._get_main_param_and_optimizer_states(parameter)


def _collect(part, parameter: torch.nn.Parameter, key: str, writer: int) -> Tensor | None:
    """Return the whole tensor [*parameter.shape] on rank `writer` of the data-parallel group, on CPU; None on the others."""
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    if parameter in part.model_param_gbuf_map:
        where, pieces = _own_piece(part, parameter)
        whole[where] = pieces[key]
    group = part.data_parallel_group
    if group.size() > 1:
        # Sum integers, which copies bits: with floats, -0.0 + 0.0 would lose the sign.
        dist.reduce(whole.view(torch.int32), dist.get_global_rank(group, writer), group=group)
    return whole.view(parameter.shape).cpu() if writer == group.rank() else None


def _sharded(template, key: str, data: Tensor):
    """Return `data` at the place where `template` has its parameter in the whole model. The rank that has it is its main
    replica."""
    changes = dict(key=f"optimizer.state.{key}.{template.key}", data=data, replica_id=(*template.replica_id[:-1], 0))
    if isinstance(template, ShardedTensor):
        changes["dtype"] = data.dtype
    return replace(template, **changes)
