"""Compare the files under two paths: a model or a data set may have moved since a run began, or its path may be spelled
differently. Loads nothing."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from frpo_nemo.megatron.weights.adapter_files import add_samples

KINDS = {
    "path",
    "target",
    "model",
    "base",
    "template_file",
}  # last parts of the keys of files that a run reads; not of files that it writes, or servers that it asks
READ = (".jinja", ".json", ".model", ".safetensors", ".txt")  # suffixes of a model's files

MOST_BYTES = 8 << 30  # most that a digest reads when a run starts: some seconds


def digests(options: Mapping[str, Any]) -> dict[str, str]:
    """Return {key: digest} of the options {"data.train.0.path": "a.jsonl", ...} that name files on this machine."""
    found = {key: digest(Path(value)) for key, value in options.items() if names_file(key, value)}
    return {key: value for key, value in found.items() if value}


def names_file(key: str, value: Any) -> bool:
    """Return whether the value of an option may name a file. A reward's target names one before its colon."""
    return isinstance(value, str) and key.rpartition(".")[2] in KINDS and "://" not in value


def same_files(old: Path, new: Path, recorded: str | None) -> bool:
    """Return whether `new` holds what `old` does; if `old` has gone, what it held by its `recorded` digest."""
    (old_file, old_name), (new_file, new_name) = _split(old), _split(new)
    if old_name != new_name:
        return False
    if old_file.exists() and new_file.exists() and old_file.samefile(new_file):
        return True
    recorded = digest(old) or recorded
    return recorded is not None and recorded == digest(new)


def digest(path: Path) -> str | None:
    """Return a digest of a file, a directory of data, the files of a pattern, or the files that are read from a model's
    directory: samples of weights, every byte of all else. None where there is nothing, or more than MOST_BYTES."""
    path, is_model = _split(path)[0], (path / "config.json").is_file()
    listed = [path] if path.is_file() else path.glob("[!.]*") if is_model else path.rglob("[!.]*")
    if glob.has_magic(str(path)) and not path.exists():
        listed = [Path(file) for file in glob.glob(str(path), recursive=True)]
        path = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    files = sorted(file for file in listed if file.is_file() and (not is_model or file.suffix in READ))
    if not files or sum(file.stat().st_size for file in files if file.suffix != ".safetensors") > MOST_BYTES:
        return None
    found = hashlib.sha256()
    for file in files:
        found.update(str(file.relative_to(path) if file != path else "").encode())
        if file.suffix == ".safetensors":
            add_samples(found, file)
        else:
            with file.open("rb") as content:
                found.update(hashlib.file_digest(content, "sha256").digest())
    return found.hexdigest()


def _split(path: Path) -> tuple[Path, str]:
    """Split a reward's target, rewards.py:score, or a configuration of a data set, DIR:main, into path and name."""
    file, colon, name = str(path).rpartition(":")
    return (Path(file), name) if colon and "/" not in name and not path.exists() else (path, "")
