"""Models made on the spot are ordinary Hugging Face checkpoints, decided by their seed."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import FAMILIES, new_model, train_tokenizer
from frpo_nemo.examples.toy import toy_tokenizer

SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_hidden_size": 96}


TEXT = "the naïve cat\n  costs 1234 €"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_its_tokenizer(family, tmp_path):
    trained = train_tokenizer(["the cat and the hat"] * 10, 280)
    new_model(tmp_path, family=family, tokenizer=trained, tie=True, **SIZES)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.model_type == family and model.dtype == torch.float32
    assert model.config.eos_token_id == tokenizer.eos_token_id == trained.eos_token_id
    messages = [{"role": "user", "content": TEXT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == f"<|bos|><|user|>\n{TEXT}\n<|assistant|>\n"
    assert ids == trained.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert model(torch.tensor([ids])).logits.shape == (1, len(ids), len(trained))


def test_a_reward_model_gives_one_number_and_another_head_is_refused(tmp_path):
    new_model(tmp_path, tokenizer=toy_tokenizer(), head="reward", **SIZES)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model(torch.tensor([[4, 2, 1]])).logits.shape == (1, 1)
    with pytest.raises(ConfigError, match="head=value must be one of lm, reward"):
        new_model(tmp_path, tokenizer=toy_tokenizer(), head="value", **SIZES)


def test_a_tokenizer_that_transformers_would_replace_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="loads the tokenizer of a qwen2 model as Qwen2Tokenizer"):
        new_model(tmp_path, family="qwen2", tokenizer=toy_tokenizer(), **SIZES)
    new_model(tmp_path, family="qwen3", tokenizer=toy_tokenizer(), **SIZES)
    assert AutoTokenizer.from_pretrained(tmp_path).decode([0, 4, 2, 1]) == "<bos> CHAT <sep> <eos>"


def test_the_seed_decides_the_weights_and_nothing_else_is_disturbed(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        new_model(tmp_path / name, tokenizer=toy_tokenizer(), seed=seed, **SIZES)
    assert torch.rand(1) == expected
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_trained_tokenizer_writes_any_text_back_and_splits_numbers_into_digits():
    tokenizer = train_tokenizer(["the cat and the hat"] * 10, 280)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert len(tokenizer.encode("1234")) == 4
    assert len(tokenizer.encode("the")) == 1
    with pytest.raises(ConfigError, match="vocab_size=100 is too small"):
        train_tokenizer(["a"], 100)


def test_sizes_that_do_not_divide_are_sentences(tmp_path):
    with pytest.raises(ConfigError, match="num_kv_heads=2 must divide"):
        new_model(tmp_path, tokenizer=toy_tokenizer(), **SIZES | {"num_heads": 1, "num_kv_heads": 2})
    with pytest.raises(ConfigError, match="family=gpt2"):
        new_model(tmp_path, tokenizer=toy_tokenizer(), family="gpt2", **SIZES)


def test_the_recipe(tmp_path, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["new_model.py", f"out={tmp_path}", "source=toy", *arguments])
        runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "new_model.py"), run_name="__main__")

    run("hidden_size=64", "num_layers=1", "num_heads=2")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(toy_tokenizer())
    with pytest.raises(SystemExit, match="hidden"):
        run("hidden=64")
