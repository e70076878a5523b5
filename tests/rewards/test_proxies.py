"""Servers of the cluster are reached past a web proxy of the environment, which knows no way to them; others through it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.remote import RemoteServer, is_near

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Answering:
    """An HTTP server that answers every POST with `status` and {"from": name}; `asked`: for which addresses."""

    def __init__(self, name: str, address: str, status: int = 200):
        server = self
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                server.asked.append(self.path)
                reply = json.dumps({"from": name}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer((address, 0), Handler)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def node():
    server = Answering("node", "127.0.0.2")
    yield server
    server.http.shutdown()


@pytest.fixture
def proxy():
    server = Answering("proxy", "127.0.0.1")
    yield server
    server.http.shutdown()


@pytest.fixture
def environment(monkeypatch):
    """Function that sets proxy variables, of which no others are set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def ask(url: str) -> list:
    return RemoteServer("m", url, timeout=5, patience=1).post_all("/v1/completions", [{"a": 1}])


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_node_is_asked_directly(node, proxy, environment, name, scheme):
    environment(**{name: f"{scheme}127.0.0.1:{proxy.port}"})
    assert ask(f"http://127.0.0.2:{node.port}") == [{"from": "node"}]
    assert proxy.asked == []


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:1080", "nonsense://x"])
def test_a_proxy_that_nobody_can_use_does_not_matter_for_a_node(node, environment, value):
    environment(ALL_PROXY=value)
    assert ask(f"http://127.0.0.2:{node.port}") == [{"from": "node"}]


def test_a_server_of_a_url_file_is_asked_directly(node, proxy, environment, tmp_path):
    environment(http_proxy=f"http://127.0.0.1:{proxy.port}")
    (tmp_path / "judge.url").write_text(f"http://127.0.0.2:{node.port}\n")
    assert ask(str(tmp_path / "judge.url")) == [{"from": "node"}]


def test_a_server_elsewhere_is_asked_through_the_proxy(proxy, environment):
    """An address for documentation that nobody has: the proxy alone can answer."""
    environment(http_proxy=f"http://127.0.0.1:{proxy.port}")
    assert ask("http://judge.example.invalid") == [{"from": "proxy"}]
    assert proxy.asked == ["http://judge.example.invalid/v1/completions"]


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:1080", "nonsense://x"])
def test_a_proxy_that_cannot_be_used_is_told_before_any_request(environment, value):
    environment(ALL_PROXY=value)
    with pytest.raises(ConfigError, match="remote.url=http://judge.example.invalid: the proxy set in the environment"):
        RemoteServer("m", "http://judge.example.invalid")


def test_what_is_near():
    near = ["localhost", "node17", "10.1.2.3", "172.16.0.9", "192.168.1.1", "127.0.0.1", "100.64.0.1", "::1", "fd00::1"]
    assert all(is_near(host) for host in near)
    assert not any(is_near(host) for host in ("8.8.8.8", "judge.example.invalid", "2001:4860:4860::8888"))
