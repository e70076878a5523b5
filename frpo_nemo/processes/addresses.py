"""Choose the address on which processes of a run listen: loopback if all are on one node, else the address of the interface
that reaches the rendezvous host. Imports neither torch nor anything of ours."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket

import psutil

LOOPBACK = "127.0.0.1"


def on_one_node() -> bool:
    """Return whether all ranks are on this machine, by the variables of torchrun or srun, or by the rendezvous host."""
    env = os.environ
    world_size = env.get("WORLD_SIZE", "1")
    if world_size == "1" or env.get("LOCAL_WORLD_SIZE") == world_size:
        return True
    if "TORCHELASTIC_RUN_ID" not in env and env.get("SLURM_STEP_NUM_NODES") == "1":
        return True
    host = env.get("MASTER_ADDR", "")
    return host == "localhost" or _is_loopback(host)


def own_address() -> str | None:
    """Return the address to listen on. None if it is unknown: the rendezvous host has no address yet, or its name means
    loopback on that host itself, as in some /etc/hosts."""
    if on_one_node():
        return LOOPBACK
    with contextlib.suppress(OSError):
        family, *_, target = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: looks up this end of the route
            address = probe.getsockname()[0]
            return None if _is_loopback(address) else address
    return None


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has `address`."""
    found = psutil.net_if_addrs().items()
    return next((name for name, entries in found if any(e.address == address for e in entries)), None)


def listen(address: str, port: int, backlog: int) -> socket.socket:
    """Return a socket that listens only on `address`. port: 0 for any free one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=backlog)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):  # a name
        return ipaddress.ip_address(host).is_loopback
    return False
