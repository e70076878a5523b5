"""A rank that dies or hangs ends the whole job, with a message that names it; nothing waits for it for ever.

One daemon thread per rank. Every rank keeps one TCP connection to rank 0, and both ends tell each other which
phase they are in. A connection that closes means a dead process, at once and across hosts (a heartbeat in a
TCPStore would only be overdue some time); silence means a stopped or unreachable one. The main thread takes
no part: it may sit in a collective, or hold the GIL for less than heartbeat_timeout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.processes.heartbeat import Link, accept_ranks, connect_to_rank_0, rank_list

EXIT_LOST = 75  # EX_TEMPFAIL: a rank died or hung; the same job may well succeed, so requeue it
EXIT_FAILED = 1  # a rank raised: the same job would probably raise again
EXIT_WRONG = 2  # it raised ConfigError: the same job certainly would, and slurm/lib.sh does not requeue it
STDERR = 2  # the descriptor: sys.stderr may be redirected, and its lock be held by the thread that hangs


class Phase(NamedTuple):
    name: str
    step: int


@dataclass(frozen=True)
class Failure:
    """Why the job ends: `text` says what happened to `rank`; those who leave because of it exit with
    `code`."""

    rank: int
    text: str
    code: int


class Watchdog:
    """Watches one rank from inside and its peers from outside. As a context manager it notes exceptions.

    phase_timeout: seconds that one phase may last. heartbeat_timeout: seconds of silence after which a rank
    counts as stopped; more than the longest time that the main thread may hold the GIL. store: a c10d store
    through which the ranks find each other; None: that of the default process group. Stacks go to
    run_dir/stacks/rank_K.txt.
    """

    _starts = 0  # watchdogs that this process has started: the n-th of one rank meets the n-th of the others

    def __init__(
        self,
        rank: int,
        world_size: int,
        run_dir: str | Path,
        *,
        phase_timeout: float,
        heartbeat_timeout: float = 30.0,
        store=None,
    ):
        self.rank, self.world_size = rank, world_size
        self.phase_timeout, self.heartbeat_timeout = phase_timeout, heartbeat_timeout
        self._interval = min(2.0, heartbeat_timeout / 5)
        # An exception may be the echo of a peer's death (gloo raises in every rank), and that peer's
        # connection closes in the same moment: wait a little before believing it. The others leave the
        # judgement to rank 0.
        self._settle = 0.0 if world_size == 1 else 1.0 if rank == 0 else 5.0
        self._store = store
        self._stacks_path = Path(run_dir) / "stacks" / f"rank_{rank}.txt"
        self._phase, self._entered = Phase("start", 0), 0  # and how many phases this rank has begun
        self._links: dict[int, Link] = {}
        self._own_failure: Failure | None = None  # an exception or an overdue phase of this rank
        self._failures: list[tuple[float, Failure]] = []  # (when it came, what a rank says of itself)
        self._verdict: Failure | None = None  # what rank 0 has decided
        self._told_state: tuple[Phase, Failure | None] | None = None  # what the peers were last told of this rank
        self._told_at = 0.0
        self._told = threading.Event()  # everyone knows of this rank's failure
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect the ranks and begin to watch. Collective: every rank calls it, after init_process_group.

        Raises TimeoutError when a rank does not come within twice heartbeat_timeout.
        """
        Watchdog._starts += 1
        if self.world_size > 1:
            self._links = self._connect()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        # A forked child (reward worker, checkpoint writer) would keep our connections open after our death.
        os.register_at_fork(after_in_child=self._close_links)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        self.enter(*self._phase)

    def enter(self, phase: str, step: int) -> None:
        """This rank begins `phase` of `step`; phase_timeout starts anew."""
        self._phase, self._entered = Phase(phase, step), self._entered + 1
        if self._thread is None:
            return
        # Our own thread cannot run while the main thread hangs with the GIL held: a timer in C can.
        faulthandler.dump_traceback_later(self.phase_timeout + self.heartbeat_timeout, exit=True, file=STDERR)
        self._wake()

    def note_failure(self, error: BaseException) -> None:
        """This rank is about to end with `error`: the others leave, with a message that says so.

        Returns when they know (within seconds), so that the traceback can be printed; does not return if
        `error` turns out to be the echo of another rank's end.
        """
        if self._thread is None:
            return
        summary = redact.text(f"{type(error).__name__}: {error}").split("\n")[0][:300].removesuffix(": ")
        code = EXIT_WRONG if isinstance(error, ConfigError) else EXIT_FAILED
        self._own_failure = self._failure(f"failed ({summary})", code)
        self._wake()
        self._told.wait(self._settle + 5.0)
        # The peers are gone: should a destructor wait for them, leave all the same.
        faulthandler.dump_traceback_later(self.heartbeat_timeout, exit=True, file=STDERR)

    def stop(self) -> None:
        """A clean end: the others go on without this rank."""
        if self._thread is None:
            return
        self._stopping = True
        self._wake()
        self._thread.join(self._interval + 5.0)
        self._thread = None
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.stop()
        else:
            self.note_failure(error)

    def _connect(self) -> dict[int, Link]:
        store = self._store
        if store is None:
            from torch.distributed.distributed_c10d import _get_default_store

            store = _get_default_store()
        key, timeout = f"frpo_nemo/watchdog/{Watchdog._starts}", 2 * self.heartbeat_timeout
        if self.rank == 0:
            return accept_ranks(store, key, self.world_size, timeout)
        return {0: connect_to_rank_0(store, key, self.rank, timeout)}

    def _close_links(self) -> None:
        for link in self._links.values():
            link.socket.close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it wakes anyway
            os.write(self._wake_writer, b".")

    def _failure(self, what: str, code: int) -> Failure:
        return Failure(self.rank, _describe(self.rank, self._place(), what), code)

    def _place(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "phase": self._phase}

    # From here on: the watchdog's thread.

    def _run(self) -> None:
        self._selector = selectors.PollSelector()  # no state in the kernel, which a forked child would share
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        for link in self._links.values():
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        age, phase, before = 0.0, self._phase, time.monotonic()
        while not self._stopping:
            self._receive()
            # While this process itself was stopped (Ctrl-Z, a suspended machine), nobody was at fault.
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * self._interval), now
            for link in self._links.values():
                link.silence += elapsed
            current = self._phase
            age, phase = (age + elapsed if current is phase else 0.0), current
            if age > self.phase_timeout and self._own_failure is None:
                self._own_failure = self._failure(self._hangs(), EXIT_LOST)
            self._note(self._own_failure)
            self._tell_state()
            verdict = self._judge()
            if verdict:
                return self._execute(verdict)
        for link in self._links.values():
            link.send({"kind": "bye"})
        for link in self._links.values():
            link.finish()

    def _receive(self) -> None:
        """Wait up to an interval for news of any peer, and take it in."""
        for key, _ in self._selector.select(self._interval):
            link = key.data
            if link is None:
                os.read(self._wake_reader, 4096)
                continue
            for message in link.receive():
                self._take(link, message)
            if link.closed:
                self._selector.unregister(key.fileobj)
                link.socket.close()

    def _take(self, link: Link, message: dict[str, Any]) -> None:
        if message["kind"] == "bye":
            link.closed = True
            del self._links[link.rank]
        elif message["kind"] == "verdict":
            self._verdict = Failure(**message["failure"])
        else:
            link.state = message
            if message["failure"]:
                self._note(Failure(**message["failure"]))

    def _note(self, failure: Failure | None) -> None:
        if failure and all(failure.rank != noted.rank for _, noted in self._failures):
            self._failures.append((time.monotonic(), failure))

    def _tell_state(self) -> None:
        """Tell the peers where this rank is: when that changes, and every interval. (Not whenever they write:
        two ranks would answer each other without end.)"""
        state, now = (self._phase, self._own_failure), time.monotonic()
        if state == self._told_state and now - self._told_at < self._interval:
            return
        self._told_state, self._told_at = state, now
        failure = self._own_failure and asdict(self._own_failure)
        for link in self._links.values():
            link.send({"kind": "state", "failure": failure, **self._place(), "entered": self._entered})

    def _judge(self) -> Failure | None:
        """Why the job must end, or None while all is well: rank 0 decides; the others do if rank 0 cannot."""
        if self._verdict:
            return self._verdict
        failed = {failure.rank for _, failure in self._failures}
        for link in self._links.values():
            if link.closed and link.rank not in failed:
                return self._verdict_on(link, "died")
            if link.silence > self.heartbeat_timeout:
                return self._verdict_on(link, f"stopped (silent for {link.silence:.0f} s)")
        if self._failures and time.monotonic() - self._failures[0][0] >= self._settle:
            return self._with_others(self._who_is_behind(self._failures[0][1]))
        return None

    def _who_is_behind(self, failure: Failure) -> Failure:
        """Of a phase that hangs, the rank that has begun the fewest: all begin the same ones, and wait for the last."""
        if failure.code != EXIT_LOST:
            return failure
        places = [(self._entered, self.rank, self._place())]
        places += [(link.state["entered"], link.rank, link.state) for link in self._links.values()]
        fewest, rank, place = min(places, key=lambda entry: entry[0])
        if all(entered == fewest for entered, *_ in places):
            return failure
        return Failure(rank, _describe(rank, place, self._hangs()), EXIT_LOST)

    def _hangs(self) -> str:
        return f"hangs (for longer than phase_timeout={self.phase_timeout:g} s)"

    def _verdict_on(self, link: Link, what: str) -> Failure:
        return self._with_others(Failure(link.rank, _describe(link.rank, link.state, what), EXIT_LOST))

    def _with_others(self, failure: Failure) -> Failure:
        """`failure`, with what the other ranks were doing, as far as rank 0 knows it."""
        phases = {link.rank: Phase(*link.state["phase"]) for link in self._links.values()} | {self.rank: self._phase}
        ranks_in: dict[Phase, list[int]] = {}
        for rank in sorted(phases.keys() - {failure.rank}):
            ranks_in.setdefault(phases[rank], []).append(rank)
        if self.rank != 0 or not ranks_in:
            return failure
        others = ", ".join(f'{rank_list(ranks)} in "{p.name}" at step {p.step}' for p, ranks in ranks_in.items())
        return Failure(failure.rank, f"{failure.text}; meanwhile {others}", failure.code)

    def _execute(self, verdict: Failure) -> None:
        if self.rank == 0:
            for link in self._links.values():
                link.send({"kind": "verdict", "failure": asdict(verdict)})
        message = f"watchdog: {verdict.text}; rank {self.rank} leaves (exit code {verdict.code})\n".encode()
        with contextlib.suppress(OSError):  # stderr on a full disk, or its reader gone: leave all the same
            os.write(STDERR, message)  # first of all: torchrun may end us within a tenth of a second
        if verdict.rank == self.rank and verdict.code != EXIT_LOST:
            self._told.set()  # the main thread goes on: its traceback says the rest
            return
        self._dump_stacks(message, to_stderr=verdict.code == EXIT_LOST)
        for child in multiprocessing.active_children():  # os._exit would leave them behind
            child.kill()
        if self.rank == 0:
            time.sleep(0.5)  # let the verdict reach the others before our connections close
        os._exit(verdict.code)

    def _dump_stacks(self, message: bytes, to_stderr: bool) -> None:
        if to_stderr:
            faulthandler.dump_traceback(STDERR)
        with contextlib.suppress(OSError):  # a full disk, perhaps what went wrong: this rank must leave all the same
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._stacks_path, "ab", buffering=0) as file:  # earlier attempts are evidence: append
                file.write(time.strftime("%Y-%m-%d %H:%M:%S ").encode() + message)
                faulthandler.dump_traceback(file)


def _describe(rank: int, place: dict[str, Any], what: str) -> str:
    phase = Phase(*place["phase"])
    return f'rank {rank} (host {place["host"]}, pid {place["pid"]}) {what} in phase "{phase.name}" at step {phase.step}'
