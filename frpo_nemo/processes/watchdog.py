"""End the whole job when a rank dies or hangs, with a message that names the rank, so that nothing waits for it forever.

Each rank runs one daemon thread. It keeps one TCP connection to rank 0, over which both ends report the phase that they are
in. A closed connection means a dead process, at once and across hosts (a heartbeat in a TCPStore would only become overdue);
silence means a stopped or unreachable one. The main thread takes no part: it may be in a collective, or hold the GIL for
less than heartbeat_timeout.
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

EXIT_LOST = 75  # EX_TEMPFAIL: a rank died or hung; the same job may succeed, so requeue it
EXIT_FAILED = 1  # a rank raised: the same job would probably raise again
EXIT_WRONG = 2  # a rank raised ConfigError: the same job would raise again, so slurm/lib.sh does not requeue it
STDERR = 2  # the descriptor: sys.stderr may be redirected, and a hanging thread may hold its lock


class Phase(NamedTuple):
    name: str
    step: int


@dataclass(frozen=True)
class Failure:
    """Why the job ends: `text` describes what happened to `rank`; ranks that leave because of it exit with `code`."""

    rank: int
    text: str
    code: int


class Watchdog:
    """Watch one rank from inside and its peers from outside. As a context manager it notes exceptions.

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
        # A peer's death may cause the exception (gloo raises on every rank), and that peer's connection closes at the
        # same moment: wait a little before reporting the exception. Ranks other than 0 leave the decision to rank 0.
        self._settle = 0.0 if world_size == 1 else 1.0 if rank == 0 else 5.0
        self._store = store
        self._stacks_path = Path(run_dir) / "stacks" / f"rank_{rank}.txt"
        self._phase, self._entered = Phase("start", 0), 0  # phase; number of phases that this rank has begun
        self._links: dict[int, Link] = {}
        self._own_failure: Failure | None = None  # an exception or an overdue phase of this rank
        self._failures: list[tuple[float, Failure]] = []  # (time received, failure that a rank reported of itself)
        self._verdict: Failure | None = None  # decided by rank 0
        self._told_state: tuple[Phase, Failure | None] | None = None  # last state of this rank sent to the peers
        self._told_at = 0.0
        self._told = threading.Event()  # all ranks know of this rank's failure
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect the ranks and begin to watch. Collective: every rank calls it, after init_process_group.

        Raises TimeoutError when a rank does not connect within twice heartbeat_timeout.
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
        """Record that this rank begins `phase` of `step`, and restart phase_timeout."""
        self._phase, self._entered = Phase(phase, step), self._entered + 1
        if self._thread is None:
            return
        # The watchdog's thread cannot run while the main thread hangs with the GIL held; a timer in C can.
        faulthandler.dump_traceback_later(self.phase_timeout + self.heartbeat_timeout, exit=True, file=STDERR)
        self._wake()

    def note_failure(self, error: BaseException) -> None:
        """Report that this rank is about to end with `error`, so that the others leave with a message that names it.

        Returns when they know (within seconds), so that the traceback can be printed; does not return if
        the end of another rank turns out to have caused `error`.
        """
        if self._thread is None:
            return
        summary = redact.text(f"{type(error).__name__}: {error}").split("\n")[0][:300].removesuffix(": ")
        code = EXIT_WRONG if isinstance(error, ConfigError) else EXIT_FAILED
        self._own_failure = self._failure(f"failed ({summary})", code)
        self._wake()
        self._told.wait(self._settle + 5.0)
        # The peers are gone: leave even if a destructor waits for them.
        faulthandler.dump_traceback_later(self.heartbeat_timeout, exit=True, file=STDERR)

    def stop(self) -> None:
        """End cleanly: the other ranks continue without this one."""
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
        with contextlib.suppress(BlockingIOError):  # the pipe is full: the thread wakes anyway
            os.write(self._wake_writer, b".")

    def _failure(self, what: str, code: int) -> Failure:
        return Failure(self.rank, _describe(self.rank, self._place(), what), code)

    def _place(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "phase": self._phase}

    # The methods below run in the watchdog's thread.

    def _run(self) -> None:
        self._selector = selectors.PollSelector()  # no state in the kernel, which a forked child would share
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        for link in self._links.values():
            self._selector.register(link.socket, selectors.EVENT_READ, link)
        age, phase, before = 0.0, self._phase, time.monotonic()
        while not self._stopping:
            self._receive()
            # If this process itself was stopped (Ctrl-Z, a suspended machine), no rank is at fault.
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
        """Wait up to an interval for messages of any peer, and process them."""
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
        """Send the peers this rank's state when it changes, and every interval. (Not whenever they write: two ranks would
        answer each other without end.)"""
        state, now = (self._phase, self._own_failure), time.monotonic()
        if state == self._told_state and now - self._told_at < self._interval:
            return
        self._told_state, self._told_at = state, now
        failure = self._own_failure and asdict(self._own_failure)
        for link in self._links.values():
            link.send({"kind": "state", "failure": failure, **self._place(), "entered": self._entered})

    def _judge(self) -> Failure | None:
        """Return why the job must end, or None while all is well. Rank 0 decides; the others do if rank 0 cannot."""
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
        """Return the failure of the rank that has begun the fewest phases, when one hangs: all begin the same phases, and
        wait for the last rank."""
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
        """Return `failure` with the phases of the other ranks, as far as rank 0 knows them."""
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
        with contextlib.suppress(OSError):  # stderr on a full disk, or its reader gone: leave anyway
            os.write(STDERR, message)  # first: torchrun may end this process within 0.1 s
        if verdict.rank == self.rank and verdict.code != EXIT_LOST:
            self._told.set()  # the main thread continues and prints its traceback
            return
        self._dump_stacks(message, to_stderr=verdict.code == EXIT_LOST)
        for child in multiprocessing.active_children():  # os._exit would leave them running
            child.kill()
        if self.rank == 0:
            time.sleep(0.5)  # let the verdict reach the others before the connections close
        os._exit(verdict.code)

    def _dump_stacks(self, message: bytes, to_stderr: bool) -> None:
        if to_stderr:
            faulthandler.dump_traceback(STDERR)
        with contextlib.suppress(OSError):  # a full disk, perhaps the cause: this rank must leave anyway
            self._stacks_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._stacks_path, "ab", buffering=0) as file:  # append: earlier attempts are evidence
                file.write(time.strftime("%Y-%m-%d %H:%M:%S ").encode() + message)
                faulthandler.dump_traceback(file)


def _describe(rank: int, place: dict[str, Any], what: str) -> str:
    phase = Phase(*place["phase"])
    return f'rank {rank} (host {place["host"]}, pid {place["pid"]}) {what} in phase "{phase.name}" at step {phase.step}'
