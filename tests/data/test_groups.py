"""The groups of configs/data on published data: what a fine-tuning run learns from each, and what is refused before
one starts."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import SFTRun
from frpo_nemo.data.sft import load_examples
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import train_tokenizer
from frpo_nemo.training.checks.config import validate_sft

DATA = Path(__file__).parents[3] / "shared" / "data"
RUN = ["run_dir=run", "model.path=some-org/some-model", "optim.lr=1e-5", "data.sequences_per_step=4"]
NO_SYSTEM = "<|system|>\n\n<|user|>\n"  # code has an empty system message, as in the authors' script
MBPP = ["data.train.0.prompt=text", "data.train.0.completion=code", "data.train.0.at_least=null"]


def published(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there")
    text = (DATA / name).read_text()
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    return str(DATA / name), rows


def configured(group, path, *overrides):
    """Return a supervised run on `path` instead of the hub's data; a model from the hub, so that only data is checked."""
    overrides = [*RUN, "trainer.max_steps=1", f"data={group}", f"data.train.0.path={path}", *overrides]
    return load(SFTRun, compose("sft", overrides))


def examples(sources, texts):
    """Return [(prompt, completion)] as text, with their own tokenizer."""
    tokenizer = train_tokenizer(texts, 1024)
    batch = load_examples(sources, tokenizer, max_prompt_tokens=4096, max_tokens=16384).batch
    pairs = [(tokenizer.decode(p), tokenizer.decode(c)) for p, c in batch.unpack()]
    return [
        (p.removeprefix("<|bos|>").removeprefix("<|user|>\n").removesuffix("\n<|assistant|>\n"), c) for p, c in pairs
    ]


def test_alpaca_asks_with_the_input_and_the_next_rows_are_held_out():
    path, rows = published("alpaca/alpaca_1k.json")
    cfg = configured("alpaca", path, "data.train.0.limit=900")
    validate_sft(cfg, 1)
    texts = [row["output"] for row in rows]
    inputs = [f"\n\n### Input:\n{r['input']}" if r["input"] else "" for r in rows]
    asked = [f"### Instruction:\n{r['instruction']}{given}" for r, given in zip(rows, inputs, strict=True)]
    assert 400 < sum(map(bool, inputs)) < 600, "with and without input"
    expected = [(q.strip(), r["output"] + "<|endoftext|>") for q, r in zip(asked, rows, strict=True)]
    assert examples(cfg.data.train, texts) == expected[:900]
    assert examples(cfg.data.validation, texts) == expected[900:]


def test_gsm8k_is_learned_with_the_final_line_or_without():
    path, rows = published("gsm8k/train.jsonl")
    texts = [row["answer"] for row in rows[:512]]
    whole = examples(configured("gsm8k_sft", path).data.validation, texts)
    rationale = examples(configured("gsm8k_rationale", path).data.validation, texts)
    assert [question for question, _ in whole] == [row["question"] for row in rows[:512]]
    for (question, answer), (same_question, steps), row in zip(whole, rationale, rows[:512], strict=True):
        assert question == same_question and answer == row["answer"] + "<|endoftext|>"
        assert re.sub(r"\n#### .*", "<|endoftext|>", row["answer"]) == steps


def test_code_is_read_as_a_stream_and_its_next_rows_are_held_out():
    path, rows = published("mbpp/mbpp.jsonl")
    cfg = configured("code", path, *MBPP, "data.train.0.limit=900")
    assert cfg.data.train[0].streaming and cfg.data.validation[0].streaming
    validate_sft(cfg, 1)
    expected = [(NO_SYSTEM + row["text"], row["code"] + "<|endoftext|>") for row in rows]
    assert examples(cfg.data.train, [row["code"] for row in rows]) == expected[:900]
    assert examples(cfg.data.validation, [row["code"] for row in rows]) == expected[900:]


def test_code_keeps_what_passes_all_its_tests_of_the_rows_read(tmp_path):
    rows = [
        {"input": f"Task {i}.", "output": f"f{i}()", "domain": "generic", "average_test_score": score}
        for i, score in enumerate(["1", "0.9", "1.0", "0"] * 5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    cfg = configured("code", tmp_path, "data.train.0.limit=8")
    validate_sft(cfg, 1)
    train, held_out = (examples(s, ["Task"]) for s in (cfg.data.train, cfg.data.validation))
    assert [prompt for prompt, _ in train] == [f"{NO_SYSTEM}Task {i}." for i in range(0, 8, 2)]
    assert [prompt for prompt, _ in held_out] == [f"{NO_SYSTEM}Task {i}." for i in range(8, 20, 2)]


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["data.train.0.streaming=true"], "data.train.0.streaming=true needs data.train.0.limit"),
        (["data.train.0.at_least={score: 1}"], "data.train.0: .* no column 'score'"),
        (["data.train.0.at_least={level: 9}"], "data.train.0: .* none of the 8 rows read has level of at least 9"),
        (["data.train.0.at_least={level: high}"], "data.train.0.at_least"),
        (["data.validation.0.start=8"], "data.validation.0: .* has 8 rows: none is left with start=8"),
        (["data.train.0.prompt='{question} {hint}'"], "data.train.0: .* no column 'hint'"),
        (
            ["probe.interval=1", "probe.prompts=[{path: rows.jsonl, prompt: question, limit: 2}]"],
            "probe.prompts: 2 of 2 prompts are also in data.train, the first 'Question 0'",
        ),
    ],
)
def test_mistakes_in_sources_are_told_before_anything_loads(overrides, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Question {i}", "answer": f"{i} #### {i}", "level": i} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probe = ["probe.reward={right: {target: exact}}", "probe.max_response_tokens=8"] if "probe" in overrides[0] else []
    with pytest.raises(ConfigError, match=sentence):
        validate_sft(configured("gsm8k_rationale", "rows.jsonl", "data.train.0.start=0", *overrides, *probe), 1)
