"""A model's path is a directory, or a hub name whose files are in the cache; a run by such a name can be resumed."""

import shutil
import sys
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_models import make_tiny

from frpo_nemo.config.cli import compose, main
from frpo_nemo.config.hub import local_model
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.errors import ConfigError
from frpo_nemo.training import start_record
from frpo_nemo.training.checks.config import validate_frpo

NAME = "some-org/some-model"
OPTIONS = [
    "run_dir=run",
    "data.train=[{path: prompts.jsonl}]",
    "reward.right.target=length",
    "reward.right.args.max=9",
]
OPTIONS += ["model=tiny_fp32", "objective=grpo", "optim.lr=1e-3", "data.max_prompt_tokens=64", "trainer.max_steps=3"]
OPTIONS += ["rollout.prompts_per_step=4", "rollout.max_response_tokens=8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(make_tiny(tmp_path_factory.mktemp("model") / "llama", "llama"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Return an empty Hugging Face cache, in a place without the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def download(cache: Path, model: Path, name: str = NAME, commit: str = "0" * 40, **changed: str) -> Path:
    """Return what a download of `name` leaves: each file is a link to its content, which commits share. The newest is main."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for directory in (repository / "refs", repository / "blobs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        blob = repository / "blobs" / f"{file.name}-{changed.get(file.stem, 'original')}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_a_directory_is_itself(tmp_path):
    assert local_model(str(tmp_path), download=True) == str(tmp_path)


def test_a_file_is_to_be_converted_first(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=f"convert.py input={tmp_path}/model.gguf out=DIR makes of a GGUF file"):
        local_model(str(tmp_path / "model.gguf"), download=True)


def test_a_hub_name_is_its_directory_in_the_cache(cache, model):
    snapshot = download(cache, model)
    assert local_model(NAME, download=False) == str(snapshot)


def test_what_is_neither_gives_one_sentence(cache):
    with pytest.raises(ConfigError) as error:
        local_model("some-org/another-model", download=False)
    assert "model.path=some-org/another-model" in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def a_run(cache, model, tmp_path, monkeypatch) -> Path:
    """Return the directory of a run by hub name that died after its second step; and the snapshot that it began with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    Path("prompts.jsonl").write_text('{"prompt": "1+1?"}\n{"prompt": "2+2?"}\n')
    snapshot, run_dir = download(cache, model), Path("run")
    cfg = load(FRPORun, compose("frpo", [*OPTIONS, f"model.path={NAME}"]))
    run_dir.mkdir()
    OmegaConf.save(OmegaConf.structured(cfg), run_dir / "config.yaml")
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    start_record.add_start(
        run_dir,
        model=str(snapshot),
        world_size=1,
        data={},
        moment="2026-01-02T03:04:05",
        resume="auto",
        resumed_from=None,
    )
    return snapshot


def start_again(monkeypatch, capsys, path: str) -> str:
    """Return what the command says of its configuration."""
    monkeypatch.setattr(sys, "argv", ["frpo.py", "--check", *OPTIONS, f"model.path={path}"])
    try:
        main(None, FRPORun, "frpo", validate_frpo)
    except SystemExit as end:
        assert end.code == 2
    return "".join(capsys.readouterr())


RIGHT = "configuration OK for"


def test_a_run_by_hub_name_can_be_resumed(a_run, monkeypatch, capsys):
    assert RIGHT in start_again(monkeypatch, capsys, NAME)
    assert RIGHT in start_again(monkeypatch, capsys, str(a_run))


def test_another_hub_name_is_another_run(a_run, cache, model, monkeypatch, capsys):
    download(cache, model, "some-org/other-model")
    assert f"(was {NAME})" in start_again(monkeypatch, capsys, "some-org/other-model")


def test_a_newer_commit_with_the_same_files_is_the_same_model(a_run, cache, model, monkeypatch, capsys):
    newer = download(cache, model, commit="1" * 40)
    (newer / "README.md").write_text("More words.")
    assert RIGHT in start_again(monkeypatch, capsys, NAME)


def test_a_newer_commit_with_other_files_is_refused_and_the_former_is_named(a_run, cache, model, monkeypatch, capsys):
    download(cache, model, commit="1" * 40, tokenizer_config="newer")
    said = start_again(monkeypatch, capsys, NAME)
    assert f"model.path={NAME} has changed since the run in run_dir=run began" in said
    assert f"set model.path={a_run} to continue that run" in said
    assert RIGHT in start_again(monkeypatch, capsys, str(a_run))
