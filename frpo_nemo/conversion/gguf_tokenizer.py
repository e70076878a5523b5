"""The tokenizer and the generation configuration of a GGUF file, in Hugging Face format.

A GGUF file has the vocabulary, merges and kinds of tokens, but only a name for how text is cut into words before the merges.
transformers reads such files too, but with differences that change token ids. It cuts numbers otherwise (smollm), doesn't
keep a word whole that is a token (Llama 3), and loses special tokens with characters beyond the byte alphabet (DeepSeek). So
the tokenizer is built here, and an unknown name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo_nemo.errors import ConfigError

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class Words:
    """How a byte-level tokenizer cuts text into words. split: key of transformers' table of regular expressions; None:
    GPT-2's. digits: every digit is a word. nfc: text is first converted to Unicode's NFC. whole: a word that is a token stays
    that token, whatever the merges would make of it. bos: a text begins with BOS unless the file says otherwise."""

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


WORDS = {  # tokenizer.ggml.pre
    "gpt-2": Words(),
    "smollm": Words(digits=True),
    "llama-bpe": Words("llama-bpe", whole=True, bos=True),
    "llama3": Words("llama-bpe", whole=True, bos=True),
    "tekken": Words("tekken", whole=True, bos=True),
    "qwen2": Words("qwen2", nfc=True),
    "deepseek-r1-qwen": Words("qwen2"),
}


def check_tokenizer(fields: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError when the tokenizer in the metadata `fields` of the file `path` is not known here."""
    kind, name = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise ConfigError(
            f"{path} has a tokenizer of kind {kind!r} (tokenizer.ggml.model); supported are {BYTE_LEVEL!r} (byte-level BPE) "
            f"and {SENTENCEPIECE!r} (SentencePiece's BPE)."
        )
    needed = ("tokens", "merges" if kind == BYTE_LEVEL else "scores")
    if missing := [f"tokenizer.ggml.{key}" for key in needed if f"tokenizer.ggml.{key}" not in fields]:
        raise ConfigError(f"{path} has no {' and no '.join(missing)}, which a tokenizer needs.")
    size = len(fields["tokenizer.ggml.tokens"])
    for key, value in fields.items():
        if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key) and not 0 <= value < size:
            raise ConfigError(f"{path} has {key}={value}, but only {size} tokens.")
    if kind == BYTE_LEVEL and name not in WORDS:
        raise ConfigError(
            f"{path} cuts text into words by {name!r} (tokenizer.ggml.pre); known are {', '.join(WORDS)}, and another way "
            "would give other tokens than the model learned."
        )


def build_tokenizer(fields: Mapping[str, Any]):
    """Return the tokenizer, with its chat template, from metadata that `check_tokenizer` has accepted."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    tokens = own["tokens"]
    backend = _byte_level(own) if own["model"] == BYTE_LEVEL else _sentencepiece(own)
    for token, kind in zip(tokens, own.get("token_type", ()), strict=False):
        if kind in (_UNKNOWN, _CONTROL):
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: own.get(f"{key}_token_id") for name, key in named.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: None if token_id is None else tokens[token_id] for name, token_id in ids.items()},
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def generation_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of generation_config.json: all tokens that end a turn, of which a file may name several."""
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "padding", "eos", "eot", "eom")}
    ends = sorted({ids[name] for name in ("eos", "eot", "eom")} - {None})
    return {"bos_token_id": ids["bos"], "eos_token_id": ends, "pad_token_id": ids["padding"]}


def _byte_level(own: Mapping[str, Any]):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    words = WORDS[own["pre"]]
    merges = [tuple(merge.split(" ")) for merge in own["merges"]]
    backend = Tokenizer(models.BPE(vocab=_vocabulary(own), merges=merges, ignore_merges=words.whole))
    if words.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if words.digits else []
    if words.split:
        steps.append(pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[words.split]), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    _add_bos(backend, own, by_default=words.bos)
    return backend


def _sentencepiece(own: Mapping[str, Any]):
    """Build a tokenizer like Llama 2's: a space precedes every text, and decoding removes it again."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    vocabulary, unknown = _vocabulary(own), own.get("unknown_token_id")
    merges = generate_merges(vocabulary, dict(zip(own["tokens"], own["scores"], strict=True)))
    unk_token = None if unknown is None else own["tokens"][unknown]
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    space, prefixed = "▁", own.get("add_space_prefix", True)
    prepend = [normalizers.Prepend(space)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", space)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_bos(backend, own, by_default=True)
    return backend


def _vocabulary(own: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(own["tokens"])}


def _add_bos(backend, own: Mapping[str, Any], *, by_default: bool) -> None:
    """Make a text that isn't a conversation begin with BOS, where the file says so."""
    from tokenizers import processors

    bos = own.get("bos_token_id")
    if bos is None or not own.get("add_bos_token", by_default):
        return
    token = own["tokens"][bos]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, bos)]
    )
