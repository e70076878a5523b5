"""A model and a checkpoint of its weights, for the tests of conversion."""

import conversion_checks as checks
import pytest
from tiny_models import make_tiny

from frpo_nemo.megatron.checkpoint import files as checkpoint_files


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


@pytest.fixture(scope="package")
def saved(workers, model, tmp_path_factory):
    """Return a checkpoint outside of any run. Its weights are those of `model`."""
    directory = tmp_path_factory.mktemp("saved")
    workers.run(1, checks.save, path=model, run_dir=str(directory))
    return checkpoint_files.newest(directory)
