"""A model's path is a directory, or a hub name whose files are in the cache."""

import pytest

from frpo_nemo.errors import ConfigError
from frpo_nemo.training.hub import local_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hugging Face cache that holds some-org/some-model, as downloads leave it."""
    repository = tmp_path / "models--some-org--some-model"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return repository / "snapshots" / commit


def test_a_directory_is_itself(tmp_path):
    assert local_model(str(tmp_path), download=True) == str(tmp_path)


def test_a_hub_name_is_its_directory_in_the_cache(cache):
    assert local_model("some-org/some-model", download=False) == str(cache)


def test_what_is_neither_gives_one_sentence(cache):
    with pytest.raises(ConfigError) as error:
        local_model("some-org/another-model", download=False)
    assert "model.path=some-org/another-model" in str(error.value) and "\n" not in str(error.value)
