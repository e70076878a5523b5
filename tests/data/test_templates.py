"""Templates: places are filled as they are, braces and line ends of other languages are not mistaken for places."""

import pytest

from frpo_nemo.config.options import RewardConfig, SourceConfig
from frpo_nemo.data.columns import completion_text, prompt_messages
from frpo_nemo.data.sources import check_source
from frpo_nemo.data.templates import columns_of, fill, is_template
from frpo_nemo.errors import ConfigError
from frpo_nemo.training.checks.data import check_reward_tasks

ROW = {"q": "6*7?", "answer": "42", "two words": "{q} \\n {{q}}"}


@pytest.mark.parametrize("template, text", [
    (r"{q} Put it in \boxed{{answer}}.", r"6*7? Put it in \boxed{answer}."),
    (r"{q} \boxed{} {}", r"6*7? \boxed{} {}"),
    (r"\boxed{\text{}} {q}", r"\boxed{\text{}} 6*7?"),
    (r"{q} \boxed{{{answer}}}", r"6*7? \boxed{42}"),
    ('{q} {{"answer": {{"value": "..."}}}}', '6*7? {"answer": {"value": "..."}}'),
    ('{q} { "answer": { "value": 1 }}', '6*7? { "answer": { "value": 1 }}'),
    ("{two words}", "{q} \\n {{q}}"),
    (r"{q}\n\n{answer}", "6*7?\n\n42"),
    (r"{q}\nAnswer:\n- {answer}\n1", "6*7?\nAnswer:\n- 42\n1"),
    (r"{q}[[\n\nAnswer: {answer}]]", "6*7?\n\nAnswer: 42"),
    (r"{q} [[1, 2], [3, 4]] [[x]]", "6*7? [[1, 2], [3, 4]] [[x]]"),
    (r"{q} $x \neq \nu$, \nabla f, \not=, \\n", r"6*7? $x \neq \nu$, \nabla f, \not=, \\n"),
])  # fmt: skip
def test_places_are_filled_and_other_braces_stay(template, text):
    assert fill(template, ROW.__getitem__) == text
    assert prompt_messages(ROW, SourceConfig(path="-", prompt=template)) == [{"role": "user", "content": text}]
    assert completion_text(ROW, SourceConfig(path="-", completion=template)) == text


def test_a_name_without_places_is_a_column():
    assert columns_of("answer") == ["answer"] and not is_template("answer")
    assert columns_of("{a} {b c} {{d}} {}") == ["a", "b c"]


@pytest.mark.parametrize("field", ["prompt", "completion"])
@pytest.mark.parametrize("template, sentence", [
    (r"{q} \boxed{answer}", r"write \boxed{{answer}} for LaTeX, or \boxed{{{answer}}} for the column in LaTeX's braces"),
    (r"{q} \text{two words}", r"write \text{{two words}} for LaTeX"),
    (r"{q} \nthink first", r"has \nthink, which may be a line end and a word or a command of LaTeX: write a space"),
    ('{q} {"a": 1}', "no column '\"a\": 1'"),
    ('{q} {"a": 1}', "braces around anything else are written twice, {{ }}"),
])  # fmt: skip
def test_what_may_be_meant_otherwise_is_a_sentence_before_anything_loads(field, template, sentence, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "6*7?", "answer": "42", "two words": ""}\n')
    with pytest.raises(ConfigError) as error:
        check_source(SourceConfig(path=str(tmp_path / "rows.jsonl"), **{"prompt": "q", field: template}))
    assert sentence in str(error.value) and str(error.value).startswith("data source '")


def test_line_ends_of_the_command_line_in_a_system_prompt_are_line_ends():
    source = SourceConfig(path="-", prompt="q", system_prompt=r"Be brief.\nUse \boxed{}.")
    assert prompt_messages(ROW, source)[0]["content"] == "Be brief.\nUse \\boxed{}."


@pytest.mark.parametrize("reward, prompt", [
    (RewardConfig("math"), "{q} {answer}"),
    (RewardConfig("exact"), "answer"),
    (RewardConfig("math", args={"column": "gold"}), "{q} ({gold})"),
])  # fmt: skip
def test_a_prompt_that_shows_the_right_answer_is_refused(reward, prompt):
    with pytest.raises(ConfigError, match="shows the column '(answer|gold)', the right answer for reward.right"):
        check_reward_tasks({"right": reward}, [SourceConfig(path="rows.jsonl", prompt=prompt)])


def test_a_prompt_may_show_columns_that_are_no_answer():
    rewards = {"right": RewardConfig("math", args={"column": "gold"}), "code": RewardConfig("code")}
    check_reward_tasks(rewards, [SourceConfig(path="rows.jsonl", prompt="{answer} {tests} {{gold}}")])
