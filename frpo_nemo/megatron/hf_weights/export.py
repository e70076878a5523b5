"""Export: full Hugging Face tensors out of a model that is spread over tensor and pipeline ranks, a bucket at a time.

Collective over the tensor and pipeline groups of one model replica, in one order on all its ranks; data-parallel
replicas need nothing of each other. The same stream feeds a refit of vLLM and the files that `save_hf` writes.
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

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.hf_weights.binding import Binding, bind
from frpo_nemo.megatron.hf_weights.load import INDEX, SINGLE
from frpo_nemo.megatron.hf_weights.table import Weight, hf_shapes

# What makes a checkpoint usable besides weights; never code.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "tekken.json",
    "LICENSE*",
    "NOTICE*",
)


@torch.no_grad()
def stream_hf_weights(
    model: torch.nn.Module, arch: Architecture, *, dtype: torch.dtype | None = None, bucket_bytes: int = 512 << 20
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) for every tensor of the Hugging Face model, the same on every rank of the replica.

    The tensors are new, on the model's device, in `dtype` (None: the parameters'). Every rank must exhaust the
    iterator. Memory beyond the model: up to three times `bucket_bytes`, or the largest weight's bytes if that is more.
    """
    bindings = [binding for binding in bind(model, arch) if binding.weight.exported]
    like = next(model.parameters())
    dtype = dtype or like.dtype
    for bucket in _buckets(bindings, bucket_bytes // dtype.itemsize):
        shards = _gather(bucket, torch.empty(0, dtype=dtype, device=like.device))
        for binding in bucket:
            numel = binding.weight.shard_numel
            yield from _assemble(binding.weight, shards[:, :numel])
            shards = shards[:, numel:]
        del shards  # the next bucket takes its memory


def _buckets(bindings: list[Binding], max_numel: int) -> Iterator[list[Binding]]:
    """Consecutive weights of one pipeline stage whose full tensors hold at most `max_numel` elements; at least one."""
    bucket: list[Binding] = []
    tp = parallel_state.get_tensor_model_parallel_world_size()
    for binding in bindings:
        numel = tp * sum(member.weight.shard_numel for member in (*bucket, binding))
        if bucket and (numel > max_numel or bucket[0].weight.stage != binding.weight.stage):
            yield bucket
            bucket = []
        bucket.append(binding)
    if bucket:
        yield bucket


def _gather(bucket: list[Binding], like: Tensor) -> Tensor:
    """[tp, shard elements of the whole bucket] in the dtype and on the device of `like`, on every rank.

    The owning stage's shards go to the other stages first, while they are small, and then round each tensor group.
    """
    pipeline, tensor = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_tensor_model_parallel_group(),
    )
    numel = sum(binding.weight.shard_numel for binding in bucket)
    own = like.new_empty(numel)
    if bucket[0].parameter is not None:
        torch.cat([binding.parameter.to(like.dtype).flatten() for binding in bucket], out=own)
    if pipeline.size() > 1:
        dist.broadcast(own, src=dist.get_global_rank(pipeline, bucket[0].weight.stage), group=pipeline)
    if tensor.size() == 1:
        return own[None]
    shards = like.new_empty(tensor.size() * numel)  # flat: gloo takes no other shape
    dist.all_gather_into_tensor(shards, own, group=tensor)
    return shards.view(tensor.size(), numel)


def _assemble(weight: Weight, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of one weight, from its shards [tp, elements]."""
    tensors = [shards.new_empty(shape) for _, shape in weight.hugging_face]
    for run in weight.runs:
        if run.source is None or (weight.replicated and run.rank > 0):
            continue
        shard = shards[run.rank].view(weight.shard_shape)
        target = tensors[run.source].narrow(weight.dim, run.start, run.length)
        target.copy_(shard.narrow(weight.dim, run.offset, run.length))
    for (name, _), tensor in zip(weight.hugging_face, tensors, strict=True):
        yield name, tensor


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

    Every rank calls this. Rank 0 of the replica writes, one shard in memory at a time, below a temporary name that
    becomes `out_path` when all is there: readers see a whole checkpoint or none. dtype: None means the one that the
    source's config.json names, or else the parameters'. An earlier export at `out_path` is replaced; anything else
    there is refused with ConfigError.
    """
    source, out = Path(source_path), Path(out_path)
    dtype = dtype or (getattr(torch, arch.dtype) if arch.dtype else next(model.parameters()).dtype)
    _check_replaceable(source, out)
    dist.barrier()  # every rank has looked before one of them writes
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        stream = stream_hf_weights(model, arch, dtype=dtype, bucket_bytes=bucket_bytes)
        if parallel_state.get_model_parallel_group().rank() == 0:
            _write(stream, arch, source, out, dtype, max_shard_bytes)
        else:
            for _ in stream:
                pass
    dist.barrier()


def _write(stream: Iterator, arch: Architecture, source: Path, out: Path, dtype: torch.dtype, max_bytes: float) -> None:
    temporary = out.with_name(out.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write_shards(stream, arch, temporary, dtype, max_bytes)
    for pattern in _COMPANIONS:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(file, temporary / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", temporary / "additional_chat_templates")
    dtype_key = "torch_dtype" if "torch_dtype" in arch.hf_config else "dtype"  # transformers 4 or 5
    config = {**arch.hf_config, dtype_key: str(dtype).removeprefix("torch.")}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def _write_shards(stream: Iterator, arch: Architecture, directory: Path, dtype: torch.dtype, max_bytes: float) -> None:
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in hf_shapes(arch).items()}
    shards = _plan_shards(sizes, max_bytes)
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for names, file in zip(shards, files, strict=True):
        tensors = dict(next(stream) for _ in names)
        assert list(tensors) == names, "stream and plan come from one table, so their order is the same"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, directory / file, {"format": "pt"})
        del tensors  # before the next shard comes together
    for _ in stream:
        raise AssertionError("the stream yields exactly the planned tensors")
    if len(shards) > 1:
        weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _plan_shards(sizes: dict[str, int], max_bytes: float) -> list[list[str]]:
    """Names in order, a new shard whenever the next tensor would exceed `max_bytes`."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _check_replaceable(source: Path, out: Path) -> None:
    if out.exists() and out.resolve() == source.resolve():
        raise ConfigError(
            f"The export would overwrite the model that it came from, {source}; choose another directory."
        )
    is_export = (out / SINGLE).is_file() or (out / INDEX).is_file()
    if out.exists() and not is_export and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an exported model; choose another directory or remove it.")
