"""Chat templates of published models: prompts are what apply_chat_template gives, examples are how the whole
conversation begins, and the end of a turn is learned and stops generation. Or one sentence."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import jinja2
import pytest
from published_tokenizers import tokenizer_files

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.chat import Chat
from frpo_nemo.data.prompts import load_prompts
from frpo_nemo.data.sft import load_examples
from frpo_nemo.data.tokenizer import load_tokenizer
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import train_tokenizer

TRL = Path(pytest.importorskip("trl", reason="TRL is not in the lock for GPUs").__file__).parent / "chat_templates"
NEW_YEAR = datetime(2026, 1, 2, 3, 4)
USER = {"role": "user", "content": "  What is 12 % of 50?\nBriefly. "}
SYSTEM = {"role": "system", "content": "Answer in words."}
MISTRAL = (  # as of its instruction models from v0.3 on
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# tokenizer, the template if it is not its own, the end of a turn
PUBLISHED = {
    "Qwen3": ("qwen3", None, "<|im_end|>"),
    "Llama 3.1": ("llama3_1", None, "<|eot_id|>"),
    "Llama 3.2": ("llama3_2", None, "<|eot_id|>"),
    "Gemma 3": ("gemma3", None, "<end_of_turn>"),
    "gpt-oss": ("gptoss", "gptoss", "<|return|>"),
    "DeepSeek-V3": ("deepseek_v3", None, "<｜end▁of▁sentence｜>"),
    "R1-Distill": ("deepseek_v3", "deepseek_r1_distill", "<｜end▁of▁sentence｜>"),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request) -> tuple[Chat, str]:
    """Return (a published model's chat format, the token that ends its turns)."""
    package, template, end = PUBLISHED[request.param]
    tokenizer = load_tokenizer(str(tokenizer_files(package)))
    if template:
        tokenizer.chat_template = (TRL / f"{template}.jinja").read_text()
    return Chat(tokenizer, moment=NEW_YEAR), end


@pytest.fixture(scope="module")
def small():
    """Return a tokenizer trained here, with its own special tokens; tests give it TRL's templates."""
    special = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>", "<|eot_id|>"]
    tokenizer = train_tokenizer(["What is 12 % of 50? It is 6, of course. Think: 12 of 100."], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def with_template(tokenizer, template: str) -> Chat:
    tokenizer.chat_template = template
    return Chat(tokenizer, moment=NEW_YEAR)


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def rendered(chat: Chat, messages: list[dict], **options) -> list[int]:
    """Return what transformers makes of a conversation on the day of `chat`."""
    clock = {"strftime_now": chat.moment.strftime}
    return chat.tokenizer.apply_chat_template(messages, return_dict=False, **clock, **options)


@pytest.mark.parametrize("before", [[], [SYSTEM], [USER, assistant("Six.")]], ids=["", "system", "a turn before"])
def test_prompts_are_those_of_apply_chat_template_with_one_bos(published, before, request):
    chat, _ = published
    (ids,) = chat.prompt_ids([[*before, USER]], "data")
    assert ids == rendered(chat, [*before, USER], add_generation_prompt=True)
    bos = chat.tokenizer.bos_token_id
    written = 0 if "gpt-oss" in request.node.name else 1  # its template writes none
    assert bos is None or ids.count(bos) == written


@pytest.mark.parametrize("answer", ["Six.", "  Six: $0.12 \\cdot 50$.\n\n", "the end", "6 <b>of</b> 50 |"])
def test_examples_are_how_the_whole_conversation_begins_and_end_in_the_end_of_turn(published, answer, request):
    chat, end = published
    answer = assistant(answer)
    if "R1" in request.node.name:  # its prompts open a thought: see below
        answer = assistant(f"<think>\n\n</think>\n\n{answer['content']}")
    ((prompt, completion),) = chat.examples([([USER], answer)], "data")
    assert prompt == rendered(chat, [USER], add_generation_prompt=True)
    assert chat.tokenizer.convert_ids_to_tokens(completion[-1]) == end
    assert completion.count(completion[-1]) == 1 and completion[-1] in chat.end_tokens
    if "R1" not in request.node.name:
        assert rendered(chat, [USER, answer])[: len(prompt + completion)] == prompt + completion
    assert answer["content"].rpartition("</think>")[2].strip() in chat.tokenizer.decode(completion)


def test_qwen3_learns_the_empty_thought_that_its_template_writes():
    chat = Chat(load_tokenizer(str(tokenizer_files("qwen3"))))
    ((_, completion),) = chat.examples([([USER], assistant("Six."))], "data")
    assert chat.tokenizer.decode(completion) == "<think>\n\n</think>\n\nSix.<|im_end|>"
    ((prompt, completion),) = Chat(chat.tokenizer, {"enable_thinking": False}).examples(
        [([USER], assistant("Six."))], ""
    )
    assert chat.tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert chat.tokenizer.decode(completion) == "Six.<|im_end|>"


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "qwen3_5_think", "qwen3_8", "nemotron_3_nano"])
@pytest.mark.parametrize(
    "answer",
    [assistant("<think>\nfour and two\n</think>\n\nSix."), assistant("Six.", reasoning_content="four and two")],
    ids=["in the text", "in a key"],
)
def test_a_thought_that_the_prompt_opens_is_not_opened_again(small, template, answer):
    chat = with_template(small, (TRL / f"{template}.jinja").read_text())
    ((prompt, completion),) = chat.examples([([USER], answer)], "data")
    text = small.decode(prompt + completion)
    assert small.decode(prompt).endswith("<think>\n") and text.count("<think>") == text.count("</think>") == 1
    assert "".join(text.rpartition("<think>")[2].split()).startswith("fourandtwo</think>Six.")


def test_an_answer_without_the_thought_that_the_prompt_opens_is_a_sentence(small):
    chat = with_template(small, (TRL / "deepseek_r1_distill.jinja").read_text())
    with pytest.raises(
        ConfigError, match=r"opens <think> in the prompt, and the answer does not begin with it: 'Six\.'"
    ):
        chat.examples([([USER], assistant("Six."))], "data")


@pytest.mark.parametrize(
    "answer, missing",
    [
        (assistant("Six.", reasoning_content="four and two"), "leaves out the answer's thoughts, 'four and two'"),
        (
            assistant("Six.", tool_calls=[{"type": "function", "function": {"name": "multiply", "arguments": {}}}]),
            "shows nothing of a call of tools in message 1",
        ),
    ],
)
def test_what_a_template_leaves_out_of_an_answer_is_a_sentence(small, answer, missing):
    chat = with_template(small, MISTRAL)
    with pytest.raises(ConfigError, match=missing):
        chat.examples([([USER], answer)], "data")
    shy = "{% for m in messages %}{{ m['role'] + ': ' + m['content'].split('</think>')[-1] }}\n{% endfor %}"
    with pytest.raises(ConfigError, match="leaves out the answer's content"):
        with_template(small, shy).examples([([USER], assistant("<think>so</think>Six."))], "data")


UNSEEN = {
    "a role that the template does not know": [{"role": "human", "content": "What is 12 % of 50?"}],
    "OpenAI's name for system": [{"role": "developer", "content": "Be brief."}, USER],
    "a second system message": [SYSTEM, SYSTEM, USER],
    "a system message late": [USER, assistant("Six."), SYSTEM, USER],
}


@pytest.mark.parametrize("case", UNSEEN)
def test_a_message_that_the_template_shows_nothing_of_is_a_sentence(published, case):
    chat, _ = published
    messages = UNSEEN[case]
    try:
        whole = chat.tokenizer.decode(rendered(chat, messages, add_generation_prompt=True))
    except jinja2.TemplateError:
        whole = ""
    shown = all(whole.count(m["content"].strip()) >= messages.count(m) for m in messages)
    if shown:
        assert chat.tokenizer.decode(chat.prompt_ids([messages], "data")[0]) == whole
        return
    with pytest.raises(ConfigError, match=r"shows nothing of message \d \(role '\w+'\); write it in|refuses a message"):
        chat.prompt_ids([messages], "data")


def call(arguments) -> dict:
    return {"type": "function", "id": "a1b2c3d4e", "function": {"name": "multiply", "arguments": arguments}}


@pytest.mark.parametrize("arguments", [{"a": 50, "é": 0.12}, '{"a": 50, "é": 0.12}'], ids=["object", "text"])
def test_arguments_of_calls_are_written_once_as_json_in_prompts_and_answers(published, arguments, request):
    """Llama and gpt-oss quote text again, as for a template without objects; DeepSeek-V3 takes no object."""
    chat, end = published
    calling = assistant(None, tool_calls=[call(arguments)])
    messages = [USER, calling, {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "6"}]
    if any(name in request.node.name for name in ("Llama 3.1", "Gemma")):  # these packages' templates know no tools
        with pytest.raises(ConfigError, match="shows nothing of a call of tools in message 1|refuses a message"):
            chat.prompt_ids([messages], "data")
        return
    (ids,) = chat.prompt_ids([messages], "data")
    text = chat.tokenizer.decode(ids)
    assert text.count("multiply") >= 1 and text.count('{"a": 50, "é": 0.12}') == 1 and "None" not in text
    if "R1" not in request.node.name:  # its prompts open a thought
        ((_, completion),) = chat.examples([([USER], calling)], "data")
        assert '{"a": 50, "é": 0.12}' in chat.tokenizer.decode(completion)
        assert "multiply" in chat.tokenizer.decode(completion)


@pytest.mark.parametrize("template", ["smolvlm", "llava_next"])
def test_a_template_that_takes_content_in_parts_alone_is_a_sentence(small, template):
    chat = with_template(small, (TRL / f"{template}.jinja").read_text())
    with pytest.raises(ConfigError, match=r"shows nothing of message 0 \(role 'user'\)"):
        chat.prompt_ids([[USER]], "data")


@pytest.mark.parametrize("form", [lambda value: value, json.dumps], ids=["objects", "text"])
@pytest.mark.parametrize("template", ["qwen3", "llama3_2"])
def test_tools_of_a_row_reach_the_template(small, template, form, tmp_path):
    chat = with_template(small, (TRL / f"{template}.jinja").read_text())
    parameters = {"type": "object", "properties": {"a": {"type": "number", "enum": None}}}
    tools = [{"type": "function", "function": {"name": "multiply", "description": "a x b", "parameters": parameters}}]
    calling, plain = [USER, assistant(None, tool_calls=[call({"a": 1})])], [USER, assistant("Six.")]
    rows = [
        {"chat": calling, "tools": form(tools)},
        *({"chat": plain, "tools": other} for other in (None, ["a hammer"])),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), prompt="chat", completion="chat")
    del parameters["properties"]["a"]["enum"]  # null, as Parquet writes a key that other tools have
    expected = [rendered(chat, [USER], tools=given, add_generation_prompt=True) for given in (tools, None, None)]
    limits = dict(max_prompt_tokens=9999, max_tokens=9999)
    assert [prompt for prompt, _ in load_examples([source], chat, **limits).batch.unpack()] == expected
    assert "multiply" in small.decode(expected[0])
    prompts = load_prompts([source], chat, max_prompt_tokens=9999)
    assert [example.prompt_ids for example in prompts.examples] == expected
    with pytest.raises(ConfigError, match="definitions of tools, and the chat template of .* never reads them"):
        load_prompts([source], with_template(small, MISTRAL), max_prompt_tokens=9999)


def test_a_template_that_shows_one_call_only_is_not_given_two(small):
    chat = with_template(small, (TRL / "gptoss.jinja").read_text())
    assert len(chat.examples([([USER], assistant(None, tool_calls=[call({})]))], "data")) == 1
    with pytest.raises(ConfigError, match="shows nothing of a call of tools in message 1"):
        chat.examples([([USER], assistant(None, tool_calls=[call({}), call({})]))], "data")


def test_what_a_template_shows_is_asked_once_for_conversations_of_one_shape(small, monkeypatch):
    chat = with_template(small, (TRL / "qwen3.jinja").read_text())
    renderings = []
    apply = small.apply_chat_template
    monkeypatch.setattr(small, "apply_chat_template", lambda *a, **k: renderings.append(1) or apply(*a, **k))
    chat.prompt_ids([[SYSTEM, {"role": "user", "content": f"{i}?"}] for i in range(50)], "data")
    assert len(renderings) == 51


@pytest.mark.parametrize("brought", ["Six.", "Six.<|endoftext|>", "Six.<|endoftext|>\n"])
def test_mistrals_form_ends_in_one_eos_also_when_the_data_bring_one(small, brought):
    chat = with_template(small, MISTRAL)
    ((prompt, completion),) = chat.examples([([USER], assistant(brought))], "data")
    assert small.decode(completion) == " Six.<|endoftext|>"
    assert prompt + completion == rendered(chat, [USER, assistant("Six.")])


def test_an_end_of_turn_that_is_no_special_token_is_followed_by_eos(small):
    chat = with_template(
        small,
        "{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n###\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}",
    )
    ((_, completion),) = chat.examples([([USER], assistant("Six."))], "data")
    assert small.decode(completion) == "Six.\n###<|endoftext|>"
    assert chat.end_tokens == {small.eos_token_id}


def test_the_end_of_turn_may_be_another_token_than_eos(small):
    chat = with_template(small, (TRL / "qwen2_5.jinja").read_text())
    assert {small.decode([i]) for i in chat.end_tokens} == {"<|endoftext|>", "<|im_end|>"}
    ((_, completion),) = chat.examples([([USER], assistant("Six."))], "data")
    assert small.decode(completion) == "Six.<|im_end|>"


def test_null_content_beside_a_call_of_tools_is_never_written_as_none(small):
    call = {"type": "function", "function": {"name": "multiply", "arguments": "{}"}}
    messages = [USER, assistant(None, tool_calls=[call]), {"role": "tool", "content": "6"}, USER]
    prints = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}{% endfor %}"
    assert "None" not in small.decode(with_template(small, prints).prompt_ids([messages], "data")[0])
    with pytest.raises(ConfigError, match="shows nothing of a call of tools in message 1"):
        with_template(small, MISTRAL).prompt_ids([messages], "data")
    glm = with_template(small, (TRL / "glm4moe.jinja").read_text())  # a line of its own for content that is not none
    assert "None" not in small.decode(glm.prompt_ids([messages], "data")[0])
    asks = "{% for m in messages %}{{ m.tool_calls[0].function.name if m.content is none else m.content }}{% endfor %}"
    assert "multiply" in small.decode(with_template(small, asks).prompt_ids([messages], "data")[0])


@pytest.mark.parametrize("template", ["llama3_2", "gptoss"])
def test_a_date_in_a_template_is_the_runs(small, template):
    small.chat_template = (TRL / f"{template}.jinja").read_text()
    first, later = (Chat(small, moment=moment) for moment in (NEW_YEAR, datetime(2027, 5, 6)))
    texts = [small.decode(chat.prompt_ids([[USER]], "data")[0]) for chat in (first, later)]
    assert ("02 Jan 2026" in texts[0]) or ("2026-01-02" in texts[0])
    assert texts[0] != texts[1]
    assert Chat(small, moment=NEW_YEAR).prompt_ids([[USER]], "data") == first.prompt_ids([[USER]], "data")


def test_template_arguments_reach_the_template_and_unknown_ones_are_a_sentence(small):
    small.chat_template = "{{ messages[0].content }}{% if loud %}!{% endif %}"
    assert small.decode(Chat(small, {"loud": True}).prompt_ids([[USER]], "")[0]).endswith("!")
    with pytest.raises(ConfigError, match="model.chat_template_args.lound: the chat template of .* never reads lound"):
        Chat(small, {"lound": True}).check()


def test_tokens_beyond_the_vocabulary_are_a_sentence(small, tmp_path):
    chat = Chat(train_tokenizer(["some words"], 300), vocab_size=300)
    chat.tokenizer.add_tokens(["<|extra|>"] * (len(chat.tokenizer) < 300))
    vocab_size = chat.tokenizer.convert_tokens_to_ids("<|extra|>")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "some", "a": "<|extra|> words"}))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"), prompt="q", completion="a")
    swapped = SourceConfig(path=source.path, prompt="a")
    sentence = rf"rows.jsonl': token '<\|extra\|>' has id {vocab_size}, and vocab_size={vocab_size}"
    enough, short = (Chat(chat.tokenizer, vocab_size=size) for size in (vocab_size + 1, vocab_size))
    assert len(load_examples([source], enough, max_prompt_tokens=50, max_tokens=99)) == 1
    with pytest.raises(ConfigError, match=sentence):
        load_examples([source], short, max_prompt_tokens=50, max_tokens=99)
    assert len(load_prompts([source], short, max_prompt_tokens=50)) == 1, "nothing asks for the token"
    with pytest.raises(ConfigError, match=sentence):
        load_prompts([swapped], short, max_prompt_tokens=50)
