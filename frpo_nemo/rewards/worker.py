"""What a reward worker runs: `python -m frpo_nemo.rewards.worker FD`. It receives (target, args) over the
socket FD, answers None when the function is there, then scores one response after another until the socket
closes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from frpo_nemo.rewards.call import bind, call_one


def main() -> None:
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    function = bind(*connection.recv())
    connection.send(None)
    while True:
        try:
            response = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(call_one(function, *response))


def _die_with_parent(parent: int) -> None:
    # A closed socket tells an idle worker; one that hangs in a reward would outlive a killed trainer.
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
