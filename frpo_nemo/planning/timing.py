"""Estimate the seconds of each phase of a step: FLOPs and bytes over the data sheet's rates, times an efficiency each. The
estimates serve to compare layouts: docs/planning.md gives the sources of the efficiencies and the error on published runs.
They contain no measurement of this project.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from frpo_nemo.config.option import option
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.planning import communication
from frpo_nemo.planning.cluster import Cluster
from frpo_nemo.planning.communication import Model, Pack, Parallel, Transfer
from frpo_nemo.planning.memory import (
    Layout,
    active_parameters,
    kv_bytes,
    parameters,
    rank_parameters,
    trained_parameters,
)

# Reached share of the data sheet's rate.
MATRIX_EFFICIENCY = 0.5  # products of training and log-probs, in large microbatches
SMALL_BATCH_TOKENS = 256  # tokens per microbatch at which products reach half of that: small ones starve the GPU
MEMORY_EFFICIENCY = 0.7  # reading weights and KV cache while decoding
LINK_EFFICIENCY = 0.6  # NVLink, network and host link, in collectives and copies of hundreds of MB
# Seconds.
DECODE_OVERHEAD = 0.004  # vLLM's scheduler, sampler and kernel launches, per decoded token
ALL_REDUCE_LATENCY = 12e-6  # of a small message over NVLink
TENSOR_OVERHEAD = 0.001  # in a refit, per Hugging Face tensor: reload and two fingerprints


@dataclass
class Workload:
    """One step."""

    prompts_per_step: int = option("Prompts per step, over all ranks.", 64, at_least=1)
    group_size: int = option("Responses per prompt.", 8, at_least=1)
    prompt_tokens: int = option("Mean length of a prompt.", 256, at_least=1)
    response_tokens: int = option("Mean length of a response.", 512, at_least=1)
    max_prompt_tokens: int = option("Longest prompt.", 1024, at_least=1)
    max_response_tokens: int = option(
        "Longest response; each step is assumed to have one of this length.", 3072, at_least=1
    )
    updates_per_rollout: int = option("Optimizer steps per rollout.", 1, at_least=1)
    logprob_passes: int = option(
        "Forward passes in addition to training: 1 for objective.beta above 0, 1 for updates_per_rollout above 1.",
        1,
        at_least=0,
    )

    @property
    def sequences(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def tokens(self) -> int:
        return self.sequences * (self.prompt_tokens + self.response_tokens)

    @property
    def longest(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens


def seconds(
    arch: Architecture, layout: Layout, cluster: Cluster, work: Workload, kv_cache: int | None = None
) -> dict[str, float]:
    """Return seconds by phase: generation (if there is an engine; kv_cache: its bytes), log-probs, training, refit."""
    found = {}
    if layout.engine:
        found["generation"] = generation(arch, layout, cluster, work, kv_cache)
    if work.logprob_passes:
        found["log-probs"] = logprobs(arch, layout, cluster, work)
    found["training"] = training(arch, layout, cluster, work)
    if layout.engine:
        found["refit"] = refit(arch, layout, cluster)
    return found


def generation(arch: Architecture, layout: Layout, cluster: Cluster, work: Workload, kv_cache: int | None) -> float:
    """Return the seconds of a full batch while requests wait, and of a tail in which fewer and fewer responses continue up to
    the longest. Lengths are assumed to be exponential around the mean."""
    tp, mean = layout.engine.tp, work.response_tokens
    engines = layout.tp * layout.pp * layout.cp * layout.dp // tp
    waiting = math.ceil(work.prompts_per_step / engines) * work.group_size
    room = kv_cache // (kv_bytes(arch, layout) * (work.prompt_tokens + mean)) if kv_cache else waiting
    batch = max(min(waiting, layout.engine.max_num_seqs, room), 1)
    context = work.prompt_tokens + mean / 2

    total = (waiting - batch) * mean / batch * _decode(arch, layout, cluster, batch, context)
    slices = 32
    for number in range(slices):
        done = (number + 0.5) / slices * work.max_response_tokens
        alive = max(batch * math.exp(-done / mean), 1)
        each = _decode(arch, layout, cluster, alive, work.prompt_tokens + done)
        total += work.max_response_tokens / slices * each
    prompts = work.prompts_per_step / engines * work.prompt_tokens  # once per group: the prefix cache has the rest
    return total + 2 * active_parameters(arch) * prompts / (tp * _peak_flops(layout, cluster) * MATRIX_EFFICIENCY)


def _decode(arch: Architecture, layout: Layout, cluster: Cluster, batch: float, context: float) -> float:
    """Return the seconds of one token for each of `batch` sequences of `context` tokens."""
    tp, memory = layout.engine.tp, cluster.memory_gb_per_s * 1e9 * MEMORY_EFFICIENCY
    weights = parameters(arch) * layout.element / tp / memory
    products = 2 * active_parameters(arch) * batch / tp / (_peak_flops(layout, cluster) * MATRIX_EFFICIENCY)
    cache = batch * context * kv_bytes(arch, layout) / memory
    exchange = 2 * arch.num_layers * ALL_REDUCE_LATENCY if tp > 1 else 0
    return max(weights, products) + cache + exchange + DECODE_OVERHEAD


def logprobs(arch: Architecture, layout: Layout, cluster: Cluster, work: Workload) -> float:
    """Return the seconds of forward passes, and of moving the reference's weights into and out of the GPU."""
    swap = 4 * rank_parameters(arch, layout, 0) * layout.element / _link(cluster.host_gb_per_s)
    passes = _passes(arch, layout, cluster, work, backward=False)
    return work.logprob_passes * passes + (swap if layout.reference else 0)


def training(arch: Architecture, layout: Layout, cluster: Cluster, work: Workload) -> float:
    """Return the seconds of forward and backward passes, with one more forward under recomputation, without the products of
    adapters (a percent); for each update, the gradient's reduction, the weights' gather and Adam; in bf16, moving the
    optimizer from host memory and back."""
    model = _model(arch, layout)

    def once(rank: int) -> list[Transfer]:
        stage = model.parallel.stage(rank)
        return communication.gradient_sync(model, stage) + communication.optimizer_step(model, stage)

    replicas, count = layout.dp * layout.cp, max(trained_parameters(arch, layout, s) for s in (0, layout.pp - 1))
    adam = 32 * count / replicas / (cluster.memory_gb_per_s * 1e9 * MEMORY_EFFICIENCY)
    offloaded = layout.engine and layout.precision != "fp32"
    moves = 2 * 12 * count / replicas / _link(cluster.host_gb_per_s) if offloaded else 0
    update = exchange(model, cluster, once) + adam
    return _passes(arch, layout, cluster, work, backward=True) + work.updates_per_rollout * update + moves


def _passes(arch: Architecture, layout: Layout, cluster: Cluster, work: Workload, *, backward: bool) -> float:
    """Return the seconds of all microbatches through all stages."""
    rows = min(layout.microbatch_tokens, work.tokens / work.updates_per_rollout / layout.dp)
    microbatches = math.ceil(work.tokens / work.updates_per_rollout / layout.dp / rows)
    # FLOPs per parameter and token: 2 forward, 2 for the gradient of inputs, 2 for that of weights unless they are frozen.
    flops = 2 + (backward and 2 * (1 + (not layout.lora_rank) + (layout.recompute == "full")))
    efficiency = MATRIX_EFFICIENCY * rows / (rows + SMALL_BATCH_TOKENS)
    length = work.prompt_tokens + work.response_tokens
    attention = arch.num_layers * arch.num_heads * arch.head_dim * length  # causal; as costly as so many parameters
    products = flops * rows * (active_parameters(arch) + attention) / (layout.tp * layout.pp * layout.cp)
    busy = products / (_peak_flops(layout, cluster) * efficiency)

    model, packs = _model(arch, layout), [Pack(int(rows), int(rows * work.response_tokens / length))]

    def once(rank: int) -> list[Transfer]:
        return communication.model_pass(model, model.parallel.stage(rank), packs, backward=backward)

    busy += exchange(model, cluster, once)
    return work.updates_per_rollout * (microbatches + layout.pp - 1) * busy


def refit(arch: Architecture, layout: Layout, cluster: Cluster) -> float:
    """Return the seconds of the stream, with copies into full tensors and into vLLM, which first restores its sleeping
    weights."""
    model, size = _model(arch, layout), parameters(arch) * layout.element
    stream = exchange(model, cluster, lambda rank: communication.refit(model, rank, layout.engine.bucket_bytes))
    copies = 4 * size / (cluster.memory_gb_per_s * 1e9 * MEMORY_EFFICIENCY)
    wake = 2 * size / layout.engine.tp / _link(cluster.host_gb_per_s)
    return stream + copies + wake + TENSOR_OVERHEAD * (9 * arch.num_layers + 3)


def exchange(model: Model, cluster: Cluster, transfers_of: Callable[[int], Sequence[Transfer]]) -> float:
    """Return the seconds of `transfers_of(rank)` on the slowest pipeline stage, whose ranks have equal traffic (in a refit
    the first has most)."""
    parallel = model.parallel
    stage_ranks = parallel.world // parallel.pp
    return max(
        transfer_seconds(parallel, cluster, rank, transfers_of(rank)) for rank in range(0, parallel.world, stage_ranks)
    )


def transfer_seconds(parallel: Parallel, cluster: Cluster, rank: int, transfers: Sequence[Transfer]) -> float:
    """Return the seconds of the bytes that `rank` receives, one transfer after the other: over NVLink in groups inside a
    node, else over the network. Ignores latency, contention and overlap with computation."""
    total, node = 0.0, rank // cluster.gpus_per_node
    for group in {transfer.group for transfer in transfers}:
        ranks = parallel.ranks(rank, group)
        inside = all(other // cluster.gpus_per_node == node for other in ranks)
        received = sum(transfer.received(len(ranks)) for transfer in transfers if transfer.group == group)
        total += received / _link(cluster.nvlink_gb_per_s if inside else cluster.network_gb_per_s)
    return total


def _model(arch: Architecture, layout: Layout) -> Model:
    parallel = Parallel(
        layout.tp, layout.pp, layout.dp, layout.cp, layout.sequence_parallel, layout.first, layout.last, layout.ep
    )
    recompute = layout.recompute == "full"
    return _cached_model(arch, parallel, layout.element, layout.logprob_chunk_tokens, recompute, layout.lora_rank)


_cached_model = functools.lru_cache(maxsize=128)(Model)  # listing its weights takes longer than all sums over them


def _peak_flops(layout: Layout, cluster: Cluster) -> float:
    return (cluster.peak_fp32_tflops if layout.precision == "fp32" else cluster.peak_tflops) * 1e12


def _link(gb_per_s: float) -> float:
    return gb_per_s * 1e9 * LINK_EFFICIENCY
