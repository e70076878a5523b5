"""The memory of real training steps on this machine's CPU, printed as JSON: started as a process of its own by
test_memory.py. Torch's allocator is asked, not the operating system: the figures are the same on every machine."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import TypeVar

import torch
from tiny_models import make_tiny
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from frpo_nemo.config.options import LoRAConfig, ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import Losses, PolicyActor
from frpo_nemo.megatron.groups import start_model_parallel
from frpo_nemo.processes import world

SHAPE = dict(hidden_size=512, intermediate_size=1536, num_attention_heads=16, num_key_value_heads=4)
MIXTURE = SHAPE | dict(moe_intermediate_size=768, num_experts=8, num_experts_per_tok=2, head_dim=32)
LAYERS, VOCABULARY, CHUNK = 2, 1024, 128
LENGTHS = [262, 307, 455]  # attention makes one rectangle of them, 3 x 455
RANK = 32  # of adapters
CASES = {"none": [(0, 0.0), (RANK, 0.0)], "full": [(0, 0.0), (RANK, 0.1)]}  # recompute -> (rank, dropout)
T = TypeVar("T")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def allocated(work: Callable[[], T]) -> tuple[T, int, int]:
    """Return what `work` returns, the bytes of tensors that it leaves, and the most that there were while it ran."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
        gc.collect()
    events = profiler.profiler.kineto_results.experimental_event_tree()
    alive: dict[int, int] = {}  # address -> bytes
    most = 0
    for _, address, size in sorted(_changes(events), key=itemgetter(0)):
        if size > 0:
            alive[address] = size
            most = max(most, sum(alive.values()))
        else:
            alive.pop(address, None)  # None: a tensor from before, which nothing here counts
    return result, sum(alive.values()), most


def _changes(events: list, scratch: frozenset[int] = frozenset()) -> Iterator[tuple[int, int, int]]:
    """Yield time, address and bytes of each tensor made (+) or freed (-), without those that a matrix product makes for itself:
    on a CPU that has no instructions for bf16, oneDNN sums in fp32."""
    for event in events:
        fields = event.extra_fields
        if event.tag == _EventType.Allocation and fields.ptr not in scratch:
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        inside = [child for child in event.children if child.tag == _EventType.Allocation]
        freed = {child.extra_fields.ptr for child in inside if child.extra_fields.alloc_size < 0}
        yield from _changes(event.children, frozenset(freed if event.name in PRODUCTS else ()))


def loss(logprobs, entropy, sequences) -> Losses:
    lengths = sequences.response_lengths
    return Losses(-torch.stack([part.sum() for part in logprobs.split(lengths.tolist())]) / 100)


def batch_of(lengths: list[int]) -> SequenceBatch:
    tokens = [[(7 * i + n) % VOCABULARY for i in range(length)] for n, length in enumerate(lengths)]
    return SequenceBatch.from_lists([t[:8] for t in tokens], [t[8:] for t in tokens])


def measure(model: ModelConfig) -> dict[str, int]:
    """Bytes: `state` of weights, gradients and optimizer after a step, and `peak` of the next step above that."""

    def start() -> PolicyActor:
        actor = PolicyActor(model, OptimizerConfig(lr=1e-4), microbatch_tokens=sum(LENGTHS))
        actor.train_step(batch_of([32]), loss, update=0, total_updates=2)  # the optimizer's moments appear
        return actor

    actor, state, _ = allocated(start)
    _, _, peak = allocated(lambda: actor.train_step(batch_of(LENGTHS), loss, update=1, total_updates=2))
    return {"state": state, "peak": peak}


def main() -> None:
    world.start_world()
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(f"{directory}/llama", "llama", layers=LAYERS, vocab=VOCABULARY, **SHAPE)
        make_tiny(f"{directory}/qwen3_moe", "qwen3_moe", layers=LAYERS, vocab=VOCABULARY, **MIXTURE)
        cases = [
            ("llama", precision, recompute, rank, dropout)
            for precision in ("fp32", "bf16")
            for recompute in sys.argv[1:]
            for rank, dropout in CASES[recompute]
        ]
        cases += [("qwen3_moe", precision, recompute, 0, 0.0) for precision in ("fp32", "bf16") for recompute in sys.argv[1:]]
        start_model_parallel(ModelConfig(path=directory), seed=1)
        for family, precision, recompute, rank, dropout in cases:
            model = ModelConfig(
                path=f"{directory}/{family}",
                precision=precision,
                recompute=recompute,
                logprob_chunk_tokens=CHUNK,
                lora=LoRAConfig(rank=rank, dropout=dropout),
            )
            case = {"family": family, "precision": precision, "recompute": recompute, "rank": rank, "dropout": dropout}
            print(json.dumps(case | measure(model)), flush=True)


if __name__ == "__main__":
    main()
