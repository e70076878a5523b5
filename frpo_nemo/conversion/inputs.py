"""The options of a conversion, its input, and the checks of both. Nothing here imports torch, except to read a GGUF file,
so errors are reported immediately."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frpo_nemo.config.hub import FILES, WITHOUT_WEIGHTS, is_hub_name, local_model
from frpo_nemo.config.option import check_values, option
from frpo_nemo.conversion.model_card import trained_from
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.weights.adapter_files import PEFT_CONFIG, PEFT_WEIGHTS
from frpo_nemo.megatron.weights.files import CARD, check_replaceable, others
from frpo_nemo.planning.memory import adapter_parameters, parameters, readable
from frpo_nemo.processes.launcher import started_world

if TYPE_CHECKING:
    from frpo_nemo.conversion.gguf_file import GGUFFile

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SLACK = 64 << 20  # bytes of disk for everything except weights: tokenizers, indices, the headers of chunks


@dataclass
class ConvertRun:
    """recipes/convert.py"""

    input: str = option(
        "Checkpoint, run directory or GGUF file to convert to Hugging Face format.",
        example="runs/first",
    )
    out: str = option(
        "Directory to write; an earlier conversion there is replaced, anything else refused.",
        example="runs/first/hf_best",
    )
    checkpoint: str = option(
        "Which checkpoint of a run directory; best is by validation.", "newest", choices=("newest", "best")
    )
    base: str | None = option(
        "Model that gives configuration and tokenizer, and for adapters the frozen weights; null: the one that the checkpoint "
        "was trained from.",
        None,
    )
    adapter: bool = option(
        "For a run with adapters (model.lora): write only the adapters, for PEFT, instead of merging them.", False
    )
    dtype: str | None = option(
        "Type of the written weights; null: what config.json names, or how most matrices of a GGUF file are stored.",
        None,
        choices=tuple(ITEM_BYTES),
    )
    max_shard_gb: float = option(
        "Largest safetensors file in 10^9 bytes; needs memory for one file and the largest weight.", 5.0, above=0
    )
    verify: bool = option("Compare log-probs by transformers and Megatron; needs memory for the whole model.", False)


@dataclass(frozen=True)
class Conversion:
    """A checked ConvertRun. checkpoint: what is converted, or None when it is a GGUF file, `model`, read as `gguf`. model:
    otherwise the directory that gives configuration and tokenizer, and for adapters (`lora`: their record) the frozen
    weights. base: its name. adapter: only the adapters are written."""

    checkpoint: Path | None
    gguf: GGUFFile | None
    model: Path
    base: str
    lora: dict[str, Any] | None
    adapter: bool
    arch: Architecture
    dtype: str
    out: Path

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights to write."""
        arch = self.arch
        count = arch.num_layers * adapter_parameters(arch, self.lora["rank"], 1) if self.adapter else parameters(arch)
        return count * ITEM_BYTES[self.dtype]


def check_conversion(cfg: ConvertRun) -> Conversion:
    """Check options, input, base, `out` and the disk, as far as possible without reading weights. Downloads the model of a
    hub name. Raises ConfigError."""
    _check_options(cfg)
    out = _out(cfg)
    if Path(cfg.input).is_file():
        return _of_gguf(cfg, out)
    checkpoint = _checkpoint(cfg)
    lora = checkpoint_files.read(checkpoint).get("lora")
    if cfg.adapter and lora is None:
        raise ConfigError(f"adapter=true, but input={cfg.input} holds no adapters.")
    base = _base(cfg, checkpoint)
    model = Path(local_model(base, download=True, files=FILES if lora else WITHOUT_WEIGHTS))
    arch = Architecture.from_hf(model)
    if differing := checkpoint_files.differences(checkpoint, arch):
        raise ConfigError(
            f"{checkpoint} is of another model than base={model}: {', '.join(differing)}; give the one that it was "
            "trained from."
        )
    if cfg.adapter:
        _check_replaceable_adapter(out)
    else:
        check_replaceable(model, out)
    dtype = cfg.dtype or arch.dtype or "float32"
    conversion = Conversion(checkpoint, None, model, base, lora, cfg.adapter, arch, dtype, out)
    _check_disk(conversion)
    return conversion


def _of_gguf(cfg: ConvertRun, out: Path) -> Conversion:
    for package in ("gguf", "accelerate") if cfg.verify else ("gguf",):  # transformers needs the second
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"input={cfg.input} is a file, and reading GGUF files needs {package}: pip install {package}."
            )
    if cfg.adapter:
        raise ConfigError(f"adapter=true, but input={cfg.input} holds no adapters.")
    from frpo_nemo.conversion.gguf_file import read_gguf

    path = Path(cfg.input)
    file = read_gguf(path)
    check_replaceable(path, out)
    dtype = cfg.dtype or file.arch.dtype
    conversion = Conversion(None, file, path, cfg.input, None, False, file.arch, dtype, out)
    _check_disk(conversion)
    return conversion


def _check_options(cfg: ConvertRun) -> None:
    check_values(cfg)
    if started_world()[1] > 1:
        raise ConfigError(f"{started_world()[1]} processes were started; a conversion needs exactly one.")
    if cfg.adapter and cfg.verify and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "verify=true loads an adapter (adapter=true) with peft, which is not installed; pip install peft."
        )


def _checkpoint(cfg: ConvertRun) -> Path:
    """Return the checkpoint that `cfg.input` names."""
    path = Path(cfg.input)
    if (path / checkpoint_files.RECORD).is_file():
        return path
    if (path / "checkpoints").is_dir():
        found = checkpoint_files.newest(path) if cfg.checkpoint == "newest" else checkpoint_files.best(path)
        if found is None:
            lacking = "complete checkpoint" if cfg.checkpoint == "newest" else "checkpoint that was validated"
            raise ConfigError(f"input={cfg.input} is a run directory without a {lacking}.")
        return found
    if (path / "config.json").is_file():
        raise ConfigError(f"input={cfg.input} is in Hugging Face format already, which every recipe reads.")
    raise ConfigError(
        f"input={cfg.input} is neither a checkpoint ({checkpoint_files.RECORD}), nor a run directory (checkpoints/), nor "
        f"a GGUF file; the working directory is {Path.cwd()}."
    )


def _base(cfg: ConvertRun, checkpoint: Path) -> str:
    base = cfg.base or trained_from(checkpoint)
    if base is None:
        raise ConfigError(f"{checkpoint} does not record which model it was trained from; name it with base=.")
    if not Path(base).is_dir() and not is_hub_name(base):
        named = f"base={base}" if cfg.base else f"{base}, which {checkpoint} was trained from,"
        raise ConfigError(
            f"{named} isn't a directory (working directory: {Path.cwd()}); name with base= the model that gives configuration "
            "and tokenizer."
        )
    return base


def _out(cfg: ConvertRun) -> Path:
    """Return the location of `cfg.out`: a link stays, and its target is written."""
    out, here = Path(cfg.out).resolve(), Path.cwd()
    if out == here or out in here.parents:
        raise ConfigError(f"out={cfg.out} is the working directory or contains it ({here}); name a new directory.")
    return out


def _check_replaceable_adapter(out: Path) -> None:
    if out.exists() and others(out, (PEFT_CONFIG, PEFT_WEIGHTS, CARD)):
        raise ConfigError(
            f"out={out} exists and isn't an earlier adapter alone; choose another directory or remove it."
        )


def _check_disk(conversion: Conversion) -> None:
    """Check the free space. An earlier conversion's space does not count: it is removed when the new one is complete."""
    out, needed = conversion.out, conversion.weight_bytes + _SLACK
    existing = next(parent for parent in (out, *out.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"out={conversion.out} needs {readable(needed)} of disk; {existing} has {readable(free)} free."
        )
