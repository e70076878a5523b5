"""Export full Hugging Face tensors from a model that is split over tensor, pipeline and expert ranks, a bucket at a time.

Collective over the tensor and pipeline groups of one model replica, in one order on all its ranks; data-parallel
replicas do not communicate, except those that share experts. The same stream feeds a refit of vLLM and the files that
`save_hf` writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import save_file
from torch import Tensor

from frpo_nemo.config.options import LoRAConfig
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights import adapter_files
from frpo_nemo.megatron.weights.binding import Binding, bind, bind_adapters
from frpo_nemo.megatron.weights.files import (
    INDEX,
    SINGLE,
    begin_export,
    check_replaceable,
    companions,
    publish_export,
)
from frpo_nemo.megatron.weights.table import Weight, hf_shapes


@torch.no_grad()
def stream_hf_weights(
    model: torch.nn.Module, arch: Architecture, *, dtype: torch.dtype | None = None, bucket_bytes: int = 512 << 20
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) for every tensor of the Hugging Face model, the same on every rank of the replica. Updates
    of adapters are merged into the tensors.

    The tensors are new, on the model's device, in `dtype` (None: the parameters'). Every rank must exhaust the
    iterator. Each rank receives every element once, whatever shard it already holds. Memory beyond the model: a bucket,
    the larger of a TP-th of it and one tensor, and the tensor that the caller still has. A bucket is `bucket_bytes`, or
    the largest weight if that is more.
    """
    bindings = [binding for binding in bind(model, arch) if binding.weight.exported]
    yield from _stream(bindings, next(model.parameters()), dtype, bucket_bytes)


@torch.no_grad()
def stream_adapters(
    model: torch.nn.Module, arch: Architecture, *, dtype: torch.dtype | None = None, bucket_bytes: int = 512 << 20
) -> Iterator[tuple[str, Tensor]]:
    """Do the same for every A and B of the model's adapters, by PEFT's names (see table.adapter_weights)."""
    yield from _stream(bind_adapters(model, arch), next(model.parameters()), dtype, bucket_bytes)


def _stream(
    bindings: list[Binding], like: Tensor, dtype: torch.dtype | None, bucket_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    dtype = dtype or like.dtype
    for bucket in _buckets(bindings, bucket_bytes // dtype.itemsize):
        shards = _gather(bucket, torch.empty(0, dtype=dtype, device=like.device))
        for binding, own_shards in zip(bucket, shards, strict=True):
            yield from assemble(binding.weight, own_shards)
        del shards, own_shards  # the next bucket needs their memory


def _buckets(bindings: list[Binding], max_numel: int) -> Iterator[list[Binding]]:
    """Yield consecutive weights of the same ranks whose full tensors hold at most `max_numel` elements; at least one."""
    bucket: list[Binding] = []
    room = 0
    tp = parallel_state.get_tensor_model_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    for binding in bindings:
        weight = binding.weight
        numel = weight.shard_numel * (1 if weight.replicated else ep if weight.of_expert else tp)
        if bucket and (numel > room or _shared_by(bucket[0].weight) != _shared_by(weight)):
            yield bucket
            bucket = []
        if not bucket:
            room = max_numel
        bucket.append(binding)
        room -= numel
    if bucket:
        yield bucket


def _shared_by(weight: Weight) -> tuple[int, bool]:
    """Return what decides which ranks hold the shards of a weight."""
    return weight.stage, weight.of_expert


def _sharing_group(weight: Weight) -> dist.ProcessGroup:
    """Return the group over which the shards of a weight lie."""
    if weight.of_expert:
        return parallel_state.get_expert_model_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def _gather(bucket: list[Binding], like: Tensor) -> list[Tensor]:
    """Return all shards of each weight in the bucket, [tp, elements], or [1, elements] if it is replicated; in the dtype
    and on the device of `like`, on every rank.

    The owning stage's shards are sent to the other stages first, while they are small, and then around each tensor group, or
    for experts each expert group.
    Replicated weights, which all ranks of the stage have, are sent with the first rank's shards, and from there to its
    tensor group: no byte is sent twice, and all ranks get the same bits.
    """
    pipeline, tensor = (
        parallel_state.get_pipeline_model_parallel_group(),
        _sharing_group(bucket[0].weight),
    )
    in_order = sorted(bucket, key=lambda binding: binding.weight.replicated)  # first the gathered ones
    sizes = [binding.weight.shard_numel for binding in in_order]
    split = sum(binding.weight.shard_numel for binding in bucket if not binding.weight.replicated)
    own = like.new_empty(sum(sizes))
    if bucket[0].parameter is not None:
        for part, binding in zip(own.split(sizes), in_order, strict=True):
            part.copy_(binding.merged().flatten())
    mine = own if tensor.rank() == 0 else own[:split]
    if pipeline.size() > 1 and mine.numel():
        dist.broadcast(mine, src=dist.get_global_rank(pipeline, bucket[0].weight.stage), group=pipeline)
    shards, replicated = own[None, :split], own[None, split:]
    if tensor.size() > 1 and split:
        gathered = like.new_empty(tensor.size() * split)  # flat: gloo accepts no other shape
        dist.all_gather_into_tensor(gathered, own[:split], group=tensor)
        shards, replicated = gathered.view(tensor.size(), split), replicated.clone()  # frees own
    if tensor.size() > 1 and replicated.numel():
        dist.broadcast(replicated, src=dist.get_global_rank(tensor, 0), group=tensor)
    count = sum(not binding.weight.replicated for binding in bucket)
    parts = [*shards.split(sizes[:count], dim=1), *replicated.split(sizes[count:], dim=1)]
    places = {id(binding): part for binding, part in zip(in_order, parts, strict=True)}
    return [places[id(binding)] for binding in bucket]


def assemble(weight: Weight, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the Hugging Face tensors of one weight from its shards [tp, elements]."""
    for source, (name, shape) in enumerate(weight.hugging_face):
        tensor = shards.new_empty(shape)
        for segment in weight.segments:
            if segment.source != source or (weight.replicated and segment.rank > 0):
                continue
            shard = shards[segment.rank].view(weight.shard_shape)
            part = shard.narrow(weight.dim, segment.offset, segment.length)
            tensor.narrow(weight.dim, segment.start, segment.length).copy_(part)
        yield name, tensor
        del tensor  # the caller may drop it before the next is made


def save_hf(
    model: torch.nn.Module,
    arch: Architecture,
    source_path: str | Path,
    out_path: str | Path,
    *,
    max_shard_bytes: float = 5e9,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = 512 << 20,
) -> None:
    """Write the model to `out_path` as transformers would; tokenizer and configuration come from `source_path`.

    Every rank calls this. Rank 0 of the replica writes, one shard in memory at a time, under a temporary name that
    becomes `out_path` when all files are there: readers see a whole checkpoint or none. dtype: None means the one that the
    source's config.json names, or else the parameters'. An earlier export at `out_path` is replaced; anything else
    there raises ConfigError.
    """
    source, out = Path(source_path), Path(out_path)
    dtype = dtype or (getattr(torch, arch.dtype) if arch.dtype else next(model.parameters()).dtype)
    check_replaceable(source, out)
    dist.barrier()  # every rank has checked before one of them writes
    if _takes_part():
        stream = stream_hf_weights(model, arch, dtype=dtype, bucket_bytes=bucket_bytes)
        if dist.get_rank() == 0:
            _write(stream, arch, source, out, dtype, max_shard_bytes)
        else:
            for _ in stream:
                pass
    dist.barrier()


def _takes_part() -> bool:
    """Return whether this rank must stream for rank 0: those of its replica, and all that share experts with them."""
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    return first_replica or parallel_state.get_expert_model_parallel_world_size() > 1


def save_adapter(
    model: torch.nn.Module, arch: Architecture, lora: LoRAConfig, out_path: str | Path, *, base: str | Path
) -> None:
    """Write the adapters to the directory `out_path`, which PEFT loads onto `base`. Every rank calls this. The directory
    appears whole, and replaces an earlier one."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        stream = stream_adapters(model, arch)
        if parallel_state.get_model_parallel_group().rank() == 0:
            temporary = begin_export(Path(out_path))
            write_adapter(stream, lora.rank, lora.alpha, temporary, base)
            publish_export(temporary, Path(out_path))
        else:
            for _ in stream:
                pass
    dist.barrier()


def write_adapter(stream: Iterator, rank: int, alpha: float, directory: Path, base: str | Path) -> None:
    """Write PEFT's files of the adapters of `stream` (as `stream_adapters` yields them) to `directory`."""
    tensors = {f"{adapter_files.PEFT_PREFIX}{name}": tensor.cpu() for name, tensor in stream}
    save_file(tensors, directory / adapter_files.PEFT_WEIGHTS, {"format": "pt"})
    (directory / adapter_files.PEFT_CONFIG).write_text(adapter_files.peft_config(rank, alpha, base, tensors))


def _write(stream: Iterator, arch: Architecture, source: Path, out: Path, dtype: torch.dtype, max_bytes: float) -> None:
    temporary = begin_export(out)
    ep = parallel_state.get_expert_model_parallel_world_size()
    write_files(stream, arch, source, temporary, dtype, max_bytes, ep)
    publish_export(temporary, out)


def write_files(
    stream: Iterator,
    arch: Architecture,
    source: Path | None,
    directory: Path,
    dtype: torch.dtype,
    max_shard_bytes: float,
    ep: int = 1,
) -> None:
    """Write the tensors of `stream` (as `stream_hf_weights` yields them, in `dtype`) to `directory`, one shard in memory
    at a time, with the configuration of `arch` and the tokenizer from `source`; None: without one. ep: the stream's."""
    _write_shards(stream, hf_shapes(arch, ep), directory, dtype, max_shard_bytes)
    for file in companions(source) if source else []:
        (directory / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / file, directory / file)
    dtype_key = "torch_dtype" if "torch_dtype" in arch.hf_config else "dtype"  # transformers 4 or 5
    config = {**arch.hf_config, dtype_key: str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_shards(stream: Iterator, shapes: dict, directory: Path, dtype: torch.dtype, max_bytes: float) -> None:
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = _plan_shards(sizes, max_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for names, file in zip(shards, files, strict=True):
        tensors = dict(next(stream) for _ in names)
        assert list(tensors) == names, "stream and plan come from one table, so their order is the same"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, directory / file, {"format": "pt"})
        del tensors  # before the next shard is collected
    for _ in stream:
        raise AssertionError("the stream yields exactly the planned tensors")
    if len(shards) > 1:
        weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan_shards(sizes: dict[str, int], max_bytes: float) -> list[list[str]]:
    """Return the names in order, with a new shard whenever the next tensor would exceed `max_bytes`."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
