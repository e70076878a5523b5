"""slurm/serve.py with a program in vLLM's place that ends when and how a test wants: what is started again, and what is not.
With vLLM itself: test_remote_rewards.py."""

import signal
import subprocess
import sys
import time

import pytest
from reward_models import SERVE

# What `python -m vllm.entrypoints.openai.api_server` runs: the n-th start does what the n-th word of PLAN says, or the last.
PROGRAM = """
import http.server, pathlib, signal, sys
here = pathlib.Path(__file__).parent
with (here / "starts").open("a") as file:
    file.write("x")
plan = (here / "plan").read_text().split()
act = plan[min(len((here / "starts").read_text()), len(plan)) - 1]
if act == "fail":
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200), self.end_headers()
    def log_message(self, *_):
        pass

server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler)
server.handle_request()
server.server_close()
if act == "stay":
    signal.pause()
sys.exit(4)
"""


@pytest.fixture
def serve(tmp_path):
    """Starts slurm/serve.py on a plan; its pauses are short. What it started is ended with the test."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for directory in (package, *package.parents[:2]):
        (directory / "__init__.py").touch()
    (package / "api_server.py").write_text(PROGRAM)
    started = []

    def start(plan: str) -> subprocess.Popen:
        (package / "plan").write_text(plan)
        quick = f"import sys; sys.path.insert(0, {str(SERVE.parent)!r}); import serve; serve.FIRST_PAUSE = 0.01\n"
        quick += "try: sys.exit(serve.main())\nexcept serve.Stopped: sys.exit(0)"
        command = [sys.executable, "-c", quick, "127.0.0.1", str(tmp_path / "judge.url"), "a_model"]
        environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    start.count = lambda: len((package / "starts").read_text())
    start.url_file = tmp_path / "judge.url"
    yield start
    for process in started:
        process.terminate()
        process.wait()


def test_a_server_that_had_answered_is_started_again_though_its_first_restarts_fail(serve):
    process = serve("answer fail fail answer fail stay")
    deadline = time.monotonic() + 60
    while not (serve.url_file.exists() and serve.count() == 6):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and not serve.url_file.exists()
    pauses = [line.rpartition(" in ")[2] for line in said.splitlines() if "starting it again" in line]
    assert pauses == ["0 s", "0.01 s", "0.02 s", "0 s", "0.01 s"], "growing, and from the start after one that answered"


def test_restarts_that_fail_in_a_row_end_it(serve):
    process = serve("answer fail")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 3 and serve.count() == 1 + 8
    assert said.splitlines()[-1] == "serve.py: the server ended with exit code 3; 8 restarts in a row failed"


def test_a_server_that_never_answered_is_not_started_again(serve):
    process = serve("fail")
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 3 and serve.count() == 1
    assert said == "serve.py: the server ended with exit code 3; it never answered\n"
