"""What all reward models share, wherever they run: their files, which are checked before any weights are read, and the
encoding of prompts and responses. Servers receive the token ids made here, so local and remote models see the same.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from frpo_nemo.data.chat import Chat
from frpo_nemo.data.tokenizer import load_tokenizer
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.local import LocalModel, LocalWeights
from frpo_nemo.rewards.models.remote import RemoteServer
from frpo_nemo.rewards.registry import Failure

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class ModelFiles:
    """The config and tokenizer of a directory or hub name, and where the model runs."""

    def __init__(self, model: str, revision: str | None, head: str, *, local: dict | None, remote: dict | None) -> None:
        """head: ForCausalLM or ForSequenceClassification. local, remote: arguments of LocalModel and RemoteServer; the
        model is remote if there is a remote.url. Raises ConfigError."""
        self.model = model
        with _sentences(model):
            base, base_revision, adapter = _base(model, revision)
            self.config = _read_config(base, base_revision)
            self.tokenizer = load_tokenizer(model, revision)
        self._chat = Chat(self.tokenizer)
        found = _head(self.config)
        if not found.endswith(head):
            raise ConfigError(f"model={model} has the wrong head: {found}; this reward needs a {head}")
        self.host = _host(model, revision, head, local or {}, remote or {})
        if isinstance(self.host, LocalModel):
            with _sentences(model):
                _require_loadable(base, base_revision, adapter)

    @property
    def longest(self) -> int:
        """Return the largest number of tokens that the model accepts."""
        own = self.config.get_text_config()
        return min(getattr(own, "max_position_embeddings", None) or 1 << 31, self.tokenizer.model_max_length)

    def load(self) -> None:
        """Read the weights of a local model."""
        if isinstance(self.host, LocalModel):
            self.host.load()

    def local_weights(self) -> list[LocalWeights]:
        """Return the model, if it is local."""
        return [self.host.weights(self.config)] if isinstance(self.host, LocalModel) else []

    def chat_ids(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, suffix: str = ""
    ) -> list[int] | Failure:
        """Encode messages with the model's chat template, which `require_chat_template` has checked. Returns a Failure if
        the template refuses them, as many refuse a system message, or leaves one out."""
        try:
            text = self._chat.render(messages, "a conversation to score", prompt=add_generation_prompt)
        except Exception as problem:  # noqa: BLE001 - a template is the model's own program
            return Failure("error", str(problem))
        return self.tokenizer(text + suffix, add_special_tokens=False)["input_ids"]

    def require_chat_template(self) -> None:
        if not self.tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of model={self.model} has no chat template, and one is needed")

    def score(
        self, sequences: list[list[int] | Failure], longest: int, score: Callable[[list[list[int]]], list[Any]]
    ) -> list[Any]:
        """Apply `score` to the sequences of at most `longest` tokens. A longer one is a Failure, never cut; those that are
        failures already stay as they are."""
        checked = [_checked(ids, longest, self.model) for ids in sequences]
        fitting = [ids for ids in checked if not isinstance(ids, Failure)]
        scores = iter(score(fitting) if fitting else [])
        return [ids if isinstance(ids, Failure) else next(scores) for ids in checked]


def read_head(model: str, revision: str | None) -> str:
    """Return the class of a model, such as LlamaForCausalLM, from its config.json. Raises ConfigError."""
    with _sentences(model):
        base, base_revision, _ = _base(model, revision)
        return _head(_read_config(base, base_revision))


def as_messages(prompt: Any) -> list[dict[str, str]]:
    """Return a prompt, a string or chat messages, as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def conversation(prompt: Any, response: str) -> list[dict[str, str]]:
    """Return prompt and response as chat messages."""
    return [*as_messages(prompt), {"role": "assistant", "content": response}]


def _host(
    model: str, revision: str | None, head: str, local: dict[str, Any], remote: dict[str, Any]
) -> LocalModel | RemoteServer:
    if remote.get("url"):
        return RemoteServer(model, **remote)
    return LocalModel(f"AutoModel{head}", model, revision, **local)


def _base(model: str, revision: str | None) -> tuple[str, str | None, dict[str, Any] | None]:
    """Return the base model, its revision and the adapter's settings, if this is a LoRA adapter; else the model and None."""
    from transformers.utils import find_adapter_config_file

    found = find_adapter_config_file(model, revision=revision)
    if not found:
        return model, revision, None
    adapter = json.loads(Path(found).read_text())
    return adapter["base_model_name_or_path"], None, adapter


def _read_config(model: str, revision: str | None):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)


def _require_loadable(model: str, revision: str | None, adapter: dict[str, Any] | None) -> None:
    """Raise now what reading the weights would raise minutes later. model: itself or, for an `adapter`, its base."""
    from transformers.utils import is_peft_available

    if adapter and not is_peft_available():
        raise ValueError("it is a LoRA adapter, which needs peft: pip install peft, merge it, or serve it (remote.url)")
    if adapter and adapter.get("use_dora"):  # findings/transformers_loses_the_magnitudes_of_dora.sh
        raise ValueError(
            "it is a DoRA adapter (use_dora in adapter_config.json), whose magnitude vectors transformers does not "
            "read: merge it into its base model (merge_and_unload of peft)"
        )
    if not _has(SAFETENSORS, model, revision) and (Path(model).is_dir() or _has(PICKLES, model, revision)):
        raise ValueError(
            f"{model} has no {SAFETENSORS[0]}, and pickled weights are never loaded: convert them with transformers' "
            "save_pretrained, or serve the model (remote.url)"
        )


def _has(names: tuple[str, ...], model: str, revision: str | None) -> bool:
    """Return whether one of these files is in the directory, the cache or, if it can be reached, the hub."""
    import httpx
    from transformers.utils import has_file

    for offline in (True, False):  # the hub isn't asked for what the cache has
        with contextlib.suppress(httpx.HTTPError):
            if any(has_file(model, name, revision=revision, local_files_only=offline) for name in names):
                return True
    return False


def _head(config) -> str:
    return (config.architectures or ["no head"])[0]


@contextlib.contextmanager
def _sentences(model: str) -> Iterator[None]:
    """Raise what transformers reports about missing or unknown files as a ConfigError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, StrictDataclassError) as problem:
        lines = [line.strip() for line in str(problem).splitlines()] or [type(problem).__name__]
        shown = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise ConfigError(f"model={model} cannot be read: {shown}") from problem


def _checked(ids: list[int] | Failure, longest: int, model: str) -> list[int] | Failure:
    if isinstance(ids, Failure) or len(ids) <= longest:
        return ids
    return Failure("error", f"{len(ids)} tokens of prompt and response, and model={model} takes at most {longest}")
