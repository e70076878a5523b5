"""What reward models have in common, wherever they run: their files, checked before any weights are read, and how prompts
and responses become token ids. Token ids are made here and sent to servers as such, so local and remote see the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.call import Failure
from frpo_nemo.rewards.local import LocalModel, LocalWeights
from frpo_nemo.rewards.remote import RemoteServer


class ModelFiles:
    """The config and tokenizer of a directory or hub name, and where the model runs."""

    def __init__(self, model: str, revision: str | None, head: str, *, local: dict | None, remote: dict | None) -> None:
        """head: ForCausalLM or ForSequenceClassification. local, remote: arguments of LocalModel and RemoteServer; it is
        remote if there is a remote.url. Raises ConfigError."""
        from transformers import AutoTokenizer

        self.model = model
        with _sentences(model):
            self.config = _read_config(model, revision)
            self.tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        found = _head(self.config)
        if not found.endswith(head):
            raise ConfigError(f"model={model} has the wrong head: {found}, where one {head} is needed")
        self.host = _host(model, revision, head, local or {}, remote or {})

    @property
    def longest(self) -> int:
        """Tokens that the model takes."""
        own = self.config.get_text_config()
        return min(getattr(own, "max_position_embeddings", 1 << 31), self.tokenizer.model_max_length)

    def load(self) -> None:
        """Read the weights of a local model."""
        if isinstance(self.host, LocalModel):
            self.host.load()

    def local_weights(self) -> list[LocalWeights]:
        """Of the model, if it is local."""
        return [self.host.weights(self.config)] if isinstance(self.host, LocalModel) else []

    def chat_ids(self, messages: list[dict[str, str]], *, add_generation_prompt: bool, suffix: str = "") -> list[int]:
        """Messages through the model's chat template, which ConfigError says there is (`require_chat_template`)."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return self.tokenizer(text + suffix, add_special_tokens=False)["input_ids"]

    def require_chat_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of model={self.model} has no chat template, and one is needed")

    def score(
        self, sequences: list[list[int]], longest: int, score: Callable[[list[list[int]]], list[Any]]
    ) -> list[Any]:
        """`score` of the sequences of at most `longest` tokens; a Failure for each of the others, which are not cut."""
        fitting = [ids for ids in sequences if len(ids) <= longest]
        scores = iter(score(fitting) if fitting else [])
        return [next(scores) if len(ids) <= longest else _too_long(ids, longest, self.model) for ids in sequences]


def read_head(model: str, revision: str | None) -> str:
    """The class of a model, such as LlamaForCausalLM, from its config.json. Raises ConfigError."""
    with _sentences(model):
        return _head(_read_config(model, revision))


def as_messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt, a string or chat messages, as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def conversation(prompt: Any, response: str) -> list[dict[str, str]]:
    """Prompt and response as chat messages."""
    return [*as_messages(prompt), {"role": "assistant", "content": response}]


def _host(
    model: str, revision: str | None, head: str, local: dict[str, Any], remote: dict[str, Any]
) -> LocalModel | RemoteServer:
    if remote.get("url"):
        return RemoteServer(model, **remote)
    return LocalModel(f"AutoModel{head}", model, revision, **local)


def _read_config(model: str, revision: str | None):
    """Of its base model, if it is a LoRA adapter."""
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file, is_peft_available

    adapter = find_adapter_config_file(model, revision=revision)
    if adapter:
        if not is_peft_available():
            raise ValueError("it is a LoRA adapter, which needs peft: pip install peft, or merge it")
        model, revision = json.loads(Path(adapter).read_text())["base_model_name_or_path"], None
    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)


def _head(config) -> str:
    return (config.architectures or ["no head"])[0]


@contextlib.contextmanager
def _sentences(model: str) -> Iterator[None]:
    """What transformers says about missing or strange files, as a ConfigError."""
    try:
        yield
    except (OSError, ValueError) as problem:
        first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise ConfigError(f"model={model} cannot be read: {first_line}") from problem


def _too_long(ids: list[int], longest: int, model: str) -> Failure:
    return Failure("error", f"{len(ids)} tokens of prompt and response, and model={model} takes {longest}")
