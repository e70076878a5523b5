"""A chat model as a judge. Recorded answers over real HTTP, since the judge is somebody's service; and vLLM's own server, so
that the protocol is not only ours."""

import json

import pytest
from recorded_judge import RecordedJudge
from transformers import AutoModelForCausalLM, AutoTokenizer

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.chat_judge import ChatJudge
from frpo_nemo.rewards.registry import Failure
from frpo_nemo.rewards.reward_set import build_rewards, check_rewards

KEY = "open-sesame-of-the-judge"  # like no known service's
YES_NO = {"template": "{prompt}|{response}", "choices": {"yes": 0, "no": 1}}


@pytest.fixture
def recorded():
    judges = []

    def start(answers, **options):
        """answers: what it says to a text that ends in |RESPONSE, by the response."""
        judges.append(
            RecordedJudge(lambda body, n: answers[body["messages"][-1]["content"].rpartition("|")[2]], **options)
        )
        return judges[-1]

    yield start
    for judge in judges:
        judge.close()


def ask(judge, responses, **arguments):
    arguments = YES_NO | arguments
    return ChatJudge("gpt", **arguments, remote={"url": judge.url, "patience": 0.3})(
        ["How?"] * len(responses), responses
    )


def test_the_answer_begins_with_a_choice_whatever_follows_and_anything_else_is_a_failure(recorded):
    answers = {
        "a": "yes",
        "b": "No, it refuses. Yes, politely.",
        "c": "**NO**",
        "d": "I cannot say yes or no.",
        "e": "Yesterday",
        "f": "",
        "g": None,
        "h": {"error": {"message": "overloaded"}},
        "i": b"<html>a proxy's page</html>",
        "j": {"choices": [{"message": {"content": None, "refusal": "no"}, "finish_reason": "content_filter"}]},
    }
    scores = ask(recorded(answers), list(answers))
    assert scores[:3] == [0.0, 1.0, 1.0]
    assert all(isinstance(score, Failure) and score.kind == "error" for score in scores[3:])
    assert scores[3].message == "the judge answers something else: 'I cannot say yes or no.'"
    assert "has no text: {'error'" in scores[7].message and "isn't JSON: <html>a proxy" in scores[8].message


BETWEEN = {"-1": 0.0, "0": 0.5, "1": 1.0}
STEPS = {"0": 0.0, "0.5": 0.5, "1": 1.0}
STARS = {str(stars): (stars - 1) / 4 for stars in range(1, 6)}
WORDS = {"partly": 0.5, "partly-safe": 0.75, "no": 0.0, "yes": 1.0}
OTHER = None  # an answer that is none of the choices
FIRST_WORDS = [
    (
        BETWEEN,
        {"-1": 0.0, "**-1**": 0.0, "1": 1.0, "- 1": OTHER, "+1": OTHER, "−1": OTHER, "--2": OTHER, "-1.5": OTHER},
    ),
    (STEPS, {"0.5": 0.5, "0.5.": 0.5, "0": 0.0, "1.": 1.0, "1.5": OTHER, "0.55": OTHER, ".5": OTHER, "-0.5": OTHER}),
    (STARS, {"5": 1.0, "'4'": 0.75, "3, since": 0.5, "4.5": OTHER, "5/10": OTHER, "5 / 10": OTHER, "4-5": OTHER}),
    (STARS, {"-5": OTHER, "0.5": OTHER, ". 5": OTHER, "10": OTHER, "4,5": OTHER, "2–3": OTHER, "4 stars": 0.75}),
    (
        WORDS,
        {"partly-safe": 0.75, "partly": 0.5, "Partly, I think": 0.5, "partly-safely": OTHER, "partly-unsafe": OTHER},
    ),
    (WORDS, {"- yes": 1.0, "...No": 0.0, "yes/no": OTHER, "No. 5 is": 0.0, "no-one": OTHER, "not": OTHER}),
]


@pytest.mark.parametrize(("choices", "answers"), FIRST_WORDS)
def test_a_choice_is_a_whole_number_or_word_and_no_part_of_another(recorded, choices, answers):
    says_what_it_is_shown = {answer: answer for answer in answers}
    scores = ask(recorded(says_what_it_is_shown), list(answers), choices=choices)
    assert [None if isinstance(score, Failure) else score for score in scores] == list(answers.values())


def test_a_pattern_finds_the_choice_in_a_longer_answer(recorded):
    answers = {"a": '{"reason": "It says no.", "label": "Yes"}', "b": "Rating: [[10]]", "c": "Rating: [[11]]"}
    judge = recorded(answers)
    assert ask(judge, ["a"], pattern=r'"label": "(\w+)"') == [0.0]
    rated = ask(judge, ["b", "c"], pattern=r"\[\[(\d+)\]\]", choices={i: (i - 1) / 9 for i in range(1, 11)})
    assert rated[0] == 1.0 and "answers something else: 'Rating: [[11]]'" in rated[1].message


def test_the_rubric_is_strongrejects_score(recorded):
    answers = {
        "refusal": "1.a. It declines.\n1.b 1\n2.a. -\n2.b 5\n3.a. -\n3.b 5",
        "half": "1.b: 0\n2.b: 3\n3.b: 3",
        "full": "1.a It helps.\n1.b. 0\n2.b. 5\n3.b. 5",
        "cut": "1.a. It declines.\n1.b 1\n2.a. The",
        "no number": "1.b 0\n2.b 6\n3.b 5",
        "negative": "1.b -1\n2.b 3\n3.b 5",
    }
    scores = ask(recorded(answers), list(answers), choices=None, rubric=True)
    assert scores[:3] == [0.0, 0.5, 1.0]
    assert [score.kind for score in scores[3:]] == ["error"] * 3


def test_a_judge_is_sent_its_own_question_with_the_last_request_and_columns_of_the_data(
    recorded, monkeypatch, tmp_path
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = recorded({"r{0}": "no"})
    texts = tmp_path / "texts.json"
    texts.write_text(
        json.dumps({"system": "You judge {this}.", "question": "{context}/{behavior}/{category}|{generation}"})
    )
    arguments = {
        "model": "gpt",
        "choices": {"no": 1},
        "template_file": str(texts),
        "template_key": "question",
        "system_key": "system",
        "columns": {"context": "ContextString", "category": "SemanticCategory"},
        "options": {"max_completion_tokens": 9},
        "remote": {"url": judge.url, "api_key_env": "JUDGE_KEY", "served_model_name": "served"},
    }
    prompt = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "-"},
        {"role": "user", "content": "{q}"},
    ]
    columns = {"ContextString": [None], "SemanticCategory": ["chemical"]}
    rewards = build_rewards({"judge": RewardConfig(target="chat_judge", args=arguments)})
    assert rewards.score([prompt], ["r{0}"], ["t"], columns).total.tolist() == [1.0]
    ((authorization, body, _),) = judge.seen
    assert authorization == f"Bearer {KEY}"
    assert body == {
        "model": "served",
        "messages": [
            {"role": "system", "content": "You judge {this}."},
            {"role": "user", "content": "/{q}/chemical|r{0}"},
        ],
        "max_completion_tokens": 9,
    }


def test_a_judge_that_dies_in_a_batch_fails_what_it_did_not_answer_and_nothing_else(recorded):
    responses = [str(i) for i in range(60)]
    judge = recorded(dict.fromkeys(responses, "no"), lives=20)
    remote = {"url": judge.url, "patience": 0.3, "retries": 1, "concurrency": 4}
    rewards = build_rewards(
        {"refusal": RewardConfig(target="chat_judge", args={"model": "gpt", **YES_NO, "remote": remote})}
    )
    scores = rewards.score(["How?"] * 60, responses, [None] * 60, {})
    lost = int(scores.total.isnan().sum())
    assert lost == 40 and scores.failures == {"refusal": {"died": lost}}
    assert set(scores.total[~scores.total.isnan()].tolist()) == {1.0}


def test_vllms_server_reads_the_requests_as_transformers_reads_the_conversation(models, servers):
    """What a random judge answers to it greedily is a choice here; to another response it answers something else."""
    url, options = servers["judge"].up().url, {"temperature": 0.0, "max_tokens": 6}
    model, tokenizer = (cls.from_pretrained(models["judge"]) for cls in (AutoModelForCausalLM, AutoTokenizer))
    chat = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "How?|So."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    answer = tokenizer.decode(written, skip_special_tokens=True)
    arguments = YES_NO | {"choices": {answer: 0.25}, "pattern": "(?s)(.*)", "system": "Judge.", "options": options}
    score, other = ChatJudge(models["judge"], **arguments, remote={"url": url})(["How?"] * 2, ["So.", "No."])
    assert score == 0.25
    assert other.kind == "error" and other.message.startswith("the judge answers something else: ")


BAD = {
    "no url": ({"remote": {}}, "needs remote.url, of a server with /v1/chat/completions"),
    "no choices": ({"choices": None}, "needs either choices, the answers and their values, or rubric: true"),
    "both": ({"rubric": True}, "needs either choices"),
    "no template": ({"template": None}, "needs template or template_file"),
    "fields": ({"template": "{question} {response}"}, "has the fields ['question', 'response']"),
    "unused": ({"columns": {"context": "c"}}, "columns.context: the judge's template has no field {context}"),
    "pattern": ({"pattern": "("}, "pattern=( isn't a regular expression"),
    "groups": ({"pattern": "yes|no"}, "must have exactly one group, the choice; it has 0"),
    "systems": ({"system": "x", "system_key": "y"}, "system and system_key are both given"),
    "system": ({"system_key": "y"}, "system_key=y names an entry of template_file, which isn't set"),
    "key": ({"remote": {"url": "http://h", "api_key_env": "NO_KEY"}}, "api_key_env=NO_KEY: this environment"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_a_sentence_before_anything_is_asked(name):
    changes, sentence = BAD[name]
    args = {"model": "gpt", **YES_NO, "remote": {"url": "http://127.0.0.1:1"}} | changes
    with pytest.raises(ConfigError, match="^reward.mine: ") as error:
        check_rewards({"mine": RewardConfig(target="chat_judge", args=args)})
    assert sentence in str(error.value)


def test_a_column_that_the_data_do_not_have_is_told_before_anything_is_asked():
    args = {"model": "gpt", "template": "{a}{response}", "columns": {"a": "Context"}, "choices": {"no": 1}}
    config = {"mine": RewardConfig(target="chat_judge", args=args | {"remote": {"url": "http://127.0.0.1:1"}})}
    check_rewards(config, ["Context"])
    with pytest.raises(ConfigError, match="needs 'Context', which is neither in args nor a column of the data"):
        check_rewards(config, ["ContextString"])
