"""Which prompts a run sees: what becomes of rows, in which order they are drawn, and what is refused with a
sentence."""

import json
from pathlib import Path

import pytest

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.prompts import PromptSampler, load_prompts
from frpo_nemo.data.sources import check_source
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import train_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
ROWS = [
    {"question": f"What is {i} and {i}?", "answer": str(2 * i), "kind": "odd" if i % 2 else "even"} for i in range(10)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([row["question"] for row in ROWS], 300)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def load(tokenizer, *sources, max_prompt_tokens=100):
    return load_prompts(sources, tokenizer, max_prompt_tokens=max_prompt_tokens)


def test_a_prompt_is_the_templates_text_up_to_where_the_answer_begins(tokenizer, path):
    example = load(tokenizer, SourceConfig(path=path, prompt="question", system_prompt="Be brief.")).examples[3]
    assert tokenizer.decode(example.prompt_ids) == (
        "<|bos|><|system|>\nBe brief.\n<|user|>\nWhat is 3 and 3?\n<|assistant|>\n"
    )
    assert example.prompt_ids.count(tokenizer.bos_token_id) == 1, "the tokenizer adds no second BOS"
    assert example.columns == {"answer": "6", "kind": "odd"}


def test_tasks_come_from_the_source_or_from_a_column(tokenizer, path):
    by_column = SourceConfig(path=path, prompt="question", task_column="kind", limit=2)
    prompts = load(tokenizer, by_column, SourceConfig(path=path, prompt="question", task="sum", start=8, limit=5))
    assert [e.task for e in prompts.examples] == ["even", "odd", "sum", "sum"]
    assert [e.columns["answer"] for e in prompts.examples] == ["0", "2", "16", "18"]
    assert prompts.tasks == {"even", "odd", "sum"}


def test_chat_messages_are_taken_as_they_are(tokenizer, tmp_path):
    messages = [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "hello"), ("user", "bye"))]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"prompt": messages, "id": 1}]))
    (example,) = load(tokenizer, SourceConfig(path=str(path))).examples
    assert example.messages == messages
    assert tokenizer.decode(example.prompt_ids).endswith("hello<|endoftext|>\n<|user|>\nbye\n<|assistant|>\n")


def test_longer_prompts_are_dropped_and_counted(tokenizer, path):
    lengths = [len(e.prompt_ids) for e in load(tokenizer, SourceConfig(path=path, prompt="question")).examples]
    system = SourceConfig(path=path, prompt="question", system_prompt="Be very, very brief.")
    both = load(tokenizer, SourceConfig(path=path, prompt="question"), SourceConfig(path=path, prompt="question"))
    assert (len(both), both.dropped) == (20, 0)
    with pytest.raises(ConfigError, match="all 10 prompts are longer than max_prompt_tokens"):
        load(tokenizer, system, max_prompt_tokens=max(lengths))


def test_columns_for_rewards_are_repeated_for_each_response(tokenizer, path):
    world = SourceConfig(path="python:frpo_nemo.examples.toy.rows?part=math", limit=1)
    prompts = load(tokenizer, SourceConfig(path=path, prompt="question", limit=2), world)
    columns = prompts.columns([1, 2], repeat=2)
    assert columns["kind"] == ["odd", "odd", None, None]
    assert columns["family"] == [None, None, "MATH", "MATH"]


def test_the_fingerprint_sees_content_and_order(tokenizer, path):
    source = SourceConfig(path=path, prompt="question")
    first = load(tokenizer, source).fingerprint
    assert load(tokenizer, source).fingerprint == first
    assert load(tokenizer, SourceConfig(path=path, prompt="question", limit=9)).fingerprint != first
    assert load(tokenizer, SourceConfig(path=path, prompt="question", task="x")).fingerprint != first


@pytest.mark.parametrize("per_step", [1, 3, 7, 10, 24])
def test_nothing_repeats_within_an_epoch_and_the_step_alone_decides(per_step):
    sampler = PromptSampler(10, per_step, seed=3)
    steps = [sampler.indices(step) for step in range(30)]
    drawn = [i for step in steps for i in step]
    epochs = [drawn[i : i + 10] for i in range(0, len(drawn) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "epochs have orders of their own"
    assert [PromptSampler(10, per_step, seed=3).indices(step) for step in (17, 4, 29)] == [
        steps[17],
        steps[4],
        steps[29],
    ]


def test_the_seed_decides_the_order_and_unshuffled_data_keeps_its_own():
    assert PromptSampler(100, 10, seed=1).indices(0) != PromptSampler(100, 10, seed=2).indices(0)
    assert PromptSampler(10, 4, seed=1, shuffle=False).indices(2) == [8, 9, 0, 1]


def test_a_check_needs_only_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    assert check_source(SourceConfig(path=str(path), prompt="question")) == ["question", "answer", "kind"]
    assert "answer" in check_source(SourceConfig(path="python:frpo_nemo.examples.toy.rows?part=prompts&seed=1"))


BAD = {
    "missing file": ({"path": "nowhere.jsonl"}, "data file 'nowhere.jsonl' does not exist"),
    "missing column": ({}, "no column 'prompt' (prompt=prompt); its columns: question, answer, kind"),
    "missing completion": ({"prompt": "question", "completion": "reply"}, "(completion=reply)"),
    "missing task column": ({"prompt": "question", "task_column": "task"}, "(task_column=task)"),
    "two tasks": ({"prompt": "question", "task": "a", "task_column": "kind"}, "give one"),
    "broken file": ({"path": "{tmp}/broken.jsonl"}, "broken.jsonl' cannot be read: JSON parse error"),
    "empty file": ({"path": "{tmp}/empty.jsonl"}, "has no rows"),
    "unknown module": ({"path": "python:there.is.none"}, "ModuleNotFoundError: No module named 'there'. Write python:pack"),
    "unknown function": ({"path": "python:frpo_nemo.examples.toy.nothing"}, "has no attribute 'nothing'"),
    "unknown part": ({"path": "python:frpo_nemo.examples.toy.rows?part=all"}, "part=all must be one of reference, prompts, "),
    "no rows": ({"path": "python:os.getcwd"}, "must return a list of dicts"),
    "unknown option": ({"path": "python:frpo_nemo.examples.toy.rows?part=prompts&sed=1"}, "unexpected keyword argument 'sed'"),
    "bad seed": ({"path": "python:frpo_nemo.examples.toy.rows?part=prompts&seed=x"}, "seed=x must be a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_sentences_before_anything_is_tokenized(name, path, tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"\n')
    (tmp_path / "empty.jsonl").write_text("")
    fields, sentence = BAD[name]
    fields = {"path": path, **fields}
    fields["path"] = fields["path"].replace("{tmp}", str(tmp_path))
    with pytest.raises(ConfigError) as error:
        check_source(SourceConfig(**fields))
    assert sentence in str(error.value)


def test_bad_rows_and_tokenizers_are_sentences(tokenizer, path, tmp_path):
    with pytest.raises(ConfigError, match="has 10 rows: none is left with start=10"):
        load(tokenizer, SourceConfig(path=path, prompt="question", start=10))
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"prompt": 1}\n')
    with pytest.raises(ConfigError, match="a prompt is a string or a list of {role, content} messages, not '1'"):
        load(tokenizer, SourceConfig(path=str(numbers)))
    bare = train_tokenizer(["a"], 300)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        load(bare, SourceConfig(path=path, prompt="question"))
    bare.chat_template = "{{ raise_exception('system messages are not supported') }}"
    with pytest.raises(ConfigError, match="refuses a message: system messages are not supported"):
        load(bare, SourceConfig(path=path, prompt="question"))


@pytest.mark.parametrize("name, prompt, task_column", [
    ("gsm8k/train.jsonl", "question", None),
    ("frpo_paper/safety_train.parquet", "prompt", "ability"),
    ("harmbench/behaviors_text_test.csv", "Behavior", "SemanticCategory"),
])  # fmt: skip
def test_published_data_loads_by_its_column_names(name, prompt, task_column, tokenizer):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there")
    source = SourceConfig(path=str(DATA / name), prompt=prompt, task_column=task_column, limit=50)
    prompts = load(tokenizer, source, max_prompt_tokens=10_000)
    assert len(prompts) == 50
    assert all(e.messages[-1]["role"] == "user" for e in prompts.examples)
