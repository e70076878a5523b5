"""Tests of where processes listen. tests/training/test_runs.py checks whole runs."""

import os
import socket
import threading

import psutil
import pytest
import torch.distributed as dist

from frpo_nemo.processes import addresses, world
from frpo_nemo.processes.heartbeat import accept_ranks, connect_to_rank_0

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VARIABLES += ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_NODES")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def several_nodes(environment) -> str:
    """Return the variables of a world over two nodes, of which this machine is the first; its address."""
    found = [a.address for entries in psutil.net_if_addrs().values() for a in entries if a.family == socket.AF_INET]
    real = [address for address in found if not address.startswith("127.")]
    if not real:
        pytest.skip("this machine has no network interface but loopback")
    for name, value in dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR=real[0], MASTER_PORT="0").items():
        environment.setenv(name, value)
    return real[0]


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}


def accept_and_look(environment, world_size: str) -> set[str]:
    """Return the addresses on which rank 0's watchdog waits for rank 1."""
    store, links, before = dist.HashStore(), {}, listening()
    waiting = threading.Thread(target=lambda: links.update(accept_ranks(store, "key", 2, timeout=30)))
    waiting.start()
    store.wait(["key"])
    new = {address for address, _ in listening() - before}
    link = connect_to_rank_0(store, "key", 1, timeout=30)
    waiting.join()
    for end in (link, links[1]):
        end.socket.close()
    return new


def test_the_watchdog_listens_on_loopback_in_a_world_on_one_node(environment):
    assert accept_and_look(environment, "1") == {"127.0.0.1"}


def test_the_watchdog_listens_on_one_address_in_a_world_over_several_nodes(environment, several_nodes):
    assert accept_and_look(environment, "2") == {several_nodes}


def test_the_store_listens_on_one_address_in_a_world_over_several_nodes(several_nodes):
    """Make the store as rank 0 of srun does; rank 1 reaches it there."""
    before, made, timeout = listening(), [], world.datetime.timedelta(seconds=30)
    with socket.socket() as probe:
        probe.bind((several_nodes, 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    rank_0 = threading.Thread(target=lambda: made.append(world._own_store(0, 2, timeout)))
    rank_0.start()
    made.append(world._own_store(1, 2, timeout))
    rank_0.join()
    assert {address for address, _ in listening() - before} == {several_nodes}
    made[0].set("a", "b")
    assert made[1].get("a") == b"b"


@pytest.mark.parametrize(
    "variables, expected",
    [
        (dict(), True),  # plain python
        (dict(WORLD_SIZE="8", LOCAL_WORLD_SIZE="8", MASTER_ADDR="node7"), True),  # torchrun
        (dict(WORLD_SIZE="16", LOCAL_WORLD_SIZE="8", MASTER_ADDR="node7"), False),
        (dict(WORLD_SIZE="8", SLURM_STEP_NUM_NODES="1", MASTER_ADDR="node7"), True),  # srun
        (dict(WORLD_SIZE="16", SLURM_STEP_NUM_NODES="2", MASTER_ADDR="node7"), False),
        # torchrun in steps of one node each
        (dict(WORLD_SIZE="16", SLURM_STEP_NUM_NODES="1", TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="8"), False),
        (dict(WORLD_SIZE="2", MASTER_ADDR="localhost"), True),
        (dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"), True),
    ],
)
def test_launchers_say_whether_a_world_is_on_one_node(environment, variables, expected):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert addresses.on_one_node() == expected


def test_an_address_that_others_cannot_reach_is_not_chosen(environment):
    """The rendezvous host's name means nothing yet, or loopback, as in some /etc/hosts."""
    for name, value in dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR="node7.invalid").items():
        environment.setenv(name, value)
    assert addresses.own_address() is None
    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))]
    environment.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    assert addresses.own_address() is None


def test_a_rank_that_does_not_come_to_the_rendezvous_ends_the_others(environment):
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_PORT="0").items():
        environment.setenv(name, value)
    for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR"):
        environment.setenv(name, os.environ.get(name, ""))  # start_world sets them, the fixture sets them back
    environment.setattr(world, "RENDEZVOUS_TIMEOUT", world.datetime.timedelta(seconds=1))
    with pytest.raises((dist.DistStoreError, dist.DistNetworkError)):
        world.start_world()


def test_the_interface_of_an_address_is_found():
    assert addresses.interface_of("127.0.0.1") in psutil.net_if_addrs()
    assert addresses.interface_of("203.0.113.77") is None
