"""Counts what this process sends through torch.distributed: calls and bytes, by phase, operation and group.

Every collective and point-to-point call, by whatever Python function, passes torch's dispatcher as an operator of the
namespaces c10d or _c10d_functional; here is a mode that looks at them there. An operator that it does not know is an
error, and `backend_calls` counts the same calls on the other side of the dispatcher, in the backends. Not seen: the
store of the rendezvous, and communicators that vLLM opens for itself.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator -> (kind, argument whose tensors are the payload, position of the root's group rank). The payload is what
# frpo_nemo/planning/communication.py says: the whole vector of an all-gather or reduce-scatter, one rank's part of a
# gather or scatter, else the tensor.
_C10D = {
    "allreduce_": ("all_reduce", 0, None),
    "allreduce_coalesced_": ("all_reduce", 0, None),
    "allgather_": ("all_gather", 0, None),
    "_allgather_base_": ("all_gather", 0, None),
    "allgather_coalesced_": ("all_gather", 0, None),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, None),
    "reduce_scatter_": ("reduce_scatter", 1, None),
    "_reduce_scatter_base_": ("reduce_scatter", 1, None),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, None),
    "broadcast_": ("broadcast", 0, 2),
    "reduce_": ("reduce", 0, None),
    "gather_": ("gather", 1, 3),
    "scatter_": ("scatter", 0, 3),
    "alltoall_": ("all_to_all", 1, None),
    "alltoall_base_": ("all_to_all", 1, None),
    "send": ("send", 0, None),
    "recv_": ("recv", 0, None),
    "barrier": ("barrier", None, None),
}
_FUNCTIONAL = {  # the group is an argument by name; an all-gather gets only this rank's part
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}
_NO_CALL = {"wait_tensor", "_wrap_tensor_autograd"}

Key = tuple[str, str, tuple[int, ...], bool]  # phase, kind, global ranks (of send and recv: the peer), is the root


class CollectiveCounter(TorchDispatchMode):
    """Context manager: `calls` and `bytes` [Key] of this rank, of everything that happens inside.

    `phase` is a plain attribute, or the name given to `with counter.of(name): ...`.
    """

    def __init__(self):
        super().__init__()
        self.phase = "other"
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    @contextlib.contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Attribute what happens inside to `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func, args) -> None:
        name = func._schema.name.split("::")[1]
        if name in _NO_CALL:
            return
        if func.namespace == "c10d" and name in _C10D:
            kind, payload, root = _C10D[name]
            box = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            ranks = dist.get_process_group_ranks(_by_name(dist.ProcessGroup.unbox(box).group_name))
            if kind in ("send", "recv"):
                ranks = [ranks[args[2]]]
            is_root = root is not None and ranks[args[root]] == dist.get_rank()
            self._add(kind, ranks, 0 if payload is None else _bytes(args[payload]), is_root)
        elif func.namespace == "_c10d_functional" and name in _FUNCTIONAL:
            ranks = dist.get_process_group_ranks(_by_name(args[-1] if isinstance(args[-1], str) else args[-2]))
            kind = _FUNCTIONAL[name]
            self._add(kind, ranks, _bytes(args[0]) * (len(ranks) if kind == "all_gather" else 1), False)
        else:
            raise NotImplementedError(f"{func} is not among the operators that are counted")

    def _add(self, kind: str, ranks: list[int], size: int, is_root: bool) -> None:
        key = (self.phase, kind, tuple(ranks), is_root)
        self.calls[key] += 1
        self.bytes[key] += size


def backend_calls() -> int:
    """Return how many calls this rank's gloo backends have had so far, over all groups that exist: each numbers its own."""
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.GroupMember.NON_GROUP_MEMBER]
    return sum(group._get_backend(torch.device("cpu"))._get_sequence_number_for_group() for group in groups)


def _by_name(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
