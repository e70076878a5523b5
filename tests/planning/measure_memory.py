"""The memory of real training steps on this machine's CPU, printed as JSON: started as a process of its own by
test_memory.py, with a malloc that gives freed memory back at once, so that the resident size is what is allocated."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from tiny_models import make_tiny

from frpo_nemo.config.options import LoRAConfig, ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import Losses, PolicyActor
from frpo_nemo.megatron.groups import start_model_parallel
from frpo_nemo.processes import world

SHAPE = dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=32, num_key_value_heads=8)
LAYERS, VOCABULARY, CHUNK = 2, 2048, 256
LENGTHS = [524, 614, 910]  # attention makes one rectangle of them, 3 x 910
RANK = 32  # of adapters
CASES = {"none": [(0, 0.0), (RANK, 0.0)], "full": [(0, 0.0), (RANK, 0.1)]}  # recompute -> (rank, dropout)


def resident(kind: str = "VmRSS") -> int:
    """Return the bytes of this process in memory now, or with VmHWM the most since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def loss(logprobs, entropy, sequences) -> Losses:
    lengths = sequences.response_lengths
    return Losses(-torch.stack([part.sum() for part in logprobs.split(lengths.tolist())]) / 100)


def batch_of(lengths: list[int]) -> SequenceBatch:
    tokens = [[(7 * i + n) % VOCABULARY for i in range(length)] for n, length in enumerate(lengths)]
    return SequenceBatch.from_lists([t[:8] for t in tokens], [t[8:] for t in tokens])


def measure(model: ModelConfig) -> dict[str, int]:
    """Bytes: `state` of weights, gradients and optimizer after a step, and `peak` of the next step above that."""
    gc.collect()
    before = resident()
    actor = PolicyActor(model, OptimizerConfig(lr=1e-4), microbatch_tokens=sum(LENGTHS))
    actor.train_step(batch_of([32]), loss, update=0, total_updates=2)  # the optimizer's moments appear
    gc.collect()
    state = resident()
    reset_peak()
    actor.train_step(batch_of(LENGTHS), loss, update=1, total_updates=2)
    return {"state": state - before, "peak": resident("VmHWM") - state}


def warm_up(directory: str) -> None:
    """Let libraries make their own buffers, as they do at first use."""
    for precision, rank in (("fp32", 0), ("bf16", 0), ("fp32", RANK), ("bf16", RANK)):
        model = ModelConfig(path=directory, precision=precision, lora=LoRAConfig(rank=rank))
        actor = PolicyActor(model, OptimizerConfig(lr=1e-4), microbatch_tokens=64)
        actor.train_step(batch_of([32]), loss, update=0, total_updates=2)


def main() -> None:
    world.start_world()
    with tempfile.TemporaryDirectory() as directory:
        make_tiny(directory, "llama", layers=LAYERS, vocab=VOCABULARY, **SHAPE)
        cases = [
            (precision, recompute, rank, dropout)
            for precision in ("fp32", "bf16")
            for recompute in sys.argv[1:]
            for rank, dropout in CASES[recompute]
        ]
        start_model_parallel(ModelConfig(path=directory), seed=1)
        warm_up(directory)
        for precision, recompute, rank, dropout in cases:
            model = ModelConfig(
                path=directory,
                precision=precision,
                recompute=recompute,
                logprob_chunk_tokens=CHUNK,
                lora=LoRAConfig(rank=rank, dropout=dropout),
            )
            case = {"precision": precision, "recompute": recompute, "rank": rank, "dropout": dropout}
            print(json.dumps(case | measure(model)), flush=True)


if __name__ == "__main__":
    main()
