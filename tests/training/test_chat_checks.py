"""What ends a response, what rewards read of it, and what --check says of a run's conversations."""

from __future__ import annotations

import json

import pytest
from tiny_models import make_tiny
from transformers import AutoTokenizer, GenerationConfig

from frpo_nemo.config.options import FRPORun, ModelConfig, SFTRun, SourceConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import train_tokenizer
from frpo_nemo.rollout.chat import load_chat, stop_token_ids
from frpo_nemo.rollout.worker import response_texts
from frpo_nemo.training.checks.chat import check_conversations

QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["The answer is 6."], 300)
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|eom_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = QWEN
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("chat") / "model", "llama", layers=1)


def test_a_response_ends_in_eos_the_templates_end_of_turn_and_what_is_named(tokenizer, tmp_path):
    ids = tokenizer.convert_tokens_to_ids
    assert stop_token_ids(str(tmp_path), tokenizer) == sorted(ids(["<|endoftext|>", "<|im_end|>"]))
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(tmp_path)
    assert stop_token_ids(str(tmp_path), tokenizer, ["<|eom_id|>"]) == sorted(
        [7, 9, *ids(["<|endoftext|>", "<|im_end|>", "<|eom_id|>"])]
    )
    with pytest.raises(ConfigError, match="rollout.stop_tokens names '<stop>', which isn't a token of .* but 6 tokens"):
        stop_token_ids(str(tmp_path), tokenizer, ["<stop>"])


def test_rewards_read_everything_but_the_token_that_ended_the_response(tokenizer):
    stops = stop_token_ids("nowhere", tokenizer)
    written = ["<think>so</think>The answer is 6 .<|im_end|>", "cut off <|eom_id|> here", "<|im_end|>", ""]
    responses = [tokenizer.encode(text, add_special_tokens=False) for text in written]
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's files ask for
    assert response_texts(responses, tokenizer, stops) == [
        "<think>so</think>The answer is 6 .",
        "cut off <|eom_id|> here",
        "",
        "",
    ]


def write(path, *rows) -> SourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig(path=str(path))


def configured(schema, model: str, source: SourceConfig):
    cfg = schema()
    cfg.model = ModelConfig(path=model)
    cfg.data.train = [source]
    return cfg


@pytest.mark.parametrize("late", [{"prompt": None}, {"prompt": [{"role": "user", "content": None}]}])
def test_the_check_reads_every_row_as_the_run_will(model, tmp_path, late):
    arch = object()  # any: the model is on disk
    good = [{"prompt": [{"role": "user", "content": "Hi"}]}] * 300
    check_conversations(configured(FRPORun, model, write(tmp_path / "good.jsonl", *good)), arch)
    with pytest.raises(ConfigError, match="^data.train.0: data source"):
        check_conversations(configured(FRPORun, model, write(tmp_path / "late.jsonl", *good, late)), arch)


@pytest.mark.parametrize("schema", [FRPORun, SFTRun])
def test_the_check_reads_a_file_that_is_streamed_as_well(model, tmp_path, schema):
    source = write(tmp_path / "rows.jsonl", {"prompt": "Hi", "answer": "Ho"}, {"prompt": None, "answer": "Ho"})
    source.completion, source.streaming, source.limit = "answer", True, 1
    check_conversations(configured(schema, model, source), object())
    source.limit = 2
    with pytest.raises(ConfigError, match="^data.train.0: data source .* a prompt is a string or a list"):
        check_conversations(configured(schema, model, source), object())


def test_tokens_that_the_model_has_no_rows_for_are_refused_by_the_check(tmp_path):
    path = make_tiny(tmp_path / "model", "llama", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([f"<|extra_{i}|>" for i in range(40)], special_tokens=True)
    tokenizer.save_pretrained(path)
    assert load_chat(ModelConfig(path=path)).vocab_size == 131 < len(tokenizer)
    fine = write(tmp_path / "fine.jsonl", {"prompt": "<|extra_0|> Hi", "answer": "no"})
    beyond = write(tmp_path / "beyond.jsonl", {"prompt": "Hi", "answer": "<|extra_39|>"})
    for source in (fine, beyond):
        source.completion = "answer"
    check_conversations(configured(SFTRun, path, fine), object())
    check_conversations(configured(FRPORun, path, beyond), object())
    with pytest.raises(ConfigError, match=r"data.train.0: .*token '<\|extra_39\|>' has id 142, and vocab_size=131"):
        check_conversations(configured(SFTRun, path, beyond), object())
    cfg = configured(FRPORun, path, fine)
    cfg.rollout.stop_tokens = ["<|extra_38|>"]
    with pytest.raises(ConfigError, match=r"the tokens that end a response: token '<\|extra_38\|>' has id 141"):
        check_conversations(cfg, object())


def test_an_unknown_template_argument_is_refused_by_the_check(model, tmp_path):
    cfg = configured(FRPORun, model, write(tmp_path / "rows.jsonl", {"prompt": "Hi"}))
    cfg.model.chat_template_args = {"enable_thinking": False}
    with pytest.raises(
        ConfigError, match="model.chat_template_args.enable_thinking: the chat template of .* never reads"
    ):
        check_conversations(cfg, object())
