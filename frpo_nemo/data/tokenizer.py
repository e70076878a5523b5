"""Load a model's tokenizer exactly as its files define it.

transformers chooses a class by the model's family or by tokenizer_config.json, and some of these classes build their own
normaliser and pre-tokenizer instead of reading tokenizer.json: the ids differ, without a message. The class loaded here
reads that file as it stands.
"""

from __future__ import annotations

import json
from pathlib import Path

from frpo_nemo.errors import ConfigError

SAMPLE = "The café sold 12.5% of 3,000 rolls:\n\n  def f(x):\treturn {'x': x**2}  # 中文, ¿qué?\n"


def load_tokenizer(model: str, revision: str | None = None):
    """Return the tokenizer of a directory or hub name. Raises what transformers raises for missing files (OSError,
    ValueError)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    file = cached_file(model, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, revision=revision, trust_remote_code=False)
    if tokenizer.eos_token is None:  # not in the files: a family's default may be in this vocabulary
        family = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        for name in ("eos_token", "bos_token", "pad_token"):
            token = getattr(family, name)
            if getattr(tokenizer, name) is None and token in tokenizer.get_vocab():
                setattr(tokenizer, name, token)
    return tokenizer


def check_read_alike(model: str) -> None:
    """Raise ConfigError when programs that load the tokenizer of the directory `model` by transformers' AutoTokenizer, as
    vLLM and lm-eval do, get other ids than its tokenizer.json gives, or ids for which the model has no rows."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(model, trust_remote_code=False), load_tokenizer(model)
    ids = ours.encode(SAMPLE, add_special_tokens=False)
    if theirs.encode(SAMPLE, add_special_tokens=False) != ids:
        raise ConfigError(
            f"the tokenizer of '{model}' is read as a {type(theirs).__name__} by transformers, which gives other token "
            'ids than its tokenizer.json: set "tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json, '
            "and check that model_type in config.json is the model's own"
        )
    config = json.loads(Path(model, "config.json").read_text())
    vocab_size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if vocab_size:
        chat = [{"role": "user", "content": SAMPLE}]
        text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) if ours.chat_template else ""
        ids = [*ids, *ours.encode(text, add_special_tokens=False), *filter(None, [ours.eos_token_id])]
        check_ids([ids], ours, vocab_size, "a question to this model")


def check_ids(sequences: list[list[int]], tokenizer, vocab_size: int, where: str) -> None:
    """Raise ConfigError when a token id lies beyond the model's vocabulary: its embedding would be zeros, or another
    token's."""
    for ids in sequences:
        if ids and max(ids) >= vocab_size:
            beyond = max(ids)
            raise ConfigError(
                f"{where}: token {tokenizer.convert_ids_to_tokens(beyond)!r} has id {beyond}, and "
                f"vocab_size={vocab_size} of '{tokenizer.name_or_path}' has no row for it: the tokenizer has tokens that "
                "the model was not resized for; use the model's own tokenizer, or resize_token_embeddings of transformers"
            )
