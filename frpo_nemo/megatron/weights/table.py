"""Define which Hugging Face tensors make up each Megatron parameter: one table, for every family and layer spec.

A Megatron parameter, joined over the tensor-parallel ranks, is a concatenation of ranges ("pieces") of Hugging Face tensors
along one dimension; rank r of tp holds the r-th even part. Import copies those ranges one way and export the other, so no
other module of this package needs to know about query groups, gates or padding. Weights of experts are split over the
expert-parallel ranks instead: the local expert j of every rank, joined, is one weight. Pure Python: no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from frpo_nemo.megatron.architecture import Architecture

Piece = tuple[int | None, int, int]  # (index of the Hugging Face tensor or None for zeros, start, stop)


def _whole(arch: Architecture, tp: int, size: int) -> list[Piece]:
    """Return one Hugging Face tensor, unchanged."""
    return [(0, 0, size)]


def _padded_vocabulary(arch: Architecture, tp: int, size: int) -> list[Piece]:
    return [(0, 0, size), (None, 0, arch.padded_vocab_size(tp) - size)]


def _query_groups(arch: Architecture, tp: int, size: int) -> list[Piece]:
    """Interleave q, k, v by query group: the queries of group 0, its key, its value, the queries of group 1 ..."""
    queries, one = arch.num_heads // arch.num_kv_heads * arch.head_dim, arch.head_dim
    return [
        piece
        for g in range(arch.num_kv_heads)
        for piece in ((0, g * queries, (g + 1) * queries), (1, g * one, (g + 1) * one), (2, g * one, (g + 1) * one))
    ]


def _gate_and_up(arch: Architecture, tp: int, size: int) -> list[Piece]:
    """Put each rank's part of the gate above its part of the up projection."""
    part = arch.ffn_hidden_size // tp
    return [(source, r * part, (r + 1) * part) for r in range(tp) for source in (0, 1)]


def _stacked(arch: Architecture, tp: int, size: int, tensors: int) -> list[Piece]:
    """Put the tensors one above the other."""
    return [(source, 0, size) for source in range(tensors)]


@dataclass(frozen=True)
class WeightRow:
    """A row of the table. megatron: the parameter's name, by the local layer spec, and by Transformer Engine's if different.
    hugging_face: name -> shape in named sizes (see `_sizes`). dim: the tensor-parallel dimension, None if replicated.
    pieces: how the tensors fuse along dim. only_if: the Architecture flag that makes the parameter exist. of_expert: split
    over the expert-parallel ranks. adapts: the matrix of a linear layer that may have an adapter."""

    megatron: tuple[str, ...]
    hugging_face: dict[str, tuple[str, ...]]
    dim: int | None = 0
    pieces: Callable[[Architecture, int, int], list[Piece]] = _whole
    only_if: str | None = None
    of_expert: bool = False
    adapts: bool = False


# fmt: off
# Rows of a layer, below `decoder.layers.{i}.` and `model.layers.{i}.`
ATTENTION = (
    WeightRow(("self_attention.linear_qkv.weight",),
        {"self_attn.q_proj.weight": ("query", "hidden"), "self_attn.k_proj.weight": ("kv", "hidden"),
         "self_attn.v_proj.weight": ("kv", "hidden")}, pieces=_query_groups, adapts=True),
    WeightRow(("self_attention.linear_qkv.bias",),
        {"self_attn.q_proj.bias": ("query",), "self_attn.k_proj.bias": ("kv",), "self_attn.v_proj.bias": ("kv",)},
        pieces=_query_groups, only_if="qkv_bias"),
    WeightRow(("self_attention.linear_proj.weight",), {"self_attn.o_proj.weight": ("hidden", "query")}, dim=1, adapts=True),
    WeightRow(("self_attention.q_layernorm.weight",), {"self_attn.q_norm.weight": ("head",)}, dim=None, only_if="qk_norm"),
    WeightRow(("self_attention.k_layernorm.weight",), {"self_attn.k_norm.weight": ("head",)}, dim=None, only_if="qk_norm"),
)
DENSE = (
    WeightRow(("mlp.linear_fc1.weight",), {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
        pieces=_gate_and_up, adapts=True),
    WeightRow(("mlp.linear_fc2.weight",), {"mlp.down_proj.weight": ("hidden", "ffn")}, dim=1, adapts=True),
)
NORMS = (
    WeightRow(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        {"input_layernorm.weight": ("hidden",)}, dim=None),
    WeightRow(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        {"post_attention_layernorm.weight": ("hidden",)}, dim=None),
)
EMBEDDING = WeightRow(("embedding.word_embeddings.weight",), {"model.embed_tokens.weight": ("vocab", "hidden")},
                pieces=_padded_vocabulary)
FINAL_NORM = WeightRow(("decoder.final_layernorm.weight",), {"model.norm.weight": ("hidden",)}, dim=None)
OUTPUT = WeightRow(("output_layer.weight",), {"lm_head.weight": ("vocab", "hidden")}, pieces=_padded_vocabulary)
TIED_OUTPUT = WeightRow(OUTPUT.megatron, EMBEDDING.hugging_face, pieces=_padded_vocabulary)  # the last stage's own copy
# fmt: on

# Family -> prefix of the router and of the experts, and an expert's gate, up and down projection
EXPERT_NAMES = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}


@functools.cache
def layer_rows(arch: Architecture, has_experts: bool, ep: int) -> tuple[WeightRow, ...]:
    """Return the rows of a layer, with or without experts, which are split over `ep` ranks."""
    if not arch.experts:
        return ATTENTION + DENSE + NORMS
    if not has_experts:
        return ATTENTION + tuple(replace(row, adapts=False) for row in DENSE) + NORMS
    prefix, (gate, up, down) = EXPERT_NAMES[arch.family]
    router = WeightRow(("mlp.router.weight",), {f"{prefix}.gate.weight": ("experts", "hidden")}, dim=None)
    local = arch.experts.number // ep
    rows = [router]
    for j in range(local):
        names = [f"{prefix}.experts.{rank * local + j}" for rank in range(ep)]
        first: dict[str, tuple[str, ...]] = {}
        for name in names:
            first |= {f"{name}.{projection}.weight": ("expert_ffn", "hidden") for projection in (gate, up)}
        second: dict[str, tuple[str, ...]] = {f"{name}.{down}.weight": ("hidden", "expert_ffn") for name in names}
        for layer, tensors in (("linear_fc1", first), ("linear_fc2", second)):
            stacked = functools.partial(_stacked, tensors=len(tensors))
            # Megatron's local experts are modules; Transformer Engine's are numbered parameters of one.
            parameters = (f"mlp.experts.local_experts.{j}.{layer}.weight", f"mlp.experts.{layer}.weight{j}")
            rows.append(WeightRow(parameters, tensors, pieces=stacked, of_expert=True))
    input_norm, norm = NORMS
    # Experts do not share a module with the norm before them, in Transformer Engine's layers neither.
    return ATTENTION + (*rows, input_norm, replace(norm, megatron=norm.megatron[:1]))


def _adapter_rows(row: WeightRow) -> tuple[WeightRow, WeightRow]:
    """Return A and B of a linear layer (lora.py), as PEFT names them. An adapter is split like its layer's weight, along the
    same dimension; the rank of the update is never split."""
    (layer,) = (name.removesuffix("weight") for name in row.megatron)
    a: dict[str, tuple[str, ...]] = {}
    b: dict[str, tuple[str, ...]] = {}
    for name, (out, columns) in row.hugging_face.items():
        a[name.replace("weight", "lora_A.weight")] = ("rank", columns)
        b[name.replace("weight", "lora_B.weight")] = (out, "rank")
    stacked = functools.partial(_stacked, tensors=len(a))
    if row.dim == 0:
        return WeightRow((f"{layer}lora.a",), a, None, stacked), WeightRow((f"{layer}lora.b",), b, 0, row.pieces)
    return WeightRow((f"{layer}lora.a",), a, 1, row.pieces), WeightRow((f"{layer}lora.b",), b, None, stacked)


@functools.cache
def adapter_rows(arch: Architecture) -> tuple[WeightRow, ...]:
    """Return the rows of a layer's adapters. In a mixture of experts only attention has adapters, in every layer."""
    adapted = ATTENTION if arch.experts else ATTENTION + DENSE
    return tuple(adapter for row in adapted if row.adapts for adapter in _adapter_rows(row))


def _sizes(arch: Architecture, rank: int) -> dict[str, int]:
    experts = {"experts": arch.experts.number, "expert_ffn": arch.experts.ffn_size} if arch.experts else {}
    return experts | {
        "rank": rank,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "vocab": arch.vocab_size,
        "head": arch.head_dim,
        "query": arch.num_heads * arch.head_dim,
        "kv": arch.num_kv_heads * arch.head_dim,
    }


@dataclass(frozen=True)
class Segment:
    """`length` entries along the weight's dimension: from `offset` in rank's shard, to `start` in Hugging Face tensor
    number `source` (None: zeros)."""

    rank: int
    offset: int
    source: int | None
    start: int
    length: int


@dataclass(frozen=True)
class Weight:
    """A row of the table for one architecture and layout: one Megatron parameter of one pipeline stage.

    names: its possible names there. hugging_face: (name, shape) of each tensor in it. shard_shape: shape on each tensor
    rank. replicated: every rank holds all of it. of_expert: the ranks over which it is split are the expert-parallel ones.
    adapts: the matrix of a linear layer that may have an adapter. exported: False for the copy of a tied embedding.
    """

    stage: int
    names: tuple[str, ...]
    hugging_face: tuple[tuple[str, tuple[int, ...]], ...]
    shard_shape: tuple[int, ...]
    dim: int
    segments: tuple[Segment, ...]
    replicated: bool
    of_expert: bool = False
    adapts: bool = False
    exported: bool = True

    @property
    def shard_numel(self) -> int:
        return math.prod(self.shard_shape)


@dataclass(frozen=True)
class WeightLayout:
    """Tensor, pipeline and expert parallel sizes; `first` and `last`: layers of the first and last stage, if uneven."""

    tp: int = 1
    pp: int = 1
    first: int | None = None
    last: int | None = None
    ep: int = 1


def weights(arch: Architecture, layout: WeightLayout) -> list[Weight]:
    """Return every Megatron parameter of every stage, in the order of the Hugging Face model; a stage's are contiguous
    (except the last stage's copy of a tied embedding, which comes last)."""
    resolved = [_resolve(EMBEDDING, arch, layout.tp, stage=0), *_layers(arch, layout)]
    last = layout.pp - 1
    resolved.append(_resolve(FINAL_NORM, arch, layout.tp, last))
    if not arch.tied_embeddings:
        resolved.append(_resolve(OUTPUT, arch, layout.tp, last))
    elif layout.pp > 1:
        resolved.append(_resolve(TIED_OUTPUT, arch, layout.tp, last, exported=False))
    return resolved


def adapter_weights(arch: Architecture, layout: WeightLayout, rank: int) -> list[Weight]:
    """Return every parameter of adapters of rank `rank`, in the same order; hugging_face has PEFT's names, without the
    prefix that its files put before them."""
    return _layers(arch, layout, rank)


def _layers(arch: Architecture, layout: WeightLayout, rank: int = 0) -> list[Weight]:
    """Return the weights of all layers, or those of their adapters of rank `rank` above 0."""
    has_experts = arch.experts.layers if arch.experts else (False,) * arch.num_layers
    return [
        _resolve(
            row,
            arch,
            layout.ep if row.of_expert else layout.tp,
            stage,
            f"decoder.layers.{local}.",
            f"model.layers.{layer}.",
            rank=rank,
        )
        for stage in range(layout.pp)
        for local, layer in enumerate(arch.layers_of_stage(stage, layout.pp, layout.first, layout.last))
        for row in (adapter_rows(arch) if rank else layer_rows(arch, has_experts[layer], layout.ep))
        if row.only_if is None or getattr(arch, row.only_if)
    ]


def hf_shapes(arch: Architecture, ep: int = 1) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of the Hugging Face model, in the order in which `ep` expert ranks export them."""
    return dict(tensor for weight in weights(arch, WeightLayout(ep=ep)) for tensor in weight.hugging_face)


def _resolve(
    row: WeightRow, arch: Architecture, tp: int, stage: int, prefix="", hf_prefix="", *, rank: int = 0, exported=True
) -> Weight:
    """Resolve a row of the table. tp: the ranks over which it is split, tensor-parallel ones except for experts."""
    sizes = _sizes(arch, rank)
    tensors = {hf_prefix + name: tuple(sizes[size] for size in shape) for name, shape in row.hugging_face.items()}
    first_shape = next(iter(tensors.values()))
    dim = row.dim or 0
    pieces = row.pieces(arch, tp, first_shape[dim])
    total = sum(stop - start for _, start, stop in pieces)
    part = total if row.dim is None else total // tp
    segments = _cut(pieces, part)
    if row.dim is None:
        segments = [replace(segment, rank=r) for r in range(tp) for segment in segments]
    return Weight(
        stage=stage,
        names=tuple(prefix + name for name in row.megatron),
        hugging_face=tuple(tensors.items()),
        shard_shape=(*first_shape[:dim], part, *first_shape[dim + 1 :]),
        dim=dim,
        segments=tuple(segments),
        replicated=row.dim is None,
        of_expert=row.of_expert,
        adapts=row.adapts,
        exported=exported,
    )


def _cut(pieces: Sequence[Piece], part: int) -> list[Segment]:
    """Lay the pieces end to end and cut them at multiples of `part`, one rank's share each."""
    segments, position = [], 0
    for source, start, stop in pieces:
        while start < stop:
            rank, offset = divmod(position, part)
            length = min(stop - start, part - offset)
            segments.append(Segment(rank, offset, source, start, length))
            start, position = start + length, position + length
    return segments


def check_complete(
    arch: Architecture, layout: WeightLayout, stage: int, shapes: Mapping[str, Sequence[int]], rank: int = 0
) -> None:
    """Check a stage's Megatron parameters (name -> shape of this rank's shard; may be on the meta device) against the
    table: every parameter is in it, every weight of the stage has exactly one parameter, shapes agree, and over all
    stages every element of every Hugging Face tensor is used exactly once. rank: of the adapters; 0 if there are none.
    Raises ValueError that names the wrong one."""
    table = weights(arch, layout) + (adapter_weights(arch, layout, rank) if rank else [])
    unknown = set(shapes)
    for weight in table:
        if weight.stage != stage:
            continue
        found = [name for name in weight.names if name in shapes]
        if len(found) != 1:
            hf = ", ".join(name for name, _ in weight.hugging_face)
            raise ValueError(
                f"Pipeline stage {stage} should have one parameter called {' or '.join(weight.names)} (for {hf}); it "
                f"has {len(found)}."
            )
        if tuple(shapes[found[0]]) != weight.shard_shape:
            raise ValueError(
                f"{found[0]} on pipeline stage {stage} has shape {list(shapes[found[0]])}; {arch.source}/config.json "
                f"at tensor_model_parallel_size={layout.tp} gives {list(weight.shard_shape)}."
            )
        unknown.discard(found[0])
    if unknown:
        raise ValueError(
            f"Pipeline stage {stage} has parameters that are not in the table of Hugging Face weights: "
            f"{', '.join(sorted(unknown))}."
        )
    _check_used_once(table)


def _check_used_once(table: Sequence[Weight]) -> None:
    ranges: dict[str, list[tuple[int, int]]] = {}
    size: dict[str, int] = {}
    for weight in table:
        if not weight.exported:
            continue
        size.update((name, shape[weight.dim]) for name, shape in weight.hugging_face)
        for segment in weight.segments:
            if segment.source is not None and (segment.rank == 0 or not weight.replicated):
                name = weight.hugging_face[segment.source][0]
                ranges.setdefault(name, []).append((segment.start, segment.start + segment.length))
    for name, total in size.items():
        position = 0
        for start, stop in sorted(ranges.get(name, [])):
            if start != position:
                raise ValueError(f"The table leaves out or repeats {name} between {start} and {position}.")
            position = stop
        if position != total:
            raise ValueError(f"The table uses {position} of the {total} entries of {name}.")
