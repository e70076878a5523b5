"""Models that think: what rewards see of a response, what is counted, and what --check says."""

from __future__ import annotations

import pytest
from scoring_checks import rollouts_of_thoughts
from test_chat_checks import configured, write
from tiny_models import make_tiny, tiny_tokenizer
from transformers import AutoTokenizer

from frpo_nemo.config.options import FRPORun
from frpo_nemo.errors import ConfigError
from frpo_nemo.rollout.thoughts import begun_in_prompt, opening, part
from frpo_nemo.training.checks.chat import check_conversations

TOKENIZER = tiny_tokenizer()  # a token per character
END = "</think>"


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def parted(text: str, *, begun: bool = False, end: str = END) -> tuple[str, int, bool]:
    found = part([ids_of(text)], [text], [begun], end, TOKENIZER)
    return found.answers[0], found.tokens[0], found.unfinished[0]


@pytest.mark.parametrize("begun", [False, True])
def test_the_answer_is_what_follows_the_thoughts(begun):
    assert parted("<think>2+2</think>\n\n4", begun=begun) == ("4", len("<think>2+2</think>"), False)
    assert parted("2+2</think>4", begun=begun) == ("4", len("2+2</think>"), False), "begun in the prompt"
    text = "<think>a</think>no<think>b</think> 4"
    assert parted(text, begun=begun) == ("4", len(text) - 2, False), "the last thoughts end there"
    assert parted("<think>2+2</think>", begun=begun) == ("", len("<think>2+2</think>"), False)


def test_thoughts_that_do_not_end_leave_no_answer():
    assert parted("so 4, or 5", begun=True) == ("", 10, True)
    assert parted("<think>so 4, or 5") == ("", 17, True)
    assert parted("so 4", end="[END]") == ("", 4, True), "an end to which no beginning belongs"
    text = "<think>a</think>x<think>the answer is 42"
    assert parted(text) == ("", len(text), True), "they have begun again"


def test_a_response_without_thoughts_is_an_answer():
    assert parted("4 <b>") == ("4 <b>", 0, False)
    assert parted("<think> is no tag of HTML"[1:]) == ("think> is no tag of HTML", 0, False)
    assert parted("In HTML, <think> is no tag.") == ("In HTML, <think> is no tag.", 0, False)


def test_thoughts_may_have_begun_in_the_prompt():
    assert (opening("</think>"), opening("[/THINK]"), opening("<|end|>")) == ("<think>", "[THINK]", "")
    assert opening("</think>\n\n") == "<think>"
    assert begun_in_prompt(ids_of("user: 2+2? assistant: <think>\n"), END, TOKENIZER)
    assert not begun_in_prompt(ids_of("write <think> in a sentence. assistant:"), END, TOKENIZER)


def test_rewards_read_answers_and_the_step_counts_thoughts(workers):
    texts = ["<think>12345</think> 42", "<think>123456789", "4"]
    for rewards, lengths, values in workers.run(2, rollouts_of_thoughts, texts=texts, end=END):
        assert rewards == [2, 0, 1] * 2
        assert lengths == [len(text) + 1 for text in texts] * 2, "what is learned stays whole"
        thoughts = len("<think>12345</think>") + len(texts[1]) + 1
        assert values["thought_length/mean"] == pytest.approx(thoughts / 3)
        assert values["share/unfinished_thoughts"] == pytest.approx(1 / 3)


def model_that_thinks(path, template: str) -> str:
    make_tiny(path, "llama", layers=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return str(path)


THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is not defined or enable_thinking %}<think>{% else %}"
    "<think></think>{% endif %}{% endif %}"
)


def test_the_check_says_that_rewards_would_read_thoughts(tmp_path):
    path = model_that_thinks(tmp_path / "model", THINKING)
    cfg = configured(FRPORun, path, write(tmp_path / "rows.jsonl", {"prompt": "Hi"}))
    [sentence] = check_conversations(cfg, object())
    assert sentence.startswith("rollout.think_end_token is not set") and "rollout.think_end_token='</think>'" in sentence
    cfg.model.chat_template_args = {"enable_thinking": False}
    assert check_conversations(cfg, object()) == []
    cfg.model.chat_template_args, cfg.rollout.think_end_token = {}, END
    assert check_conversations(cfg, object()) == []


def test_a_template_that_writes_nothing_after_an_answer_is_refused(tmp_path):
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    path = model_that_thinks(tmp_path / "model", bare)
    cfg = configured(FRPORun, path, write(tmp_path / "rows.jsonl", {"prompt": "Hi"}))
    with pytest.raises(ConfigError, match="writes nothing after an answer.*let it write <eos> there"):
        check_conversations(cfg, object())
