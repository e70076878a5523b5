"""Describe adapters on disk: the record of a checkpoint of adapters and its base, and PEFT's description of exported ones.
Nothing here needs torch, so errors are reported immediately."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.weights.tensors import tensor_files

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # prefix of the names of tensors in its files
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14  # per file of weights


def record(model: ModelConfig) -> dict[str, Any] | None:
    """Return what the checkpoints of a run record of its adapters; None without any."""
    if not model.lora.rank:
        return None
    return {"rank": model.lora.rank, "alpha": model.lora.alpha, "base": digest(model.path)}


def check(checkpoint: str | Path, model: ModelConfig, ours: dict[str, Any] | None) -> None:
    """Raise ConfigError when `checkpoint` holds other adapters than those of `model` on this base. `ours`: its record."""
    saved = checkpoint_files.read(checkpoint).get("lora")
    if saved == ours:
        return
    if saved is None:
        raise ConfigError(
            f"{checkpoint} holds all weights of a model and no adapters; set model.lora.rank=0 (it is {model.lora.rank})."
        )
    wanted = f"model.lora.rank={saved['rank']} model.lora.alpha={saved['alpha']}"
    if ours is None or ours | {"base": None} != saved | {"base": None}:
        raise ConfigError(
            f"{checkpoint} holds adapters with {wanted}; this run has model.lora.rank={model.lora.rank} "
            f"model.lora.alpha={model.lora.alpha}."
        )
    raise ConfigError(
        f"{checkpoint} holds adapters of a base whose weights are not those in model.path={model.path}: give the model that "
        "they were trained on."
    )


def digest(path: str | Path) -> str:
    """Return a digest of the weights in a Hugging Face directory: names, sizes and samples spread over every file. Quick at
    any size, and practically different for any two sets of trained weights. Raises ConfigError when a file is missing."""
    found = hashlib.sha256()
    for file in sorted(set(tensor_files(Path(path)).values())):
        if not file.is_file():
            raise ConfigError(f"{file} does not exist, so the weights that the adapters belong to are unknown.")
        add_samples(found, file)
    return found.hexdigest()


def add_samples(found, file: Path) -> None:
    """Add a file's name, size and samples to the hash `found`."""
    size = file.stat().st_size
    found.update(f"{file.name} {size}".encode())
    with file.open("rb") as weights:
        for sample in range(_SAMPLES):
            weights.seek(max(size - _SAMPLE_BYTES, 0) * sample // (_SAMPLES - 1))
            found.update(weights.read(_SAMPLE_BYTES))


def peft_config(rank: int, alpha: float, base: str | Path, names: Iterable[str]) -> str:
    """Return PEFT's adapter_config.json. `base`: the model that the adapter was trained on. names: of the adapter's tensors."""
    modules = list(dict.fromkeys(name.split(".")[-3] for name in names))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.fspath(
            Path(base).resolve() if Path(base).is_dir() else base
        ),  # read from anywhere
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }
    return json.dumps(settings, indent=2) + "\n"
