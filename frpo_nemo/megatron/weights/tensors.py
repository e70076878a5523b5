"""Find the file of each tensor in a Hugging Face directory, and check them. No megatron-core here, so that a configuration can
be checked."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.weights.files import INDEX, SINGLE
from frpo_nemo.megatron.weights.table import hf_shapes

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 4096  # compared at a time


def tensor_files(path: Path) -> dict[str, Path]:
    """Return tensor name -> file. Raises ConfigError when the directory `path` holds no weights in safetensors files."""
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
            f"{path} holds pickled weights ({some(pickled)}), which can run code when read; convert the model to "
            "safetensors first."
        )
    raise ConfigError(f"{path} holds no weights: neither {INDEX} nor {SINGLE} is there.")


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


def is_derived(name: str, arch: Architecture) -> bool:
    """Return whether a tensor follows from others, although some published files contain it. `check_head` checks this for an
    output layer."""
    return name.endswith(".rotary_emb.inv_freq") or (name == HEAD and arch.tied_embeddings)


def check_head(arch: Architecture, path: str | Path) -> None:
    """Raise ConfigError when a model with tied embeddings has a separate output layer in the files of `path`: it would be
    dropped, and a different model trained."""
    files = tensor_files(Path(path)) if arch.tied_embeddings else {}
    if not files.keys() >= {EMBEDDING, HEAD}:
        return
    with open_files() as open_file:
        embedding, head = (tensor_slice(open_file, files, name) for name in (EMBEDDING, HEAD))
        rows, width = embedding.get_shape()
        same = head.get_shape() == [rows, width] and all(
            torch.equal(embedding[i : i + ROWS], head[i : i + ROWS].to(embedding[:0].dtype))
            for i in range(0, rows, ROWS)
        )
    if not same:
        raise ConfigError(
            f"{files[HEAD]} has an output layer, {HEAD}, that differs from {EMBEDDING}, but by tie_word_embeddings in "
            f"{path}/config.json they are the same; set it to false there, or remove {HEAD} from the file."
        )


def check_range(tensor: torch.Tensor, *names: str) -> None:
    """Raise ConfigError when a value of `tensor`, the weight `names`, was too large for its dtype: float32 and bfloat16 have a
    larger range than float16."""
    if tensor.dtype != torch.float16:
        return
    low, high = tensor.aminmax()  # makes no copy, as isfinite would
    if not (math.isfinite(low) and math.isfinite(high)):
        limit = torch.finfo(torch.float16).max
        raise ConfigError(
            f"{' or '.join(names)} has a value that float16 cannot hold (its largest is {limit:g}); choose dtype=bfloat16 or "
            "float32."
        )


@contextmanager
def open_files() -> Iterator[Callable[[Path], safe_open]]:
    """Yield a function path -> open safetensors file, which keeps each file open for as long as the context lasts."""
    with ExitStack() as stack:
        yield functools.cache(lambda path: stack.enter_context(_open(path)))


def tensor_slice(open_file: Callable[[Path], safe_open], files: dict[str, Path], name: str):
    """Return the tensor `name` as a slice of safetensors. Raises ConfigError when its file does not hold it."""
    try:
        return open_file(files[name]).get_slice(name)
    except SafetensorError as error:  # the index names a tensor that the file lacks
        raise ConfigError(f"{files[name]} does not hold {name}, contrary to the index: {error}.") from error


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist, although the index names it.") from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a complete safetensors file: {error}.") from error


def some(names: list[str]) -> str:
    """Return the first names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
