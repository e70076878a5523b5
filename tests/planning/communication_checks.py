"""Checks of communication and of the refit's memory with real groups: every rank of a world calls them."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import use_layout

from benchmarks.collectives import CollectiveCounter, backend_calls
from benchmarks.communication import compare, model_config
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.weights.binding import bind
from frpo_nemo.planning.communication import Transfer


def counted_and_computed(path: str, directory: str, **layout) -> dict:
    """Return phase name -> benchmarks.communication.Phase, of this rank."""
    config = model_config(path, **layout)
    use_layout(config)
    return compare(config, directory)


def counted_ways_to_communicate() -> tuple[dict, int]:
    """(what is counted, without the phase, of one call of every kind in a world of two; how many calls the backend got)."""
    mine, whole, other = torch.ones(4), torch.ones(8), 1 - dist.get_rank()
    before = backend_calls()
    with CollectiveCounter() as counter:
        dist.all_reduce(mine)
        dist.all_gather_into_tensor(whole, mine)
        dist.all_gather(list(whole.chunk(2)), mine)
        dist.reduce_scatter_tensor(mine, whole)
        dist.broadcast(mine, src=0)
        dist.reduce(mine, dst=0)
        dist.all_to_all_single(whole, whole.clone())
        dist.all_gather_object([None, None], "x")
        dist.broadcast_object_list(["x"], src=0)
        torch.distributed._functional_collectives.all_reduce(mine, "sum", dist.group.WORLD).sum()
        torch.distributed._functional_collectives.all_gather_tensor(mine, 0, dist.group.WORLD).sum()
        with dist.distributed_c10d._coalescing_manager(dist.group.WORLD):
            dist.all_reduce(mine)
            dist.all_reduce(whole)
        messages = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, mine.clone(), other)]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        dist.barrier()
    counted = {kind: [0, 0] for _, kind, *_ in counter.calls}
    for key, calls in counter.calls.items():
        counted[key[1]][0] += calls
        counted[key[1]][1] += counter.bytes[key]
    return counted, backend_calls() - before


def refit_traffic(path: str, bucket_bytes: int, **layout) -> dict[str, float]:
    """Return bytes of the whole model, of what this rank's shards lack of it, of the replicated weights that it has, and what
    reached it in one stream."""
    actor = _actor(path, **layout)
    with CollectiveCounter() as counter:
        for _ in actor.stream_hf_weights(bucket_bytes=bucket_bytes):
            pass
    received = sum(
        Transfer("", kind, "", counter.bytes[key], root=root).received(len(ranks))
        for key in counter.calls
        for _, kind, ranks, root in [key]
    )
    own = [binding.weight for binding in bind(actor.gpt, actor.arch) if binding.parameter is not None]
    whole = sum(t.numel() * 4 for _, t in actor.stream_hf_weights())
    return {
        "whole": whole,
        "missing": whole - 4 * sum(w.shard_numel for w in own if w.exported),
        "replicated": 4 * sum(w.shard_numel for w in own if w.replicated),
        "received": received,
    }


def refit_memory(path: str, bucket_bytes: int, **layout) -> tuple[int, int, int, int]:
    """(most bytes alive at one time that a stream made, bytes of its largest weight when whole, of its largest tensor, of
    the model); the caller keeps nothing but the tensor that it was given last."""
    actor = _actor(path, **layout)
    peaks = []
    for _ in range(3):
        with _LiveMemory(actor.gpt.parameters()) as memory:
            for _last in actor.stream_hf_weights(bucket_bytes=bucket_bytes):
                pass
        peaks.append(memory.peak)
    tp = layout.get("tp", 1)
    sizes = [4 * math.prod(shape) for b in bind(actor.gpt, actor.arch) for _, shape in b.weight.hugging_face]
    weights = [4 * b.weight.shard_numel * tp for b in bind(actor.gpt, actor.arch) if not b.weight.replicated]
    return min(peaks), max(weights), max(sizes), sum(sizes)


def _actor(path: str, **layout) -> PolicyActor:
    config = model_config(path, **layout)
    use_layout(config)
    return PolicyActor(config, microbatch_tokens=64)


class _LiveMemory(TorchDispatchMode):
    """`peak`: most bytes at one time in storages that operators returned inside, other than those of `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out
