"""vLLM's server for one model, with its address in a file while it answers; standard library only.

    python slurm/serve.py ADDRESS URL_FILE MODEL [option of vllm serve ...]

Listens only on ADDRESS, at a free port. A server that has answered and then ends is started again, at another port, because
rewards wait for it. A failed restart is repeated after a pause that doubles, up to MOST_FAILURES times in a row. Then, or
if no server ever answered, this program ends with the last one's exit code. The file is written in one step, and removed
when the server is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

MOST_FAILURES = 8  # of restarts in a row: two minutes and more, in which memory is freed and file systems come back
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds after a restart that failed


class Stopped(BaseException):
    """A signal asked this program to end."""


def main() -> int:
    name, file, model, *options = sys.argv[1:]
    address, url_file = socket.gethostbyname(name), Path(file)
    if address.startswith("127.") and name not in (address, "localhost"):
        print(
            f"serve.py: here {name} means {address}, which other nodes cannot reach; set FRPO_SERVE_HOST",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGTERM, stop)
    ever_answered, failures = False, 0
    while True:
        url_file.parent.mkdir(parents=True, exist_ok=True)
        url_file.unlink(missing_ok=True)  # left by a server that was killed
        answered, code = serve(address, url_file, model, options)
        if answered:
            ever_answered, failures = True, 0
        else:
            failures += 1
        if not ever_answered or failures >= MOST_FAILURES:
            reason = f"{failures} restarts in a row failed" if ever_answered else "it never answered"
            print(f"serve.py: the server ended with exit code {code}; {reason}", flush=True)
            return code
        pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE) if failures else 0.0
        print(f"serve.py: the server ended with exit code {code}; starting it again in {pause:g} s", flush=True)
        time.sleep(pause)


def serve(address: str, url_file: Path, model: str, options: list[str]) -> tuple[bool, int]:
    """Run a server to its end; return (whether it ever answered, its exit code)."""
    with socket.create_server((address, 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://{address}:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", address, "--port", str(port)]
    # The server's processes are on this node and need not listen on the network.
    environment = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "VLLM_PLUGINS": "", **os.environ}
    server = subprocess.Popen([*command, "--model", model, *options], env=environment, start_new_session=True)
    answered = False
    try:
        while server.poll() is None:
            if not answered and healthy(url):
                answered = True
                write(url_file, url)
                print(f"serve.py: {model} at {url}, as {url_file} says", flush=True)
            wait(server, seconds=1.0 if answered else 0.2)
        return answered, server.returncode
    finally:
        url_file.unlink(missing_ok=True)
        end(server)


def healthy(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


def write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text + "\n")
    draft.rename(path)


def wait(server: subprocess.Popen, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(seconds)


def end(server: subprocess.Popen) -> None:
    """End the server with all of its processes: those that compute outlive a killed one that listens."""
    for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        wait(server, seconds)


def stop(*_) -> None:
    raise Stopped


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Stopped, KeyboardInterrupt):
        sys.exit(0)
