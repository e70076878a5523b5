"""Check conversations: render all rows with the chat template, as the run will read them, so that no run fails on a row
that --check has accepted. Raises ConfigError."""

from __future__ import annotations

from frpo_nemo.config.options import FRPORun, SFTRun, TrainingRun
from frpo_nemo.data.chat import Chat
from frpo_nemo.data.prompts import load_prompts
from frpo_nemo.data.sft import load_examples
from frpo_nemo.data.sources import is_hub_stream
from frpo_nemo.data.tokenizer import check_ids
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.training.checks.data import named_sources

THINK_END = "</think>"


def check_conversations(cfg: TrainingRun, arch: Architecture | None) -> list[str]:
    """Check the tokenizer of `cfg` and every row of its data. Returns a sentence if rewards would read thoughts. arch: None
    where the model is not on disk, because nothing is known of it then. Streams from the hub are left out: their rows are
    read once, by the run."""
    if arch is None:
        return []
    from frpo_nemo.rollout.chat import load_chat, stop_token_ids  # transformers: seconds

    chat, limit = load_chat(cfg.model), cfg.data.max_prompt_tokens
    chat.check()
    stops = stop_token_ids(cfg.model.path, chat, cfg.rollout.stop_tokens)
    check_ids([[token] for token in stops], chat.tokenizer, chat.vocab_size, "the tokens that end a response")
    probe = [(f"probe.prompts.{i}", source) for i, source in enumerate(cfg.probe.prompts if cfg.probe.interval else [])]
    for key, source in named_sources(cfg.data) + probe:
        try:
            if is_hub_stream(source):
                continue
            if isinstance(cfg, SFTRun) and not key.startswith("probe"):
                load_examples([source], chat, max_prompt_tokens=limit, max_tokens=cfg.data.max_tokens)
            else:
                load_prompts([source], chat, max_prompt_tokens=limit)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from error
    return _describe_thoughts(cfg, chat)


def _describe_thoughts(cfg: TrainingRun, chat: Chat) -> list[str]:
    rewarded = isinstance(cfg, FRPORun) or cfg.probe.interval
    thinks = THINK_END in str(chat.tokenizer.chat_template) and chat.template_args.get("enable_thinking") is not False
    if not rewarded or not thinks or cfg.rollout.think_end_token:
        return []
    return [
        f"rollout.think_end_token is not set, and the chat template of {cfg.model.path} knows thoughts: rewards read whole "
        f"responses, thoughts included; with rollout.think_end_token='{THINK_END}' they read what follows the thoughts"
    ]
