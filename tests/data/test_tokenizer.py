"""A tokenizer is what its tokenizer.json says, whatever class transformers takes for the model's family."""

from __future__ import annotations

import json
import shutil
from itertools import product

import pytest
from published_tokenizers import tokenizer_files
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from frpo_nemo.data.tokenizer import SAMPLE, check_read_alike, load_tokenizer
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import train_tokenizer


def model_directory(path, package: str | None, family: str, vocab_size: int = 200_000, **settings) -> str:
    """Write tokenizer files like those of a model of `family`. package: None for a byte-level tokenizer trained here."""
    if package:
        shutil.copytree(tokenizer_files(package), path, dirs_exist_ok=True)
    else:
        train_tokenizer(["def f(x): return 12.5", "Two words"], 300).save_pretrained(path)
    file = path / "tokenizer_config.json"
    merged = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    (path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": vocab_size}))
    return str(path)


# Every class for a small file and the hardest for the large ones, each of which takes seconds to read.
CLASSES = [*product(["llama", "qwen2"], [None, "LlamaTokenizerFast", "PreTrainedTokenizerFast"])]
PUBLISHED = ["llama3_1", "qwen3", "deepseek_v3", "gptoss", "gemma3"]


@pytest.mark.parametrize(
    ("package", "family", "named"),
    [(None, *of_class) for of_class in CLASSES] + [(name, "llama", "LlamaTokenizerFast") for name in PUBLISHED],
)
def test_ids_are_those_of_the_file(tmp_path, package, family, named):
    path = model_directory(tmp_path, package, family, **({"tokenizer_class": named} if named else {}))
    tokenizer, file = load_tokenizer(path), Tokenizer.from_file(f"{path}/tokenizer.json")
    ids = file.encode(SAMPLE, add_special_tokens=False).ids
    assert tokenizer.encode(SAMPLE, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == SAMPLE
    assert len(tokenizer) <= max(file.get_vocab().values()) + 1, "no token was added"


def test_what_programs_around_would_read_otherwise_is_a_sentence(tmp_path):
    path = model_directory(tmp_path, None, "llama", tokenizer_class="LlamaTokenizerFast")
    theirs = AutoTokenizer.from_pretrained(path).encode(SAMPLE, add_special_tokens=False)
    assert theirs != load_tokenizer(path).encode(SAMPLE, add_special_tokens=False), "transformers reads the file now"
    with pytest.raises(ConfigError, match="is read as a LlamaTokenizer by transformers, which gives other token ids"):
        check_read_alike(path)
    check_read_alike(model_directory(tmp_path, None, "llama", tokenizer_class="PreTrainedTokenizerFast"))
    with pytest.raises(ConfigError, match="vocab_size=30 of .* has no row for it"):
        check_read_alike(model_directory(tmp_path, None, "llama", 30, tokenizer_class="PreTrainedTokenizerFast"))


def test_an_eos_that_only_the_family_knows_is_taken_if_it_is_a_token(tmp_path):
    path = model_directory(tmp_path, None, "qwen2", tokenizer_class="Qwen2Tokenizer", eos_token=None)
    assert load_tokenizer(path).eos_token == "<|endoftext|>"
    path = model_directory(tmp_path, None, "llama", tokenizer_class="LlamaTokenizer", eos_token=None)
    assert load_tokenizer(path).eos_token is None, "</s> is no token of this vocabulary"
