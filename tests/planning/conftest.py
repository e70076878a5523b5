"""Configurations of known models, on disk."""

from pathlib import Path

import pytest
from known_models import MODELS, write_config


@pytest.fixture(scope="session")
def known(tmp_path_factory) -> dict[str, Path]:
    """Return the directory of each known model, with its config.json."""
    directory = tmp_path_factory.mktemp("known")
    return {name: write_config(name, directory) for name in MODELS}
