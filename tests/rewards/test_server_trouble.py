"""Servers that say nonsense or nothing: what cannot be read fails for its response alone, is asked for no second time, and
nobody waits longer than the patience. Recorded answers over real HTTP."""

import shutil
import socket
import threading
import time

import pytest
from recorded_judge import RecordedJudge
from reward_models import TEMPLATE

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.rewards.models.remote import RemoteServer
from frpo_nemo.rewards.models.safety import Moderation, Safety
from frpo_nemo.rewards.reward_set import build_rewards

KEY = "sesame-open-sesame"  # like no known service's
SYSTEM, USER = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}


@pytest.fixture
def recorded():
    """Starts a server that gives the answers in turn, and the last one from then on."""
    servers = []

    def start(*answers):
        servers.append(RecordedJudge(lambda body, n: answers[min(n, len(answers) - 1)]))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def remote(server, **arguments):
    return {"url": server.url, "concurrency": 1, "patience": 0.3, **arguments}


def completion(top_logprobs):
    return {"choices": [{"logprobs": {"top_logprobs": top_logprobs}}]}


def moderated(*results):
    return {"results": list(results)}


ANYTHING = [b"null", b"[]", b'"text"', b"7", b"[" * 100_000, {}]
NO_LOGPROBS = [
    None,
    [],
    [None],
    [{}],
    [[-0.1]],
    [{"1": None}],
    [{"1": "likely"}],
    [{"1": 800.0}],
    [{"1": float("nan")}],
]
NO_OUTPUTS = [None, [], ["high"], [None], [float("inf")], [True], 0.5, [10**400]]
NO_SCORES = [None, [], [1.0], {}, {"hate": None}, {"hate": "high"}, {"hate": True}, {"hate": 0.1, "violence": []}]
READERS = {  # target, arguments, nonsense, a good answer and its value
    "judge": (
        "judge",
        {"template": TEMPLATE},
        [{"choices": None}, {"choices": []}, {"choices": [{"logprobs": None}]}, *map(completion, NO_LOGPROBS)],
        (completion([{"5": 0.0, "1": -40.0, "x": -50.0}]), 1.0),
    ),
    "reward": (
        "reward_model",
        {"sigmoid": False},
        [{"data": None}, {"data": [None]}, *({"data": [{"probs": probs}]} for probs in NO_OUTPUTS)],
        ({"data": [{"probs": [2]}]}, 2.0),
    ),
    "moderation": (
        "moderation",
        {"inputs_per_request": 1},
        [{"results": None}, moderated(None), moderated([]), moderated(), moderated({}, {})]
        + [moderated({"category_scores": scores}) for scores in NO_SCORES],
        (moderated({"category_scores": {"hate": 0.5, "violence": None}}), 0.5),
    ),
    "chat": (
        "chat_judge",
        {"model": "gpt", "template": "{response}", "choices": {"no": 1}, "pattern": "label:(no)?"},
        ["label:", "no", {"choices": None}, {"choices": [{"message": {"content": ["no"]}}]}],
        ("label:no", 1.0),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_an_answer_that_cannot_be_read_fails_alone_and_is_asked_for_once(models, recorded, name):
    target, arguments, nonsense, (good, value) = READERS[name]
    nonsense = ANYTHING + nonsense
    server, n = recorded(*nonsense, good), len(nonsense) + 1
    model = {"model": models[name]} if name in models else {}
    rewards = build_rewards({"r": RewardConfig(target=target, args=model | arguments | {"remote": remote(server)})})
    scores = rewards.score(["Why?"] * n, ["So."] * n, [None] * n, {})
    assert scores.total.isnan().tolist() == [True] * (n - 1) + [False] and scores.total[-1] == pytest.approx(value)
    assert scores.failures == {"r": {"error": n - 1}} and len(server.seen) == n


def test_a_result_that_cannot_be_read_does_not_spoil_those_in_its_request(recorded):
    calm = {"category_scores": {"hate": 0.25}}
    server = recorded(moderated(calm, None, calm), moderated(None))
    scores = Moderation(remote=remote(server))(["p"] * 3, ["a", "b", "c"])
    assert scores[::2] == [0.25, 0.25] and "gave no category scores: None" in scores[1].message
    assert [body["input"] for _, body, _ in server.seen] == [["a", "b", "c"], ["b"]]


@pytest.mark.parametrize(
    "begin, said",
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
            "refuses a message: no system role",
        ),
        (
            "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
            "shows nothing of message 0 (role 'system')",
        ),
    ],
    ids=["refuses", "leaves out"],
)
def test_a_chat_template_that_does_not_show_a_conversation_costs_its_response_alone(
    models, recorded, tmp_path, begin, said
):
    for name, target, answer in (
        ("judge", "judge", completion([{"5": 0.0, "x": -50.0}])),
        ("reward", "reward_model", {"data": [{"probs": [0]}]}),
    ):
        path = tmp_path / name
        shutil.copytree(models[name], path)
        template = (path / "chat_template.jinja").read_text()
        (path / "chat_template.jinja").write_text(begin + template)
        server = recorded(answer)
        args = {"model": str(path), "remote": remote(server)} | ({"chat": True} if name == "judge" else {})
        prompts = [[USER], [SYSTEM, USER], "Why?"]
        rewards = build_rewards({"r": RewardConfig(target=target, args=args)})
        scores = rewards.score(prompts, ["So."] * 3, [None] * 3, {})
        assert scores.total.isnan().tolist() == [False, True, False] and len(server.seen) == 2
        assert f"the chat template of '{path}' {said}" in scores.messages["r"]


def test_a_request_that_cannot_be_written_costs_its_response_alone(recorded):
    server = recorded({"ok": 1})
    answers = RemoteServer("m", **remote(server)).post_all("/v1", [{"text": "\ud800"}, {"text": "x"}])
    assert answers[0].kind == "error" and "surrogates not allowed" in answers[0].message and answers[1] == {"ok": 1}


class Silent:
    """A server that takes every connection and says nothing. `connections`: all that it took."""

    def __init__(self):
        self.connections = []
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                self.connections.append(self.listening.accept()[0])
            except OSError:  # closed
                return

    def close(self):
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        for connection in self.connections:
            connection.close()


def test_a_server_that_hangs_is_given_up_after_the_patience_by_all_that_wait_for_their_turn():
    silent, n = Silent(), 400
    server = RemoteServer("m", silent.url, timeout=0.3, patience=1.0, retries=1, concurrency=4)
    begun = time.monotonic()
    answers = server.post_all("/v1/completions", [{}] * n)
    elapsed = time.monotonic() - begun
    silent.close()
    died = [a for a in answers if a.kind == "died"]
    assert len(died) > n - 40 and {a.kind for a in answers} <= {"died", "timeout"}
    assert died[-1].message == "the server gave no answer within patience=1 s: no answer within timeout=0.3 s"
    assert len(silent.connections) < 40 and elapsed < 15, "each would have taken 0.3 s: 30 s for four at a time"


def test_a_server_that_answers_slower_than_the_patience_is_not_given_up(recorded):
    server = RecordedJudge(lambda body, n: time.sleep(0.1) or {"n": n})
    answers = RemoteServer("m", **remote(server, patience=0.02, concurrency=2)).post_all("/v1", [{}] * 8)
    server.close()
    assert sorted(answer["n"] for answer in answers) == list(range(8))


@pytest.mark.parametrize(("as_bytes", "code"), [(False, 200), (True, 200), (True, 400)])
def test_a_secret_is_hidden_before_a_message_is_cut(monkeypatch, as_bytes, code):
    """An answer that says something else, one that is no JSON, and a refusal, each with the key across the cut."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    longest = 300 if as_bytes else 200
    texts = ["x" * length + KEY for length in range(longest - len(KEY) - 1, longest)]
    server = RecordedJudge(lambda body, n: texts[n].encode() if as_bytes else texts[n], status=lambda n: code)
    arguments = {"model": "gpt", "template": "{response}", "choices": {"no": 1}}
    config = RewardConfig(target="chat_judge", args=arguments | {"remote": remote(server, api_key_env="JUDGE_KEY")})
    rewards = build_rewards({"r": config})
    for _ in texts:
        message = rewards.score(["p"], ["r"], [None], {}).messages["r"]
        assert "xx" in message and KEY[:2] not in message.rpartition("xx")[2]
    server.close()


def test_nobody_moderates_what_the_judge_could_not_score(models, recorded):
    good, calm = completion([{"1": 0.0, "x": -50.0}]), {"category_scores": {"hate": 0.5}}
    judge, moderation = recorded(good, {}, good), recorded(moderated(calm, calm))
    safety = Safety(
        judge={"model": models["judge"], "template": TEMPLATE, "remote": remote(judge)},
        moderation={"remote": remote(moderation)},
    )
    scores = safety(["Why?"] * 3, ["a", "b", "c"])
    assert scores[::2] == pytest.approx([0.75, 0.75]) and scores[1].message.startswith(
        "judge: the server's answer has no"
    )
    assert [body["input"] for _, body, _ in moderation.seen] == [["a", "c"]]


def test_a_judge_that_is_away_leaves_nothing_to_moderate(models, recorded):
    moderation = recorded(moderated())
    away = {"url": "http://127.0.0.1:9", "patience": 0.0}
    safety = Safety(
        judge={"model": models["judge"], "template": TEMPLATE, "remote": away},
        moderation={"remote": remote(moderation)},
    )
    assert {score.kind for score in safety(["Why?"] * 3, ["a", "b", "c"])} == {"died"} and not moderation.seen


def test_a_column_that_no_response_of_a_rank_has_is_shown_as_one_that_is_empty(models, recorded):
    """Which prompts a rank scores together must not decide about a score."""
    arguments = {"template": "{context}|{response}", "columns": {"context": "Context"}, "choices": {"no": 1}}
    server = recorded("no")
    for columns in ({"Context": [None]}, {}):
        args = {"model": "gpt", **arguments, "remote": remote(server)}
        rewards = build_rewards({"r": RewardConfig(target="chat_judge", args=args)})
        assert rewards.score(["p"], ["r"], [None], columns).total.tolist() == [1.0]
    assert [body["messages"][0]["content"] for _, body, _ in server.seen] == ["|r", "|r"]
