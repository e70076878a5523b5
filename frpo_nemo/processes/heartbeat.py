"""Connect rank 0 and every other rank for the watchdog: JSON objects over TCP, no pickle."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from datetime import timedelta
from typing import Any

from frpo_nemo.processes import addresses


class Link:
    """A connection to `rank` that carries JSON objects, one per line, and the last state received from that rank."""

    def __init__(self, rank: int, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(1.0)
        self.rank, self.socket = rank, connection
        self.state: dict[str, Any] = {"host": "unknown", "pid": 0, "phase": ("start", 0), "entered": 0}
        self.silence = 0.0  # seconds since the last message
        self.closed = False  # by the peer
        self._buffer = b""

    def send(self, message: dict[str, Any]) -> None:
        # A closed connection shows when reading, after any buffered messages.
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages received; sets `closed` when no more can come."""
        try:
            data = self.socket.recv(65536)
        except OSError:  # reset by the peer
            data = b""
        self.closed, self.silence = not data, 0.0
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def finish(self) -> None:
        """Close once the peer has read everything: closing at once could overtake the last message."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                pass
        self.socket.close()


def accept_ranks(store, key: str, world_size: int, timeout: float) -> dict[int, Link]:
    """Publish an address under `key`, and wait for a connection of every other rank. Rank 0 calls this."""
    deadline = time.monotonic() + timeout
    token = secrets.token_hex(16)  # a program that finds the port without the token is rejected
    links: dict[int, Link] = {}
    own = addresses.own_address()
    with addresses.listen(own, 0, world_size) if own else _listen_everywhere(world_size) as server:
        hosts = [own] if own else [os.environ["MASTER_ADDR"], socket.gethostname()]
        store.set(key, json.dumps({"hosts": hosts, "port": server.getsockname()[1], "token": token}))
        while len(links) < world_size - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = rank_list(sorted(set(range(1, world_size)) - set(links)))
                raise TimeoutError(f"watchdog: {missing} did not connect within {timeout:g} s") from None
            connection.settimeout(5.0)
            given, _, rank = _read_line(connection).partition(" ")
            if given == token:
                links[int(rank)] = Link(int(rank), connection)
                connection.sendall(token.encode() + b"\n")
            else:
                connection.close()
    return links


def connect_to_rank_0(store, key: str, rank: int, timeout: float) -> Link:
    """Connect to the address that rank 0 published under `key`. Every other rank calls this."""
    store.wait([key], timedelta(seconds=timeout))
    published = json.loads(store.get(key))
    token, problems = published["token"], []
    for host in published["hosts"]:
        try:
            connection = socket.create_connection((host, published["port"]), timeout=5.0)
            connection.sendall(f"{token} {rank}\n".encode())
            if _read_line(connection) == token:
                return Link(0, connection)
            problems.append(f"{host}: another program answered")
        except OSError as error:
            problems.append(f"{host}: {error}")
    raise TimeoutError(
        f"watchdog: rank {rank} on {socket.gethostname()} cannot reach rank 0 at port {published['port']} "
        f"({'; '.join(problems)}); nodes of one job must be able to open TCP connections to each other"
    )


def _listen_everywhere(backlog: int) -> socket.socket:
    """Listen on all addresses, on a host that does not know the address by which others reach it."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=dual)


def _read_line(connection: socket.socket) -> str:
    """Read one short line; "" when the peer sends nothing valid."""
    # unbuffered: bytes after the line stay in the socket
    with contextlib.suppress(OSError), connection.makefile("rb", buffering=0) as file:
        return file.readline(256).decode(errors="replace").strip()
    return ""


def rank_list(ranks: list[int]) -> str:
    """Return ranks as text: [3] -> "rank 3", [0, 1, 2, 5] -> "ranks 0-2,5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ",".join("-".join(map(str, run)) for run in runs)
