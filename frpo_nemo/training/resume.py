"""May this configuration continue that run? Looks at the configuration saved in run_dir and at what the checkpoint says
of itself; loads nothing."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron import adapter_files, checkpoint_files
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.hf_weights.files import check_replaceable
from frpo_nemo.training import record
from frpo_nemo.training.hub import is_hub_name

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

_READ = (".jinja", ".json", ".model", ".safetensors", ".txt")  # of a model's files


def check_resume(cfg, arch: Architecture | None) -> None:
    """Raise ConfigError when `cfg` (a typed run) asks to continue what it cannot. arch: None where it is not known."""
    resume, run_dir = cfg.checkpoint.resume, Path(cfg.run_dir)
    own = checkpoint_files.newest(run_dir)
    if resume == "never" and own:
        raise ConfigError(
            f"checkpoint.resume=never, but run_dir={cfg.run_dir} holds {own.name} of an earlier run, which would be lost; "
            "take another run_dir, or delete that one."
        )
    saved = run_dir / "config.yaml"
    if saved.is_file() and not is_failed_start(run_dir):
        check_same_run(cfg, saved)
    if not own and (run_dir / "hf").exists():
        raise ConfigError(
            f"run_dir={cfg.run_dir} holds a model (hf/) and no checkpoint to continue from; a new run would overwrite it: "
            "take another run_dir, or move hf/ away."
        )
    check_replaceable(Path(cfg.model.path), run_dir / "hf")  # the export at the end would refuse as well
    checkpoint = own or (None if resume in ("auto", "never") else Path(resume))
    if checkpoint is None:
        return
    if not checkpoint.exists():
        raise ConfigError(
            f"checkpoint.resume={resume} does not exist (working directory: {Path.cwd()}); give auto, never or the "
            "path of a checkpoint."
        )
    try:
        checkpoint_files.check_resumable(checkpoint)
        if arch:
            checkpoint_files.check_matches(checkpoint, arch)
            adapter_files.check(checkpoint, cfg.model, adapter_files.record(cfg.model))
        step = checkpoint_files.read(checkpoint)["step"]
    except ConfigError as error:
        raise ConfigError(f"checkpoint.resume={resume}: {error}") from error
    if step > cfg.trainer.max_steps:
        raise ConfigError(
            f"trainer.max_steps={cfg.trainer.max_steps} is before step {step} of {checkpoint}, from which the run would go on; "
            f"set it to at least {step}, or take another run_dir."
        )


def is_failed_start(run_dir: Path) -> bool:
    """Whether a run began here and ended before its first step: another may take its place."""
    metrics = run_dir / "metrics.jsonl"
    if checkpoint_files.newest(run_dir) or not metrics.is_file():
        return False
    return not any(json.loads(line)["step"] > 0 for line in metrics.read_text().split("\n")[:-1])


def check_same_run(cfg, saved: Path) -> None:
    """Raise ConfigError unless `cfg` is the configuration `saved`, but for what MAY_CHANGE."""
    before = _defaults(cfg) | _flat(OmegaConf.to_container(OmegaConf.load(saved)))  # options may be newer than the run
    now = _flat(redact.values(OmegaConf.to_container(OmegaConf.structured(cfg))))  # as it was saved; secrets rotate
    name = before.get("model.path")
    if _is_snapshot_of(now["model.path"], name):  # cli.py has put the directory in the place of the hub name
        _check_same_snapshot(cfg, name)
        now["model.path"] = name
    changed = [key for key in before | now if before.get(key) != now.get(key) and not _may_change(key)]
    if changed:
        listed = ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in changed[:8])
        raise ConfigError(
            f"run_dir={cfg.run_dir} holds a run with another configuration: {listed}; set them back to continue it, "
            "or take another run_dir."
        )


def _is_snapshot_of(path: str, name: str | None) -> bool:
    """Whether `path` is where the Hugging Face cache keeps a commit of the hub's model `name`."""
    return is_hub_name(name or "") and Path(path).parts[-3:-1] == ("models--" + name.replace("/", "--"), "snapshots")


def _check_same_snapshot(cfg, name: str) -> None:
    """The weights come from the checkpoint, but the reference policy, the tokenizer and the template from model.path."""
    starts, new = record.starts(Path(cfg.run_dir)), Path(cfg.model.path)
    old = (
        new.with_name(Path(starts[-1].get("model", new)).name) if starts else new
    )  # in this cache, which may have moved
    if new.name == old.name:
        return
    if _blobs(old) != _blobs(new):
        raise ConfigError(
            f"model.path={name} has changed since the run in run_dir={cfg.run_dir} began: its commit on the hub was "
            f"{old.name} and is {new.name}; set model.path={old} to continue that run, or take another run_dir."
        )


def _blobs(snapshot: Path) -> set[tuple[str, Path]]:
    """(name, what the cache stores under it) of each file that a model is read from: commits that differ in others, of
    which the cache may have some or none, share theirs."""
    files = [file for file in snapshot.rglob("*") if file.suffix in _READ and file.is_file()]
    return {(str(file.relative_to(snapshot)), file.resolve()) for file in files}


def _may_change(key: str) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def _defaults(values: Any, path: str = "") -> dict[str, Any]:
    """{"model.lora.rank": 0, ...}: what each option of the dataclasses in `values` is where nobody has set it."""
    found = {}
    for name, item in _items(values):
        key = f"{path}.{name}" if path else str(name)
        if is_dataclass(item) or isinstance(item, (dict, list)):
            found |= _defaults(item, key)
        elif is_dataclass(values):
            found[key] = next(option.default for option in fields(values) if option.name == name)
    return found


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """{"data.train.0.path": "a", ...} of nested dicts and lists."""
    if not isinstance(values, (dict, list)):
        return {path: values}
    items = _items(values)
    return {k: v for name, item in items for k, v in _flat(item, f"{path}.{name}" if path else str(name)).items()}


def _items(values: Any) -> Iterable[tuple[Any, Any]]:
    return (
        enumerate(values)
        if isinstance(values, list)
        else (values if isinstance(values, dict) else vars(values)).items()
    )
