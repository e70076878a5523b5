"""Read the weights of a checkpoint one by one and without ranks, whatever layout saved it.

A checkpoint holds each weight as the table has it without tensor parallelism, those of all layers stacked: the key
decoder.layers.mlp.linear_fc1.weight is [layers, 2 * ffn, hidden], gates above ups. A rank saves a chunk of that: an
offset in it, and a range of bytes in a .distcp file. Vocabularies may have more rows of padding than the table's.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files
from frpo_nemo.megatron.checkpoint import save_load as checkpoints
from frpo_nemo.megatron.lora import membership, merge
from frpo_nemo.megatron.weights import adapter_files
from frpo_nemo.megatron.weights.export import assemble
from frpo_nemo.megatron.weights.load import read_weight
from frpo_nemo.megatron.weights.table import Weight, WeightLayout, adapter_weights, weights
from frpo_nemo.megatron.weights.tensors import check_checkpoint, check_range


class StoredWeights:
    """The weights of a checkpoint of the model `arch`.

    Raises ConfigError when its files do not hold them all. The index and the files' sizes show that: nothing else is read
    before `stream`.
    """

    def __init__(self, checkpoint: str | Path, arch: Architecture, table: Sequence[Weight] | None = None):
        """Find the weights. table: those to read; None: all weights of the model."""
        self._path, self._arch = Path(checkpoint), arch
        self._metadata = checkpoints.read_metadata(checkpoint)
        self._reader = torch_checkpoint.FileSystemReader(checkpoint)
        self._reader.set_up_storage_reader(self._metadata, True)
        self._pieces = [(weight, self._find(weight)) for weight in table or weights(arch, WeightLayout())]
        self._check_files({piece.storage_index for _, pieces in self._pieces for piece in pieces})

    def stream(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, new tensor in `dtype`) for every tensor of the Hugging Face model, in its order. Memory beyond what
        the caller keeps: the largest weight in `dtype`, and once more in `dtype` or as it is stored, whichever is larger.
        Raises ConfigError when a weight does not fit into float16, or a chunk isn't a plain tensor as in the index. Reading
        never runs code."""
        for weight, whole in self.read(dtype):
            yield from assemble(weight, whole.view(1, -1))

    def read(self, dtype: torch.dtype) -> Iterator[tuple[Weight, Tensor]]:
        """Yield the same, each weight [*shard_shape] as the table without tensor parallelism has it."""
        for weight, pieces in self._pieces:
            yield weight, self._read(weight, pieces, dtype)

    def _find(self, weight: Weight) -> list[ReadItem]:
        """Return the parts of chunks that make up a weight."""
        key, stack = _place(weight, self._arch)
        stored, whole = self._metadata.state_dict_metadata.get(key), _stacked_shape(weight, self._arch)
        if not isinstance(stored, TensorStorageMetadata):
            raise ConfigError(f"{self._path} lacks {key}, which a {self._arch.family} model has.")
        # A vocabulary is padded by the layout that saved it.
        padded = not weight.replicated and not weight.names[0].startswith("decoder.")
        rows = max(whole[0], stored.size[0]) if padded else whole[0]
        if tuple(stored.size) != (rows, *whole[1:]):
            raise ConfigError(
                f"{self._path} has {key} of shape {list(stored.size)}; {self._arch.source}/config.json gives {list(whole)}."
            )
        pieces = create_read_items_for_chunk_list(key, stored, [_chunk(weight, self._arch)])
        if sum(math.prod(piece.lengths) for piece in pieces) != math.prod(weight.shard_shape):
            raise ConfigError(f"{self._path} is not a whole checkpoint: it holds only a part of {key}.")
        return pieces

    def _check_files(self, chunks: set[MetadataIndex]) -> None:
        ends: dict[str, int] = {}
        for chunk in chunks:
            where = self._metadata.storage_data[chunk]
            ends[where.relative_path] = max(ends.get(where.relative_path, 0), where.offset + where.length)
        for name, end in ends.items():
            if Path(name).name != name:
                raise ConfigError(f"{self._path}/.metadata refers to {name} outside of its folder; do not load it.")
            file = self._path / name
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < end:
                problem = "is missing" if size is None else f"has {size} of at least {end} bytes"
                raise ConfigError(f"{self._path} is not a whole checkpoint: {name} {problem}.")

    def _read(self, weight: Weight, pieces: list[ReadItem], dtype: torch.dtype) -> Tensor:
        """Return the whole weight, [*weight.shard_shape]."""
        key, stack = _place(weight, self._arch)
        whole = torch.empty(weight.shard_shape, dtype=dtype)
        target = whole if stack is None else whole[None]
        try:
            self._reader.read_data(LoadPlan(pieces), _Into(target)).wait()
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"{self._path} has a chunk of {key} that isn't a plain tensor: {reason}") from error
        check_range(whole, *(name for name, _ in weight.hugging_face))
        return whole


class _Into(DefaultLoadPlanner):
    """Collect all that is read in one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._target
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class MergedWeights:
    """The weights of a model with the updates of a checkpoint of its adapters. Streams as StoredWeights does; needs the same
    memory, plus a weight and its update in fp32."""

    def __init__(self, checkpoint: str | Path, arch: Architecture, base: str | Path):
        """Open both. base: the directory, in Hugging Face format, of the model on which the adapters were trained. Raises
        ConfigError when it is another model, or when either is not whole."""
        self._record = files.read(checkpoint)["lora"]
        if self._record["base"] != adapter_files.digest(base):
            raise ConfigError(
                f"{checkpoint} holds adapters of a base whose weights are not those in {base}; name the right one by base=."
            )
        self._base, self._arch = check_checkpoint(arch, base), arch
        self._adapters = StoredWeights(checkpoint, arch, adapter_weights(arch, WeightLayout(), self._record["rank"]))

    def stream(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, new tensor in `dtype`) for every tensor of the Hugging Face model, in its order."""
        adapters = (
            value for _, value in self._adapters.read(torch.float32)
        )  # A and B of each layer, in the table's order
        for weight in weights(self._arch, WeightLayout()):
            whole = read_weight(weight, self._base, torch.float32 if weight.adapts else dtype)
            if weight.adapts:
                a, b = next(adapters), next(adapters)
                member = membership(weight, 0) if len(weight.hugging_face) > 1 else None
                whole = merge(whole, a, b, member, self._record["alpha"] / self._record["rank"]).to(dtype)
            check_range(whole, *(name for name, _ in weight.hugging_face))
            yield from assemble(weight, whole.view(1, -1))

    def stream_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield (PEFT's name, new tensor in `dtype`) for every A and B."""
        return self._adapters.stream(dtype)


def _place(weight: Weight, arch: Architecture) -> tuple[str, tuple[int, int] | None]:
    """Return (key, (place, length) of a stack or None) of a weight of the table without parallelism. Layers are stacked, but
    not in a mixture of experts, whose layers differ; there the experts of a layer are stacked."""
    name = weight.names[-1]  # checkpoints use Transformer Engine's, with any layers
    if expert := re.match(r"(.*\.mlp\.experts\.)(linear_fc.\.weight)(\d+)$", name):
        return f"{expert[1]}experts.{expert[2]}", (int(expert[3]), arch.experts.number)
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None or (arch.experts and ".lora." not in name):
        return name, None
    return f"decoder.layers.{name[layer.end() :]}", (int(layer[1]), arch.num_layers)


def _stacked_shape(weight: Weight, arch: Architecture) -> tuple[int, ...]:
    _, stack = _place(weight, arch)
    return weight.shard_shape if stack is None else (stack[1], *weight.shard_shape)


def _chunk(weight: Weight, arch: Architecture) -> ChunkStorageMetadata:
    """Return the place of a weight in its stack."""
    _, stack = _place(weight, arch)
    offsets, sizes = [0] * len(weight.shard_shape), weight.shard_shape
    if stack is not None:
        offsets, sizes = [stack[0], *offsets], (1, *sizes)
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
