"""What a step takes with the shapes of a 7B model: a few of its layers, with its embeddings."""

from __future__ import annotations

import functools
import time

import torch

from acceptance import models, policy
from acceptance.context import Context
from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning.cluster import peak_flops
from frpo_nemo.planning.memory import parameters
from frpo_nemo.rollout.engine import RolloutEngine
from frpo_nemo.training.loss import CompletionLoss

GIB_OF_7B = 7.25e9 * 2 / 2**30  # Mistral 7B in bf16


@functools.cache
def _engine(context: Context) -> RolloutEngine:
    """Start an engine and put it to sleep. Without CUDA graphs, because only refits are measured."""
    engine = RolloutEngine(
        models.stack(context),
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
    )
    context.closing.callback(engine.close)
    engine.sleep()
    return engine


def refit(context: Context) -> dict:
    """Time the second refit, from a sleeping engine to proven weights. seconds_7b: scaled by bytes from these few layers to a
    whole 7B model."""
    engine = _engine(context)  # before the policy, as in a run
    actor = _actor(context, None)
    for _ in range(2):
        engine.sleep()
        _synchronise(context)
        started = time.monotonic()
        engine.refit(actor.stream_hf_weights())
        _synchronise(context)
        seconds = time.monotonic() - started
    engine.sleep()
    gib = parameters(actor.arch) * 2 / 2**30
    return {"seconds_7b": seconds / gib * GIB_OF_7B, "seconds": seconds, "gib": gib}


def mfu(context: Context) -> dict:
    """Time an update over packed microbatches in bf16. mfu: its FLOP/s over the data sheet's peak."""
    found = _step(context)
    if not context.cuda:
        return found
    return found | {"mfu": found["tflops"] * 1e12 / peak_flops(torch.cuda.get_device_name())}


def delayed(context: Context) -> dict:
    return against_bf16(context, fp8="hybrid", fp8_recipe="delayed")


def tensorwise(context: Context) -> dict:
    return against_bf16(context, fp8="hybrid", fp8_recipe="tensorwise")


def blockwise(context: Context) -> dict:
    return against_bf16(context, fp8="hybrid", fp8_recipe="blockwise")


def against_bf16(context: Context, **model) -> dict:
    """Time the same update with other fields of ModelConfig. speedup: over plain bf16."""
    found = _step(context, **model)
    return {"speedup": _step(context)["seconds"] / found["seconds"]} | found


@functools.cache
def _step(context: Context, **model) -> dict:
    """Time forward, backward and optimizer: the best of three after one that warms up."""
    actor, batch = _actor(context, OptimizerConfig(lr=1e-5), **model), _batch(context)
    loss, seconds = CompletionLoss(int(batch.response_lengths.sum())), []
    for _ in range(4):
        _synchronise(context)
        started = time.monotonic()
        actor.train_step(batch, loss, update=0, total_updates=1)
        _synchronise(context)
        seconds.append(time.monotonic() - started)
    best = min(seconds[1:])
    tokens = int(batch.lengths.sum())
    return {"tflops": _flops(actor.arch, batch) / best / 1e12, "seconds": best, "tokens_per_second": tokens / best}


def _actor(context: Context, optim: OptimizerConfig | None, **model) -> PolicyActor:
    policy.free()
    config = ModelConfig(path=models.stack(context), **model)
    return policy.make_actor(config, optim, microbatch_tokens=context.on(cuda=8192, cpu=256))


def _batch(context: Context) -> SequenceBatch:
    """Make four microbatches of equal sequences, nearly all response."""
    sequences, length, vocabulary = context.on(cuda=(32, 1024, 32000), cpu=(16, 64, 131))
    tokens = torch.randint(2, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0)).tolist()
    return SequenceBatch.from_lists([row[:16] for row in tokens], [row[16:] for row in tokens])


def _flops(arch: Architecture, batch: SequenceBatch) -> float:
    """Count those of the matrix products, forward and backward, without the embedding, attention and recomputation."""
    head = arch.vocab_size * arch.hidden_size
    layers = parameters(arch) - 2 * head
    return 6.0 * (layers * int(batch.lengths.sum()) + head * int(batch.response_lengths.sum()))


def _synchronise(context: Context) -> None:
    if context.cuda:
        torch.cuda.synchronize()
