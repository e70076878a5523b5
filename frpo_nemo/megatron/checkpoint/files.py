"""Handle a run's checkpoints as directories: which exist, their records, which to keep. save_load.py defines the large files.
Nothing here needs torch, so a configuration is checked in milliseconds.

run_dir/checkpoints/step_00000010/           complete: it got this name after everything in it was on disk
run_dir/checkpoints/step_00000010.tmp-1f3a/  being written, or left by an attempt that died
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture

RECORD = "state.json"
FORMAT = 1  # of the record; increased when an old reader would misread a new one

_COMPLETE = re.compile(r"step_(\d{8,})")
_IDENTITY = (  # a checkpoint fits a model when these agree; the rest of config.json does not affect the weights
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "tied_embeddings",
    "qkv_bias",
    "qk_norm",
    "norm_eps",
    "rope_theta",
    "rope_scaling",
)


def directory(run_dir: str | Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`, which need not exist."""
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def complete(run_dir: str | Path) -> list[Path]:
    """Return all complete checkpoints of a run, by step."""
    found = Path(run_dir, "checkpoints").glob("step_*")
    return sorted((path for path in found if _COMPLETE.fullmatch(path.name)), key=_step)


def newest(run_dir: str | Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None."""
    return next(reversed(complete(run_dir)), None)


def best(run_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest score (the later one of equals), or None if none has a score."""
    scores = [(read(path)["score"], _step(path), path) for path in complete(run_dir)]
    return max((entry for entry in scores if entry[0] is not None), default=(None, None, None))[2]


def prune(run_dir: str | Path, keep_last: int, keep_best: bool = True) -> None:
    """Delete all checkpoints except the newest `keep_last` and, with keep_best, the best one. One rank calls this."""
    keep = set(complete(run_dir)[-keep_last:])
    if keep_best:
        keep.add(best(run_dir))
    for path in complete(run_dir):
        if path not in keep:
            shutil.rmtree(_set_aside(path), ignore_errors=True)  # the next `begin` removes what is left


def begin(checkpoint: Path, token: str) -> Path:
    """Return a new and empty directory in which to write `checkpoint`. Leftovers of dead attempts next to it are removed."""
    for leftover in checkpoint.parent.glob("step_*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)  # its last process may still be writing
    temporary = temporary_name(checkpoint, token)
    temporary.mkdir(parents=True)
    return temporary


def temporary_name(checkpoint: Path, token: str) -> Path:
    """Return a name for one attempt, unique by `token`: a dead attempt's last process may still be writing to its own."""
    return checkpoint.with_name(f"{checkpoint.name}.tmp-{token}")


def publish(temporary: Path, checkpoint: Path) -> None:
    """Give a completely written directory its name, durably; one of an earlier attempt is replaced."""
    sync(temporary)
    replaced = _set_aside(checkpoint) if checkpoint.exists() else None
    temporary.rename(checkpoint)
    sync(checkpoint.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """Wait until the names in a directory are on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(checkpoint: str | Path) -> dict[str, Any]:
    """Return the record of a checkpoint: step, seed, score, adam_step, precision, layout, architecture, versions, and the
    caller's `state`. Raises ConfigError when `checkpoint` isn't a checkpoint of this program."""
    file = Path(checkpoint) / RECORD
    if not file.is_file():
        raise ConfigError(f"{checkpoint} is not a checkpoint: it has no {RECORD}.")
    try:
        record = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{file} is cut off or damaged, so {checkpoint} cannot be used; copy it again, or remove that directory to "
            "continue from the checkpoint before it."
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        written = record.get("format") if isinstance(record, dict) else None
        raise ConfigError(
            f"{checkpoint} was written by another version of frpo-nemo (format {written}, here {FORMAT}); "
            "resume it with that version, or take another run_dir."
        )
    return record


def identity(arch: Architecture) -> dict[str, Any]:
    """Return the values in which a checkpoint and the model that loads it must agree."""
    experts = {"experts": asdict(arch.experts)} if arch.experts else {}
    return {name: getattr(arch, name) for name in _IDENTITY} | json.loads(json.dumps(experts))  # as a record has them


def differences(checkpoint: str | Path, arch: Architecture) -> list[str]:
    """Return where the model in `checkpoint` differs from `arch`: "vocab_size=131 (here 140)"."""
    saved, ours = read(checkpoint)["architecture"], identity(arch)
    return [f"{name}={saved.get(name)} (here {ours[name]})" for name in ours if saved.get(name) != ours[name]]


def check_matches(checkpoint: str | Path, arch: Architecture) -> None:
    """Raise ConfigError that names the differing fields when `checkpoint` is of another model than `arch`."""
    differing = differences(checkpoint, arch)
    if differing:
        raise ConfigError(
            f"{checkpoint} is of another model than model.path={arch.source}: {', '.join(differing)}; resume with the "
            "model from which it was trained, or take another run_dir."
        )


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint before it is deleted, so that an interrupted deletion leaves no half checkpoint."""
    aside = temporary_name(checkpoint, "old")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def _step(checkpoint: Path) -> int:
    return int(_COMPLETE.fullmatch(checkpoint.name)[1])
