"""May this configuration continue that run? Compares it with the configuration saved beside the checkpoints
(run_dir/config.yaml); reads no checkpoint."""

from __future__ import annotations

import fnmatch
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture

# What may differ between the parts of one run: where and how fast it computes, how long, and what it tells.
MAY_CHANGE = (
    "run_dir",
    "model.*_parallel*",
    "model.num_layers_in_*",
    "model.recompute",
    "model.logprob_chunk_tokens",
    "rollout.tensor_model_parallel_size",
    "rollout.gpu_memory_utilization",
    "rollout.max_num_seqs",
    "rollout.enforce_eager",
    "rollout.refit_bucket_mb",
    "rollout.logprob_gap_threshold",
    "reward.*.timeout",
    "reward.*.isolate",
    "reward.*.workers",
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.max_steps",
    "trainer.microbatch_tokens",
    "trainer.val_interval",
    "trainer.save_interval",
    "trainer.phase_timeout",
    "checkpoint.*",
    "logging.*",
)
COMPARED = ("family", "num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_kv_heads", "head_dim",
            "vocab_size", "tied_embeddings")  # fmt: skip


def check_resume(cfg, arch: Optional[Architecture]) -> None:
    """Raise ConfigError when `cfg` (a typed run) asks to continue what it cannot. arch: None if not known."""
    resume, run_dir = cfg.checkpoint.resume, Path(cfg.run_dir)
    if resume == "never":
        return
    if resume == "auto":
        if _holds_checkpoint(run_dir) and (run_dir / "config.yaml").is_file():
            _check_same_run(cfg, run_dir / "config.yaml")
        return
    path = Path(resume)
    if not path.exists():
        raise ConfigError(
            f"checkpoint.resume={resume} does not exist (working directory: {Path.cwd()}); give auto, never or the path "
            "of a checkpoint."
        )
    if not _holds_checkpoint(path):
        raise ConfigError(f"checkpoint.resume={resume} is not a checkpoint: it has no .metadata of torch.distributed.")
    saved = next((p / "config.yaml" for p in (path, *path.parents[:2]) if (p / "config.yaml").is_file()), None)
    if saved and arch:
        _check_same_model(cfg, arch, saved)


def _check_same_run(cfg, saved: Path) -> None:
    before, now = _flat(OmegaConf.to_container(OmegaConf.load(saved))), _flat(_plain(cfg))
    changed = [key for key in (before | now) if before.get(key) != now.get(key) and not _may_change(key)]
    if changed:
        listed = ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in changed[:8])
        raise ConfigError(
            f"run_dir={cfg.run_dir} holds a run with another configuration: {listed}; set them back to continue it, take "
            "another run_dir, or start over with checkpoint.resume=never."
        )


def _check_same_model(cfg, arch: Architecture, saved: Path) -> None:
    path = OmegaConf.select(OmegaConf.load(saved), "model.path")
    if path == cfg.model.path or not Path(path, "config.json").is_file():
        return
    other = Architecture.from_hf(path)
    differing = [f"{name}={getattr(other, name)}" for name in COMPARED if getattr(other, name) != getattr(arch, name)]
    if differing:
        raise ConfigError(
            f"checkpoint.resume={cfg.checkpoint.resume} is of another model ({path}: {', '.join(differing)}) than "
            f"model.path={cfg.model.path}; resume with the model that it was trained from."
        )


def _holds_checkpoint(path: Path) -> bool:
    """.metadata is what torch.distributed.checkpoint writes last."""
    return any(any(path.glob(pattern)) for pattern in (".metadata", "*/.metadata", "*/*/.metadata"))


def _may_change(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, the way they are saved."""
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """{"data.train.0.path": "a", ...} of nested dicts and lists."""
    if not isinstance(values, (dict, list)):
        return {path: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {k: v for name, item in items for k, v in _flat(item, f"{path}.{name}" if path else str(name)).items()}
