"""Whether W&B would find a key is asked before anything loads; of W&B itself, without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789" * 4
NETRC = "machine {}\n  login user\n  password " + KEY + "\n"


@pytest.fixture
def asked(tmp_path):
    """Return a function: environment variables -> the check's report on logging.wandb_project=mine in a new home."""
    script = (
        "from frpo_nemo.config.options import LoggingConfig\n"
        "from frpo_nemo.training.checks.logging import check_logging\n"
        "try: check_logging(LoggingConfig(wandb_project='mine'))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}

    def ask(**environment: str) -> str:
        home = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        options = dict(env=clean | home | environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return subprocess.run([sys.executable, "-c", script], **options).stdout.strip()

    return ask


def test_no_key_is_one_sentence(asked):
    assert asked() == (
        "ConfigError logging.wandb_project=mine: W&B finds no API key here; run `wandb login`, set WANDB_API_KEY, or log "
        "without a network by WANDB_MODE=offline."
    )


def test_a_key_is_found_in_the_environment(asked):
    assert asked(WANDB_API_KEY=KEY) == ""


def test_a_key_is_found_where_wandb_login_leaves_it(asked, tmp_path):
    (tmp_path / ".netrc").write_text(NETRC.format("api.wandb.ai"))
    (tmp_path / ".netrc").chmod(0o600)
    assert asked() == ""


def test_a_key_for_another_server_does_not_count(asked, tmp_path):
    (tmp_path / ".netrc").write_text(NETRC.format("example.com"))
    (tmp_path / ".netrc").chmod(0o600)
    assert asked().startswith("ConfigError logging.wandb_project=mine")


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_network_no_key_is_needed(asked, mode):
    assert asked(WANDB_MODE=mode) == ""


def test_the_settings_of_a_directory_count(asked, tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert asked() == ""
