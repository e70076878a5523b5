"""Handle the directory of an exported model: which files it may have, when it may replace another, and how it gets its name.
export.py defines the weights' contents. Nothing here needs torch, so errors are reported immediately."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.checkpoint import files as checkpoint_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CARD = "README.md"
TEMPLATES = "additional_chat_templates"

# Files that a checkpoint needs in addition to weights; never code.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "tekken.json",
    "LICENSE*",
    "NOTICE*",
)
_EXPORTED = (SINGLE, INDEX, "model-*-of-*.safetensors", "config.json", CARD, *_COMPANIONS, f"{TEMPLATES}/*.jinja")


def companions(source: Path) -> list[Path]:
    """Return the files in `source` that an export copies unchanged, relative to `source`."""
    patterns = (*_COMPANIONS, f"{TEMPLATES}/*.jinja")
    found = {file for pattern in patterns for file in source.glob(pattern) if file.is_file() and file.suffix != ".py"}
    return sorted(file.relative_to(source) for file in found)


def check_replaceable(source: Path, out: Path) -> None:
    """Raise ConfigError when `out` is the `source` of an export, or holds anything that an export does not write."""
    if out.exists() and out.resolve() == source.resolve():
        raise ConfigError(
            f"The export would overwrite the model that it came from, {source}; choose another directory."
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not ((out / SINGLE).is_file() or (out / INDEX).is_file()):
        raise ConfigError(f"{out} exists and is not an exported model; choose another directory or remove it.")
    other = others(out, _EXPORTED)
    if other:
        raise ConfigError(
            f"{out} exists and holds more than an exported model: {other[0]} in it has another origin and would be lost; "
            "choose another directory or remove it."
        )


def others(directory: Path, patterns: Iterable[str]) -> list[str]:
    """Return what `directory` contains in addition to plain files with these names."""
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        holds_files = path.is_dir() and any(pattern.startswith(f"{name}/") for pattern in patterns)
        is_file = path.is_file() and path.suffix != ".py" and any(_matches(name, pattern) for pattern in patterns)
        if path.is_symlink() or not (holds_files or is_file):
            found.append(name)
    return found


def begin_export(out: Path) -> Path:
    """Return a new and empty directory in which an export is written before it becomes `out`."""
    temporary = out.with_name(out.name + ".incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish_export(temporary: Path, out: Path) -> None:
    """Give a complete export its name, once all of it is on disk; a directory of that name is deleted only afterwards."""
    for path in temporary.rglob("*"):
        checkpoint_files.sync(path)
    checkpoint_files.publish(temporary, out)
    shutil.rmtree(checkpoint_files.temporary_name(out, "old"), ignore_errors=True)  # left by an attempt that died here


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)
