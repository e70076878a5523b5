"""A chat model as a service, for tests: a real HTTP server that answers what was recorded."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RecordedJudge:
    """An HTTP server on 127.0.0.1 that answers a request by `answer(body, n)`, n the number of requests before: a text, or
    all that it sends, as dict or bytes, with the code `status(n)`. It is gone after `lives` requests. `seen`:
    (Authorization, body, answer) of each."""

    def __init__(
        self,
        answer: Callable[[dict, int], str | None | dict | bytes],
        *,
        lives: int = 1 << 30,
        status: Callable[[int], int] = lambda n: 200,
    ):
        judge, lock = self, threading.Lock()
        self.seen: list[tuple[str | None, dict, str | None | dict | bytes]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    if len(judge.seen) >= lives:
                        threading.Thread(target=judge.close).start()
                        return  # without an answer, the connection breaks off
                    code, said = status(len(judge.seen)), answer(body, len(judge.seen))
                    judge.seen.append((self.headers.get("Authorization"), body, said))
                if said is None or isinstance(said, str):
                    said = {"choices": [{"message": {"role": "assistant", "content": said}}]}
                reply = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
