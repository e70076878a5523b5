"""What supervised training sees: the prompt exactly as a sampler gets it, then the completion and one EOS."""

import json
from pathlib import Path

import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.prompts import load_prompts
from frpo_nemo.data.sft import load_examples
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import train_tokenizer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS = [{"q": "Count to " + "four, " * i, "a": "one, two" + ", three" * i} for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text for row in ROWS for text in row.values()], 320)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return SourceConfig(path=str(tmp_path / "rows.jsonl"), prompt="q", completion="a")


def load(source, tokenizer, max_prompt_tokens=100, max_tokens=200):
    return load_examples([source], tokenizer, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens)


def test_prompt_ids_are_those_of_sampling_and_completions_end_in_one_eos(source, tokenizer):
    examples = load(source, tokenizer)
    prompts = load_prompts([source], tokenizer, max_prompt_tokens=100)
    for (prompt, completion), sampled, row in zip(examples.batch.unpack(), prompts.examples, ROWS, strict=True):
        assert prompt == sampled.prompt_ids
        assert prompt.count(tokenizer.bos_token_id) == 1 and tokenizer.bos_token_id not in completion
        assert completion == tokenizer.encode(row["a"], add_special_tokens=False) + [tokenizer.eos_token_id]


def test_prompt_and_completion_together_are_the_templates_conversation(source, tokenizer):
    for (prompt, completion), row in zip(load(source, tokenizer).batch.unpack(), ROWS, strict=True):
        messages = [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(prompt + completion) == whole.rstrip("\n")


def test_a_completion_that_ends_in_eos_gets_no_second(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "x", "a": "y<|endoftext|>"}))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), prompt="q", completion="a")
    ((_, completion),) = load(source, tokenizer).batch.unpack()
    assert completion.count(tokenizer.eos_token_id) == 1


def test_longer_examples_are_dropped_and_counted(source, tokenizer):
    lengths = load(source, tokenizer).batch.lengths
    assert len(lengths.unique()) == 5
    some = load(source, tokenizer, max_tokens=int(lengths.sort().values[2]))
    assert (len(some), some.dropped) == (3, 2)
    with pytest.raises(ConfigError, match="all 5 examples are longer than max_prompt_tokens=1 or max_tokens=200"):
        load(source, tokenizer, max_prompt_tokens=1)


def test_examples_without_completion_are_a_sentence(source, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="names no completion column"):
        load(SourceConfig(path=source.path, prompt="q"), tokenizer)
    (tmp_path / "none.jsonl").write_text(json.dumps({"q": "x", "a": 3}))
    with pytest.raises(ConfigError, match="column 'a': a completion is a string, not '3'"):
        load(SourceConfig(path=str(tmp_path / "none.jsonl"), prompt="q", completion="a"), tokenizer)


def test_gsm8k_becomes_examples_with_a_tokenizer_of_its_own():
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not there")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()[:500]]
    tokenizer = train_tokenizer([row[c] for row in rows for c in row], 1024)
    source = SourceConfig(path=str(GSM8K), prompt="question", completion="answer", limit=500)
    examples = load(source, tokenizer, max_prompt_tokens=300, max_tokens=500)
    assert len(tokenizer) == 1024 and len(examples) + examples.dropped == 500 and len(examples) > 450
    prompt, completion = examples.batch.unpack()[0]
    assert tokenizer.decode(completion) == rows[0]["answer"] + "<|endoftext|>"
    assert rows[0]["question"] in tokenizer.decode(prompt)


@pytest.mark.parametrize(
    "text, name", [("q,a\nx,\ny,z\n", "rows.csv"), ('{"q": "x"}\n{"q": "y", "a": "z"}\n', "rows.jsonl")]
)
def test_a_row_without_an_answer_is_dropped_as_one_with_an_empty_answer_is(text, name, tmp_path, tokenizer):
    (tmp_path / name).write_text(text)
    for completion in ("a", "{a}"):
        examples = load(SourceConfig(path=str(tmp_path / name), prompt="q", completion=completion), tokenizer)
        assert (len(examples), examples.dropped) == (1, 1)


def test_completions_end_where_they_are_cut_off_and_an_empty_one_is_dropped(tmp_path, tokenizer):
    rows = [{"q": "x", "a": "one\n#### 1"}, {"q": "y", "a": " \n"}, {"q": "z", "a": "#### 3"}, {"q": "w", "a": "two"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"path": str(tmp_path / "rows.jsonl"), "prompt": "q", "completion": "a"}
    examples = load(SourceConfig(**fields, completion_until="####"), tokenizer)
    assert [tokenizer.decode(c) for _, c in examples.batch.unpack()] == ["one<|endoftext|>", "two<|endoftext|>"]
    assert (len(examples), examples.dropped) == (2, 2)
    with pytest.raises(ConfigError, match="none of 4 completions has completion_until='Answer:'"):
        load(SourceConfig(**fields, completion_until="Answer:"), tokenizer)
    with pytest.raises(ConfigError, match="all 1 completions are empty"):
        load(SourceConfig(**fields, start=1, limit=1), tokenizer)
