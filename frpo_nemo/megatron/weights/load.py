"""Import weights: each rank reads from the safetensors files only the slices that its own parameters hold."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.binding import bind
from frpo_nemo.megatron.weights.table import Weight, hf_shapes
from frpo_nemo.megatron.weights.tensors import check_head, is_derived, open_files, some, tensor_files, tensor_slice


@torch.no_grad()
def load_hf_weights(model: torch.nn.Module, arch: Architecture, path: str | Path) -> None:
    """Fill this rank's GPTModel from the Hugging Face directory `path`, converting to the parameters' dtype.

    No communication. Padding rows of the vocabulary become zero. Raises ConfigError, before anything is written, when
    the files do not hold exactly this model (see `check_checkpoint`).
    """
    files = check_checkpoint(arch, path)
    rank = parallel_state.get_tensor_model_parallel_rank()
    with open_files() as open_file:
        for binding in bind(model, arch):
            if binding.parameter is not None:
                sources = [open_file(files[name]).get_slice(name) for name, _ in binding.weight.hugging_face]
                fill(binding.parameter, binding.weight, rank, sources)


def check_checkpoint(arch: Architecture, path: str | Path) -> dict[str, Path]:
    """Return tensor name -> file for the Hugging Face directory `path`. Checks the files' headers, and with tied embeddings
    the values of an output layer in the files.

    Raises ConfigError naming tensor and file when one is missing, unexpected, of another shape or value, or unreadable.
    """
    files, expected = tensor_files(Path(path)), hf_shapes(arch)
    missing = [name for name in expected if name not in files]
    if missing:
        raise ConfigError(f"{path} lacks {some(missing)}, which its config.json ({arch.family}) requires.")
    unexpected = [name for name in files if name not in expected and not is_derived(name, arch)]
    if unexpected:
        name = unexpected[0]
        raise ConfigError(f"{files[name]} has {some(unexpected)}, which a {arch.family} model does not have.")
    with open_files() as open_file:
        for name, shape in expected.items():
            found = tuple(tensor_slice(open_file, files, name).get_shape())
            if found != shape:
                raise ConfigError(f"{files[name]}: {name} has shape {list(found)}; config.json gives {list(shape)}.")
    check_head(arch, path)
    return files


def read_weight(weight: Weight, files: dict[str, Path], dtype: torch.dtype) -> torch.Tensor:
    """Read a weight of the table without tensor parallelism from `files` (of `check_checkpoint`) into a new tensor.

    The files are closed again: pages read from a mapped file count as this process's memory for as long as it is open.
    """
    whole = torch.empty(weight.shard_shape, dtype=dtype)
    with open_files() as open_file:
        fill(whole, weight, 0, [open_file(files[name]).get_slice(name) for name, _ in weight.hugging_face])
    return whole


def fill(parameter: torch.Tensor, weight: Weight, rank: int, sources: list) -> None:
    """Copy the part of `weight` that tensor rank `rank` holds into its `parameter`. sources: the weight's Hugging Face
    tensors, or slices of files, in the table's order."""
    for segment in weight.segments:
        if segment.rank != rank:
            continue
        target = parameter.narrow(weight.dim, segment.offset, segment.length)
        if segment.source is None:
            target.zero_()
        else:
            where = slice(segment.start, segment.start + segment.length)
            target.copy_(sources[segment.source][(slice(None),) * weight.dim + (where,)])
