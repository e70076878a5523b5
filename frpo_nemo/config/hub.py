"""Find a model's files: in a directory, or, for a hub name, in the Hugging Face cache."""

from __future__ import annotations

import re
from pathlib import Path

from frpo_nemo.errors import ConfigError

WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*"]
FILES = [*WITHOUT_WEIGHTS, "*.safetensors"]  # weights as safetensors only
CONFIG_ONLY = ["config.json"]


def is_hub_name(path: str, directory: str | Path = ".") -> bool:
    """Return whether `path` reads owner/name and isn't a path in `directory`. A mistyped directory below an existing one
    isn't a hub name, so the hub is not asked for it."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not Path(directory, Path(path).parts[0]).exists()


def local_model(path: str, *, download: bool, files: list[str] = FILES) -> str:
    """Return the directory of model `path`. download: fetch a hub name's `files` that are not in the cache yet.

    Raises ConfigError when there is no such directory and the hub cannot provide it.
    """
    if Path(path).is_dir():
        return path
    if Path(path).is_file():
        raise ConfigError(
            f"model.path={path} is a file; give a directory in Hugging Face format, which python recipes/convert.py "
            f"input={path} out=DIR makes of a GGUF file."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(path, allow_patterns=files, local_files_only=not download)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"model.path={path} isn't a directory here (working directory: {Path.cwd()}) and couldn't be downloaded from "
            f"the hub: {reason} Give a directory in Hugging Face format, or a hub name such as Qwen/Qwen2.5-7B-Instruct."
        ) from error
