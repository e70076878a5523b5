"""The program of a reward worker: `python -m frpo_nemo.rewards.worker FD`. It receives (target, args) over the
socket FD, answers None once the function is imported, then scores one response after another until the socket
closes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from frpo_nemo.rewards.registry import bind, call_one


def main() -> None:
    _stay_when_the_run_is_asked_to_stop()
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    function = bind(*connection.recv())
    function.load()
    connection.send(None)
    while True:
        try:
            response = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send(call_one(function, *response))


def _stay_when_the_run_is_asked_to_stop() -> None:
    """Ignore the signals that Slurm may send to all processes of a job: the trainer, their target, still needs scores."""
    signals = {signal.SIGUSR1, signal.SIGTERM}
    for number in signals:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that a reward starts would inherit

    def default_in_child():
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    os.register_at_fork(  # blocked, or a child would lose a signal that comes before it has its own handlers
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signals),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, signals),
        after_in_child=default_in_child,
    )


def _die_with_parent(parent: int) -> None:
    # A closed socket ends an idle worker; one that hangs in a reward would outlive a killed trainer.
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
