"""Load the chat format of a run's model: its tokenizer, template arguments, clock and vocabulary, and its stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from transformers import GenerationConfig

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.data.chat import Chat
from frpo_nemo.data.tokenizer import load_tokenizer
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture


def load_chat(model: ModelConfig, moment: datetime | None = None) -> Chat:
    """Return the Chat of `model`, a directory. moment: the time that a template's clock shows; None: now. Raises
    ConfigError when transformers cannot read the tokenizer."""
    vocab_size = Architecture.from_hf(model.path).vocab_size
    try:
        tokenizer = load_tokenizer(model.path)
    except (OSError, ValueError) as problem:
        raise ConfigError(f"the tokenizer of model.path={model.path} cannot be read: {problem}") from problem
    return Chat(tokenizer, dict(model.chat_template_args), moment or datetime.now(), vocab_size)


def stop_token_ids(model_path: str, tokenizer, more: Sequence[str] = ()) -> list[int]:
    """Return the tokens that end a response: the tokenizer's EOS, the token with which its template ends a turn, those of
    generation_config.json (Llama 3 has several), and the tokens named in `more`. Raises ConfigError for a name that isn't
    a token. tokenizer: may also be a Chat."""
    chat = Chat.of(tokenizer)
    ids = chat.end_tokens if chat.tokenizer.chat_template else {chat.tokenizer.eos_token_id}
    if Path(model_path, "generation_config.json").is_file():
        from_file = GenerationConfig.from_pretrained(model_path).eos_token_id
        ids = ids | set(from_file if isinstance(from_file, list) else [from_file]) - {None}
    return sorted(ids | {_token_id(name, chat) for name in more})


def _token_id(name: str, chat: Chat) -> int:
    vocabulary = chat.tokenizer.get_vocab()
    found = vocabulary.get(name)
    if found is None:
        ids = chat.tokenizer.encode(name, add_special_tokens=False)
        raise ConfigError(
            f"rollout.stop_tokens names {name!r}, which isn't a token of '{chat.tokenizer.name_or_path}' but "
            f"{len(ids)} tokens: {' '.join(map(repr, chat.tokenizer.convert_ids_to_tokens(ids)))}; name single tokens"
        )
    return found
