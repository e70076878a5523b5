"""Import weights: each rank reads from the safetensors files only the slices that its own parameters hold."""

from __future__ import annotations

from pathlib import Path

import torch

from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.binding import bind, rank_of
from frpo_nemo.megatron.weights.table import Weight
from frpo_nemo.megatron.weights.tensors import check_checkpoint, open_files


@torch.no_grad()
def load_hf_weights(model: torch.nn.Module, arch: Architecture, path: str | Path) -> None:
    """Fill this rank's GPTModel from the Hugging Face directory `path`, converting to the parameters' dtype.

    No communication. Padding rows of the vocabulary become zero. Raises ConfigError, before anything is written, when
    the files do not hold exactly this model (see `check_checkpoint`).
    """
    files = check_checkpoint(arch, path)
    with open_files() as open_file:
        for binding in bind(model, arch):
            if binding.parameter is not None:
                sources = [open_file(files[name]).get_slice(name) for name, _ in binding.weight.hugging_face]
                fill(binding.parameter, binding.weight, rank_of(binding.weight), sources)


def read_weight(weight: Weight, files: dict[str, Path], dtype: torch.dtype) -> torch.Tensor:
    """Read a weight of the table without tensor parallelism from `files` (of `check_checkpoint`) into a new tensor.

    The files are closed again: pages read from a mapped file count as this process's memory for as long as it is open.
    """
    whole = torch.empty(weight.shard_shape, dtype=dtype)
    with open_files() as open_file:
        fill(whole, weight, 0, [open_file(files[name]).get_slice(name) for name, _ in weight.hugging_face])
    return whole


def fill(parameter: torch.Tensor, weight: Weight, rank: int, sources: list) -> None:
    """Copy into `parameter` the part of `weight` that rank `rank` of those that share it holds. sources: the weight's Hugging
    Face tensors, or slices of files, in the table's order."""
    for segment in weight.segments:
        if segment.rank != rank:
            continue
        target = parameter.narrow(weight.dim, segment.offset, segment.length)
        if segment.source is None:
            target.zero_()
        else:
            where = slice(segment.start, segment.start + segment.length)
            target.copy_(sources[segment.source][(slice(None),) * weight.dim + (where,)])
