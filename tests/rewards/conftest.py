"""Shared by the tests of model-based rewards: tiny models, and one vLLM server for each kind, for the session."""

import pytest
from reward_models import Server, make_classifier, make_judge


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Return name -> directory."""
    at = tmp_path_factory.mktemp("models")
    return {
        "judge": make_judge(at / "judge"),
        "reward": make_classifier(at / "reward", ["reward"]),
        "multi": make_classifier(
            at / "multi", ["hate", "violence", "self-harm"], problem_type="multi_label_classification"
        ),
        "exclusive": make_classifier(at / "exclusive", ["safe", "hate", "violence"], seed=2),
    }


@pytest.fixture(scope="session")
def servers(models, tmp_path_factory):
    """Both start together, while other tests run; `servers["judge"].up()` waits for one."""
    started = {
        "judge": Server(models["judge"], tmp_path_factory.mktemp("judge")),
        "reward": Server(models["reward"], tmp_path_factory.mktemp("reward"), "--runner", "pooling"),
    }
    for server in started.values():
        server.start()
    yield started
    for server in started.values():
        server.end()
