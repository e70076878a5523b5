"""Reward functions in separate processes, because killing its process is the only way to stop one that hangs.

Workers are fresh interpreters started by exec with one socket. They aren't forked: a fork would copy a process
full of threads, gloo or NCCL sockets and CUDA state. Nor are they started by `multiprocessing`, whose spawn and
forkserver import `__main__`, the whole training program, into every worker. Workers live as long as the pool and
score one response at a time. Each leads a process group, so that the processes it starts are killed with it, and
is replaced when it dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from frpo_nemo.rewards.registry import Failure, Outcome

STARTUP_SECONDS = 300.0  # to import the function's module, on a busy machine


class WorkerPool:
    """Processes, at most `workers`, in which `call` scores responses, `timeout` seconds each. They start on first
    use."""

    def __init__(self, name: str, target: str, args: dict[str, Any], workers: int, timeout: float) -> None:
        self._name, self._target, self._args = name, target, args
        self._size, self._timeout = workers, timeout
        self._workers: list[_Worker] = []
        weakref.finalize(self, _kill_all, self._workers)  # also at the end of the interpreter

    def close(self) -> None:
        """Kill the workers. A later call starts new ones."""
        _kill_all(self._workers)

    def call(self, prompts: list, completions: list[str], columns: dict[str, list]) -> list[Outcome]:
        """Return one outcome per response: a Failure where its worker hung or died, which leaves the others
        unaffected. Raises RuntimeError when a worker cannot even import the function."""
        outcomes: list[Outcome] = [None] * len(completions)
        waiting = deque(range(len(completions)))
        while waiting or any(w.response is not None for w in self._workers):
            self._start_missing(len(waiting))
            for worker in (w for w in self._workers if w.idle and waiting):
                i = waiting.popleft()
                worker.give(i, (prompts[i], completions[i], {k: v[i] for k, v in columns.items()}), self._timeout)
            for worker in self._settled():
                response, outcome = worker.response, self._receive(worker)
                if response is not None:
                    outcomes[response] = outcome
        return outcomes

    def _start_missing(self, wanted: int) -> None:
        for worker in [w for w in self._workers if w.idle and not w.alive]:
            self._remove(worker)  # died between two responses, so no response failed
        useful = min(self._size, wanted + sum(w.response is not None for w in self._workers))
        while len(self._workers) < useful:
            self._workers.append(_Worker(self._target, self._args))

    def _settled(self) -> list[_Worker]:
        """Wait for the next event; return the workers that sent something, died, or are out of time."""
        busy: dict[Any, _Worker] = {w.connection: w for w in self._workers if not w.idle}
        patience = max(0.0, min((w.deadline for w in busy.values()), default=0.0) - time.monotonic())
        spoke = wait(list(busy), patience) if busy else []
        return [busy[c] for c in spoke] or [w for w in busy.values() if w.deadline <= time.monotonic()]

    def _receive(self, worker: _Worker) -> Outcome:
        """Return the outcome of the worker's current task; the worker is then idle, or gone."""
        try:
            if worker.connection.poll():
                outcome = worker.connection.recv()
                worker.become_idle()
                return outcome
            failure = Failure("timeout", f"took more than {self._timeout} s")
        except (EOFError, ConnectionResetError):
            failure = Failure("died", "its worker process ended")
        self._remove(worker)
        if worker.starting:
            raise RuntimeError(
                f"reward.{self._name}: no worker process could import {self._target} ({failure.kind}); "
                "the worker's own message is above"
            )
        return failure

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


class _Worker:
    """A process that is starting, idle, or scoring the response of index `response` until `deadline`."""

    def __init__(self, target: str, args: dict[str, Any]) -> None:
        self.connection, theirs = Pipe()
        self.process = _start_interpreter(theirs)
        theirs.close()  # else the worker's end would stay open here after it dies
        self.connection.send((target, args))
        self.starting, self.idle = True, False
        self.response: int | None = None
        self.deadline = time.monotonic() + STARTUP_SECONDS

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def give(self, index: int, response: tuple, timeout: float) -> None:
        self.idle, self.response, self.deadline = False, index, time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: the next receive reports it
            self.connection.send(response)

    def become_idle(self) -> None:
        self.starting, self.idle, self.response = False, True, None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the whole group is gone already
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


def _start_interpreter(socket: Connection) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "frpo_nemo.rewards.worker", str(socket.fileno())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=[socket.fileno()],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
