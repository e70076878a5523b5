"""One rank of a world that does not exist: groups have their sizes and members, and collectives do nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_world(model, *, rank: int, replicas: int = 1) -> Iterator[None]:
    """Megatron's groups for `model` (a ModelConfig), as many times as there are replicas."""
    sizes = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
    tp, pp, cp = sizes
    dist.init_process_group("fake", rank=rank, world_size=tp * pp * cp * replicas, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            context_parallel_size=cp,
            expert_model_parallel_size=model.expert_model_parallel_size,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def or_the_error(facts: Callable[..., dict]) -> Callable[..., dict]:
    """Decorator: what went wrong is a fact as well, and the other cases are looked at all the same."""

    @functools.wraps(facts)
    def looked_at(*args, **kwargs) -> dict:
        try:
            return facts(*args, **kwargs)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    return looked_at
