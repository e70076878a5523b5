"""Compute the communication of one rank in a training step: every collective and message, from shapes and layout alone.

Formulas for what frpo_nemo and megatron-core 0.16 call, checked call by call and byte by byte against real process
groups (tests/planning/test_communication.py); docs/scaling.md has them with symbols. Not here: vLLM's own
communicators, the rendezvous store, the watchdog's sockets. No tensors: numbers of calls and bytes.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.table import Weight, WeightLayout, adapter_weights, weights
from frpo_nemo.planning.memory import layers_with_experts
from frpo_nemo.planning.parallel import Parallel, Transfer

FP32, INT64 = 4, 8  # bytes
SHAPE_BYTES = 3 * INT64  # sent before every activation between stages: packs differ in length


@dataclass(frozen=True)
class Pack:
    """A packed microbatch. tokens: of the whole pack with its padding. responses: response tokens that this rank's part
    predicts (all of the pack's, without CP)."""

    tokens: int
    responses: int


@dataclass(frozen=True)
class Model:
    """The properties of a model that decide its traffic. element: bytes of a weight and an activation (2: bf16, 4: fp32)."""

    arch: Architecture
    parallel: Parallel
    element: int
    chunk_tokens: int = 1024  # model.logprob_chunk_tokens
    recompute: bool = False  # model.recompute=full
    lora_rank: int = 0  # of adapters; if above 0, only they are trained

    def trained_of(self, stage: int) -> list[Weight]:
        """Return the parameters of each rank of `stage` that have gradients."""
        return self._trained_by_stage[stage]

    @functools.cached_property
    def weights(self) -> list[Weight]:
        """Return all parameters of all stages except adapters, in the order of the refit."""
        return weights(self.arch, self._layout)

    @functools.cached_property
    def _trained_by_stage(self) -> list[list[Weight]]:
        trained = adapter_weights(self.arch, self._layout, self.lora_rank) if self.lora_rank else self.weights
        return [[weight for weight in trained if weight.stage == stage] for stage in range(self.parallel.pp)]

    @property
    def _layout(self) -> WeightLayout:
        parallel = self.parallel
        return WeightLayout(parallel.tp, parallel.pp, parallel.first, parallel.last, parallel.ep)

    def layers_of(self, stage: int) -> int:
        parallel = self.parallel
        return len(self.arch.layers_of_stage(stage, parallel.pp, parallel.first, parallel.last))


def model_pass(model: Model, stage: int, packs: Sequence[Pack], *, backward: bool) -> list[Transfer]:
    """Return the transfers of forward passes over a replica's microbatches, and of backward passes if `backward`."""
    transfers = []
    for pack in packs:
        forward = _layers(model, stage, pack, "forward")
        transfers += _embedding(model, stage, pack, backward) + forward + _head(model, stage, pack, backward)
        transfers += _between_stages(model, stage, pack, backward)
        if backward:
            transfers += _layers(model, stage, pack, "backward") + (forward if model.recompute else [])
    return transfers


def _layers(model: Model, stage: int, pack: Pack, direction: str) -> list[Transfer]:
    """Return the transfers of tensor and context parallelism inside the layers of one stage."""
    arch, parallel, count = model.arch, model.parallel, model.layers_of(stage)
    local = pack.tokens // parallel.cp
    activations = local * arch.hidden_size * model.element
    # With adapters nothing needs the gradient of the very first input, unless the layer is recomputed.
    asked = 2 * count - (direction == "backward" and model.lora_rank > 0 and stage == 0 and not model.recompute)
    name, transfers = f"layers, {direction}", []
    if parallel.tp > 1 and parallel.sequence_parallel:
        # Backward gathers twice for each column-parallel matrix: its input again unless it is frozen, and the gradient of
        # the next one.
        gathers = 4 * count if direction == "backward" and not model.lora_rank else 2 * count
        transfers.append(Transfer(name, "all_gather", "tp", gathers * activations, gathers))
        transfers.append(Transfer(name, "reduce_scatter", "tp", asked * activations, asked))
    elif parallel.tp > 1:
        transfers.append(Transfer(name, "all_reduce", "tp", asked * activations, asked))
    if parallel.tp > 1 and model.lora_rank:
        transfers += _adapters(model, count, local * model.lora_rank * model.element, direction)
    if arch.num_kv_heads < parallel.tp:  # a query group's heads are split over ranks: q, k and v are gathered first
        fused = local * (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim * model.element
        kind = "all_gather" if direction == "forward" else "reduce_scatter"
        transfers.append(Transfer(f"layers, {direction}", kind, "tp", count * fused, count))
    return transfers + _dispatch(model, stage, pack, direction)


def _dispatch(model: Model, stage: int, pack: Pack, direction: str) -> list[Transfer]:
    """Return the transfers of tokens to the experts that were chosen for them, and back, if all experts get equally many.
    Splits and weights, a few bytes a token, are left out."""
    arch, parallel = model.arch, model.parallel
    layers = arch.layers_of_stage(stage, parallel.pp, parallel.first, parallel.last)
    mixtures = layers_with_experts(arch, layers)
    if parallel.ep == 1 or not mixtures:
        return []
    split = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    rows = pack.tokens // split * arch.experts.chosen * arch.hidden_size * model.element
    return [Transfer(f"experts, {direction}", "all_to_all", "ep", 2 * mixtures * rows, 2 * mixtures)]


def _adapters(model: Model, count: int, product: int, direction: str) -> list[Transfer]:
    """Return the transfers of adapters of `count` layers: A's products, of `product` bytes each, 5 in the two column-parallel
    layers (q, k, v; gate, up) and one in each of the two row-parallel ones (o; down)."""
    name, forward = f"adapters, {direction}", direction == "forward"
    columns, rows, calls = count * 5 * product, count * 2 * product, count * 2
    if model.parallel.sequence_parallel:
        gathered, scattered = (columns, rows) if forward else (rows, columns)
        return [
            Transfer(name, "all_gather", "tp", gathered, calls),
            Transfer(name, "reduce_scatter", "tp", scattered, calls),
        ]
    return [Transfer(name, "all_reduce", "tp", rows if forward else columns, calls)]


def _embedding(model: Model, stage: int, pack: Pack, backward: bool) -> list[Transfer]:
    parallel = model.parallel
    if stage > 0 or parallel.tp == 1:
        return []
    activations = pack.tokens // parallel.cp * model.arch.hidden_size * model.element
    if not parallel.sequence_parallel:
        return [Transfer("embedding", "all_reduce", "tp", activations)]
    transfers = [Transfer("embedding", "reduce_scatter", "tp", activations)]
    learns = backward and not model.lora_rank
    return transfers + ([Transfer("embedding", "all_gather", "tp", activations)] if learns else [])


def _head(model: Model, stage: int, pack: Pack, backward: bool) -> list[Transfer]:
    """Return the transfers from the last hidden states to log-probs and entropy (with CP, to columns over whole sequences)."""
    parallel = model.parallel
    if stage < parallel.pp - 1:
        return []
    activations = pack.tokens // parallel.cp * model.arch.hidden_size * model.element
    transfers = []
    if parallel.tp > 1 and parallel.sequence_parallel:
        transfers.append(Transfer("head", "all_gather", "tp", activations))
        if backward:
            transfers.append(Transfer("head", "reduce_scatter", "tp", activations))
    elif parallel.tp > 1 and backward:
        transfers.append(Transfer("head", "all_reduce", "tp", activations))
    # Per chunk: the largest logit; then the sums of exponentials and of weighted logits, and the target's logit.
    chunks = math.ceil(pack.responses / model.chunk_tokens)
    transfers.append(Transfer("log-probs", "all_reduce", "tp", 4 * FP32 * pack.responses, 2 * chunks))
    return transfers


def _between_stages(model: Model, stage: int, pack: Pack, backward: bool) -> list[Transfer]:
    parallel = model.parallel
    split = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    message = SHAPE_BYTES + pack.tokens // split * model.arch.hidden_size * model.element
    transfers = []
    for neighbour, kind, there in (("previous", "recv", stage > 0), ("next", "send", stage < parallel.pp - 1)):
        if there:
            transfers.append(Transfer("between stages", kind, neighbour, message, 2))
            if backward:
                back = "send" if kind == "recv" else "recv"
                transfers.append(Transfer("between stages", back, neighbour, message, 2))
    return transfers


def distribution_distance(model: Model, stage: int, packs: Sequence[Pack]) -> list[Transfer]:
    """Return the transfers that an exact KL from the reference adds to a forward pass (logprobs.token_kl)."""
    if stage < model.parallel.pp - 1:
        return []
    chunks = [math.ceil(pack.responses / model.chunk_tokens) for pack in packs]
    tokens = sum(pack.responses for pack in packs)
    return [Transfer("log-probs", "all_reduce", "tp", 5 * FP32 * tokens, 5 * sum(chunks))]


def columns(parallel: Parallel, stage: int, names: Sequence[str], length: int) -> list[Transfer]:
    """Return the transfers of a pass's results to every rank: fp32 columns `names` of `length` entries of the global batch,
    by a sum over replicas and one over stages."""
    transfers, last = [], stage == parallel.pp - 1
    if parallel.pp > 1:
        size = INT64 + len(pickle.dumps(list(names)))
        transfers.append(Transfer("columns", "broadcast", "pp", size, 2, root=last))
    for group in ("dp", "pp"):
        if getattr(parallel, group) > 1:
            transfers.append(Transfer("columns", "all_reduce", group, FP32 * len(names) * length))
    return transfers


def buffer_elements(model: Model, stage: int, *, of_experts: bool = False) -> list[int]:
    """Return the elements of each gradient (and weight) bucket of the distributed optimizer, with its padding. Without
    overlap there is one bucket, and one more for a tied embedding that first and last stage both hold; experts have their
    own."""
    held = [weight for weight in model.trained_of(stage) if weight.of_expert == of_experts]
    tied = [weight for weight in held if _is_shared_embedding(model, weight)]
    rest = [weight for weight in held if weight not in tied]
    replicas = model.parallel.dp * model.parallel.cp
    if of_experts:
        replicas = replicas * model.parallel.tp // model.parallel.ep
    align = math.lcm(replicas, 128)
    return [_up(sum(_up(weight.shard_numel, 64) for weight in part), align) for part in (rest, tied) if part]


def gradient_sync(model: Model, stage: int) -> list[Transfer]:
    """Return the transfers after the last backward pass: gradients (fp32) over replicas, those of replicated weights over TP,
    that of a tied embedding over stages."""
    parallel, arch = model.parallel, model.arch
    buckets = buffer_elements(model, stage)
    transfers = [Transfer("gradients", "reduce_scatter", "dp_cp", FP32 * sum(buckets), len(buckets))]
    if experts := buffer_elements(model, stage, of_experts=True):
        transfers.append(Transfer("gradients of experts", "reduce_scatter", "edp", FP32 * sum(experts), len(experts)))
    # Under sequence parallelism each rank saw only its own tokens; norms of single heads always saw only this rank's heads.
    of_heads = ("q_layernorm.weight", "k_layernorm.weight")
    partial = [
        weight.shard_numel
        for weight in model.trained_of(stage)
        if weight.replicated and (parallel.sequence_parallel or weight.names[0].endswith(of_heads))
    ]
    if parallel.tp > 1 and partial:
        transfers.append(Transfer("gradients of replicated weights", "all_reduce", "tp", FP32 * sum(partial)))
    shared = [weight for weight in model.trained_of(stage) if _is_shared_embedding(model, weight)]
    if shared:
        size = FP32 * arch.padded_vocab_size(parallel.tp) // parallel.tp * arch.hidden_size
        transfers.append(Transfer("gradient of the tied embedding", "all_reduce", "embedding", size))
    return transfers


def optimizer_step(model: Model, stage: int) -> list[Transfer]:
    """Return the transfers of the global gradient norm, and of the updated weights from the ranks that updated them."""
    buckets, experts = buffer_elements(model, stage), buffer_elements(model, stage, of_experts=True)
    transfers = [
        Transfer("gradient norm", "all_reduce", "world", FP32),
        Transfer("weights", "all_gather", "dp_cp", model.element * sum(buckets), len(buckets)),
    ]
    if experts:
        transfers.append(Transfer("experts", "all_gather", "edp", model.element * sum(experts), len(experts)))
    return transfers


def refit(model: Model, rank: int, bucket_bytes: int) -> list[Transfer]:
    """Return the transfers of the stream of full weights to vLLM, and of the result of its check (nothing to report)."""
    parallel, transfers = model.parallel, []
    first = rank % parallel.tp == 0  # of its tensor group: replicated weights pass through this rank
    for bucket in refit_buckets(model, bucket_bytes):
        split = model.element * sum(weight.shard_numel for weight in bucket if not weight.replicated)
        whole = model.element * sum(weight.shard_numel for weight in bucket if weight.replicated)
        between = split + (whole if first else 0)
        if parallel.pp > 1 and between:
            is_source = bucket[0].stage == parallel.stage(rank)
            transfers.append(Transfer("weights from their stage", "broadcast", "pp", between, root=is_source))
        group, size = ("ep", parallel.ep) if bucket[0].of_expert else ("tp", parallel.tp)
        if size > 1 and split:
            transfers.append(Transfer("weights from all shards", "all_gather", group, size * split))
        if parallel.tp > 1 and whole:
            transfers.append(Transfer("replicated weights", "broadcast", "tp", whole, root=first))
    return transfers + agreement(parallel)


@functools.lru_cache(maxsize=8)
def refit_buckets(model: Model, bucket_bytes: int) -> list[list[Weight]]:
    """Return buckets: consecutive weights of one stage, together at most `bucket_bytes` when whole, or one larger weight."""
    buckets: list[list[Weight]] = []
    room = 0
    for weight in model.weights:
        if not weight.exported:
            continue
        ranks = 1 if weight.replicated else model.parallel.ep if weight.of_expert else model.parallel.tp
        size, last = model.element * weight.shard_numel * ranks, buckets[-1][0] if buckets else weight
        if not buckets or size > room or (last.stage, last.of_expert) != (weight.stage, weight.of_expert):
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(weight)
        room -= size
    return buckets


def object_gather(part: str, world: int, largest: int) -> list[Transfer]:
    """Return the transfers of all_gather_object over the world, of pickles of at most `largest` bytes: sizes, then all
    pickles padded to the largest."""
    return [Transfer(part, "all_gather", "world", world * (INT64 + largest), 2)]


def agreement(parallel: Parallel) -> list[Transfer]:
    """Return the transfers by which every rank reports to all that it has no problem."""
    return object_gather("agreement", parallel.world, len(pickle.dumps(None)))


def optimizer_collection(model: Model, stage: int) -> list[Transfer]:
    """Return a checkpoint's transfers of each parameter's fp32 weight and Adam moments to one replica. Weights need none."""
    parallel, transfers = model.parallel, []
    replicas = parallel.dp * parallel.cp
    for group, size, of_expert in (("dp_cp", replicas, False), ("edp", replicas * parallel.tp // parallel.ep, True)):
        held = [weight.shard_numel for weight in model.trained_of(stage) if weight.of_expert == of_expert]
        if held and size > 1:
            transfers.append(Transfer("optimizer state", "reduce", group, 3 * FP32 * sum(held), 3 * len(held)))
    return transfers


def checkpoint_agreements(parallel: Parallel, rank: int) -> list[Transfer]:
    """Return a checkpoint's agreements: which rank writes what, and that all could. Only calls are counted: the payload is
    pickles of names and places of the tensors, whose length no formula here gives (0 stands for it)."""
    first, part = rank == 0, "agreement on files"
    transfers = [
        # A name; success, three times; the places of all shards; the lengths of each rank's plan and result.
        Transfer(part, "all_gather", "world", 0, 2 * (1 + 3 + 1) + 2),
        Transfer(part, "gather", "world", 0, 2, root=first),
        Transfer(part, "scatter", "world", 0, 2, root=first),
        Transfer(part, "broadcast", "world", 0, 3, root=first),
    ]
    if parallel.dp * parallel.cp > 1:
        transfers.append(Transfer(part, "all_gather", "dp_cp", 0, 2))
    return transfers


def _is_shared_embedding(model: Model, weight: Weight) -> bool:
    """Return whether the first and the last stage both hold `weight`."""
    arch = model.arch
    return arch.tied_embeddings and model.parallel.pp > 1 and weight.hugging_face[0][0] == "model.embed_tokens.weight"


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
