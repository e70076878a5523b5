"""Rewards by servers: vLLM's own OpenAI server gives the numbers of the same model in this process, whatever happens to
it; and a moderation service of OpenAI's protocol (recorded answers, since the service is OpenAI's)."""

import contextlib
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
from reward_models import LOCAL, TEMPLATE

from frpo_nemo.config.options import RewardConfig
from frpo_nemo.rewards.models.classifiers import RewardModel
from frpo_nemo.rewards.models.judge import Judge
from frpo_nemo.rewards.models.safety import Moderation
from frpo_nemo.rewards.registry import Failure
from frpo_nemo.rewards.reward_set import build_rewards

PROMPTS = [
    "How do I do it?",
    "Why?",
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hi"}],
]
RESPONSES = ["I will not.", "", "Hi there! " * 12]
KEY = "sesame-open-sesame"  # like no known service's


class Service:
    """An HTTP server that answers each request by `answer(text)`: (status, category scores or error). `seen`: what it was
    sent."""

    def __init__(self, answer):
        service = self
        self.seen: list[tuple[str, list[str]]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.seen.append((self.headers.get("Authorization"), body["input"]))
                answers = [answer(text) for text in body["input"]]
                status = max(status for status, _ in answers)
                content = {"results": [{"category_scores": scores} for _, scores in answers]}
                reply = json.dumps(content if status == 200 else {"error": str(answers)}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # whoever asked has given up
                    self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture(scope="module", autouse=True)
def _servers_end_with_these_tests(servers):
    yield
    for server in servers.values():
        server.end()


@pytest.fixture
def serve():
    services = []

    def start(answer):
        services.append(Service(answer))
        return services[-1]

    yield start
    for service in services:
        service.http.shutdown()
        service.http.server_close()


def category_scores(text):
    return {
        "hate": (200, {"hate": 0.9, "violence": 0.2}),
        "none": (200, {}),
        "null": (200, {"hate": None}),
        "refused": (400, f"invalid text, your key is {KEY}"),
        "broken": (500, "no luck"),
    }.get(text, (200, {"hate": 0.0, "violence": 0.1}))


def test_moderation_is_the_largest_category_and_a_text_without_one_fails_alone(serve, monkeypatch):
    monkeypatch.setenv("MODERATOR", KEY)
    service = serve(category_scores)
    moderation = Moderation(inputs_per_request=3, remote={"url": service.url, "api_key_env": "MODERATOR"})
    scores = moderation(["p"] * 5, ["hate", "none", "calm", "null", "calm"])
    assert [s if isinstance(s, float) else s.kind for s in scores] == [0.9, "error", 0.1, "error", 0.1]
    assert scores[1].message == "the moderation service gave no category scores: {'category_scores': {}}"
    assert {header for header, _ in service.seen} == {f"Bearer {KEY}"}
    assert sorted(len(texts) for _, texts in service.seen[:2]) == [2, 3]


def test_a_text_that_the_service_refuses_does_not_spoil_those_in_its_request(serve, monkeypatch, caplog, capfd):
    monkeypatch.setenv("MODERATOR", KEY)
    caplog.set_level(logging.DEBUG)
    config = RewardConfig(
        target="moderation", args={"remote": {"url": serve(category_scores).url, "api_key_env": "MODERATOR"}}
    )
    scores = build_rewards({"m": config}).score(["p"] * 3, ["hate", "refused", "calm"], [None] * 3, {})
    assert scores.total.tolist()[::2] == [0.9, 0.1] and scores.failures == {"m": {"error": 1}}
    assert "answered 400" in scores.messages["m"] and "REDACTED" in scores.messages["m"]
    written = caplog.text + scores.messages["m"] + "".join(capfd.readouterr())
    assert KEY not in written


def test_a_request_that_breaks_the_server_is_given_up_after_its_retries_and_others_are_not(serve):
    service = serve(category_scores)
    moderation = Moderation(inputs_per_request=1, remote={"url": service.url, "retries": 1})
    scores = moderation(["p"] * 3, ["broken", "calm", "hate"])
    assert scores[1:] == [0.1, 0.9] and scores[0].kind == "error" and "answered 500" in scores[0].message
    assert sum(texts == ["broken"] for _, texts in service.seen) == 2


def test_a_server_that_is_busy_is_asked_again(serve):
    first = threading.Event()

    def busy_once(text):
        busy, _ = not first.is_set(), first.set()
        return (429, "slow down") if busy else (200, {"hate": 0.5})

    moderation = Moderation(inputs_per_request=1, remote={"url": serve(busy_once).url, "retries": 0})
    assert moderation(["p"], ["calm"]) == [0.5]


def test_a_server_that_does_not_answer_in_time_is_a_timeout(serve):
    never = threading.Event()
    service = serve(lambda text: (200, {"late": float(never.wait(30))}))
    scores = Moderation(remote={"url": service.url, "timeout": 0.2, "retries": 1})(["p"], ["calm"])
    never.set()
    assert scores == [Failure("timeout", "no answer within timeout=0.2 s")]


def test_a_remote_judge_is_the_local_one(models, servers):
    arguments = {"template": TEMPLATE, "max_response_tokens": 40}
    local = Judge(models["judge"], **arguments, local=LOCAL)
    local.load()
    remote = Judge(models["judge"], **arguments, remote={"url": str(servers["judge"].up().url_file)})
    assert remote(PROMPTS, RESPONSES) == pytest.approx(local(PROMPTS, RESPONSES), abs=1e-5)


def test_a_remote_judge_that_answers_something_else_and_a_server_of_another_model_are_failures(models, servers):
    url = servers["judge"].up().url + "/v1"
    (nonsense,) = Judge(models["judge"], template=TEMPLATE, min_mass=0.9, remote={"url": url})(["Why?"], ["Because"])
    assert nonsense.kind == "error" and "answers something else" in nonsense.message
    (other,) = Judge(models["judge"], template=TEMPLATE, remote={"url": url, "served_model_name": "x"})(
        ["Why?"], ["So"]
    )
    assert other.kind == "error" and "The model `x` does not exist" in other.message
    (wrong,) = RewardModel(models["reward"], remote={"url": url, "served_model_name": models["judge"]})(
        ["Why?"], ["So"]
    )
    assert wrong.kind == "error" and "answered 404" in wrong.message


def test_a_judge_knows_how_far_it_may_be_wrong_when_a_server_tells_only_the_largest_log_probs(models):
    judge = Judge(models["judge"], template=TEMPLATE, remote={"url": "http://127.0.0.1:1"})

    def read(told):
        return judge._read({"choices": [{"logprobs": {"top_logprobs": [told]}}]})

    assert read({"1": -0.1, "token_id:99": -9.0}) == pytest.approx(0.0)
    assert read({"1": -0.7, "5": -0.7, "x": -12.0}) == pytest.approx(0.5)
    unknown = read({"1": -1.0, "x": -2.0})
    assert unknown.kind == "error" and "returns too few log-probs: the score may be wrong by 0.6" in unknown.message
    assert "has no log-probs" in read(None).message


def test_a_server_listens_on_the_address_that_it_was_given_alone(servers):
    listening = {
        connection.laddr.ip
        for process in servers["reward"].up().processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_server_that_dies_in_a_batch_and_comes_back_elsewhere_loses_nothing(models, servers):
    server, n = servers["reward"].up(), 400
    responses = [f"Answer {i}" for i in range(n)]
    local = RewardModel(models["reward"], local=LOCAL)
    local.load()
    remote = RewardModel(models["reward"], remote={"url": str(server.url_file), "concurrency": 4})
    former, begun = server.url, server.answered("/classify")
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(remote, ["Why?"] * n, responses)
        while server.answered("/classify") < begun + 10:
            assert not asked.done()
        for process in server.processes:
            process.kill()
        answered = server.answered("/classify") - begun
        assert answered < n, "it died too late to show anything"
        assert asked.result() == pytest.approx(local(["Why?"] * n, responses), abs=1e-5)
    assert server.url != former
    assert server.answered("/classify") - begun >= n


def test_a_server_that_stays_away_fails_what_is_left_within_the_patience(models, servers):
    server, n = servers["reward"].up(), 400
    arguments = {"model": models["reward"], "remote": {"url": str(server.url_file), "concurrency": 4, "patience": 1.0}}
    rewards = build_rewards({"r": RewardConfig(target="reward_model", args=arguments)})
    begun = server.answered("/classify")
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(rewards.score, ["Why?"] * n, [f"Answer {i}" for i in range(n)], [None] * n, {})
        while server.answered("/classify") < begun + 10:
            assert not asked.done()
        server.end()
        scores = asked.result(timeout=300)
    assert not server.url_file.exists()
    lost = int(scores.total.isnan().sum())
    assert 0 < lost < n and scores.failures == {"r": {"died": lost}}
    assert "gave no answer within patience=1 s" in scores.messages["r"]
