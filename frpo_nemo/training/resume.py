"""May this configuration continue that run? Looks at the configuration saved in run_dir and at what the checkpoint says
of itself; loads nothing."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron import checkpoint_files
from frpo_nemo.megatron.architecture import Architecture

# What may differ between the parts of one run: where, how fast and how long it computes, and what it tells.
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


def check_resume(cfg, arch: Architecture | None) -> None:
    """Raise ConfigError when `cfg` (a typed run) asks to continue what it cannot. arch: None where it is not known."""
    resume, run_dir = cfg.checkpoint.resume, Path(cfg.run_dir)
    own = checkpoint_files.newest(run_dir)
    if resume == "never" and own:
        raise ConfigError(
            f"checkpoint.resume=never, but run_dir={cfg.run_dir} holds {own.name} of an earlier run, which would be lost; "
            "take another run_dir, or delete that one."
        )
    checkpoint = own or (None if resume in ("auto", "never") else Path(resume))
    if checkpoint is None:
        return
    if not checkpoint.exists():
        raise ConfigError(
            f"checkpoint.resume={resume} does not exist (working directory: {Path.cwd()}); give auto, never or the "
            "path of a checkpoint."
        )
    saved = run_dir / "config.yaml"
    if own and saved.is_file():
        _check_same_run(cfg, saved)
    try:
        checkpoint_files.read(checkpoint)
        if arch:
            checkpoint_files.check_matches(checkpoint, arch)
    except ConfigError as error:
        raise ConfigError(f"checkpoint.resume={resume}: {error}") from error


def _check_same_run(cfg, saved: Path) -> None:
    before = _flat(OmegaConf.to_container(OmegaConf.load(saved)))
    now = _flat(OmegaConf.to_container(OmegaConf.structured(cfg)))
    changed = [key for key in before | now if before.get(key) != now.get(key) and not _may_change(key)]
    if changed:
        listed = ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in changed[:8])
        raise ConfigError(
            f"run_dir={cfg.run_dir} holds a run with another configuration: {listed}; set them back to continue it, "
            "or take another run_dir."
        )


def _may_change(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """{"data.train.0.path": "a", ...} of nested dicts and lists."""
    if not isinstance(values, (dict, list)):
        return {path: values}
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return {k: v for name, item in items for k, v in _flat(item, f"{path}.{name}" if path else str(name)).items()}
