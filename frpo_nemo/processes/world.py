"""Start the world of processes, one per GPU (per rank on a CPU), under torchrun, srun or plain python, and offer the few
collectives over all of them that other modules use."""

from __future__ import annotations

import datetime
import os
import re
import subprocess

import torch
import torch.distributed as dist

from frpo_nemo.processes import addresses
from frpo_nemo.processes.launcher import srun_task

RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=15)  # the watchdog has not started yet
GROUP_TIMEOUT = datetime.timedelta(hours=2)  # for hangs that look like work to the watchdog


def read_world() -> tuple[int, int]:
    """Return (rank, world size) from torchrun or srun, or (0, 1). Completes the rendezvous variables in the environment,
    which torch.distributed and vLLM's external launcher read."""
    env = os.environ
    if "RANK" not in env and (task := srun_task()):
        env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"] = map(str, task)
        env.setdefault("MASTER_ADDR", _first_slurm_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 10000))
    if "RANK" not in env:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "0")  # any free one, known when start_world listens
    return int(env["RANK"]), int(env["WORLD_SIZE"])


def start_world() -> tuple[int, int]:
    """Initialise torch.distributed: NCCL with CUDA (gloo for CPU tensors), gloo without. Returns (rank, world size).
    Raises torch's DistStoreError or DistNetworkError when a rank does not connect within RENDEZVOUS_TIMEOUT."""
    rank, world_size = read_world()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _listen_where_needed()
    store = _own_store(rank, world_size, RENDEZVOUS_TIMEOUT)
    if store is None:
        store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=RENDEZVOUS_TIMEOUT))
    if store.add("frpo_nemo/came", 1) == world_size:
        store.set("frpo_nemo/all_came", "")
    store.wait(["frpo_nemo/all_came"], RENDEZVOUS_TIMEOUT)
    store.set_timeout(GROUP_TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    return rank, world_size


def device() -> torch.device:
    """Return the device on which this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """Return this process's rank in the default process group."""
    return dist.get_rank()


def wait_for_all() -> None:
    """Return when every rank has called this."""
    dist.barrier()


def gather_objects(value) -> list:
    """Return every rank's picklable `value`, in rank order, on every rank."""
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def _listen_where_needed() -> None:
    """Give libraries that would choose an address by themselves the run's address; variables that the user set stay."""
    address = addresses.own_address()
    if address is None:
        return
    os.environ.setdefault("VLLM_HOST_IP", address)
    interface = addresses.interface_of(address)
    if interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if interface and addresses.on_one_node():  # between nodes, NCCL finds the fastest interface itself
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def _own_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store | None:
    """Return the store of the rendezvous: a TCPStore of rank 0 on one address. torch's own would listen on all addresses.
    None under torchrun, whose agent has one already."""
    if world_size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if addresses.on_one_node():
        os.environ["MASTER_ADDR"] = addresses.LOOPBACK
    host, port, address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), addresses.own_address()
    if rank > 0 or address is None:
        return dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout)
    # A single process uses a port that the system chooses: another run could take a port that was only found free.
    listener = addresses.listen(address, port if world_size > 1 else 0, backlog=max(128, world_size))
    port = listener.getsockname()[1]
    os.environ["MASTER_PORT"] = str(port)
    return dist.TCPStore(address, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach())


def _first_slurm_host(nodelist: str) -> str:
    """Return the first host: `node[003-010,12]` -> `node003`. scontrol knows every form; without it a pattern is used."""
    try:
        return subprocess.check_output(["scontrol", "show", "hostnames", nodelist], text=True).split()[0]
    except FileNotFoundError:
        name, bracket = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?", nodelist).groups()
        return name + (re.split("[-,]", bracket)[0] if bracket else "")
