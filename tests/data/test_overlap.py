"""A probe's prompts are none of the training prompts."""

import json
from pathlib import Path

import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.overlap import check_apart, overlapping_prompts
from frpo_nemo.errors import ConfigError

DATA = Path(__file__).parents[3] / "shared" / "data"


def chat(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


def test_prompts_are_equal_but_for_case_space_unicode_form_and_system_messages():
    known = [chat("How are you?"), chat("Caf\u00e9 or tea?"), chat("hi", "hello", "bye")]
    same = [chat("how  are\nYOU? "), chat("Cafe\u0301 or tea?", system="Be brief."), chat("hi", "Hello", "bye")]
    other = [chat("How are you"), chat("bye"), chat("hi"), chat("Cafe or tea?")]
    assert overlapping_prompts([*other, *same], known) == same
    assert overlapping_prompts(other, known) == []


def test_an_overlap_is_a_sentence_with_its_size_and_first_prompt(tmp_path):
    rows = [{"instruction": f"Task {i}.", "input": "", "output": "x"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps({"prompt": f"task {i}."}) + "\n" for i in range(5, 12)))
    training = SourceConfig(path=str(tmp_path / "train.jsonl"), prompt="{instruction}\n\n{input}", completion="output")
    with pytest.raises(ConfigError, match="probe.prompts: 4 of 7 prompts are also in data.train, the first 'task 5.'"):
        check_apart([SourceConfig(path=str(tmp_path / "probe.jsonl"))], [training])
    check_apart([SourceConfig(path=str(tmp_path / "probe.jsonl"), start=4)], [training])


def test_published_probes_are_apart_from_published_fine_tuning_data_but_not_from_themselves():
    if not (DATA / "frpo_paper").is_dir():
        pytest.skip(f"{DATA / 'frpo_paper'} is not there")
    safety = SourceConfig(path=str(DATA / "frpo_paper/kl_safety_prompts.jsonl"))
    alpaca = SourceConfig(path=str(DATA / "alpaca/alpaca_1k.json"), prompt="{instruction}\n\n{input}")
    gsm8k = SourceConfig(path=str(DATA / "gsm8k/train.jsonl"), prompt="question")
    check_apart([safety], [alpaca, gsm8k])
    with pytest.raises(ConfigError, match="probe.prompts: 100 of 100 prompts"):
        check_apart([SourceConfig(path=gsm8k.path, prompt="question", limit=100)], [alpaca, gsm8k])
