"""Import: each rank reads from the safetensors files only the slices that its own parameters hold."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.hf_weights.binding import bind
from frpo_nemo.megatron.hf_weights.files import INDEX, SINGLE
from frpo_nemo.megatron.hf_weights.table import Weight, hf_shapes


@torch.no_grad()
def load_hf_weights(model: torch.nn.Module, arch: Architecture, path: str | Path) -> None:
    """Fill this rank's GPTModel from the Hugging Face directory `path`, converting to the parameters' dtype.

    No communication. Padding rows of the vocabulary become zero. Raises ConfigError, before anything is written, when
    the files do not hold exactly this model (see `check_checkpoint`).
    """
    files = check_checkpoint(arch, path)
    rank = parallel_state.get_tensor_model_parallel_rank()
    with _open_files() as open_file:
        for binding in bind(model, arch):
            if binding.parameter is not None:
                sources = [open_file(files[name]).get_slice(name) for name, _ in binding.weight.hugging_face]
                fill(binding.parameter, binding.weight, rank, sources)


def check_checkpoint(arch: Architecture, path: str | Path) -> dict[str, Path]:
    """Tensor name -> file, for the Hugging Face directory `path`, from the files' headers alone.

    Raises ConfigError naming tensor and file when one is missing, unexpected, of another shape, or unreadable.
    """
    files, expected = _tensor_files(Path(path)), hf_shapes(arch)
    missing = [name for name in expected if name not in files]
    if missing:
        raise ConfigError(f"{path} lacks {_some(missing)}, which its config.json ({arch.family}) calls for.")
    unexpected = [name for name in files if name not in expected and not _may_ignore(name, arch)]
    if unexpected:
        name = unexpected[0]
        raise ConfigError(f"{files[name]} has {_some(unexpected)}, which a {arch.family} model does not have.")
    with _open_files() as open_file:
        for name, shape in expected.items():
            try:
                found = tuple(open_file(files[name]).get_slice(name).get_shape())
            except SafetensorError as error:  # the index promises a tensor that the file does not hold
                raise ConfigError(f"{files[name]} does not hold {name}, contrary to the index: {error}.") from error
            if found != shape:
                raise ConfigError(f"{files[name]}: {name} has shape {list(found)}; config.json gives {list(shape)}.")
    return files


def read_weight(weight: Weight, files: dict[str, Path], dtype: torch.dtype) -> torch.Tensor:
    """A weight of the table without tensor parallelism, read from `files` (of `check_checkpoint`) into a new tensor.

    The files are closed again: what is read of a mapped file counts as this process's memory for as long as it is open.
    """
    whole = torch.empty(weight.shard_shape, dtype=dtype)
    with _open_files() as open_file:
        fill(whole, weight, 0, [open_file(files[name]).get_slice(name) for name, _ in weight.hugging_face])
    return whole


def fill(parameter: torch.Tensor, weight: Weight, rank: int, sources: list) -> None:
    """Copy what tensor rank `rank` holds of `weight` into its `parameter`. sources: the weight's Hugging Face tensors, or
    slices of files, in the table's order."""
    for run in weight.runs:
        if run.rank != rank:
            continue
        target = parameter.narrow(weight.dim, run.offset, run.length)
        if run.source is None:
            target.zero_()
        else:
            where = slice(run.start, run.start + run.length)
            target.copy_(sources[run.source][(slice(None),) * weight.dim + (where,)])


def _tensor_files(path: Path) -> dict[str, Path]:
    if (path / INDEX).is_file():
        try:
            weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ConfigError(f"{path / INDEX} is not an index of safetensors files: {error!r}.") from error
        return {name: path / file for name, file in weight_map.items()}
    if (path / SINGLE).is_file():
        with _open(path / SINGLE) as file:
            return {name: path / SINGLE for name in file.keys()}  # noqa: SIM118 (a safe_open is not iterable)
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled:
        raise ConfigError(
            f"{path} holds pickled weights ({_some(pickled)}), which can run code when read; convert the model to "
            "safetensors first."
        )
    raise ConfigError(f"{path} holds no weights: neither {INDEX} nor {SINGLE} is there.")


def _may_ignore(name: str, arch: Architecture) -> bool:
    """Tensors that some published files carry although they are derived from others."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and arch.tied_embeddings)


@contextmanager
def _open_files() -> Iterator[Callable[[Path], safe_open]]:
    """A function path -> open safetensors file, which keeps each file open for as long as the context lasts."""
    with ExitStack() as stack:
        yield functools.cache(lambda path: stack.enter_context(_open(path)))


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist, although the index names it.") from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a complete safetensors file: {error}.") from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
