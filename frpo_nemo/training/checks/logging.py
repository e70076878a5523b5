"""Check that a run can log where its configuration asks, before anything loads. Asks no server."""

from __future__ import annotations

import importlib.util

from frpo_nemo.config.options import LoggingConfig
from frpo_nemo.errors import ConfigError

WANDB = "https://api.wandb.ai"  # the entry in ~/.netrc for it also serves W&B's other addresses


def check_logging(logging: LoggingConfig) -> None:
    """Raise ConfigError when the tool is not installed, or when W&B has no key."""
    if logging.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard=true needs TensorBoard, which is not installed: pip install tensorboard, or set it to false."
        )
    if not logging.wandb_project:
        return
    asked = f"logging.wandb_project={logging.wandb_project}"
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"{asked} needs W&B, which is not installed: pip install frpo-nemo[wandb].")
    if not _wandb_can_begin():
        raise ConfigError(
            f"{asked}: W&B finds no API key here; run `wandb login`, set WANDB_API_KEY, or log without a network by "
            "WANDB_MODE=offline."
        )


def _wandb_can_begin() -> bool:
    """Return whether W&B needs no key, or finds one in the environment, in its settings or in ~/.netrc. W&B's own login
    isn't used: it asks the server, and a server that is down for a while isn't an error in the configuration."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    if settings.mode != "online" or settings.identity_token_file or settings.api_key:
        return True
    return any(get_netrc_auth(url) for url in (settings.base_url, WANDB))
