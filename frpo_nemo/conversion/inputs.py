"""What a conversion is asked for, what its input is, and what can be wrong with both. Nothing here imports torch, so a
mistake is told at once."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo_nemo.conversion.model_card import trained_from
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron import checkpoint_files
from frpo_nemo.megatron.adapter_files import PEFT_CONFIG, PEFT_WEIGHTS
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.hf_weights.files import CARD, check_replaceable, others
from frpo_nemo.planning.memory import adapter_parameters, parameters, readable
from frpo_nemo.training.cli import started_world
from frpo_nemo.training.config import required
from frpo_nemo.training.hub import FILES, WITHOUT_WEIGHTS, is_hub_name, local_model

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SLACK = 64 << 20  # bytes of disk for what is no weight: tokenizers, indices, the headers of chunks
_CONVERTED = (checkpoint_files.RECORD, ".metadata", "*.distcp", "common.pt", "metadata.json")


@dataclass
class ConvertRun:
    """recipes/convert.py"""

    input: str = required("runs/first")  # checkpoint or run directory (to Hugging Face), or Hugging Face directory
    out: str = required("runs/first/hf_best")
    checkpoint: str = "newest"  # which of a run directory: newest or best
    base: str | None = None  # configuration and tokenizer; None: what the checkpoint was trained from
    adapter: bool = False  # of a run with adapters: these alone, in PEFT's format, instead of the merged model
    dtype: str | None = None  # of the weights; None: what config.json names
    max_shard_gb: float = 5.0  # of 10^9 bytes
    verify: bool = False


@dataclass(frozen=True)
class Conversion:
    """What a ConvertRun comes to. checkpoint: the input, or None when `model` is. model: the directory in Hugging Face
    format that is converted, or that gives configuration and tokenizer, and to adapters (`lora`: their record) the frozen
    weights. base: its name. adapter: they alone are written."""

    checkpoint: Path | None
    model: Path
    base: str
    lora: dict[str, Any] | None
    adapter: bool
    arch: Architecture
    dtype: str
    out: Path

    @property
    def weight_bytes(self) -> int:
        """That are written."""
        arch = self.arch
        count = arch.num_layers * adapter_parameters(arch, self.lora["rank"], 1) if self.adapter else parameters(arch)
        return count * ITEM_BYTES[self.dtype]


def check_conversion(cfg: ConvertRun) -> Conversion:
    """Raises ConfigError for what is wrong with options, input, base, `out` or the disk, as far as that can be seen without
    a look into files of weights. Downloads what is a hub name."""
    _check_options(cfg)
    out = _out(cfg)
    checkpoint = _checkpoint(cfg)
    lora = None if checkpoint is None else checkpoint_files.read(checkpoint).get("lora")
    if cfg.adapter and lora is None:
        raise ConfigError(f"adapter=true, but input={cfg.input} holds no adapters.")
    base = cfg.input if checkpoint is None else _base(cfg, checkpoint)
    files = FILES if checkpoint is None or lora else WITHOUT_WEIGHTS
    model = Path(local_model(base, download=True, files=files))
    arch = Architecture.from_hf(model)
    if checkpoint is None:
        _check_replaceable_checkpoint(out)
    elif differing := checkpoint_files.differences(checkpoint, arch):
        raise ConfigError(
            f"{checkpoint} is of another model than base={model}: {', '.join(differing)}; give the one that it was "
            "trained from."
        )
    elif cfg.adapter:
        _check_replaceable_adapter(out)
    else:
        check_replaceable(model, out)
    conversion = Conversion(checkpoint, model, base, lora, cfg.adapter, arch, cfg.dtype or arch.dtype or "float32", out)
    _check_disk(conversion)
    return conversion


def _check_options(cfg: ConvertRun) -> None:
    if started_world()[1] > 1:
        raise ConfigError(f"{started_world()[1]} processes were started; conversion is the work of one.")
    if cfg.checkpoint not in ("newest", "best"):
        raise ConfigError(f"checkpoint={cfg.checkpoint} must be newest or best.")
    if cfg.dtype is not None and cfg.dtype not in ITEM_BYTES:
        raise ConfigError(f"dtype={cfg.dtype} must be {', '.join(ITEM_BYTES)} or null.")
    if cfg.adapter and cfg.verify and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "verify=true loads an adapter (adapter=true) with peft, which is not installed; pip install peft."
        )
    if not cfg.max_shard_gb > 0:
        raise ConfigError(f"max_shard_gb={cfg.max_shard_gb} must be above 0.")


def _checkpoint(cfg: ConvertRun) -> Path | None:
    """The checkpoint that `cfg.input` means; None when it is a model in Hugging Face format."""
    path = Path(cfg.input)
    if (path / checkpoint_files.RECORD).is_file():
        return path
    if (path / "checkpoints").is_dir():
        found = checkpoint_files.newest(path) if cfg.checkpoint == "newest" else checkpoint_files.best(path)
        if found is None:
            lacking = "complete checkpoint" if cfg.checkpoint == "newest" else "checkpoint that was validated"
            raise ConfigError(f"input={cfg.input} is a run directory without a {lacking}.")
        return found
    if (path / "config.json").is_file() or is_hub_name(cfg.input):
        return None
    raise ConfigError(
        f"input={cfg.input} is neither a checkpoint ({checkpoint_files.RECORD}), nor a run directory (checkpoints/), nor "
        f"a model in Hugging Face format (config.json); the working directory is {Path.cwd()}."
    )


def _base(cfg: ConvertRun, checkpoint: Path) -> str:
    base = cfg.base or trained_from(checkpoint)
    if base is None:
        raise ConfigError(f"{checkpoint} does not say which model it was trained from; name it by base=.")
    if not Path(base).is_dir() and not is_hub_name(base):
        named = f"base={base}" if cfg.base else f"{base}, which {checkpoint} was trained from,"
        raise ConfigError(
            f"{named} is no directory (working directory: {Path.cwd()}); name by base= the model that gives configuration "
            "and tokenizer."
        )
    return base


def _out(cfg: ConvertRun) -> Path:
    """Where `cfg.out` lies: a link stays, and what it leads to is written."""
    out, here = Path(cfg.out).resolve(), Path.cwd()
    if out == here or out in here.parents:
        raise ConfigError(f"out={cfg.out} is the working directory or holds it ({here}); name a new directory.")
    return out


def _check_replaceable_checkpoint(out: Path) -> None:
    """An earlier conversion may be replaced; what was trained, or is something else, may not."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    converted = (out / checkpoint_files.RECORD).is_file() and checkpoint_files.read(out)["adam_step"] is None
    if not converted:
        raise ConfigError(f"out={out} exists and is not an earlier conversion; choose another directory or remove it.")
    if other := others(out, _CONVERTED):
        raise ConfigError(
            f"out={out} exists and is not an earlier conversion alone: {other[0]} in it is of another origin and would be "
            "lost; choose another directory or remove it."
        )


def _check_replaceable_adapter(out: Path) -> None:
    if out.exists() and others(out, (PEFT_CONFIG, PEFT_WEIGHTS, CARD)):
        raise ConfigError(
            f"out={out} exists and is not an earlier adapter alone; choose another directory or remove it."
        )


def _check_disk(conversion: Conversion) -> None:
    """What an earlier conversion takes does not count: it goes when the new one is complete."""
    out, needed = conversion.out, conversion.weight_bytes + _SLACK
    existing = next(parent for parent in (out, *out.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"out={conversion.out} needs {readable(needed)} of disk; {existing} has {readable(free)} free."
        )
