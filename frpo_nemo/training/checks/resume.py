"""Check whether a configuration may continue a run. Reads the configuration saved in run_dir and the checkpoint's own
record; loads nothing."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from frpo_nemo import redact
from frpo_nemo.config.hub import is_hub_name
from frpo_nemo.config.option import given_options, options_of
from frpo_nemo.config.options import TrainingRun
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron import weight_decay
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.megatron.weights import adapter_files
from frpo_nemo.megatron.weights.files import check_replaceable
from frpo_nemo.records import read_jsonl
from frpo_nemo.training import start_record
from frpo_nemo.training.checks.same_files import READ, digests, names_file, same_files


def check_resume(cfg: TrainingRun, arch: Architecture | None) -> None:
    """Raise ConfigError when `cfg` (a typed run) asks to continue a run that it cannot. arch: None where unknown."""
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
            f"run_dir={cfg.run_dir} holds a model (hf/) but no checkpoint to continue from; a new run would overwrite it: "
            "take another run_dir, or move hf/ away."
        )
    check_replaceable(Path(cfg.model.path), run_dir / "hf")  # the export at the end would refuse as well
    checkpoint = _checkpoint_to_resume(cfg)
    if checkpoint is None:
        return
    if not checkpoint.exists():
        raise ConfigError(
            f"checkpoint.resume={resume} does not exist (working directory: {Path.cwd()}); give auto, never or the "
            "path of a checkpoint."
        )
    try:
        step = checkpoint_files.read(checkpoint)["step"]
        if arch:
            checkpoint_files.check_matches(checkpoint, arch)
            adapter_files.check(checkpoint, cfg.model, adapter_files.record(cfg.model))
        for each in checkpoint_files.complete(run_dir):
            checkpoint_files.read(each)  # one that cannot be read would end the run at its next save
    except ConfigError as error:
        raise ConfigError(f"checkpoint.resume={resume}: {error}") from error
    if step > cfg.trainer.max_steps:
        raise ConfigError(
            f"trainer.max_steps={cfg.trainer.max_steps} is before step {step} of {checkpoint}, from which the run would go on; "
            f"set it to at least {step}, or take another run_dir."
        )


def describe_weight_decay(cfg: TrainingRun) -> str:
    """Return a sentence on which weights the run of a checked `cfg` decays: by the rule of the checkpoint that it continues
    from, or by the rule of new runs."""
    checkpoint = _checkpoint_to_resume(cfg)
    rule = weight_decay.rule_of(checkpoint_files.read(checkpoint)) if checkpoint else weight_decay.MATRICES
    return weight_decay.describe(cfg.optim.weight_decay, rule, adapters=cfg.model.lora.rank > 0)


def _checkpoint_to_resume(cfg: TrainingRun) -> Path | None:
    """Return the newest checkpoint of run_dir; for a new run, the one that the configuration names."""
    resume = cfg.checkpoint.resume
    return checkpoint_files.newest(cfg.run_dir) or (None if resume in ("auto", "never") else Path(resume))


def check_same_data(checkpoint: Path, state: dict[str, Any], data: dict[str, str]) -> None:
    """Raise ConfigError unless the fingerprints `data`, {name of the set: fingerprint}, equal those in the checkpoint."""
    changed = [name for name in data if state["data"].get(name) != data[name]]
    if not changed:
        return
    hint = "give it the same"
    if "moment" not in state:  # written by a version that did not record it yet
        hint += " (an older version guessed the types of data files, read directories in part and rendered some conversations "
        hint += "differently: a run that began with it and read such data can only be continued with it)"
    raise ConfigError(
        f"{checkpoint} was made with other {', '.join(changed)} data than this run has; {hint}, or take another run_dir."
    )


def is_failed_start(run_dir: Path) -> bool:
    """Return whether a run began here and ended before its first step, so that another may take its place."""
    metrics = run_dir / "metrics.jsonl"
    if checkpoint_files.newest(run_dir) or not metrics.is_file():
        return False
    return not any(row["step"] > 0 for row in read_jsonl(metrics))


def check_same_run(cfg: TrainingRun, saved: Path) -> None:
    """Raise ConfigError unless `cfg` is the configuration `saved`, except for options that may change."""
    defaults = {key: each.default for key, value, each in given_options(cfg) if not isinstance(value, (dict, list))}
    before = defaults | _flat(_read(saved))  # options may be newer than the run
    now = _flat(redact.values(OmegaConf.to_container(OmegaConf.structured(cfg))))  # as it was saved; secrets rotate
    name = before.get("model.path")
    if _is_snapshot_of(now["model.path"], name):  # cli.py has replaced the hub name by the directory
        _check_same_snapshot(cfg, name)
        now["model.path"] = name
    free = [each.key for each in options_of(type(cfg)) if each.rule.may_change]
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    changed = [key for key in changed if not any(fnmatch.fnmatchcase(key, pattern) for pattern in free)]
    moved = [key for key in changed if _has_moved(Path(cfg.run_dir), key, before.get(key), now.get(key))]
    for key in moved:
        print(f"{key}={now[key]} holds the same files as {before[key]}, with which the run in {cfg.run_dir} began.")
    changed = [key for key in changed if key not in moved]
    if changed:
        listed = ", ".join(f"{key}={now.get(key)} (was {before.get(key)})" for key in changed[:8])
        raise ConfigError(
            f"run_dir={cfg.run_dir} holds a run with another configuration: {listed}; set them back to continue it, "
            "or take another run_dir."
        )


def _read(saved: Path) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(OmegaConf.load(saved))
    except (yaml.YAMLError, OSError) as error:
        raise ConfigError(
            f"{saved}, the configuration of the run there, is cut off or damaged; put a copy of it there, or take "
            "another run_dir."
        ) from error


def source_digests(cfg: TrainingRun) -> dict[str, str]:
    """Return {key: digest} of the files that a typed run reads; a run may continue when they have moved."""
    return digests(_flat(OmegaConf.to_container(OmegaConf.structured(cfg))))


def _has_moved(run_dir: Path, key: str, old: Any, new: Any) -> bool:
    """Return whether two values of an option name the same files. Another name on the hub is another model."""
    if not names_file(key, old) or not names_file(key, new):
        return False
    if is_hub_name(old) and Path(new).parts[-2:-1] == ("snapshots",):
        return False
    start: dict[str, Any] = next(reversed(start_record.starts(run_dir)), {})
    return same_files(Path(start.get("directory", "."), old), Path(new), start.get("files", {}).get(key))


def _is_snapshot_of(path: str, name: str | None) -> bool:
    """Return whether `path` is where the Hugging Face cache keeps a commit of the hub's model `name`."""
    return is_hub_name(name or "") and Path(path).parts[-3:-1] == ("models--" + name.replace("/", "--"), "snapshots")


def _check_same_snapshot(cfg: TrainingRun, name: str) -> None:
    """Raise ConfigError when the hub's model `name` has changed since the run began. The weights come from the checkpoint,
    but the reference policy, the tokenizer and the template come from model.path."""
    starts, new = start_record.starts(Path(cfg.run_dir)), Path(cfg.model.path)
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
    """Return (name, what the cache stores under it) of each file that a model is read from. Commits that differ only in
    other files, which may be missing from the cache, share these."""
    files = [file for file in snapshot.rglob("*") if file.suffix in READ and file.is_file()]
    return {(str(file.relative_to(snapshot)), file.resolve()) for file in files}


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    """Return nested dicts and lists as {"data.train.0.path": "a", ...}."""
    if not isinstance(values, (dict, list)):
        return {path: values}
    items = enumerate(values) if isinstance(values, list) else values.items()
    return {k: v for name, item in items for k, v in _flat(item, f"{path}.{name}" if path else str(name)).items()}
