"""Where a model's files are: a directory, or a hub name whose files lie in the Hugging Face cache."""

from __future__ import annotations

import re
from pathlib import Path

from frpo_nemo.errors import ConfigError

WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*"]
FILES = [*WITHOUT_WEIGHTS, "*.safetensors"]  # weights as safetensors only
CONFIG_ONLY = ["config.json"]


def is_hub_name(path: str, directory: str | Path = ".") -> bool:
    """Whether `path` reads owner/name and is no path in `directory`: a mistyped directory below an existing one is not
    asked for."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path)) and not Path(directory, Path(path).parts[0]).exists()


def local_model(path: str, *, download: bool, files: list[str] = FILES) -> str:
    """The directory of model `path`. download: fetch a hub name's `files` that are not in the cache yet.

    Raises ConfigError when there is no such directory and the hub cannot give it.
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
            f"model.path={path} is no directory here (working directory: {Path.cwd()}) and could not be had from the "
            f"hub: {reason} Give a directory in Hugging Face format, or a hub name such as Qwen/Qwen2.5-7B-Instruct."
        ) from error
